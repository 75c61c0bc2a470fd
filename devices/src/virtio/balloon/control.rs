//! A balloon from outside: how much is asked of the guest, and how much it says it has given.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pages::PAGE;

/// Nothing was asked yet: more pages than a balloon can have.
const NOTHING: u64 = u64::MAX;

/// Sets the size of a balloon and reads it, from any thread, over all lives of the guest. Clones mean the same balloon.
#[derive(Debug, Clone)]
pub struct BalloonControl(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Pages that the guest is asked for.
    target: AtomicU64,
    /// Pages that the guest says it has given.
    actual: AtomicU32,
    /// Readable when the target has changed.
    changed: EventFd,
}

/// A balloon cannot be asked for so much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "Cannot ask a balloon for {bytes} bytes: page numbers have 32 bits (ask for less than 16 TiB)"
)]
pub struct BalloonTooLarge {
    bytes: u64,
}

impl BalloonControl {
    /// A control of which no balloon knows yet.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (target, actual) = (AtomicU64::new(NOTHING), AtomicU32::new(0));
        Ok(Self(Arc::new(Shared { target, actual, changed })))
    }

    /// Asks the guest to have this many bytes in the balloon, whole pages of 4 KiB; what it does is up to its driver, and
    /// [`actual`](Self::actual) tells. It is asked for the same again after a reset.
    ///
    /// # Errors
    /// 2^32 pages (16 TiB) or more.
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonTooLarge> {
        let pages = u32::try_from(bytes / PAGE).map_err(|_| BalloonTooLarge { bytes })?;
        self.0.target.store(pages.into(), Ordering::SeqCst);
        // Refused means that it is readable already.
        let _ = self.0.changed.write(1);
        Ok(())
    }

    /// Bytes that the guest is asked for.
    #[must_use]
    pub fn target(&self) -> u64 {
        self.asked().map_or(0, |pages| u64::from(pages) * PAGE)
    }

    /// Bytes that the guest says it has given; it may say anything.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::SeqCst)) * PAGE
    }

    /// Pages that the guest is asked for: what was asked before, else `first` from now on.
    pub(super) fn begin(&self, first: u32) -> u32 {
        let (new, order) = (u64::from(first), Ordering::SeqCst);
        let _ = self.0.target.compare_exchange(NOTHING, new, order, order);
        self.0.actual.store(0, order);
        self.asked().unwrap_or(first)
    }

    /// Pages that the guest is asked for, if somebody has asked.
    pub(super) fn asked(&self) -> Option<u32> {
        u32::try_from(self.0.target.load(Ordering::SeqCst)).ok()
    }

    /// The guest says how many pages it has given.
    pub(super) fn gave(&self, pages: u32) {
        self.0.actual.store(pages, Ordering::SeqCst);
    }

    /// Takes note that the target may have changed; before it is looked at.
    pub(super) fn heard(&self) {
        // Empty where the event was stale.
        let _ = self.0.changed.read();
    }
}

impl AsRawFd for BalloonControl {
    fn as_raw_fd(&self) -> RawFd {
        self.0.changed.as_raw_fd()
    }
}
