//! The backend as both directions use it: maps its errors to outcomes, in one place.

use std::io::ErrorKind;
use std::sync::Arc;

use log::warn;

use super::backend::NetBackend;
use super::counters::Counters;
use super::header::{HEADER, Offloads};
use crate::virtio::{GuestMemoryMmap, Segment};

/// Number of frames lost in succession after which the backend counts as gone.
const MAX_LOST_IN_A_ROW: u32 = 1000;

/// A backend and its state.
pub(super) struct Port {
    backend: Box<dyn NetBackend>,
    pub(super) counters: Arc<Counters>,
    /// The backend has failed for good.
    pub(super) is_gone: bool,
    /// The driver uses this queue pair.
    pub(super) is_in_use: bool,
    lost_in_a_row: u32,
    /// Offloads that the backend has been set to.
    offloads: Offloads,
    has_warned: bool,
}

/// The outcome of sending a frame to the host.
pub(super) enum Sent {
    Done,
    /// The backend has no room yet.
    Wait,
    Lost,
}

/// The outcome of receiving a frame from the host.
pub(super) enum Received {
    /// A frame of this many bytes.
    Frame(usize),
    Nothing,
    /// A frame that could not be read.
    Lost,
}

impl Port {
    pub(super) fn new(backend: Box<dyn NetBackend>, counters: &Arc<Counters>) -> Self {
        Self {
            backend,
            counters: Arc::clone(counters),
            is_gone: false,
            is_in_use: true,
            lost_in_a_row: 0,
            offloads: Offloads::default(),
            has_warned: false,
        }
    }

    /// Connects the port to a new backend.
    pub(super) fn connect(&mut self, backend: Box<dyn NetBackend>) {
        *self = Self::new(backend, &self.counters);
    }

    pub(super) fn fd(&self) -> i32 {
        self.backend.fd()
    }

    /// Descriptor that signals link changes; none once the backend is gone.
    pub(super) fn link_fd(&self) -> Option<i32> {
        self.backend.link_fd().filter(|_| !self.is_gone)
    }

    pub(super) fn is_link_up(&mut self) -> bool {
        !self.is_gone && self.backend.is_link_up()
    }

    /// True if frames can be sent and received.
    pub(super) fn can_move(&self) -> bool {
        self.is_in_use && !self.is_gone
    }

    /// Enables or disables this queue of the backend; false, with nothing changed, if the host refuses.
    pub(super) fn set_in_use(&mut self, is_in_use: bool) -> bool {
        if self.is_in_use == is_in_use || self.is_gone {
            return true;
        }
        match self.backend.set_in_use(is_in_use) {
            Ok(()) => self.is_in_use = is_in_use,
            Err(error) if !std::mem::replace(&mut self.has_warned, true) => {
                let identity = self.backend.identity();
                warn!("net: cannot switch a queue of {identity} on or off: {error}");
            }
            Err(_) => {}
        }
        self.is_in_use == is_in_use
    }

    /// Sets the backend's offloads, and returns those now in force: the old ones if it refuses.
    pub(super) fn set_offloads(&mut self, offloads: Offloads) -> Offloads {
        // Only on a change: a driver can ask without limit, and the host notifies all listeners on its interfaces.
        if self.offloads != offloads && !self.is_gone {
            match self.backend.set_offloads(offloads) {
                Ok(()) => self.offloads = offloads,
                Err(error) if !std::mem::replace(&mut self.has_warned, true) => {
                    warn!(
                        "net: cannot change the offloads of {}: {error}",
                        self.backend.identity()
                    );
                }
                Err(_) => {}
            }
        }
        self.offloads
    }

    pub(super) fn send(&mut self, memory: &GuestMemoryMmap, head: &[u8], rest: &[Segment]) -> Sent {
        if self.is_gone {
            self.counters.tx_failed.add();
            return Sent::Lost;
        }
        match self.backend.send(memory, head, rest) {
            Ok(()) => {
                self.counters.tx_frames.add();
                Sent::Done
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Sent::Wait
            }
            Err(error) => {
                self.note_gone(error.kind() == ErrorKind::NotConnected);
                self.counters.tx_failed.add_and_warn(format_args!(
                    "a frame was dropped, the host did not accept it: {error}"
                ));
                Sent::Lost
            }
        }
    }

    pub(super) fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &mut [u8; HEADER],
        first: &[Segment],
        rest: &mut [u8],
    ) -> Received {
        match self.backend.receive(memory, header, first, rest) {
            Ok(len) => {
                self.lost_in_a_row = 0;
                Received::Frame(len)
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Received::Nothing
            }
            Err(error) => {
                self.lost_in_a_row = self.lost_in_a_row.saturating_add(1);
                let is_over = self.lost_in_a_row >= MAX_LOST_IN_A_ROW;
                self.note_gone(is_over || error.kind() == ErrorKind::NotConnected);
                self.counters
                    .rx_failed
                    .add_and_warn(format_args!("a frame from the host was lost: {error}"));
                Received::Lost
            }
        }
    }

    fn note_gone(&mut self, is_gone: bool) {
        if is_gone && !std::mem::replace(&mut self.is_gone, true) {
            warn!(
                "net: the network {} is gone: the link is down from now on",
                self.backend.identity()
            );
        }
    }
}
