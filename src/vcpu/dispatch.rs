//! Handles exits: one match, without a hart or thread.

use log::info;
use rvmm_devices::{BusView, Claim};

use super::context::MachineContext;
use super::exit::{Exit, Fault, SystemEvent};
use super::stop::StopReason;
use super::{csr, sbi};
use crate::config::Unassigned;

/// The hart's next action.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// Enter the guest; the result is in place.
    Resume,
    /// Enter the guest and run the same instruction again: there is no result yet.
    Retry,
    /// Check the control first.
    Yield,
    /// Suspend the whole system until a wake-up event (SBI SUSP).
    Suspend,
    /// Decide by the hart's registers: raise a trap in the guest, or stop the machine.
    Resolve(UnresolvedExit),
    /// Stop the machine. Boxed to keep the enum small: a `Flow` is returned at every exit, this one once.
    Stop(Box<StopReason>),
}

impl From<StopReason> for Flow {
    fn from(reason: StopReason) -> Self {
        Self::Stop(Box::new(reason))
    }
}

/// An exit that can be handled only with the hart's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnresolvedExit {
    /// An `ebreak`: the firmware's, a debugger's or the guest's own.
    Breakpoint,
    /// An access to an address without memory and device, under a policy other than zero.
    Unassigned {
        /// Guest-physical address.
        addr: u64,
        /// True for a store.
        write: bool,
    },
    /// The kernel could not carry out an instruction.
    Fault(Fault),
    /// A system event that this version does not know, by KVM's number.
    UnknownEvent(u32),
    /// An exit that this version does not know, by KVM's number.
    UnknownExit(u32),
}

/// Handles an exit. `bus` is the hart's own view.
///
/// MMIO is the hot path: a lookup on the bus, the device's lock, the device. Everything rare is out of line.
#[inline]
pub fn dispatch(exit: &mut Exit<'_>, context: &MachineContext, bus: &mut BusView) -> Flow {
    let claim = match exit {
        Exit::MmioRead { addr, data } => bus.read(*addr, data),
        Exit::MmioWrite { addr, data } => bus.write(*addr, data),
        _ => return dispatch_rare(exit, context),
    };
    if claim == Claim::Unassigned { dispatch_rare(exit, context) } else { Flow::Resume }
}

/// Handles everything but MMIO accesses to a device.
#[inline(never)]
fn dispatch_rare(exit: &mut Exit<'_>, context: &MachineContext) -> Flow {
    match exit {
        Exit::MmioRead { addr, .. } => unassigned(context, *addr, false),
        Exit::MmioWrite { addr, .. } => unassigned(context, *addr, true),
        Exit::Sbi(call) => sbi::handle(call, context),
        Exit::Csr(access) => {
            csr::handle(access, context);
            Flow::Resume
        }
        Exit::Interrupted => Flow::Yield,
        Exit::System(event) => system(*event),
        Exit::Debug => Flow::Resolve(UnresolvedExit::Breakpoint),
        Exit::Fault(fault) => Flow::Resolve(UnresolvedExit::Fault(*fault)),
        Exit::Unknown(reason) => Flow::Resolve(UnresolvedExit::UnknownExit(*reason)),
    }
}

#[cold]
fn unassigned(context: &MachineContext, addr: u64, write: bool) -> Flow {
    match context.unassigned {
        Unassigned::Zero => Flow::Resume,
        Unassigned::Fault | Unassigned::Stop => {
            Flow::Resolve(UnresolvedExit::Unassigned { addr, write })
        }
    }
}

/// The reset reason "system failure" (SBI 10.1); the other reasons do not indicate failure. For a reboot the reason is ignored:
/// the guest continues.
const SYSTEM_FAILURE: u64 = 1;

#[cold]
fn system(event: SystemEvent) -> Flow {
    match event {
        SystemEvent::Shutdown(reason) => {
            info!("The guest requests a shutdown, reason {reason}");
            if reason == SYSTEM_FAILURE { StopReason::SystemFailure } else { StopReason::PowerOff }
                .into()
        }
        SystemEvent::Reset(reason) => {
            info!("The guest requests a reset, reason {reason}");
            StopReason::Reset.into()
        }
        SystemEvent::Other(number) => Flow::Resolve(UnresolvedExit::UnknownEvent(number)),
    }
}
