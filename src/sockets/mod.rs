//! Sockets of rvmm itself: their files, addresses and peers, and back-off while the host is out of descriptors.
//!
//! | file | contents |
//! |---|---|
//! | `listening.rs` | [`Listening`]: a listening Unix socket and its file; connecting to one |
//! | `local.rs` | [`LocalAddress`]: the address of a socket on this host |
//! | `peer.rs` | the process at the other end of a Unix socket |
//! | `acceptor.rs` | [`Acceptor`]: a Unix or TCP listener that backs off |

mod acceptor;
mod listening;
mod local;
mod peer;

pub(crate) use acceptor::Acceptor;
pub(crate) use listening::{Listening, connect_to, connect_to_starting, remove_stale_socket};
pub use local::LocalAddress;
pub(crate) use local::unix_path;
pub(crate) use peer::peer_process;
