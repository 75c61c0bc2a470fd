//! The handle of the running I/O loop, to stop it and to refresh its sources.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::OnFailure;

/// State that the loop's thread shares with its handle.
#[derive(Debug)]
pub(super) struct LoopState {
    pub(super) wake: EventFd,
    /// Deadline for the end of the loop; set once, and shortened by [`LoopState::shorten`].
    pub(super) deadline: Mutex<Option<Instant>>,
    /// A request of the handle is to be followed: set after the request itself.
    pub(super) wants_refresh: AtomicBool,
    /// An event was served since it was last expected.
    pub(super) is_active: AtomicBool,
    pub(super) turns: AtomicU64,
    rest: Mutex<Rest>,
    rests: Condvar,
}

/// The requested and the reached rest of the devices: no event is delivered to them.
#[derive(Debug, Default)]
struct Rest {
    is_requested: bool,
    /// Deadline for the devices' pending output before the rest.
    drain_until: Option<Instant>,
    is_reached: bool,
    has_ended: bool,
}

impl LoopState {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            wake: EventFd::new(EFD_NONBLOCK)?,
            deadline: Mutex::new(None),
            wants_refresh: AtomicBool::new(true),
            is_active: AtomicBool::new(false),
            turns: AtomicU64::new(0),
            rest: Mutex::default(),
            rests: Condvar::new(),
        })
    }

    /// True if no events are to be delivered to devices; with a deadline if only once they have no pending output.
    pub(super) fn wanted_rest(&self) -> (bool, Option<Instant>) {
        let rest = self.lock_rest();
        (rest.is_requested, rest.drain_until)
    }

    /// Requests the rest of the devices before the thread starts.
    pub(super) fn rest_from_the_start(&self) {
        let mut rest = self.lock_rest();
        (rest.is_requested, rest.is_reached) = (true, true);
    }

    /// Notes whether events are delivered to devices.
    pub(super) fn set_rest(&self, is_reached: bool) {
        self.lock_rest().is_reached = is_reached;
        self.rests.notify_all();
    }

    /// Notes that the thread has ended: no event is delivered any more.
    pub(super) fn set_ended(&self) {
        self.lock_rest().has_ended = true;
        self.rests.notify_all();
    }

    fn lock_rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deadline for the end of the loop; `None` if it was not stopped.
    pub(super) fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shortens the deadline of a loop that was stopped or is to rest to `rest` from now; does not affect another one.
    pub(super) fn shorten(&self, rest: Duration) {
        let now = Instant::now();
        let soon = now.checked_add(rest).unwrap_or(now);
        let mut wanted = self.lock_rest();
        wanted.drain_until = wanted.drain_until.map(|until| until.min(soon));
        drop(wanted);
        let mut deadline = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        *deadline = deadline.map(|deadline| deadline.min(soon));
    }
}

/// Reports that the thread has ended without being stopped. If it panics, dropping this reports it.
pub(super) struct Failure(pub(super) Option<OnFailure>, pub(super) Arc<LoopState>);

impl Failure {
    /// Reports nothing: the thread was stopped.
    pub(super) fn none(mut self) {
        self.0 = None;
    }

    pub(super) fn report(mut self, what: String) {
        error!("{what}");
        let _ = self.0.take().map(|failed| failed(what));
    }
}

impl Drop for Failure {
    fn drop(&mut self) {
        self.1.set_ended();
        let _ = self.0.take().map(|failed| failed("The I/O thread panicked".into()));
    }
}

/// The running loop. Dropping it stops the loop at once; [`IoThread::stop`] waits for the last output.
#[derive(Debug)]
pub struct IoThread {
    pub(super) state: Arc<LoopState>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Makes the loop read the sources of all devices again: after a reset of the bus, or after a change outside of `ready`.
    pub fn refresh(&self) {
        self.state.wants_refresh.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Stops the delivery of events to devices as soon as none has pending output, after `drain` at the latest; returns once no event is
    /// being delivered: events wait in their descriptors. Signals and the external event source are still served.
    pub fn pause(&self, drain: Duration) {
        let now = Instant::now();
        let mut rest = self.state.lock_rest();
        rest.is_requested = true;
        rest.drain_until = Some(now.checked_add(drain).unwrap_or(now));
        drop(rest);
        // There may be output for which no source is listed yet.
        self.refresh();
        let rest = self.state.lock_rest();
        let is_waiting = |rest: &mut Rest| !rest.is_reached && !rest.has_ended;
        drop(self.state.rests.wait_while(rest, is_waiting));
    }

    /// Delivers events to devices again, also to those that were added meanwhile.
    pub fn resume(&self) {
        self.state.lock_rest().is_requested = false;
        self.refresh();
    }

    /// Reports the next event ([`IoLoop::watch_activity`](super::IoLoop::watch_activity)).
    pub fn expect_activity(&self) {
        self.state.is_active.store(false, Ordering::SeqCst);
    }

    /// True if the thread has ended: no device gets events any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state.lock_rest().has_ended
    }

    /// Number of times that the thread has woken up and served all events.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.state.turns.load(Ordering::Acquire)
    }

    /// Stops the loop as soon as no device has pending output, after `drain` at the latest. Returns when the thread
    /// has ended.
    ///
    /// # Errors
    /// `Other` if the thread has panicked.
    pub fn stop(mut self, drain: Duration) -> io::Result<()> {
        self.end(drain)
    }

    /// Stops a paused loop, whose devices stay at rest: no event is delivered any more. Returns when the thread has ended.
    ///
    /// # Errors
    /// As for [`IoThread::stop`].
    pub fn stop_at_rest(mut self) -> io::Result<()> {
        self.end_by(Instant::now())
    }

    fn end(&mut self, drain: Duration) -> io::Result<()> {
        let now = Instant::now();
        self.state.lock_rest().is_requested = false;
        self.end_by(now.checked_add(drain).unwrap_or(now))
    }

    fn end_by(&mut self, deadline: Instant) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        *self.state.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        // There may be output for which no source is listed yet.
        self.refresh();
        thread.join().map_err(|_| io::Error::other("The I/O thread panicked"))
    }

    fn wake(&self) {
        // Fails if the counter is at its limit: it wakes up anyway.
        let _ = self.state.wake.write(1);
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        let _ = self.end(Duration::ZERO);
    }
}
