//! Looking at a machine that runs: counters, registers, and the walk of an address, asked for through a Unix socket.
//!
//! The socket is `rvmm/NAME-PID.sock` in the user's runtime folder; without such a folder there is none. The I/O loop watches
//! it; who connects gets a thread for as long as the connection lasts. Until somebody does, it costs a descriptor.
//!
//! | file | what is in it |
//! |---|---|
//! | `query.rs` | what can be asked, and what comes back: a line each way |
//! | `server.rs` | [`InspectionServer`]: the machine's end |
//! | `client.rs` | the asker's end: which machines there are, and the connection to one |
//! | `walk.rs` | [`Walk`]: an address through both stages of translation |

mod client;
mod query;
mod server;
#[cfg(test)]
mod tests;
mod walk;

pub use client::{Connection, socket_for};
pub use query::{DeviceCount, HartCount, HartRegisters, Inspectable, Query, Reply, Stat};
pub use server::InspectionServer;
pub use walk::{Landing, Stages, Walk, WalkStep};
