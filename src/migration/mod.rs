//! Live migration: a running machine moves to another process, on this host or another one, with its memory sent while it runs.
//!
//! | file | what is in it |
//! |---|---|
//! | `message.rs` | the messages and their order |
//! | `channel.rs` | frames on a stream socket |
//! | `source.rs` | `Source`: the side that gives its guest away |
//! | `target.rs` | [`Incoming`]: the side that takes it over |
//! | `arriving.rs` | memory that arrives after the guest (post-copy) |
//! | `process.rs` | whether the process on the other side has ended |
//! | `address.rs` | where the other side is |
//! | `request.rs` | what clients ask for and learn |
//!
//! At each moment one side at most may run the guest. Up to `Go` it is the source, and from then on the target. If the connection breaks:
//!
//! | broken | source | target |
//! |---|---|---|
//! | before `Ready` | runs on | ends |
//! | before `Go` was sent | runs on, and has said `Refused` if it can | ends; if the source is known to be dead, runs |
//! | before `Go` was received | runs on if the target is known to be dead; else stays paused, since the target may have got it | as above |
//! | before `Running` was received | as above | runs |
//!
//! Death of a process is only known on the same host (pidfd_open(2)).

mod address;
mod arriving;
mod channel;
mod message;
mod process;
mod request;
mod source;
mod target;
#[cfg(test)]
mod tests;

pub use crate::sockets::LocalAddress;
pub use address::Address;
pub(crate) use arriving::Arriving;
pub use request::{MigrationProgress, MigrationReport, MigrationRequest};
pub(crate) use source::{Outcome, Source};
pub use target::Incoming;
pub(crate) use target::Received;
