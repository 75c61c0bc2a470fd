//! How much a guest can take over a stream (virtio 1.3, section 5.10.6.3). All counts are modulo 2^32.

use super::packet::Header;

/// The guest's room, as it has told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Credit {
    /// Bytes sent to the guest, and those of them that its application has taken.
    pub(super) sent: u32,
    pub(super) taken: u32,
    /// Bytes that the guest can hold.
    pub(super) buffer: u32,
}

impl Credit {
    /// How many bytes the guest can take now. It may have shrunk its buffer below what is in it.
    pub(super) fn room(&self) -> u32 {
        self.buffer.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// Counts bytes that were sent.
    pub(super) fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Notes what a packet tells; false where the guest says that it has taken what it was not sent.
    pub(super) fn update(&mut self, header: &Header) -> bool {
        let news = header.fwd_cnt.wrapping_sub(self.taken);
        // A count from before the last one is old: two harts of the guest may send in another order than they counted.
        let is_old = news > u32::MAX / 2;
        if !is_old && news > self.sent.wrapping_sub(self.taken) {
            return false;
        }
        if !is_old {
            self.taken = header.fwd_cnt;
        }
        self.buffer = header.buf_alloc;
        true
    }
}
