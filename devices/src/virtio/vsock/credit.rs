//! The guest's credit on a stream (virtio 1.3, section 5.10.6.3). All counts are modulo 2^32.

use super::packet::PacketHeader;

/// The guest's receive buffer, as it has reported it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Credit {
    /// Bytes sent to the guest, and the part of them that its application has read.
    pub(super) sent: u32,
    pub(super) taken: u32,
    /// Size of the guest's buffer in bytes.
    pub(super) buffer: u32,
}

impl Credit {
    /// Bytes that the guest can receive now. It may have shrunk its buffer below the bytes in it.
    pub(super) fn room(&self) -> u32 {
        self.buffer.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// Counts bytes that were sent.
    pub(super) fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Updates the credit from a packet; false if the guest claims to have read more than was sent.
    pub(super) fn update(&mut self, header: &PacketHeader) -> bool {
        let newly_taken = header.fwd_cnt.wrapping_sub(self.taken);
        // A count below the last one is stale: two harts of the guest may send in another order than they counted.
        let is_old = newly_taken > u32::MAX / 2;
        if !is_old && newly_taken > self.sent.wrapping_sub(self.taken) {
            return false;
        }
        if !is_old {
            self.taken = header.fwd_cnt;
        }
        self.buffer = header.buf_alloc;
        true
    }
}
