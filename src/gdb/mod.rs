//! The GDB server of a machine: GDB's remote protocol (GDB's manual, appendix E) on a TCP port or a Unix socket.
//!
//! | file | what is in it |
//! |---|---|
//! | `server.rs` | [`Server`]: the thread `gdb`, which serves one debugger at a time and outlives resets of the guest |
//! | `session.rs` | the session of one debugger, from its connection to its end |
//! | `connection.rs` | the sockets |
//! | `context.rs` | [`DebugContext`]: state that a debugger and the harts of one run share: breakpoints, and harts that hit one |
//! | `debuggee.rs` | the guest under a debugger: attach and detach |
//! | `running.rs` | continue, step and stop |
//! | `memory.rs` | memory through page tables |
//! | `target.rs` | the traits of the crate gdbstub, which implements the protocol |
//! | `breakpoints.rs` | software breakpoints in guest memory |
//! | `step.rs` | the addresses that an instruction may lead to |
//! | `registers.rs` | registers by GDB's numbers |
//! | `testing/` | a client and harts for tests and fuzzers |
//!
//! # Threads
//!
//! A hart that executes an `ebreak` asks the context, which it finds in its [`crate::vcpu::MachineContext`]. If the debugger inserted the
//! `ebreak`, the hart records its stop there, holds all harts, wakes the thread `gdb` and waits as in a pause. That thread reaches
//! the registers of waiting harts with [`crate::vcpu::Control::run_on`] and changes memory only while all harts wait. So a hart
//! has no overhead without a debugger, and with one only at an `ebreak`.
//!
//! # Steps
//!
//! KVM on RISC-V has no single-stepping. Temporary breakpoints are inserted at all addresses that the instruction may lead to,
//! the trap vector included, and interrupts are masked meanwhile. Harts that hit such a breakpoint of another hart wait until the
//! step is done.

mod breakpoints;
mod connection;
mod context;
mod debuggee;
mod memory;
mod registers;
mod running;
mod server;
mod session;
mod step;
mod target;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub(crate) use context::DebugContext;
pub(crate) use server::Server;
