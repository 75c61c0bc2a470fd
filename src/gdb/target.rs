//! gdbstub's traits for [`Debuggee`]. A thread is a hart: thread N + 1 is hart N, in HSM's stopped state too.
//!
//! While harts run, every request fails with an error and none waits for a hart.

use std::num::NonZeroUsize;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::debuggee::{Debuggee, MachineGone, ResumePlan};
use super::registers::{CoreRegisters, Number, Rv64};
use crate::vcpu::hart::Reg;

/// EFAULT, "Bad address" (errno(3)).
const BAD_ADDRESS: u8 = 14;
/// ESRCH, "No such process".
const NO_SUCH_THREAD: u8 = 3;

/// The thread id of a hart.
pub(super) fn thread(hart: u32) -> Tid {
    NonZeroUsize::MIN.saturating_add(hart as usize)
}

fn hart(thread: Tid) -> Option<u32> {
    u32::try_from(thread.get() - 1).ok()
}

impl Debuggee {
    /// The hart of a thread, if all are stopped.
    fn stopped_hart(&self, thread: Tid) -> TargetResult<u32, Self> {
        let known = hart(thread).filter(|hart| !self.is_running() && self.harts().contains(hart));
        known.ok_or(TargetError::Errno(NO_SUCH_THREAD))
    }
}

impl Target for Debuggee {
    type Arch = Rv64;
    type Error = MachineGone;

    fn base_ops(&mut self) -> BaseOps<'_, Rv64, MachineGone> {
        BaseOps::MultiThread(self)
    }

    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut CoreRegisters, tid: Tid) -> TargetResult<(), Self> {
        let read = self.on(self.stopped_hart(tid)?, |hart| {
            let mut core = CoreRegisters { pc: hart.get(Reg::Pc)?, ..CoreRegisters::default() };
            for (number, x) in (0..).zip(&mut core.x) {
                *x = hart.get(Reg::X(number))?;
            }
            std::io::Result::Ok(core)
        });
        *regs = read.map_err(|MachineGone| TargetError::NonFatal)??;
        Ok(())
    }

    fn write_registers(&mut self, regs: &CoreRegisters, tid: Tid) -> TargetResult<(), Self> {
        let core = regs.clone();
        let written = self.on(self.stopped_hart(tid)?, move |hart| {
            for (number, x) in (0..).zip(core.x) {
                hart.set(Reg::X(number), x)?;
            }
            hart.set(Reg::Pc, core.pc)
        });
        Ok(written.map_err(|MachineGone| TargetError::NonFatal)??)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let hart = self.stopped_hart(tid)?;
        self.read(hart, start, data).ok_or(TargetError::Errno(BAD_ADDRESS))
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let hart = self.stopped_hart(tid)?;
        self.write(hart, start, data).ok_or(TargetError::Errno(BAD_ADDRESS))
    }

    fn list_active_threads(&mut self, is_active: &mut dyn FnMut(Tid)) -> Result<(), MachineGone> {
        self.harts().into_iter().map(thread).for_each(is_active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(&mut self, tid: Tid, id: Number, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let Number { reg, part } = id;
        let value = self.on(self.stopped_hart(tid)?, move |hart| hart.get(reg));
        let value = part.of(value.map_err(|MachineGone| TargetError::NonFatal)??).to_le_bytes();
        let value = value.get(..part.size).ok_or(TargetError::NonFatal)?;
        buf.get_mut(..part.size).ok_or(TargetError::NonFatal)?.copy_from_slice(value);
        Ok(part.size)
    }

    fn write_register(&mut self, tid: Tid, id: Number, val: &[u8]) -> TargetResult<(), Self> {
        let Number { reg, part } = id;
        let mut bytes = [0; 8];
        if val.len() != part.size {
            return Err(TargetError::NonFatal);
        }
        bytes.get_mut(..part.size).ok_or(TargetError::NonFatal)?.copy_from_slice(val);
        let value = u64::from_le_bytes(bytes);
        let written = self.on(self.stopped_hart(tid)?, move |hart| {
            let whole = hart.get(reg)?;
            hart.set(reg, part.put(whole, value))
        });
        Ok(written.map_err(|MachineGone| TargetError::NonFatal)??)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), MachineGone> {
        // A second resume before the stop changes nothing.
        if self.is_running() { Ok(()) } else { self.run_plan() }
    }

    fn clear_resume_actions(&mut self) -> Result<(), MachineGone> {
        if !self.is_running() {
            self.plan = ResumePlan::default();
        }
        Ok(())
    }

    /// Signals are for processes; a hart takes none.
    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _: Option<Signal>,
    ) -> Result<(), MachineGone> {
        if let Ok(hart) = self.stopped_hart(tid) {
            self.plan.runs.push(hart);
        }
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), MachineGone> {
        if let Ok(hart) = self.stopped_hart(tid)
            && !self.plan.steps.contains(&hart)
        {
            self.plan.steps.push(hart);
        }
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), MachineGone> {
        if !self.is_running() {
            self.plan.is_locked = true;
        }
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        if self.is_running() {
            return Err(TargetError::NonFatal);
        }
        self.set_breakpoint(addr).map(|()| true).ok_or(TargetError::Errno(BAD_ADDRESS))
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        if self.is_running() {
            return Err(TargetError::NonFatal);
        }
        self.unset_breakpoint(addr);
        Ok(true)
    }
}

impl TargetDescriptionXmlOverride for Debuggee {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::NonFatal);
        }
        let rest =
            usize::try_from(offset).ok().and_then(|at| self.description().as_bytes().get(at..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(length).min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..len), rest.get(..len)) {
            to.copy_from_slice(from);
        }
        Ok(len)
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, MachineGone> {
        let text = hart(tid).map(|hart| format!("hart {hart}")).unwrap_or_default();
        let text = text.as_bytes();
        match buf.get_mut(..text.len()) {
            Some(room) => room.copy_from_slice(text),
            None => return Ok(0),
        }
        Ok(text.len())
    }
}
