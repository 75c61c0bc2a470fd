//! Guest memory that comes while the guest runs: from the snapshot's file, ahead of the guest, or from another program, a pager, that
//! serves the guest's page faults.
//!
//! | file | what is in it |
//! |---|---|
//! | `prefetch.rs` | reading the snapshot's file ahead of the guest |
//! | `link.rs` | the machine's connection to a pager |
//! | `handshake.rs` | the message with which a machine hands its memory to a pager, Firecracker's |
//! | `server.rs` | the pager: serves one machine |
//! | `source.rs` | where a pager has pages from |
//! | `remote.rs`, `store.rs` | a pager that fetches them from another host, and what it fetches them from |
//! | `protocol.rs`, `wire.rs` | the messages between those two; a socket with time-outs |
//!
//! `docs/snapshots.md` describes both protocols for other programs.
//!
//! The rest of a process cannot tell a page that a pager fills from any other one: the thread that accesses it waits. So what waits for
//! a thread of the machine waits for the pager, too: a pause, and a stop until [`PagerLink`] gives up the absent pages.

mod handshake;
mod link;
mod prefetch;
mod protocol;
mod remote;
mod server;
mod source;
mod store;
#[cfg(test)]
mod tests;
mod wire;

pub(crate) use link::PagerLink;
pub(crate) use prefetch::Prefetch;
pub(crate) use server::serve_machine;
pub(crate) use source::Contents;
pub(crate) use store::serve_pages;
