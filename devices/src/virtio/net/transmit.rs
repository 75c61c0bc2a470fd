//! Frames from the guest to the host (virtio 1.3, section 5.1.6.2).
//!
//! The header and the Ethernet header are copied once, validated, and sent from the copy; the rest of the frame is sent from
//! guest memory as it is. An invalid frame is dropped and counted, never forwarded.

use serde::{Deserialize, Serialize};

use super::header::{FrameHeader, HEADER, HEADER_LEN, MAX_FRAME, MIN_FRAME, Offloads};
use super::port::{Port, Sent};
use crate::virtio::{Chain, GuestMemoryMmap, Limiter, Segment, VirtioError, Work, pieces};

/// Bytes that one pass sends; the last frame may exceed it.
const PASS: u32 = 512 << 10;

/// Bytes that are copied: a header and an Ethernet header.
const HEAD: usize = HEADER + MIN_FRAME as usize;
const HEAD_LEN: u32 = HEADER_LEN + MIN_FRAME;

/// The source MAC address in the copied bytes.
const SOURCE: std::ops::Range<usize> = HEADER + 6..HEADER + 12;

/// The transmit queue of a pair.
pub(super) struct Transmitter {
    queue: u16,
    /// The only permitted source address, with `pin=on`.
    pinned: Option<[u8; 6]>,
    segments: Vec<Segment>,
    offloads: Offloads,
    /// The backend has no room.
    pub(super) is_blocked: bool,
    /// The next frame is charged to the limit already; the backend had no room for it.
    is_charged: bool,
}

/// The state of a transmit queue.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TransmitterState {
    is_charged: bool,
}

impl Transmitter {
    /// Creates the transmitter of this queue; `pinned` is the only permitted source address, if any.
    pub(super) fn new(queue: u16, pinned: Option<[u8; 6]>) -> Self {
        Self {
            queue,
            pinned,
            segments: Vec::new(),
            offloads: Offloads::default(),
            is_blocked: false,
            is_charged: false,
        }
    }

    /// Sets the only permitted source address, if there is one.
    pub(super) fn set_mac(&mut self, mac: [u8; 6]) {
        self.pinned = self.pinned.map(|_| mac);
    }

    pub(super) fn save(&self) -> TransmitterState {
        let Self {
            queue: _,
            pinned: _,
            segments: _,
            // Negotiated.
            offloads: _,
            // The backend of the restored device has room, or says again that it has none.
            is_blocked: _,
            is_charged,
        } = self;
        TransmitterState { is_charged: *is_charged }
    }

    pub(super) fn restore(&mut self, state: &TransmitterState) {
        let TransmitterState { is_charged } = *state;
        self.is_charged = is_charged;
    }

    pub(super) fn start(&mut self, features: u64) {
        self.offloads = Offloads::of_device(features);
    }

    pub(super) fn stop(&mut self) {
        self.is_blocked = false;
        self.is_charged = false;
    }

    /// Sends frames until the queue is empty, the backend is full, or the limit of a pass is reached.
    pub(super) fn pass(
        &mut self,
        limit: &mut Limiter,
        port: &mut Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let mut moved = 0;
        while port.is_in_use && !self.is_blocked && !limit.is_waiting() {
            if moved >= PASS {
                work.end_pass(self.queue);
                break;
            }
            let Some(chain) = work.pop(self.queue)? else { break };
            // Invalid chains are charged, too; they cost rvmm as much as a frame at most.
            let size = chain.readable_bytes().min(MAX_FRAME);
            if !self.is_charged && !limit.allows(size.into()) {
                work.put_back(chain);
                break;
            }
            self.is_charged = false;
            moved = size.saturating_add(moved);
            self.transmit(chain, port, work);
        }
        Ok(())
    }

    fn transmit(&mut self, chain: Chain, port: &mut Port, work: &mut Work<'_>) {
        let Some(head) = self.valid_head(&chain, work.memory()) else {
            port.counters
                .tx_malformed
                .add_and_warn("a frame of the guest was dropped, it is malformed");
            return work.refuse(chain);
        };
        if self.pinned.is_some_and(|mac| head.get(SOURCE) != Some(mac.as_slice())) {
            let what = "a frame of the guest was dropped, its source is not the device's address";
            port.counters.tx_spoofed.add_and_warn(what);
            return work.complete(chain, 0);
        }
        self.segments.clear();
        self.segments.extend(pieces(chain.readable(), HEAD_LEN, MAX_FRAME as usize));
        match port.send(work.memory(), &head, &self.segments) {
            Sent::Done | Sent::Lost => work.complete(chain, 0),
            Sent::Wait => {
                work.put_back(chain);
                self.is_blocked = true;
                self.is_charged = true;
            }
        }
    }

    /// The first bytes of a frame, validated; `None` if the frame is malformed.
    fn valid_head(&self, chain: &Chain, memory: &GuestMemoryMmap) -> Option<[u8; HEAD]> {
        let len = chain.readable_bytes().checked_sub(HEADER_LEN)?;
        let mut head = [0; HEAD];
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) || chain.read_at(memory, 0, &mut head) < HEAD {
            return None;
        }
        let (raw, _) = head.split_first_chunk_mut::<HEADER>()?;
        *raw = FrameHeader::parse(*raw).sent_by_guest(len, self.offloads)?.bytes();
        Some(head)
    }
}
