//! The debugger's end of a machine: GDB's remote protocol (GDB's manual, appendix E) on a TCP port or a Unix socket.
//!
//! | file | what is in it |
//! |---|---|
//! | `server.rs` | [`Server`]: the thread `gdb`, which lets one debugger in at a time and outlives resets of the guest |
//! | `session.rs` | one debugger, from its connection to its end |
//! | `connection.rs` | the socket |
//! | `context.rs` | [`DebugContext`]: what the debugger shares with the harts of one life: breakpoints, and who came to one |
//! | `debuggee.rs` | the guest as a debugger sees it: taken hold of, and let go |
//! | `running.rs` | going on, steps, and standing still again |
//! | `memory.rs` | memory through page tables |
//! | `target.rs` | the same in the words of the crate gdbstub, which speaks the protocol |
//! | `inserted.rs` | breakpoints in memory |
//! | `step.rs` | where an instruction leads |
//! | `registers.rs` | registers by GDB's numbers |
//! | `testing/` | a debugger and harts for tests, and what fuzzers do with them |
//!
//! # Who does what
//!
//! A hart that comes to an `ebreak` asks the context, which it finds in its world. Where the `ebreak` is the debugger's, the hart
//! notes itself there, has all harts held, wakes the thread `gdb` and waits as it waits in a pause. That thread reaches the
//! registers of waiting harts by visits ([`crate::vcpu::Control::run_on`]) and changes memory only while all wait. So without a
//! debugger a hart pays nothing, and with one it pays at an `ebreak`.
//!
//! # Steps
//!
//! KVM on RISC-V has no single steps. The places where the instruction may lead get breakpoints of their own, the trap vector too,
//! and interrupts wait meanwhile. Harts that meet such a breakpoint of another hart wait until the step is over.

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
