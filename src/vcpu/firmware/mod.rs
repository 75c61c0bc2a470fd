//! Emulation of firmware and hardware that KVM does not offer, for guests that were written for other platforms: SBI 0.1, CSRs of
//! machine mode, and a timer driven by user space.
//!
//! | file | what is in it |
//! |---|---|
//! | `shim.rs` | the page that turns a trap of a guest without a trap vector into an exit |
//! | `sites.rs` | finds `ecall`s of a guest that may be SBI calls which the kernel does not handle |
//! | `patches.rs` | the breakpoints in their place, and the classification of each when it is hit |
//! | `calls.rs` | SBI calls that exit that way: handled here, or forwarded to the kernel |
//! | `csrs.rs` | CSRs of machine mode with values from the user |
//! | `timer.rs` | the timer of `--timer user` |
//!
//! Everything here begins with a breakpoint: with guest debugging on, each `ebreak` of the guest exits to user space
//! ([`Hart::trap_ebreaks`]). One in the shim is a trap that the guest cannot take itself, a patch is an SBI call or is removed, and
//! all others are the guest's own.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::context::MachineContext;
use super::hart::{Csr, Hart, Reg};
use super::stop::StopReason;
use super::trap;
use crate::config::CsrValue;

mod calls;
mod csrs;
pub mod patches;
pub mod shim;
pub mod sites;
pub mod timer;

use calls::ShimCall;
use patches::{PatchHit, Patches};
use timer::UserTimer;

/// The emulated firmware of a machine.
pub struct Firmware {
    /// The breakpoints in place of `ecall`s.
    patches: Patches,
    /// The CSRs of machine mode, with their initial values.
    csrs: Vec<CsrValue>,
    /// The timer, if user space drives it.
    timer: Option<Arc<UserTimer>>,
    written: Mutex<Vec<(u32, CsrValue)>>,
    shim_calls: Mutex<Vec<(u32, ShimCall)>>,
}

/// The result of handling a breakpoint.
pub(super) enum BreakpointOutcome {
    /// It was handled, or is to be hit once more: the hart continues.
    Done,
    /// The machine stops.
    Stop(StopReason),
    /// It is none of the firmware's.
    NotFirmware,
}

impl Firmware {
    /// Creates firmware with these patches and CSRs of machine mode, and the timer if user space drives it.
    #[must_use]
    pub fn new(patches: Patches, csrs: Vec<CsrValue>, timer: Option<Arc<UserTimer>>) -> Self {
        Self { patches, csrs, timer, written: Mutex::default(), shim_calls: Mutex::default() }
    }

    /// Handles the breakpoint at `pc`.
    pub(super) fn breakpoint(
        &self,
        hart: &mut dyn Hart,
        context: &MachineContext,
        pc: u64,
    ) -> io::Result<BreakpointOutcome> {
        if pc == shim::VECTOR && hart.get(Reg::Csr(Csr::Stvec))? == shim::VECTOR {
            return self.vectorless(hart, context);
        }
        if matches!(pc, shim::RETURN | shim::CLEARED) && self.has_shim_call(hart.id()) {
            return self.finish(hart);
        }
        match self.patches.classify(hart, &context.ram, pc)? {
            PatchHit::Call => self.call(hart, context, pc.wrapping_add(shim::ECALL_LEN)),
            PatchHit::UserCall => {
                trap::raise_call_from_user(hart)?;
                Ok(BreakpointOutcome::Done)
            }
            PatchHit::Restored => Ok(BreakpointOutcome::Done),
            PatchHit::NotAPatch => Ok(BreakpointOutcome::NotFirmware),
        }
    }

    /// Raises the timer interrupt, if the hart was kicked for it.
    pub(super) fn handle_kick(&self, hart: &mut dyn Hart) -> io::Result<()> {
        match &self.timer {
            Some(timer) if !self.has_shim_call(hart.id()) => timer.fire(hart),
            _ => Ok(()),
        }
    }

    fn shim_calls(&self) -> MutexGuard<'_, Vec<(u32, ShimCall)>> {
        self.shim_calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> MutexGuard<'_, Vec<(u32, CsrValue)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
