//! From the guest to the host (virtio 1.3, section 5.1.6.2).
//!
//! The header and the Ethernet header are copied once, judged, and sent from the copy; the rest of the frame goes out of
//! guest memory as it is. A frame that makes no sense is dropped and counted, never passed on.

use super::header::{HEADER, HEADER_LEN, Header, MAX_FRAME, MIN_FRAME, Offloads};
use super::port::{Port, Sent};
use crate::virtio::{Chain, GuestMemoryMmap, Limiter, Segment, VirtioError, Work, pieces};

/// Bytes that one pass hands to the host, but for the last frame's.
const PASS: u32 = 512 << 10;

/// What is copied: a header and an Ethernet header.
const HEAD: usize = HEADER + MIN_FRAME as usize;
const HEAD_LEN: u32 = HEADER_LEN + MIN_FRAME;

/// Where in it the sender's address is.
const SENDER: std::ops::Range<usize> = HEADER + 6..HEADER + 12;

/// This direction of a pair of queues.
pub(super) struct Transmitter {
    queue: u16,
    /// The only sender that may be, where that is so.
    pinned: Option<[u8; 6]>,
    segments: Vec<Segment>,
    offloads: Offloads,
    /// The host has no room.
    pub(super) is_blocked: bool,
    /// The next frame was allowed, and then there was no room.
    has_paid: bool,
}

impl Transmitter {
    /// Of this queue; with the only sender that may be, where that is so.
    pub(super) fn new(queue: u16, pinned: Option<[u8; 6]>) -> Self {
        Self {
            queue,
            pinned,
            segments: Vec::new(),
            offloads: Offloads::default(),
            is_blocked: false,
            has_paid: false,
        }
    }

    pub(super) fn start(&mut self, features: u64) {
        self.offloads = Offloads::of_device(features);
    }

    pub(super) fn stop(&mut self) {
        self.is_blocked = false;
        self.has_paid = false;
    }

    /// Moves frames until there are no more, or no more room, or enough for now.
    pub(super) fn pass(
        &mut self,
        limit: &mut Limiter,
        port: &mut Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let mut moved = 0;
        while port.is_in_use && !self.is_blocked && !limit.is_waiting() {
            if moved >= PASS {
                work.leave(self.queue);
                break;
            }
            let Some(chain) = work.pop(self.queue)? else { break };
            // What makes no sense is paid for as well; it costs rvmm as much as a frame at most.
            let size = chain.readable_bytes().min(MAX_FRAME);
            if !self.has_paid && !limit.allows(size.into()) {
                work.put_back(chain);
                break;
            }
            self.has_paid = false;
            moved = size.saturating_add(moved);
            self.transmit(chain, port, work);
        }
        Ok(())
    }

    fn transmit(&mut self, chain: Chain, port: &mut Port, work: &mut Work<'_>) {
        let Some(head) = self.judge(&chain, work.memory()) else {
            port.counters
                .tx_malformed
                .add_aloud("a frame of the guest was dropped, it makes no sense");
            return work.refuse(chain);
        };
        if self.pinned.is_some_and(|mac| head.get(SENDER) != Some(mac.as_slice())) {
            let what = "a frame of the guest was dropped, its sender is not the device's address";
            port.counters.tx_spoofed.add_aloud(what);
            return work.complete(chain, 0);
        }
        self.segments.clear();
        self.segments.extend(pieces(chain.readable(), HEAD_LEN, MAX_FRAME as usize));
        match port.send(work.memory(), &head, &self.segments) {
            Sent::Done | Sent::Lost => work.complete(chain, 0),
            Sent::Wait => {
                work.put_back(chain);
                self.is_blocked = true;
                self.has_paid = true;
            }
        }
    }

    /// The first bytes as they may be sent; `None` where the frame must not.
    fn judge(&self, chain: &Chain, memory: &GuestMemoryMmap) -> Option<[u8; HEAD]> {
        let len = chain.readable_bytes().checked_sub(HEADER_LEN)?;
        let mut head = [0; HEAD];
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) || chain.read_at(memory, 0, &mut head) < HEAD {
            return None;
        }
        let (raw, _) = head.split_first_chunk_mut::<HEADER>()?;
        *raw = Header::parse(*raw).sent_by_guest(len, self.offloads)?.bytes();
        Some(head)
    }
}
