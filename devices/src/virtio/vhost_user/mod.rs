//! Devices that another program serves (QEMU's documentation, "Vhost-user Protocol"): the front end. The peer is the back end.
//!
//! | file | contents |
//! |---|---|
//! | `message.rs` | messages and their layout |
//! | `link.rs` | the socket: requests out, replies in |
//! | `session.rs` | one connection: the order of requests and replies |
//! | `peer.rs` | a peer before there is a device |
//! | `front.rs` | the virtio device between the driver and the peer |
//! | `testing.rs` | a peer for tests |
//! | `blk.rs`, `fs.rs`, `net.rs`, `vsock.rs` | the kinds of devices |
//!
//! The peer maps guest RAM, receives the driver's kicks and works on the rings itself; its interrupts are in `remote.rs`. A peer is
//! trusted with guest RAM, as vhost-user requires, and with nothing else: its messages are bounded and validated, and while the
//! guest runs only a reset waits for it, for a second: after that the driver sees a reset that has not finished. When the peer is
//! gone, the device stops, not the machine.
//!
//! The front end is implemented here because the crate for it blocks in every call, and calls are made on the I/O thread. Left out:
//! migration (dirty logging), post-copy, IOMMU, the peer's own requests, and configuration spaces that the driver writes.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) mod blk;
mod front;
pub(crate) mod fs;
mod link;
mod message;
pub(crate) mod net;
mod peer;
mod session;
pub mod testing;
pub(crate) mod vsock;

pub use blk::{ServedQueues, VhostUserBlkConfig};
pub use fs::{FsConfig, MountTag};
pub use net::{Forwards, NetUserConfig, VhostUserNetConfig};
pub use vsock::VhostUserVsockConfig;

/// The properties of a kind of device.
struct PeerKind {
    model: &'static str,
    /// Virtio device type.
    id: u32,
    /// Features of the device that are offered if the peer has them.
    features: u64,
    /// Features that the front end itself implements.
    own: u64,
    /// Sizes of the queues.
    sizes: Vec<u16>,
    /// Number of queues that the peer serves, the first ones.
    remote: u16,
    /// The configuration space; the peer's if [`PeerKind::asked`] is not 0.
    config: Vec<u8>,
    /// Bytes of the peer's configuration space that are needed.
    asked: usize,
    /// Turns the peer's configuration space into the driver's.
    adapt: fn(&mut [u8], u16),
}

/// A program that rvmm starts to serve one device, and terminates with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Service {
    /// virtiofsd: a folder of the host.
    Folder {
        /// The folder.
        path: PathBuf,
        /// The folder is read-only.
        read_only: bool,
        /// The sandbox of the program.
        sandbox: Sandbox,
    },
    /// passt: the networks of the host, as the user of rvmm sees them.
    Network {
        /// Ports of the host's loopback interface, and the ports of the guest that they are forwarded to.
        forwards: Vec<(u16, u16)>,
    },
}

/// The sandbox that confines virtiofsd to its folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    /// Its own namespaces, which contain nothing but the folder.
    #[default]
    Namespace,
    /// The folder is its root; needs root.
    Chroot,
    /// No sandbox: virtiofsd's own checks only.
    None,
}

/// A program that was started for a device. Dropping it terminates it.
pub trait Daemon: Send {
    /// Its name.
    fn name(&self) -> &str;

    /// Descriptor that is readable (epoll) when the program has written output or has ended; `None` after its end of file.
    fn messages(&self) -> Option<RawFd>;

    /// Logs its output, a bounded amount.
    fn forward_output(&mut self);

    /// Kills it at once: it no longer accesses guest memory.
    fn kill(&mut self);

    /// Its last output, once it has ended; waits a bounded time for that.
    fn last_output(&mut self) -> String;
}

/// An error that ends the connection to a peer.
#[derive(Debug, Error)]
pub enum PeerError {
    /// It has closed the connection.
    #[error("it has closed the connection")]
    Closed,
    /// An I/O error of the socket.
    #[error("its socket has failed: {0}")]
    Socket(#[source] io::Error),
    /// It does not reply in time, or accepts no requests.
    #[error("it does not reply")]
    Timeout,
    /// The header of a message is no reply of version 1.
    #[error("it sent an invalid reply header: request {request}, flags {flags:#x}")]
    InvalidHeader {
        /// The number of the request as received.
        request: u32,
        /// The flags as received.
        flags: u32,
    },
    /// A reply without a request, or out of order.
    #[error("it sent an unexpected reply to request {request}")]
    UnexpectedReply {
        /// The number of the request.
        request: u32,
    },
    /// A reply is too long, too short or does not match its request.
    #[error("its reply to request {request} is invalid ({size} bytes)")]
    InvalidPayload {
        /// The number of the request.
        request: u32,
        /// Bytes of the reply's payload.
        size: usize,
    },
    /// It could not perform a request.
    #[error("it refuses request {request}")]
    Refused {
        /// The number of the request.
        request: u32,
    },
    /// A reply lacks a usable memory descriptor.
    #[error("its reply to request {request} has no usable memory")]
    NoDescriptor {
        /// The number of the request.
        request: u32,
    },
    /// It cannot serve this device.
    #[error("{0}")]
    Unsuitable(&'static str),
}
