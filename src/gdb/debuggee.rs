//! The guest under a debugger: attach, detach, and access to stopped harts.

use std::fmt;
use std::sync::Arc;

use log::info;

use super::context::DebugContext;
use super::registers::{description, optional};
use crate::vcpu::hart::Hart;

/// The machine has ended, or is between two runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MachineGone;

impl fmt::Display for MachineGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The machine has ended")
    }
}

/// The reason for which all harts are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// A hart hit a breakpoint.
    Breakpoint(u32),
    /// A hart has done its step, or stopped for a reason that the protocol has no name for.
    Trap(u32),
    /// The debugger sent an interrupt.
    Interrupt(u32),
}

/// The actions of a debugger's resume request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ResumePlan {
    /// Harts that do one step.
    pub(super) steps: Vec<u32>,
    /// Harts that continue; unless `is_locked` is set, all others do as well.
    pub(super) runs: Vec<u32>,
    /// True if all others stay stopped.
    pub(super) is_locked: bool,
}

/// The guest under a debugger.
#[derive(Default)]
pub(super) struct Debuggee {
    /// The current run; `None` between two.
    pub(super) context: Option<Arc<DebugContext>>,
    pub(super) is_running: bool,
    /// The hart of the last stop, whose page tables are tried first.
    pub(super) current: u32,
    pub(super) plan: ResumePlan,
    /// A hart that is stepped over an alias of a breakpoint before the plan begins.
    pub(super) stepping_over: Option<u32>,
    /// Harts for which that is done.
    pub(super) stepped_over: Vec<u32>,
    /// The original `sie` of harts that step.
    pub(super) masked: Vec<(u32, u64)>,
    description: String,
}

impl Debuggee {
    /// Attaches to a run: when this returns, all harts are stopped and their `ebreak`s exit to user space.
    ///
    /// # Errors
    /// The machine ends, or the host's kernel has no guest debugging.
    pub(super) fn attach(&mut self, context: &Arc<DebugContext>) -> Result<(), MachineGone> {
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
                self.detach();
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

    /// Drops the context of a run that is over.
    pub(super) fn run_ended(&mut self) {
        self.context = None;
    }

    /// Detaches: removes every change made to the guest and lets it run.
    pub(super) fn detach(&mut self) {
        let Some(context) = self.context.take() else { return };
        context.control.hold();
        if !context.control.await_held() {
            return;
        }
        self.context = Some(Arc::clone(&context));
        self.end_steps();
        context.clear();
        let _ = self.sync_code();
        for hart in context.control.harts().into_iter().filter(|_| !context.keeps_ebreak_exits) {
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

    /// Runs a task of a stopped hart on the hart's own thread.
    ///
    /// # Errors
    /// There is no such hart, or the machine has ended.
    pub(super) fn on<R: Send + 'static>(
        &self,
        hart: u32,
        task: impl FnOnce(&mut dyn Hart) -> R + Send + 'static,
    ) -> Result<R, MachineGone> {
        self.context
            .as_ref()
            .and_then(|context| context.control.run_on(hart, task))
            .ok_or(MachineGone)
    }

    pub(super) fn first_hart(&self) -> Result<u32, MachineGone> {
        self.harts().first().copied().ok_or(MachineGone)
    }
}
