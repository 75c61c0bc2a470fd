//! Counters of the frames that a network device has passed and dropped.

use std::sync::atomic::{AtomicU64, Ordering};

use log::warn;

/// Frames since the device was created, by outcome.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the guest, sent.
    pub tx_frames: Counter,
    /// From the guest, dropped: the header or the size is invalid.
    pub tx_malformed: Counter,
    /// From the guest, dropped: the source address is not the device's (`pin=on`).
    pub tx_spoofed: Counter,
    /// From the guest, dropped: the host did not accept it.
    pub tx_failed: Counter,
    /// From the host, delivered to the guest.
    pub rx_frames: Counter,
    /// From the host, dropped: larger than the guest's buffers or than the MTU.
    pub rx_too_large: Counter,
    /// From the host, dropped: needs an offload that the guest does not accept (any more).
    pub rx_unfit: Counter,
    /// From the host, lost: reading it failed.
    pub rx_failed: Counter,
}

/// A counter that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one frame, and logs the first one.
    pub(super) fn add_and_warn(&self, what: impl std::fmt::Display) {
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!("net: {what} (further ones are only counted)");
        }
    }
}
