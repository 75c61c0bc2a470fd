//! Looking at a machine that runs: counters, registers, and the walk of an address, asked for through a Unix socket.
//!
//! The socket is `rvmm/NAME-PID.sock` in the user's runtime folder; without such a folder there is none. The I/O loop watches
//! it; who connects gets a thread for as long as the connection lasts. Until somebody does, it costs a descriptor.
//!
//! | file | what is in it |
//! |---|---|
//! | `answer.rs` | what can be asked, and what comes back: a line each way |
//! | `server.rs` | [`Reception`]: the machine's end |
//! | `client.rs` | the asker's end: which machines there are, and the connection to one |
//! | `steps.rs` | [`Walk`]: an address through both stages of translation |

mod answer;
mod client;
mod server;
mod steps;
#[cfg(test)]
mod tests;

pub use answer::{Answer, DeviceCount, HartCount, HartRegisters, Question, Stat, Subject};
pub use client::{Connection, socket_for};
pub use server::Reception;
pub use steps::{Landing, Stages, Walk, WalkStep};
