//! The reasons for which a machine stops, as values that an embedder can act on.

use std::fmt;

use crate::error::{EXIT_GUEST, EXIT_HOST, EXIT_OK};
use crate::memory::GuestRam;

/// The reason for which a machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The guest powered off (SBI SRST shutdown without a failure, or the syscon's poweroff).
    PowerOff,
    /// The guest requested a reset and the machine does not restart by itself.
    Reset,
    /// The host requested it: `stop()`, Ctrl-A x, SIGTERM.
    Requested,
    /// The guest reported failure through the syscon, with its code.
    GuestFailure(u16),
    /// The guest shut down and gave a system failure as its reason (SBI SRST, chapter 10).
    SystemFailure,
    /// A hart caused an error that cannot be delivered to the guest as a trap.
    HartFault {
        /// Hart id.
        hart: u32,
        /// Description, one line.
        what: String,
        /// Register dump, several lines.
        dump: String,
    },
    /// An access to an address without memory and device, under the policy `stop`.
    UnassignedAccess {
        /// Hart id.
        hart: u32,
        /// Guest-physical address.
        addr: u64,
        /// True for a store.
        write: bool,
        /// Register dump, several lines.
        dump: String,
    },
    /// Guest memory is lost: a file behind it shrank or cannot be read any more.
    MemoryLost {
        /// Guest-physical address, if known.
        addr: Option<u64>,
    },
    /// The host failed (KVM_RUN returned an errno that no guest can cause, a thread died).
    HostFailure(String),
}

impl StopReason {
    /// The reason for lost guest RAM, at `addr` if known: a file shrank, or the host does not provide the memory.
    pub(super) fn lost(ram: &GuestRam, addr: Option<u64>) -> Self {
        match ram.failure() {
            Some(what) => Self::HostFailure(what.into()),
            None => Self::MemoryLost { addr },
        }
    }

    /// The stable exit code of the command.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reset | Self::Requested => EXIT_OK,
            Self::GuestFailure(_)
            | Self::SystemFailure
            | Self::HartFault { .. }
            | Self::UnassignedAccess { .. }
            | Self::MemoryLost { .. } => EXIT_GUEST,
            Self::HostFailure(_) => EXIT_HOST,
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "The guest powered off"),
            Self::Reset => write!(f, "The guest asked for a reset"),
            Self::Requested => write!(f, "Stopped on request"),
            Self::GuestFailure(code) => {
                write!(f, "The guest reported failure {code} through the power device")
            }
            Self::SystemFailure => {
                write!(f, "The guest shut down because of a system failure (SBI SRST, reason 1)")
            }
            Self::HartFault { hart, what, dump } => {
                write!(f, "Hart {hart} stopped: {what}\n{dump}")
            }
            Self::UnassignedAccess { hart, addr, write, dump } => {
                let what = if *write { "stored to" } else { "loaded from" };
                write!(
                    f,
                    "Hart {hart} {what} {addr:#x}, which is neither memory nor a device\n{dump}"
                )
            }
            Self::MemoryLost { addr: Some(addr) } => {
                write!(
                    f,
                    "Guest memory at {addr:#x} is lost: the file behind it shrank or cannot be read"
                )
            }
            Self::MemoryLost { addr: None } => {
                write!(f, "Guest memory is lost: the file behind it shrank or cannot be read")
            }
            Self::HostFailure(what) => write!(f, "The host failed: {what}"),
        }
    }
}
