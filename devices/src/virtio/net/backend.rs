//! The host's end of a network device: its interface, and its kinds.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::header::{HEADER, Offloads};
use crate::host::HostError;
use crate::virtio::vhost_kernel::KernelQueues;
use crate::virtio::{DmaMemory, GuestMemoryMmap, Segment};

/// The host network that a device is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkSource {
    /// The tap interface of this name; created if it does not exist and the user is permitted to.
    Tap(String),
    /// The inherited descriptor of an open tap.
    Descriptor(RawFd),
}

/// An Ethernet segment that accepts and delivers whole frames, each behind a header of [`HEADER`] bytes (virtio 1.3, section
/// 5.1.6). No call blocks.
///
/// Three kinds of errors are distinguished: `WouldBlock`: the descriptor signals when to try again; `NotConnected`: the backend is
/// gone for good; every other one: this frame is lost, later ones may not be.
pub trait NetBackend: Send {
    /// A text that is the same whenever the same end is opened on the same host: the default MAC address is derived from it.
    fn identity(&self) -> &str;

    /// The MAC address that the guest has to have, where only frames for that address arrive; it is then the default.
    fn address(&self) -> Option<[u8; 6]> {
        None
    }

    /// Descriptor that is readable when there is a frame, and writable when there is room for one.
    fn fd(&self) -> RawFd;

    /// Sets the offloads that frames from the network may need. None right after opening.
    ///
    /// # Errors
    /// The host refuses; nothing has changed then.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Sets if frames arrive here, where this is one of several queues of the network; all are in use right after opening.
    /// Nothing is sent or received on a queue that is not in use.
    ///
    /// # Errors
    /// The host refuses; nothing has changed then.
    fn set_in_use(&mut self, is_in_use: bool) -> io::Result<()> {
        let _ = is_in_use;
        Ok(())
    }

    /// Descriptor that is readable when the link may have changed; `None` if the backend cannot signal that.
    fn link_fd(&self) -> Option<RawFd> {
        None
    }

    /// True if the link is up on the network's side. Clears the event of [`link_fd`](Self::link_fd).
    fn is_link_up(&mut self) -> bool {
        true
    }

    /// Opens the kernel's vhost for this end: it moves frames between the driver's queues in `memory` and the network, and
    /// nothing is sent or received here any more. All other calls remain valid.
    ///
    /// # Errors
    /// The host's kernel has no vhost, or not for this end or this user.
    fn kernel_queues(
        &self,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        let _ = memory;
        Err(HostError::invalid("Cannot use vhost=on: this network's backend is not in the kernel"))
    }

    /// Sends a frame: the header and the frame's first bytes are in `head`, the rest of it in `rest`.
    ///
    /// # Errors
    /// See above; the frame was not sent.
    fn send(&mut self, memory: &GuestMemoryMmap, head: &[u8], rest: &[Segment]) -> io::Result<()>;

    /// Receives a frame: its header into `header`, its bytes into `first` and, when that is full, into `rest`. Returns the
    /// number of bytes without the header; more than there is room for means that the frame was truncated.
    ///
    /// # Errors
    /// See above; with `WouldBlock` nothing was received.
    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &mut [u8; HEADER],
        first: &[Segment],
        rest: &mut [u8],
    ) -> io::Result<usize>;
}
