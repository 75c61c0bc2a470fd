//! The guest as a debugger sees it: a life that is taken hold of and let go, and harts that are reached where they stand.

use std::fmt;
use std::sync::Arc;

use log::info;

use super::context::DebugContext;
use super::registers::{description, optional};
use crate::vcpu::hart::Hart;

/// The machine has ended, or is between two lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MachineGone;

impl fmt::Display for MachineGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The machine has ended")
    }
}

/// Why all harts stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// A hart came to a breakpoint.
    Breakpoint(u32),
    /// A hart has done its step, or stands for another reason that needs no name.
    Trap(u32),
    /// The debugger asked.
    Interrupt(u32),
}

/// What a debugger wants to happen next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ResumePlan {
    /// Harts that do one step.
    pub(super) steps: Vec<u32>,
    /// Harts that go on; where `is_locked` is not set, all others do as well.
    pub(super) runs: Vec<u32>,
    /// Whether all others stand still.
    pub(super) is_locked: bool,
}

/// The guest under a debugger.
#[derive(Default)]
pub(super) struct Debuggee {
    /// The present life; none between two.
    pub(super) context: Option<Arc<DebugContext>>,
    pub(super) is_running: bool,
    /// The hart of the last stop, whose page tables come first.
    pub(super) current: u32,
    pub(super) plan: ResumePlan,
    /// A hart that does a step of ours before the plan begins.
    pub(super) over: Option<u32>,
    /// Harts that have done it.
    pub(super) are_over: Vec<u32>,
    /// What `sie` was in harts that step.
    pub(super) masked: Vec<(u32, u64)>,
    description: String,
}

impl Debuggee {
    /// Takes hold of a life: all harts stand still when this returns, and their breakpoints come out.
    ///
    /// # Errors
    /// The machine ends, or the host's kernel has no guest debugging.
    pub(super) fn take(&mut self, context: &Arc<DebugContext>) -> Result<(), MachineGone> {
        *self = Self {
            context: Some(Arc::clone(context)),
            is_running: self.is_running,
            ..Self::default()
        };
        context.control.hold();
        if !context.control.await_held() {
            return Err(MachineGone);
        }
        for hart in context.control.harts() {
            if let Err(error) = self.on(hart, |hart| hart.trap_ebreaks(true))? {
                info!("Cannot debug hart {hart}: {error} (the host needs Linux 6.12 or newer)");
                self.let_go();
                return Err(MachineGone);
            }
        }
        let first = self.first_hart()?;
        self.current = first;
        let has = move |hart: &mut dyn Hart| optional().map(|reg| (reg, hart.get(reg).is_ok()));
        let missing = self.on(first, has)?.into_iter().filter(|(_, has)| !has);
        self.description = description(&missing.map(|(reg, _)| reg).collect::<Vec<_>>());
        Ok(())
    }

    /// The life is over.
    pub(super) fn lose(&mut self) {
        self.context = None;
    }

    /// Lets the guest go on without a debugger and without any trace of one.
    pub(super) fn let_go(&mut self) {
        let Some(context) = self.context.take() else { return };
        context.control.hold();
        if !context.control.await_held() {
            return;
        }
        self.context = Some(Arc::clone(&context));
        self.end_steps();
        context.clear();
        let _ = self.sync_code();
        for hart in context.control.harts().into_iter().filter(|_| !context.has_others) {
            let _ = self.on(hart, |hart| hart.trap_ebreaks(false));
        }
        self.context = None;
        context.control.release(None);
    }

    pub(super) fn context(&self) -> Option<&Arc<DebugContext>> {
        self.context.as_ref()
    }

    pub(super) fn description(&self) -> &str {
        &self.description
    }

    pub(super) fn is_running(&self) -> bool {
        self.is_running
    }

    pub(super) fn harts(&self) -> Vec<u32> {
        self.context.as_ref().map(|context| context.control.harts()).unwrap_or_default()
    }

    /// Has a hart that stands still do something on its own thread.
    ///
    /// # Errors
    /// There is no such hart, or it runs.
    pub(super) fn on<R: Send + 'static>(
        &self,
        hart: u32,
        errand: impl FnOnce(&mut dyn Hart) -> R + Send + 'static,
    ) -> Result<R, MachineGone> {
        self.context
            .as_ref()
            .and_then(|context| context.control.run_on(hart, errand))
            .ok_or(MachineGone)
    }

    pub(super) fn first_hart(&self) -> Result<u32, MachineGone> {
        self.harts().first().copied().ok_or(MachineGone)
    }
}
