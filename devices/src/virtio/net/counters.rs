//! What a network device has let through and what it has dropped.

use std::sync::atomic::{AtomicU64, Ordering};

use log::warn;

/// Frames since the device was made, by what became of them.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the guest, sent.
    pub tx_frames: Counter,
    /// From the guest, dropped: the header or the size makes no sense.
    pub tx_malformed: Counter,
    /// From the guest, dropped: the sender's address is not the device's (`pin=on`).
    pub tx_spoofed: Counter,
    /// From the guest, dropped: the host did not take it.
    pub tx_failed: Counter,
    /// From the host, given to the guest.
    pub rx_frames: Counter,
    /// From the host, dropped: larger than the guest's buffers or than the MTU.
    pub rx_too_large: Counter,
    /// From the host, dropped: the guest does not take such frames (any more).
    pub rx_unfit: Counter,
    /// From the host, lost on the way.
    pub rx_failed: Counter,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// How many so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one, and says what the first one was.
    pub(super) fn add_aloud(&self, what: impl std::fmt::Display) {
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!("net: {what} (further ones are only counted)");
        }
    }
}
