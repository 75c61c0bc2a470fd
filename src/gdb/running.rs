//! Continue, step and stop.

use std::sync::Arc;

use log::warn;

use super::context::{DebugContext, StopCause};
use super::debuggee::{Debuggee, MachineGone, ResumePlan, Stop};
use super::step::{Frame, Next, next};
use crate::vcpu::hart::{Csr, Hart, Reg};

/// `wfi` has four bytes.
const WFI: u64 = 4;

/// The harts that may run after a step has been prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prepared {
    /// The hart and others.
    Ready,
    /// The hart only: a breakpoint has been removed for it.
    Alone,
    /// None: the step is done already.
    Done,
}

impl Debuggee {
    /// Resumes harts according to [`Debuggee::plan`].
    ///
    /// # Errors
    /// The machine ends.
    pub(super) fn run_plan(&mut self) -> Result<(), MachineGone> {
        self.is_running = true;
        self.stepped_over.clear();
        self.advance()
    }

    /// Lets the harts run, after a step of each that is at an alias of a breakpoint: a debugger removes a breakpoint before it
    /// resumes a hart from it, but not one that it set for another virtual address.
    fn advance(&mut self) -> Result<(), MachineGone> {
        if let Some(hart) = self.hart_at_alias() {
            self.stepping_over = Some(hart);
            self.stepped_over.push(hart);
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

    fn hart_at_alias(&self) -> Option<u32> {
        let context = self.context.as_ref().filter(|context| !context.is_empty())?;
        let is_exempt =
            |hart: &u32| self.plan.steps.contains(hart) || self.stepped_over.contains(hart);
        self.harts().into_iter().filter(|hart| !is_exempt(hart)).find(|hart| {
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
        if next.as_ref().is_some_and(|next| next.is_wfi) {
            let after = frame.pc.wrapping_add(WFI);
            let _ = self.on(hart, move |hart| hart.set(Reg::Pc, after))?;
            context.report_stop(hart, StopCause::Step);
            return Ok(Prepared::Done);
        }
        let is_alone = here.is_some_and(|addr| context.remove_for_step(addr));
        self.insert_targets(&context, hart, &frame, next)?;
        Ok(if is_alone { Prepared::Alone } else { Prepared::Ready })
    }

    /// Inserts the temporary breakpoints of a step, and masks interrupts unless the instruction depends on them.
    fn insert_targets(
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
        // Harts would run stale code: this must not be ignored.
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

    /// Returns the stop to report, after stopping all harts. `None` if no hart has stopped, or only at an alias that it is
    /// stepped over.
    ///
    /// # Errors
    /// The machine ends.
    pub(super) fn poll_stop(&mut self) -> Result<Option<Stop>, MachineGone> {
        let context = Arc::clone(self.context.as_ref().ok_or(MachineGone)?);
        let Some((hart, cause)) = context.take_stop().filter(|_| self.is_running) else {
            return Ok(None);
        };
        let _ = self.halt(&context)?;
        if self.stepping_over.take() == Some(hart) && cause == StopCause::Step {
            return self.advance().map(|()| None);
        }
        Ok(Some(self.stopped(hart, cause)))
    }

    /// Stops all harts at the debugger's request.
    ///
    /// # Errors
    /// The machine ends.
    pub(super) fn interrupt(&mut self) -> Result<Stop, MachineGone> {
        let context = Arc::clone(self.context.as_ref().ok_or(MachineGone)?);
        let stop = self.halt(&context)?;
        self.stepping_over = None;
        self.is_running = false;
        Ok(stop.map_or(Stop::Interrupt(self.current), |(hart, cause)| self.stopped(hart, cause)))
    }

    /// Stops all harts, and returns the stop that one of them has reported meanwhile.
    fn halt(&mut self, context: &DebugContext) -> Result<Option<(u32, StopCause)>, MachineGone> {
        context.control.hold();
        if !context.control.await_held() {
            return Err(MachineGone);
        }
        self.end_steps();
        Ok(context.take_stop())
    }

    fn stopped(&mut self, hart: u32, cause: StopCause) -> Stop {
        self.is_running = false;
        self.current = hart;
        match cause {
            StopCause::Breakpoint => Stop::Breakpoint(hart),
            StopCause::Step | StopCause::Alias => Stop::Trap(hart),
        }
    }

    /// Returns the stop that reports a reset to the debugger, which is attached to the new run.
    pub(super) fn stop_after_reset(&mut self) -> Stop {
        self.is_running = false;
        Stop::Trap(self.current)
    }
}
