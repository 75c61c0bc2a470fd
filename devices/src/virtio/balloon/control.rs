//! Control of a balloon from outside the device: its target, and the size that the guest reports.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pages::PAGE;

/// Target that is not set yet: more pages than a balloon can have.
const UNSET: u64 = u64::MAX;

/// Sets the size of a balloon and reads it, from any thread and across reboots. A clone is a handle to the same balloon.
#[derive(Debug, Clone)]
pub struct BalloonControl(Arc<SharedBalloon>);

#[derive(Debug)]
struct SharedBalloon {
    /// Target in pages.
    target: AtomicU64,
    /// Pages in the balloon, as the guest reports.
    actual: AtomicU32,
    /// [`BalloonControl::set_target`] was called.
    is_set: AtomicBool,
    /// Readable when the target has changed.
    changed: EventFd,
}

/// A target too large for a balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "Cannot set the balloon to {bytes} bytes: page numbers have 32 bits (set less than 16 TiB)"
)]
pub struct BalloonTooLarge {
    bytes: u64,
}

impl BalloonControl {
    /// Creates a control that belongs to no balloon yet.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (target, actual) = (AtomicU64::new(UNSET), AtomicU32::new(0));
        Ok(Self(Arc::new(SharedBalloon {
            target,
            actual,
            is_set: AtomicBool::new(false),
            changed,
        })))
    }

    /// Sets the target: bytes to have in the balloon, in whole pages of 4 KiB. The guest's driver decides if it follows;
    /// [`actual`](Self::actual) has the result. The target persists across resets.
    ///
    /// # Errors
    /// 2^32 pages (16 TiB) or more.
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonTooLarge> {
        let pages = u32::try_from(bytes / PAGE).map_err(|_| BalloonTooLarge { bytes })?;
        self.0.target.store(pages.into(), Ordering::SeqCst);
        self.0.is_set.store(true, Ordering::SeqCst);
        // An error means that it is readable already.
        let _ = self.0.changed.write(1);
        Ok(())
    }

    /// The target in bytes.
    #[must_use]
    pub fn target(&self) -> u64 {
        self.target_pages().map_or(0, |pages| u64::from(pages) * PAGE)
    }

    /// Bytes in the balloon, as the guest reports; not verified.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::SeqCst)) * PAGE
    }

    /// Attaches a new balloon, and returns its target in pages: the one set before, else `first`.
    pub(super) fn begin(&self, first: u32) -> u32 {
        let (new, order) = (u64::from(first), Ordering::SeqCst);
        let _ = self.0.target.compare_exchange(UNSET, new, order, order);
        self.0.actual.store(0, order);
        self.target_pages().unwrap_or(first)
    }

    /// Attaches a balloon that was saved with the target `saved`, and returns its target in pages: the one that
    /// [`set_target`](Self::set_target) has set for this machine, else `saved`.
    pub(super) fn restore(&self, saved: u32) -> Option<u32> {
        if !self.0.is_set.load(Ordering::SeqCst) {
            self.0.target.store(saved.into(), Ordering::SeqCst);
        }
        self.target_pages()
    }

    /// The target in pages, if one is set.
    pub(super) fn target_pages(&self) -> Option<u32> {
        u32::try_from(self.0.target.load(Ordering::SeqCst)).ok()
    }

    /// Stores the number of pages that the guest reports.
    pub(super) fn set_actual(&self, pages: u32) {
        self.0.actual.store(pages, Ordering::SeqCst);
    }

    /// Clears the event of a changed target; before the target is read.
    pub(super) fn clear_event(&self) {
        // Fails if the event was stale.
        let _ = self.0.changed.read();
    }
}

impl AsRawFd for BalloonControl {
    fn as_raw_fd(&self) -> RawFd {
        self.0.changed.as_raw_fd()
    }
}
