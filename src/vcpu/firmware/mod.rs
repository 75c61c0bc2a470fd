//! What stands in for firmware and hardware that KVM does not offer a guest, so that guests which were written for others run:
//! the SBI of version 0.1, CSRs of machine mode, and a timer that user space drives.
//!
//! | file | what is in it |
//! |---|---|
//! | `shim.rs` | the page that turns a trap of a guest without a trap vector into an exit |
//! | `sites.rs` | which of a guest's `ecall`s may be calls that nobody answers |
//! | `patches.rs` | the breakpoints in their place, and what each turns out to be |
//! | `calls.rs` | SBI calls that come out that way: answered here, or made to the kernel in the guest's name |
//! | `csrs.rs` | CSRs of machine mode that read as the user says |
//! | `timer.rs` | the timer of `--timer user` |
//!
//! Everything in here begins with a breakpoint: with guest debugging on, each `ebreak` of the guest comes out
//! ([`Hart::trap_ebreaks`]). One in the shim is a trap that the guest cannot take itself, a patch is an SBI call or is taken away, and
//! all others are the guest's own.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hart::{Csr, Hart, Reg};
use super::stop::StopReason;
use super::trap;
use super::world::World;
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

/// What of it a machine has.
pub struct Firmware {
    /// The breakpoints in place of `ecall`s.
    patches: Patches,
    /// The CSRs of machine mode that there are.
    csrs: Vec<CsrValue>,
    /// The timer, where user space drives it.
    timer: Option<Arc<UserTimer>>,
    written: Mutex<Vec<(u32, CsrValue)>>,
    shim_calls: Mutex<Vec<(u32, ShimCall)>>,
}

/// What became of a breakpoint.
pub(super) enum TrapResult {
    /// It was answered, or is to be met once more: the hart goes on.
    Done,
    /// The machine stops.
    Stop(StopReason),
    /// It is none of the firmware's.
    Strange,
}

impl Firmware {
    /// Firmware with these patches and CSRs of machine mode, and the timer where user space drives it.
    #[must_use]
    pub fn new(patches: Patches, csrs: Vec<CsrValue>, timer: Option<Arc<UserTimer>>) -> Self {
        Self { patches, csrs, timer, written: Mutex::default(), shim_calls: Mutex::default() }
    }

    /// Answers the breakpoint at `pc`.
    pub(super) fn breakpoint(
        &self,
        hart: &mut dyn Hart,
        world: &World,
        pc: u64,
    ) -> io::Result<TrapResult> {
        if pc == shim::VECTOR && hart.get(Reg::Csr(Csr::Stvec))? == shim::VECTOR {
            return self.vectorless(hart, world);
        }
        if matches!(pc, shim::RETURN | shim::CLEARED) && self.is_on_errand(hart.id()) {
            return self.finish(hart);
        }
        match self.patches.meet(hart, &world.ram, pc)? {
            PatchHit::Call => self.call(hart, world, pc.wrapping_add(shim::ECALL_LEN)),
            PatchHit::UserCall => {
                trap::raise_call_from_user(hart)?;
                Ok(TrapResult::Done)
            }
            PatchHit::Restored => Ok(TrapResult::Done),
            PatchHit::Strange => Ok(TrapResult::Strange),
        }
    }

    /// Does what has become due since the hart was kicked.
    pub(super) fn attend(&self, hart: &mut dyn Hart) -> io::Result<()> {
        match &self.timer {
            Some(timer) if !self.is_on_errand(hart.id()) => timer.fire(hart),
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
