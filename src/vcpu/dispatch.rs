//! From an exit to its answer: one match, no hart, no thread.

use log::info;
use rvmm_devices::Claim;

use super::exit::{Exit, Fault, SystemEvent};
use super::stop::StopReason;
use super::world::World;
use super::{csr, sbi};
use crate::config::Unassigned;

/// What the hart does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes back into the guest; the answer is in place.
    Resume,
    /// It goes back, and runs the same instruction again: the answer cannot be given yet.
    Retry,
    /// It looks at the control first.
    Yield,
    /// The whole system sleeps until something happens (SBI SUSP).
    Suspend,
    /// Its registers decide: a trap is raised in the guest, or the machine stops.
    Resolve(Trouble),
    /// The machine stops. Boxed, since a flow is made at every exit and this one once.
    Stop(Box<StopReason>),
}

impl From<StopReason> for Flow {
    fn from(reason: StopReason) -> Self {
        Self::Stop(Box::new(reason))
    }
}

/// What only the hart's registers can answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// An `ebreak` that no debugger has asked for.
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

/// Answers an exit.
///
/// MMIO is the way that costs: a lookup on the bus, the device's lock, the device. Whatever is rare is out of line.
#[inline]
pub fn dispatch(exit: &mut Exit<'_>, world: &World) -> Flow {
    let claim = match exit {
        Exit::MmioRead { addr, data } => world.bus.read(*addr, data),
        Exit::MmioWrite { addr, data } => world.bus.write(*addr, data),
        _ => return dispatch_rare(exit, world),
    };
    if claim == Claim::Unassigned { dispatch_rare(exit, world) } else { Flow::Resume }
}

/// What no device has answered.
#[inline(never)]
fn dispatch_rare(exit: &mut Exit<'_>, world: &World) -> Flow {
    match exit {
        Exit::MmioRead { addr, .. } => unassigned(world, *addr, false),
        Exit::MmioWrite { addr, .. } => unassigned(world, *addr, true),
        Exit::Sbi(call) => sbi::answer(call, world),
        Exit::Csr(access) => {
            csr::answer(access, world);
            Flow::Resume
        }
        Exit::Interrupted => Flow::Yield,
        Exit::System(event) => system(*event),
        Exit::Debug => Flow::Resolve(Trouble::Breakpoint),
        Exit::Fault(fault) => Flow::Resolve(Trouble::Fault(*fault)),
        Exit::Unknown(reason) => Flow::Resolve(Trouble::UnknownExit(*reason)),
    }
}

#[cold]
fn unassigned(world: &World, addr: u64, write: bool) -> Flow {
    match world.unassigned {
        Unassigned::Zero => Flow::Resume,
        Unassigned::Fault | Unassigned::Stop => Flow::Resolve(Trouble::Unassigned { addr, write }),
    }
}

/// The reason "system failure" of a system reset (SBI 10.1); the others that are there say nothing about success. Of a reboot the
/// reason decides nothing: the guest goes on.
const SYSTEM_FAILURE: u64 = 1;

#[cold]
fn system(event: SystemEvent) -> Flow {
    match event {
        SystemEvent::Shutdown(reason) => {
            info!("The guest asks for poweroff, reason {reason}");
            if reason == SYSTEM_FAILURE { StopReason::SystemFailure } else { StopReason::PowerOff }
                .into()
        }
        SystemEvent::Reset(reason) => {
            info!("The guest asks for a reset, reason {reason}");
            StopReason::Reset.into()
        }
        SystemEvent::Other(number) => Flow::Resolve(Trouble::UnknownEvent(number)),
    }
}
