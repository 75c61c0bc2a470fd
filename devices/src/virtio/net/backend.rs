//! The host's end of a network device: what the device asks of it, and what a user may ask for.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::header::{HEADER, Offloads};
use crate::host::HostError;
use crate::virtio::vhost_kernel::KernelQueues;
use crate::virtio::{DmaMemory, GuestMemoryMmap, Segment};

/// Which network a device is to be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkEnd {
    /// The tap interface of this name; it is made where there is none and the user may.
    Tap(String),
    /// A tap that whoever started the program has opened, by its descriptor.
    Descriptor(RawFd),
}

/// An Ethernet segment that takes and gives whole frames, each behind a header of [`HEADER`] bytes (virtio 1.3, section
/// 5.1.6). No call waits.
///
/// Three kinds of errors mean something: `WouldBlock`, that the descriptor will tell when to try again; `NotConnected`, that
/// the other end is gone for good; every other one, that this frame is lost and the next one may not be.
pub trait NetBackend: Send {
    /// A text that is the same whenever the same end is opened on the same host: the default MAC address comes from it.
    fn identity(&self) -> &str;

    /// The address that the guest has to have, where only frames for this one come here; it is the default MAC address then.
    fn address(&self) -> Option<[u8; 6]> {
        None
    }

    /// Becomes readable when there is a frame, and writable when there is room for one.
    fn fd(&self) -> RawFd;

    /// What frames from the network may leave to their receiver. None at all right after opening.
    ///
    /// # Errors
    /// The host refuses; nothing has changed then.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Whether the network brings frames here, where this is one of several queues of it; all are in use right after opening.
    /// Nothing is sent or received while it is not.
    ///
    /// # Errors
    /// The host refuses; nothing has changed then.
    fn set_in_use(&mut self, is_in_use: bool) -> io::Result<()> {
        let _ = is_in_use;
        Ok(())
    }

    /// Becomes readable when the network's side of the cable may have gone up or down; none where it cannot tell.
    fn link_fd(&self) -> Option<RawFd> {
        None
    }

    /// Whether that side is up. What [`link_fd`](Self::link_fd) has told of is done with then.
    fn is_link_up(&mut self) -> bool {
        true
    }

    /// The kernel's vhost in front of this end: it moves frames between the driver's queues in `memory` and the network, so that
    /// nothing is sent or received here any more. Everything else goes on as before.
    ///
    /// # Errors
    /// The host's kernel has no such thing, or not for this end or this user.
    fn kernel_queues(
        &self,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        let _ = memory;
        Err(HostError::mistake("Cannot use vhost=on: this network's end is not in the kernel"))
    }

    /// Sends a frame: the header and the frame's first bytes are in `head`, the rest of it in `rest`.
    ///
    /// # Errors
    /// See above; the frame was not sent.
    fn send(&mut self, memory: &GuestMemoryMmap, head: &[u8], rest: &[Segment]) -> io::Result<()>;

    /// Receives a frame: its header into `header`, its bytes into `first` and, when that is full, into `rest`. Gives the
    /// number of bytes without the header; more than there is room for means that the frame was cut off.
    ///
    /// # Errors
    /// See above; in the case of `WouldBlock` nothing was received.
    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &mut [u8; HEADER],
        first: &[Segment],
        rest: &mut [u8],
    ) -> io::Result<usize>;
}
