//! Harts that go on, step, and stand still again.

use std::sync::Arc;

use log::warn;

use super::context::{DebugContext, StopCause};
use super::debuggee::{Debuggee, MachineGone, ResumePlan, Stop};
use super::step::{Frame, Next, next};
use crate::vcpu::hart::{Csr, Hart, Reg};

/// `wfi` has four bytes.
const WFI: u64 = 4;

/// What a prepared step allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prepared {
    /// The hart may run, and others as well.
    Ready,
    /// The hart may run, but no other: a breakpoint is removed for it.
    Alone,
    /// The step is done already; the hart must not run.
    Done,
}

impl Debuggee {
    /// Begins what [`Debuggee::plan`] says.
    ///
    /// # Errors
    /// The machine ends.
    pub(super) fn go(&mut self) -> Result<(), MachineGone> {
        self.is_running = true;
        self.are_over.clear();
        self.advance()
    }

    /// Lets the harts run, after steps of those that stand on a breakpoint which the debugger does not know to be there: it takes its
    /// own away before it has a hart go on from one, but not one that it knows by another address.
    fn advance(&mut self) -> Result<(), MachineGone> {
        if let Some(hart) = self.on_an_alias() {
            self.over = Some(hart);
            self.are_over.push(hart);
            return match self.step(hart)? {
                Prepared::Done => Ok(()),
                _ => self.release(Some(&[hart])),
            };
        }
        let ResumePlan { steps, mut runs, is_locked } = self.plan.clone();
        let mut is_alone = false;
        for hart in &steps {
            match self.step(*hart)? {
                Prepared::Done => return Ok(()),
                prepared => is_alone |= prepared == Prepared::Alone,
            }
        }
        runs.extend(&steps);
        match (is_alone, is_locked) {
            (true, _) => self.release(Some(&steps)),
            (false, true) => self.release(Some(&runs)),
            (false, false) => self.release(None),
        }
    }

    fn on_an_alias(&self) -> Option<u32> {
        let context = self.context.as_ref().filter(|context| !context.is_empty())?;
        let waits = |hart: &u32| self.plan.steps.contains(hart) || self.are_over.contains(hart);
        self.harts().into_iter().filter(|hart| !waits(hart)).find(|hart| {
            let place = |hart: &mut dyn Hart| {
                Some((hart.get(Reg::Pc).ok()?, hart.get(Reg::Csr(Csr::Satp)).ok()?))
            };
            let place = self.on(*hart, place).ok().flatten();
            let addr = place.and_then(|(pc, satp)| Some((pc, self.lookup(satp, pc, 2)?)));
            addr.is_some_and(|(pc, addr)| context.is_alias(pc, addr))
        })
    }

    /// Prepares one step of `hart`.
    fn step(&mut self, hart: u32) -> Result<Prepared, MachineGone> {
        let context = Arc::clone(self.context.as_ref().ok_or(MachineGone)?);
        let frame = self.on(hart, |hart| Frame::of(hart))?.map_err(|_| MachineGone)?;
        let here = self.lookup(frame.satp, frame.pc, 2);
        let fetch = |va| {
            let mut half = [0; 2];
            let addr = self.lookup(frame.satp, va, 2)?;
            context.read(addr, &mut half).ok().map(|()| u16::from_le_bytes(half))
        };
        let next = next(&frame, &fetch);
        if next.as_ref().is_some_and(|next| next.is_wait) {
            let after = frame.pc.wrapping_add(WFI);
            let _ = self.on(hart, move |hart| hart.set(Reg::Pc, after))?;
            context.report_stop(hart, StopCause::Step);
            return Ok(Prepared::Done);
        }
        let is_alone = here.is_some_and(|addr| context.remove_for_step(addr));
        self.aim(&context, hart, &frame, next)?;
        Ok(if is_alone { Prepared::Alone } else { Prepared::Ready })
    }

