//! The running I/O loop as others see it: told to end, asked to look again.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::OnFailure;

/// What the loop's thread shares with those outside.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) wake: EventFd,
    /// When the loop has to be over; set once, and drawn nearer by [`Shared::hurry`].
    pub(super) deadline: Mutex<Option<Instant>>,
    pub(super) wants_refresh: AtomicBool,
    pub(super) turns: AtomicU64,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            wake: EventFd::new(EFD_NONBLOCK)?,
            deadline: Mutex::new(None),
            wants_refresh: AtomicBool::new(true),
            turns: AtomicU64::new(0),
        })
    }

    /// When the loop has to be over; `None` where nobody has told it to end.
    pub(super) fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a loop that was told to end be over in `rest` at the latest; another one goes on.
    pub(super) fn hurry(&self, rest: Duration) {
        let mut deadline = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let soon = now.checked_add(rest).unwrap_or(now);
        *deadline = deadline.map(|deadline| deadline.min(soon));
    }
}

/// Tells that the thread has ended although nobody has ended it: also where it panics, when this is dropped.
pub(super) struct Failure(pub(super) Option<OnFailure>);

impl Failure {
    /// The thread has ended as it should.
    pub(super) fn none(mut self) {
        self.0 = None;
    }

    pub(super) fn tell(mut self, what: String) {
        error!("{what}");
        let _ = self.0.take().map(|failed| failed(what));
    }
}

impl Drop for Failure {
    fn drop(&mut self) {
        let _ = self.0.take().map(|failed| failed("The I/O thread panicked".into()));
    }
}

/// The running loop. Dropping it ends it at once; [`IoThread::stop`] lets the last output go first.
#[derive(Debug)]
pub struct IoThread {
    pub(super) shared: Arc<Shared>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Asks every device for its sources again: after a reset of the bus, or when a device changed outside of `ready`.
    pub fn refresh(&self) {
        self.shared.wants_refresh.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// How often the thread has woken up and done what there was to do.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.shared.turns.load(Ordering::Acquire)
    }

    /// Ends the loop: as soon as no device owes the host any output, after `drain` at the latest. Returns when the thread
    /// is gone.
    ///
    /// # Errors
    /// `Other` where the thread died by a panic.
    pub fn stop(mut self, drain: Duration) -> io::Result<()> {
        self.end(drain)
    }

    fn end(&mut self, drain: Duration) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let now = Instant::now();
        let deadline = now.checked_add(drain).unwrap_or(now);
        *self.shared.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        // Output may wait that no `ready` has told about.
        self.refresh();
        thread.join().map_err(|_| io::Error::other("The I/O thread panicked"))
    }

    fn wake(&self) {
        // Refused means that it is about to wake up anyway.
        let _ = self.shared.wake.write(1);
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        let _ = self.end(Duration::ZERO);
    }
}
