//! The host's end as both directions use it: errors become what is to be done about them, once and in one place.

use std::io::ErrorKind;
use std::sync::Arc;

use log::warn;

use super::backend::NetBackend;
use super::counters::Counters;
use super::header::{HEADER, Offloads};
use crate::virtio::{GuestMemoryMmap, Segment};

/// Frames lost one after the other after which the host's end counts as gone.
const HOPELESS: u32 = 1000;

/// The host's end and what is known of it.
pub(super) struct Port {
    backend: Box<dyn NetBackend>,
    pub(super) counters: Arc<Counters>,
    /// It will never send or receive again.
    pub(super) is_gone: bool,
    /// The driver uses the pair of queues that this is for.
    pub(super) is_in_use: bool,
    lost_in_a_row: u32,
    /// What the host's end knows that it may leave to the guest.
    offloads: Offloads,
    has_warned: bool,
}

/// What became of a frame to the host.
pub(super) enum Sent {
    Done,
    /// It has to wait for room.
    Wait,
    Lost,
}

/// What came from the host.
pub(super) enum Received {
    /// A frame of so many bytes.
    Frame(usize),
    Nothing,
    /// A frame that could not be had.
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

    pub(super) fn fd(&self) -> i32 {
        self.backend.fd()
    }

    /// What tells that the link may have changed, while there is a network.
    pub(super) fn link_fd(&self) -> Option<i32> {
        self.backend.link_fd().filter(|_| !self.is_gone)
    }

    pub(super) fn is_link_up(&mut self) -> bool {
        !self.is_gone && self.backend.is_link_up()
    }

    /// Frames can be had.
    pub(super) fn can_move(&self) -> bool {
        self.is_in_use && !self.is_gone
    }

    /// The network brings frames here, or it does not; false, and nothing has changed, where the host refuses.
    pub(super) fn set_in_use(&mut self, is_in_use: bool) -> bool {
        if self.is_in_use == is_in_use || self.is_gone {
            return true;
        }
        match self.backend.set_in_use(is_in_use) {
            Ok(()) => self.is_in_use = is_in_use,
            Err(error) if !std::mem::replace(&mut self.has_warned, true) => {
                let identity = self.backend.identity();
                warn!("net: the queues of {identity} stay as they are: {error}");
            }
            Err(_) => {}
        }
        self.is_in_use == is_in_use
    }

    /// Lets the host's end leave so much to the guest, and gives what it may leave now: the same as before where it refuses.
    pub(super) fn set_offloads(&mut self, offloads: Offloads) -> Offloads {
        // Asked for what is new only: a driver can ask as often as it likes, and the host tells all who watch its interfaces.
        if self.offloads != offloads && !self.is_gone {
            match self.backend.set_offloads(offloads) {
                Ok(()) => self.offloads = offloads,
                Err(error) if !std::mem::replace(&mut self.has_warned, true) => {
                    warn!(
                        "net: the offloads of {} stay as they are: {error}",
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
                self.counters.tx_failed.add_aloud(format_args!(
                    "a frame was dropped, the host did not take it: {error}"
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
                let is_over = self.lost_in_a_row >= HOPELESS;
                self.note_gone(is_over || error.kind() == ErrorKind::NotConnected);
                self.counters
                    .rx_failed
                    .add_aloud(format_args!("a frame from the host was lost: {error}"));
                Received::Lost
            }
        }
    }

    fn note_gone(&mut self, is_gone: bool) {
        if is_gone && !std::mem::replace(&mut self.is_gone, true) {
            warn!(
                "net: the network of {} is gone: the link is down from now on",
                self.backend.identity()
            );
        }
    }
}