    /// Plants the ends of a step, and has interrupts wait for it where they can.
    fn aim(
        &mut self,
        context: &DebugContext,
        hart: u32,
        frame: &Frame,
        next: Option<Next>,
    ) -> Result<(), MachineGone> {
        let vector = [frame.stvec & !3];
        let satp = next.as_ref().and_then(|next| next.satp);
        let places = next.as_ref().map(|next| next.places.as_slice()).unwrap_or_default();
        let insert = |va: &u64| {
            let satps = [Some(frame.satp), satp];
            let addrs = satps.into_iter().flatten().filter_map(|satp| self.lookup(satp, *va, 2));
            addrs.filter(|addr| context.step_to(*addr, hart)).count() > 0
        };
        let is_caught = places.iter().filter(|va| insert(va)).count() > 0;
        vector.iter().for_each(|va| _ = insert(va));
        let may_wait = next.is_some_and(|next| !next.needs_interrupts);
        if is_caught && may_wait && frame.sie != 0 {
            let _ = self.on(hart, |hart| hart.set(Reg::Csr(Csr::Sie), 0))?;
            self.masked.push((hart, frame.sie));
        }
        Ok(())
    }

    fn release(&self, only: Option<&[u32]>) -> Result<(), MachineGone> {
        self.sync_code()?;
        self.context.as_ref().ok_or(MachineGone)?.control.release(only);
        Ok(())
    }

    pub(super) fn sync_code(&self) -> Result<(), MachineGone> {
        // Harts would run what was there before: not to be hidden.
        self.context.as_ref().ok_or(MachineGone)?.sync_code().map_err(|error| {
            warn!("Cannot make breakpoints visible to the harts: {error}");
            MachineGone
        })
    }

    pub(super) fn end_steps(&mut self) {
        for (hart, sie) in std::mem::take(&mut self.masked) {
            let _ = self.on(hart, move |hart| hart.set(Reg::Csr(Csr::Sie), sie));
        }
        if let Some(context) = &self.context {
            context.end_steps();
        }
    }

    /// Looks who came to a breakpoint. Nothing where nobody did, or that was only on the way to what the debugger wants.
    ///
    /// # Errors
    /// The machine ends.
    pub(super) fn settle(&mut self) -> Result<Option<Stop>, MachineGone> {
        let context = Arc::clone(self.context.as_ref().ok_or(MachineGone)?);
        let Some((hart, how)) = context.take_stop().filter(|_| self.is_running) else {
            return Ok(None);
        };
        let _ = self.halt(&context)?;
        if self.over.take() == Some(hart) && how == StopCause::Step {
            return self.advance().map(|()| None);
        }
        Ok(Some(self.stopped(hart, how)))
    }

    /// Has all harts stand still because the debugger asked.
    ///
    /// # Errors
    /// The machine ends.
    pub(super) fn interrupt(&mut self) -> Result<Stop, MachineGone> {
        let context = Arc::clone(self.context.as_ref().ok_or(MachineGone)?);
        let came = self.halt(&context)?;
        self.over = None;
        self.is_running = false;
        Ok(came.map_or(Stop::Interrupt(self.current), |(hart, how)| self.stopped(hart, how)))
    }

    /// Has all harts stand still, and says who came to a breakpoint meanwhile.
    fn halt(&mut self, context: &DebugContext) -> Result<Option<(u32, StopCause)>, MachineGone> {
        context.control.hold();
        if !context.control.await_held() {
            return Err(MachineGone);
        }
        self.end_steps();
        Ok(context.take_stop())
    }

    fn stopped(&mut self, hart: u32, how: StopCause) -> Stop {
        self.is_running = false;
        self.current = hart;
        match how {
            StopCause::Breakpoint => Stop::Breakpoint(hart),
            StopCause::Step | StopCause::Alias => Stop::Trap(hart),
        }
    }

    /// A new life has been taken hold of: the stop that tells the debugger.
    pub(super) fn reborn(&mut self) -> Stop {
        self.is_running = false;
        Stop::Trap(self.current)
    }
}
