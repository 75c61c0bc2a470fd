//! What devices need from the host beyond a console: files, networks, sockets. Opened by whoever knows the host, used by the
//! device that asked.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use crate::console::ConsoleBackend;
use crate::flash::{FlashMemory, FlashPlan};
use crate::virtio::DmaMemory;
use crate::virtio::blk::{DiskBackend, DiskPlan};
use crate::virtio::net::{NetBackend, NetworkEnd};
use crate::virtio::vhost_kernel::KernelQueues;
use crate::virtio::vhost_user::{Daemon, Service};

/// Opens the host's ends of devices. A host that has none of a kind refuses by itself.
pub trait Host: Send + Sync {
    /// Opens a disk, which reaches guest RAM through `memory`.
    ///
    /// # Errors
    /// The file cannot be opened, cannot be a disk, or is in use.
    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        let _ = memory;
        Err(HostError::mistake(format!("Cannot open disk {}: this host has no disks", plan.path)))
    }

    /// Connects a network device.
    ///
    /// # Errors
    /// There is no such network, or it is not for this user.
    fn network(&self, end: &NetworkEnd) -> Result<Box<dyn NetBackend>, HostError> {
        let _ = end;
        Err(HostError::mistake("Cannot connect a network: this host has none"))
    }

    /// Connects a network device with `pairs` pairs of queues, an end for each; they are all of the same network.
    ///
    /// # Errors
    /// As for [`network`](Self::network); and a network that has one queue has no more.
    fn network_queues(
        &self,
        end: &NetworkEnd,
        pairs: u16,
    ) -> Result<Vec<Box<dyn NetBackend>>, HostError> {
        if pairs > 1 {
            return Err(HostError::mistake(format!(
                "Cannot connect a network with {pairs} pairs of queues: it has one (leave queues={pairs} away)"
            )));
        }
        Ok(vec![self.network(end)?])
    }

    /// Opens a console's other end: `stdio`, `null`, `pty`, `file:PATH` or `unix:PATH`. Each has one user at a time; one that
    /// was let go is handed out again as it was left.
    ///
    /// # Errors
    /// It is none of these, cannot be had, or is in use.
    fn console(&self, to: &str) -> Result<Box<dyn ConsoleBackend>, HostError> {
        Err(HostError::mistake(format!("Cannot open {to}: there are no consoles here")))
    }

    /// Makes a Unix socket at `path` that its owner alone may connect to, and listens on it. One that nobody listens on any
    /// more is taken over, anything else of that name is left alone.
    ///
    /// # Errors
    /// No socket can be made there, or a program listens there already.
    fn listen(&self, path: &Path) -> Result<Box<dyn Listener>, HostError> {
        let what = format!("Cannot listen on {}: there are no sockets here", path.display());
        Err(HostError::mistake(what))
    }

    /// The queues of a socket device that the kernel works on, in `memory`: it is the guest of this CID from now on.
    ///
    /// # Errors
    /// The kernel has no such thing, or not for this user; or the CID is somebody's.
    fn kernel_sockets(
        &self,
        guest_cid: u32,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        let _ = memory;
        let what = format!("Cannot use CID {guest_cid}: there is no vhost here");
        Err(HostError::mistake(what))
    }

    /// Maps the bytes of a flash memory, to be read.
    ///
    /// # Errors
    /// The file or the host's memory cannot be opened, or is not a flash's size.
    fn flash(&self, plan: &FlashPlan) -> Result<Box<dyn FlashMemory>, HostError> {
        let _ = plan;
        Err(HostError::mistake("Cannot map flash memory: this host has none"))
    }

    /// Connects to the Unix socket at `path`, which is no symbolic link, without waiting for who listens there.
    ///
    /// # Errors
    /// Nobody listens there, or too many wait already (`WouldBlock`).
    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        let _ = path;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Starts a program that serves a device as vhost-user's back end, and connects to it.
    ///
    /// # Errors
    /// The program is not there, or cannot be started.
    fn serve(&self, service: &Service) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
        let what = match service {
            Service::Folder { path, .. } => format!("share {}", path.display()),
            Service::Network { .. } => "connect a network".to_owned(),
        };
        Err(HostError::mistake(format!("Cannot {what}: no programs are started here")))
    }
}

/// A Unix socket that is listened on; dropping it removes its file. Readable (epoll) while somebody waits to be let in.
pub trait Listener: AsRawFd + Send {
    /// Lets the next one in, without waiting for one.
    ///
    /// # Errors
    /// `WouldBlock` where nobody waits; else what the system says.
    fn accept(&self) -> io::Result<UnixStream>;
}

/// Why a host's end could not be had: the whole sentence for the user.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct HostError {
    what: String,
    #[source]
    source: Option<io::Error>,
}

impl HostError {
    /// What was asked for can never be had: the user has to ask for something else.
    pub fn mistake(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// The host refuses, with its answer.
    pub fn refused(what: impl Into<String>, source: io::Error) -> Self {
        Self { what: what.into(), source: Some(source) }
    }

    /// The sentence, and the host's answer where the host refused; none where the user has to ask for something else.
    #[must_use]
    pub fn into_parts(self) -> (String, Option<io::Error>) {
        (self.what, self.source)
    }
}

/// A host without anything.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHost;

impl Host for NoHost {}
