//! One thread per vCPU: enter the guest, handle the exit, enter again.
//!
//! | file | what is in it |
//! |---|---|
//! | `exit.rs` | [`exit::Exit`]: every reason for which a hart leaves the guest |
//! | `hart.rs` | [`hart::Hart`]: the interface to KVM, and the kick that makes a hart leave the guest |
//! | `context.rs` | [`MachineContext`]: state shared by all harts, needed to handle exits |
//! | `dispatch.rs` | [`dispatch()`]: handles an exit, in one match |
//! | `sbi.rs`, `csr.rs` | SBI calls and CSR accesses that the kernel leaves to user space |
//! | `trap.rs` | the traps that hardware would raise and KVM does not: cause, and entry into the guest |
//! | `firmware/` | firmware services that KVM does not offer: SBI 0.1, CSRs of machine mode, a visible timer |
//! | `restarts.rs` | state that the kernel loses when it starts a hart |
//! | `observer.rs` | [`observer::ExitObserver`]: receives every exit, with the registers |
//! | `walk.rs` | the guest's page tables, for `trap.rs` |
//! | `dump.rs` | registers as text |
//! | `run.rs` | [`spawn_hart`]: the thread and its run loop |
//! | `record.rs` | [`record::Recorder`]: records every exit for a trace |
//! | `control.rs` | [`Control`]: start, stop, pause and resume from other threads |
//! | `stop.rs` | [`stop::StopReason`] |
//!
//! # The path of an exit
//!
//! `enter` → `dispatch` → [`Flow`]. Most exits are handled by `dispatch` alone and the hart is entered again at once; nothing on
//! that path allocates, logs or takes a lock but the device's. An exit that needs the hart's registers is returned as a [`UnresolvedExit`],
//! and the run loop, which owns the hart, resolves it. The control is checked only after [`exit::Exit::Interrupted`]: a thread
//! that requests something of a hart changes the control and then kicks the hart. A hart that waits there runs the tasks of
//! [`Control::run_on`].

mod context;
mod control;
mod csr;
mod dispatch;
mod dump;
pub mod exit;
pub mod firmware;
pub mod hart;
pub mod observer;
pub mod record;
pub mod restarts;
mod run;
mod sbi;
pub mod stop;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod trap;
mod wakeups;
pub mod walk;

pub use context::{Debugger, MachineContext};
pub use control::{Control, Pause};
pub use dispatch::{Flow, UnresolvedExit, dispatch};
pub use dump::{dump, registers};
pub use run::spawn_hart;
pub use wakeups::Wakeups;
