//! Devices whose work another program does (QEMU's documentation, "Vhost-user Protocol"): the front end.
//!
//! | file | what |
//! |---|---|
//! | `message.rs` | messages and their layout |
//! | `link.rs` | the socket: messages out, answers in |
//! | `session.rs` | one connection: who asks what when |
//! | `peer.rs` | a peer before there is a device |
//! | `front.rs` | the virtio device: the driver on one side, the peer on the other |
//! | `testing.rs` | a peer for tests |
//! | `blk.rs`, `fs.rs`, `net.rs`, `vsock.rs` | what is different about each kind |
//!
//! The peer maps guest RAM, reads the driver's kicks and works on the rings itself; its interrupts are in `remote.rs`. A peer is trusted with guest RAM, since
//! that is what vhost-user is, and with nothing else: what it says is bounded and judged, nobody waits for it while the guest runs
//! but a reset, and that for a second: then the driver sees a reset that is not over. When it is gone the device stops, not the machine.
//!
//! The protocol's own client is here because the crate for it waits in every call, and calls come on the I/O thread. Left out:
//! migration (dirty logging), post-copy, IOMMU, the peer's own requests, and configuration spaces that the driver writes.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

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

/// What a kind of device is, for the driver and for the peer.
struct Kind {
    model: &'static str,
    /// Virtio device type.
    id: u32,
    /// Features of the device that are offered where the peer has them.
    features: u64,
    /// Features that are the front end's own.
    own: u64,
    /// Sizes of the queues.
    sizes: Vec<u16>,
    /// How many of them, the first ones, are the peer's.
    remote: u16,
    /// The configuration space; with [`Kind::asked`], what the peer says of it.
    config: Vec<u8>,
    /// Bytes of the peer's configuration space that are needed.
    asked: usize,
    /// Makes the driver's configuration space out of the peer's.
    adapt: fn(&mut [u8], u16),
}

/// A program that rvmm starts to serve one device, and ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Service {
    /// virtiofsd: a folder of the host.
    Folder {
        /// The folder.
        path: PathBuf,
        /// Nothing can be changed in it.
        read_only: bool,
        /// How the program is kept from everything else.
        sandbox: Sandbox,
    },
    /// passt: the networks of the host, as whoever runs rvmm sees them.
    Network {
        /// Ports of the host's loopback interface, and the ports of the guest that they lead to.
        forwards: Vec<(u16, u16)>,
    },
}

/// How virtiofsd keeps itself to its folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sandbox {
    /// Namespaces of its own, in which there is nothing but the folder.
    #[default]
    Namespace,
    /// The folder is its root; takes root.
    Chroot,
    /// Nothing but its own care.
    None,
}

/// A program that was started for a device. Dropping it ends it.
pub trait Daemon: Send {
    /// Its name.
    fn name(&self) -> &str;

    /// Readable (epoll) when it has said something or has ended; none once it says no more.
    fn messages(&self) -> Option<RawFd>;

    /// Passes on what it has said, a bounded amount.
    fn attend(&mut self);

    /// Ends it at once: it touches guest memory no more.
    fn kill(&mut self);

    /// What it said last, once it has ended; waits a bounded time for that.
    fn last_words(&mut self) -> String;
}

/// Why there is no going on with a peer.
#[derive(Debug, Error)]
pub enum PeerError {
    /// It has closed the connection.
    #[error("it has closed the connection")]
    Closed,
    /// The socket fails.
    #[error("its socket fails: {0}")]
    Socket(#[source] io::Error),
    /// It does not answer in time, or takes no requests.
    #[error("it does not answer")]
    Late,
    /// What it sends is no answer of version 1.
    #[error("it sent something that is no answer: request {request}, flags {flags:#x}")]
    NoAnswer {
        /// The number of the request as given.
        request: u32,
        /// The flags as given.
        flags: u32,
    },
    /// It answers what was not asked.
    #[error("it answered request {request} out of turn")]
    Unasked {
        /// The number of the request.
        request: u32,
    },
    /// An answer is too long, too short or says something else than was asked for.
    #[error("its answer to request {request} makes no sense ({size} bytes)")]
    Size {
        /// The number of the request.
        request: u32,
        /// Bytes of the answer's payload.
        size: usize,
    },
    /// It could not do what it was asked for.
    #[error("it refuses request {request}")]
    Refused {
        /// The number of the request.
        request: u32,
    },
    /// An answer came without memory that can be used.
    #[error("its answer to request {request} brings no memory that can be used")]
    NoDescriptor {
        /// The number of the request.
        request: u32,
    },
    /// It is no peer for this device.
    #[error("{0}")]
    Unfit(&'static str),
}
