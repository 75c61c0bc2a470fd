//! Resources of the host that devices use: disks, networks, sockets, consoles, flash memory. An implementation of [`Host`] opens
//! them.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use crate::config::Endpoint;
use crate::console::ConsoleBackend;
use crate::flash::{FlashMemory, FlashPlan};
use crate::virtio::DmaMemory;
use crate::virtio::blk::{DiskBackend, DiskPlan};
use crate::virtio::net::{NetBackend, NetworkSource};
use crate::virtio::vhost_kernel::KernelQueues;
use crate::virtio::vhost_user::{Daemon, Service};

/// Opens the backends of devices. Every method by default returns an error that the host has no such backend.
pub trait Host: Send + Sync {
    /// Opens a disk, which accesses guest RAM through `memory`.
    ///
    /// # Errors
    /// The file cannot be opened, is not usable as a disk, or is in use.
    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        let _ = memory;
        Err(HostError::invalid(format!(
            "Cannot open disk {}: this host has no disks",
            plan.path.display()
        )))
    }

    /// Releases the locks of all disks, so that another program can open them. Their devices are at rest until
    /// [`retake_locks`](Self::retake_locks).
    fn release_locks(&self) {}

    /// Takes the locks of all disks again.
    ///
    /// # Errors
    /// Another program uses one of them.
    fn retake_locks(&self) -> Result<(), HostError> {
        Ok(())
    }

    /// Connects a network device.
    ///
    /// # Errors
    /// The network does not exist, or the user has no permission for it.
    fn network(&self, end: &NetworkSource) -> Result<Box<dyn NetBackend>, HostError> {
        let _ = end;
        Err(HostError::invalid("Cannot connect a network: this host has no networks"))
    }

    /// Connects a network device with `pairs` queue pairs; returns a backend for each, all of the same network.
    ///
    /// # Errors
    /// As for [`network`](Self::network); or the network has only one queue pair.
    fn network_queues(
        &self,
        end: &NetworkSource,
        pairs: u16,
    ) -> Result<Vec<Box<dyn NetBackend>>, HostError> {
        if pairs > 1 {
            return Err(HostError::invalid(format!(
                "Cannot connect a network with {pairs} queue pairs: it has one (leave out queues={pairs})"
            )));
        }
        Ok(vec![self.network(end)?])
    }

    /// Opens the backend of a console. Each has one user at a time; a released one
    /// keeps its state for the next user.
    ///
    /// # Errors
    /// It is not available, or is in use.
    fn console(&self, to: &Endpoint) -> Result<Box<dyn ConsoleBackend>, HostError> {
        Err(HostError::invalid(format!("Cannot open {to}: this host has no consoles")))
    }

    /// Listens on a new Unix socket at `path` that only its owner may connect to. Replaces a socket without a
    /// listener, but no other file.
    ///
    /// # Errors
    /// The socket cannot be created, or a program already listens on it.
    fn listen(&self, path: &Path) -> Result<Box<dyn Listener>, HostError> {
        let what = format!("Cannot listen on {}: this host has no sockets", path.display());
        Err(HostError::invalid(what))
    }

    /// Opens the kernel's vsock backend (vhost-vsock) for the guest with this CID, with queues in `memory`.
    ///
    /// # Errors
    /// The kernel does not support it, the user has no permission, or the CID is in use.
    fn kernel_sockets(
        &self,
        guest_cid: u32,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        let _ = memory;
        let what = format!("Cannot use CID {guest_cid}: this host has no vhost");
        Err(HostError::invalid(what))
    }

    /// Maps the contents of a flash memory read-only.
    ///
    /// # Errors
    /// The file or the host's memory cannot be opened, or its size is not valid for a flash.
    fn flash(&self, plan: &FlashPlan) -> Result<Box<dyn FlashMemory>, HostError> {
        let _ = plan;
        Err(HostError::invalid("Cannot map flash memory: this host has no flash"))
    }

    /// Connects to the Unix socket at `path`, which must not be a symbolic link, without waiting for the listener.
    ///
    /// # Errors
    /// There is no listener, or its backlog is full (`WouldBlock`).
    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        let _ = path;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Starts a program that implements a device as a vhost-user back end, and connects to it.
    ///
    /// # Errors
    /// The program is not installed, or cannot be started.
    fn serve(&self, service: &Service) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
        let what = match service {
            Service::Folder { path, .. } => format!("share {}", path.display()),
            Service::Network { .. } => "connect a network".to_owned(),
        };
        Err(HostError::invalid(format!("Cannot {what}: this host starts no programs")))
    }
}

/// A listening Unix socket; dropping it removes its file. Readable (epoll) while a connection waits to be accepted.
pub trait Listener: AsRawFd + Send {
    /// Accepts the next connection, without waiting for one.
    ///
    /// # Errors
    /// `WouldBlock` if no connection waits; else the error of the system.
    fn accept(&self) -> io::Result<UnixStream>;
}

/// An error of a backend that is not available; displayed as a complete message for the user.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct HostError {
    what: String,
    #[source]
    source: Option<io::Error>,
}

impl HostError {
    /// The request can never be fulfilled: the user has to change it.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// The host failed, with its error.
    pub fn os(what: impl Into<String>, source: io::Error) -> Self {
        Self { what: what.into(), source: Some(source) }
    }

    /// The message, and the host's error if the host failed; none if the user has to change the request.
    #[must_use]
    pub fn into_parts(self) -> (String, Option<io::Error>) {
        (self.what, self.source)
    }
}

/// A host without any backends.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHost;

impl Host for NoHost {}
