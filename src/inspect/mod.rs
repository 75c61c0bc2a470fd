//! Inspection of a running machine: counters, registers and page table walks, through a Unix socket. The same socket takes orders of
//! the machine's owner: pause, resume, snapshot, migrate.
//!
//! The socket is `rvmm/NAME-PID.sock` in the user's runtime folder; without such a folder there is none. The I/O loop watches
//! it; each connection has a thread of its own. Without a connection the socket costs one descriptor.
//!
//! | file | what is in it |
//! |---|---|
//! | `query.rs` | queries, orders and replies: a line each way |
//! | `server.rs` | [`InspectionServer`]: the machine's end of the socket |
//! | `attached.rs` | a descriptor that comes with a line |
//! | `client.rs` | the client: finds running machines and connects to one |
//! | `walk.rs` | [`Walk`]: an address through both stages of translation |

mod attached;
mod client;
mod query;
mod server;
#[cfg(test)]
mod tests;
mod walk;

pub use client::{Connection, Found, runtime_folder, socket_for, socket_name};
pub use query::{
    BalloonSizes, Description, DeviceCount, GuestState, HartCount, HartRegisters, Inspectable,
    Order, Query, Reply, Stat,
};
pub use server::InspectionServer;
pub use walk::{Stages, Walk, WalkStep, WalkTarget};
