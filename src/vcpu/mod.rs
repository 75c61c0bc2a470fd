//! One thread per vCPU: enter the guest, see why it came back, answer, enter again.
//!
//! | file | what is in it |
//! |---|---|
//! | `exit.rs` | [`exit::Exit`]: every reason for which a hart comes back |
//! | `hart.rs` | [`hart::Hart`]: the seam to KVM, and the kick that gets a hart out of the guest |
//! | `world.rs` | [`World`]: what an answer needs |
//! | `dispatch.rs` | [`dispatch()`]: from an exit to an answer, one match |
//! | `sbi.rs`, `csr.rs` | SBI calls and CSR accesses that the kernel leaves to user space |
//! | `trap.rs` | the traps that hardware would raise and KVM leaves out: which, and how they enter the guest |
//! | `firmware/` | what stands in for firmware that KVM does not offer: SBI 0.1, CSRs of machine mode, a visible timer |
//! | `restarts.rs` | what a hart lacks after the kernel has started it anew |
//! | `observer.rs` | somebody who is told of every exit |
//! | `walk.rs`, `insn.rs` | what `trap` needs to know it: the guest's page tables, its memory instructions |
//! | `dump.rs` | registers as text |
//! | `run.rs` | [`spawn_hart`]: the thread and its loop |
//! | `record.rs` | [`record::Recorder`]: who sees every exit |
//! | `control.rs` | [`Control`]: start, stop, pause and resume from outside |
//! | `stop.rs` | [`stop::StopReason`] |
//!
//! # The way of an exit
//!
//! `enter` → `dispatch` → [`Flow`]. Most exits are answered by `dispatch` alone and the hart goes straight back; nothing on
//! that way allocates, logs or takes a lock but the device's. What needs the hart's registers comes back as a [`Trouble`],
//! and the loop, which has the hart, settles it. The control is looked at only after [`exit::Exit::Interrupted`]: who wants
//! something from a hart says so there and then kicks it. While it waits there, it does what [`Control::run_on`] asks.

mod control;
mod csr;
mod dispatch;
mod dump;
pub mod exit;
pub mod firmware;
pub mod hart;
mod insn;
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
pub mod walk;
mod world;

pub use control::{Control, Pause};
pub use dispatch::{Flow, Trouble, dispatch};
pub use dump::{dump, registers};
pub use run::spawn_hart;
pub use world::{Debugger, World};
