//! The I/O thread, with the only epoll set of a machine. It watches the descriptors of the devices and of the command.
//!
//! The contract with a device is [`rvmm_devices::MmioDevice`]'s: the loop reads its list of sources at the start and after every
//! `ready`, and applies the changes. The set is level-triggered, but for [`Interest::Signal`]. A descriptor that no device lists is not in the set, so
//! an unhandled hang-up costs nothing; one that reports only a hang-up or an error, and is still listed unchanged afterwards, is
//! removed until the device changes its list. A device reset closes descriptors on a hart's thread, and their numbers stay in the
//! set until the list is read again: if another descriptor gets such a number first, the closed one is removed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, Events, SubscriberId, SubscriberOps};
use log::{info, warn};
use rvmm_devices::{Bus, BusView, Interest, Source};
use vmm_sys_util::epoll::EventSet;

use crate::button::Button;
use crate::signals::{self, Signals};
use crate::terminal::{self, StopRequest};

mod devices;
mod running;
mod watch;

pub use running::IoThread;
use running::{Failure, LoopState};
pub use watch::EventSource;
use watch::{Origin, ReadyEvent, Watch, WatchedSource};

/// Limit of the events of one epoll_wait(2).
const BATCH: usize = 32;

/// A source that a device lists, and its ID in the epoll set; none if it is not in the set.
#[derive(Debug)]
struct Listed {
    source: Source,
    id: Option<SubscriberId>,
}

/// The loop before it runs. No descriptor is watched until [`IoLoop::spawn`].
pub struct IoLoop {
    bus: Arc<Bus>,
    view: BusView,
    manager: EventManager<Watch>,
    ready: Arc<Mutex<Vec<ReadyEvent>>>,
    /// The events being served, and the sources of a device: buffers, kept to reuse their allocations.
    batch: Vec<ReadyEvent>,
    sources: Vec<Source>,
    /// By the index of the device.
    listed: BTreeMap<usize, Vec<Listed>>,
    /// No event is delivered to devices.
    is_paused: bool,
    signals: Option<(Signals, StopRequest)>,
    button: Option<Arc<Button>>,
    external: Option<WatchedSource>,
    failed: Option<OnFailure>,
    shared: Arc<LoopState>,
}

/// Receives the reason, in one line, if the thread ends without [`IoThread::stop`].
pub type OnFailure = Box<dyn FnOnce(String) + Send>;

impl IoLoop {
    /// Time-out for the devices' pending output when a machine is stopped.
    pub const DRAIN: Duration = Duration::from_secs(1);
    /// The same when a machine stops by itself: that is not urgent, and a slow reader gets all output. A signal shortens it.
    pub const LONG_DRAIN: Duration = Duration::from_secs(5);

    /// Creates a loop for the devices of `bus`.
    ///
    /// # Errors
    /// The error of the system call if the host has no descriptors left.
    pub fn new(bus: Arc<Bus>) -> io::Result<Self> {
        let manager = EventManager::new_with_capacity(BATCH).map_err(io::Error::other)?;
        let shared = Arc::new(LoopState::new()?);
        let mut new = Self {
            view: bus.view(),
            bus,
            manager,
            ready: Arc::default(),
            batch: Vec::new(),
            sources: Vec::new(),
            listed: BTreeMap::new(),
            is_paused: false,
            signals: None,
            button: None,
            external: None,
            failed: None,
            shared,
        };
        let wake = new.shared.wake.as_raw_fd();
        new.watch(Origin::Wake, wake, Interest::Read)?;
        Ok(new)
    }

    /// Takes over the process's signals, once for all loops: SIGTERM, SIGINT, SIGHUP and SIGQUIT no longer end it, SIGTSTP
    /// no longer stops it, SIGXFSZ becomes a write error, SIGWINCH reports a new size to a console. Signals before a loop watches
    /// them stay pending.
    ///
    /// Only for a program whose sole purpose is the machine, before it changes the terminal.
    ///
    /// # Errors
    /// `AlreadyExists` if they are taken already.
    pub fn take_signals() -> io::Result<Signals> {
        signals::watch(&[
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGTSTP,
            libc::SIGCONT,
            libc::SIGXFSZ,
            libc::SIGWINCH,
        ])
    }

    /// Handles `signals`: SIGTERM, SIGINT, SIGHUP and SIGQUIT call `stop`; SIGTSTP restores the terminal while the process is
    /// stopped, SIGCONT sets it to raw mode again. Only one loop at a time may do so.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn watch_signals(&mut self, signals: Signals, stop: StopRequest) -> io::Result<()> {
        self.watch(Origin::Signal, signals.as_raw_fd(), Interest::Read)?;
        self.signals = Some((signals, stop));
        Ok(())
    }

    /// Makes the first SIGTERM press the power button instead, and stops the machine if the guest does not power off in time.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn watch_power_button(&mut self, button: Arc<Button>) -> io::Result<()> {
        self.watch(Origin::ShutdownTimeout, button.as_raw_fd(), Interest::Read)?;
        self.button = Some(button);
        Ok(())
    }

    /// Calls `source` when its descriptor is readable.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn watch_external(&mut self, source: Arc<dyn EventSource>) -> io::Result<()> {
        let fd = source.fd();
        let id = self.watch(Origin::External, fd, Interest::Read)?;
        self.external = Some(WatchedSource { source, fd, id });
        Ok(())
    }

    /// Calls `failed` if epoll fails or the thread panics: from then on no device gets input or notifications.
    pub fn watch_failure(&mut self, failed: OnFailure) {
        self.failed = Some(failed);
    }

    /// Starts the thread, named `io`.
    ///
    /// # Errors
    /// The error of the system call if the host has no threads left.
    pub fn spawn(mut self) -> io::Result<IoThread> {
        let shared = Arc::clone(&self.shared);
        let failure = Failure(self.failed.take(), Arc::clone(&shared));
        let body = move || match self.run() {
            Ok(()) => failure.none(),
            Err(error) => failure.report(format!("The I/O thread failed: {error}")),
        };
        let thread = thread::Builder::new().name("io".into()).spawn(body)?;
        Ok(IoThread { shared, thread: Some(thread) })
    }

    fn run(mut self) -> event_manager::Result<()> {
        loop {
            if self.shared.wants_refresh.swap(false, Ordering::SeqCst) {
                self.sync_all();
            }
            self.follow_rest();
            let Some(timeout_ms) = self.timeout_ms() else { return Ok(()) };
            self.manager.run_with_timeout(timeout_ms)?;
            let mut batch = std::mem::take(&mut self.batch);
            let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut batch, &mut *ready);
            drop(ready);
            for (origin, only_hang_up) in batch.drain(..) {
                self.serve(origin, only_hang_up);
            }
            self.batch = batch;
            // Counted at the end: when the count is visible, all events are served.
            self.shared.turns.fetch_add(1, Ordering::Release);
        }
    }

    /// Time-out of the next turn; -1 for none. `None` if the loop is over: it was stopped, and no device has pending output,
    /// or the time-out for that is over.
    fn timeout_ms(&self) -> Option<i32> {
        let Some(deadline) = self.shared.deadline() else { return Some(self.rest_timeout_ms()) };
        if !self.has_output() {
            return None;
        }
        millis_until(deadline)
    }

    /// Time-out of a turn before the devices rest: until the deadline for their pending output, if they are to.
    fn rest_timeout_ms(&self) -> i32 {
        let (wants_rest, drain_until) = self.shared.wanted_rest();
        let until = drain_until.filter(|_| wants_rest && !self.is_paused);
        until.map_or(-1, |until| millis_until(until).unwrap_or(0))
    }

    /// True if a device has pending output.
    fn has_output(&self) -> bool {
        let has_output = |listed: &Listed| listed.id.is_some() && listed.source.interest.writes();
        self.listed.values().flatten().any(has_output)
    }

    fn serve(&mut self, origin: Origin, only_hang_up: bool) {
        match origin {
            Origin::Wake => {
                // Fails if it was read already.
                let _ = self.shared.wake.read();
            }
            Origin::Signal => self.serve_signals(),
            Origin::ShutdownTimeout => self.end_shutdown(),
            Origin::External => self.serve_external(),
            Origin::Device { index, source } => {
                let is_listed = |listed: &Listed| listed.source == source && listed.id.is_some();
                // An earlier event of the same batch may have changed the device's list.
                if !self.listed.get(&index).is_some_and(|list| list.iter().any(is_listed)) {
                    return;
                }
                let mut sources = std::mem::take(&mut self.sources);
                self.view.ready(index, source.token, &mut sources);
                self.apply(index, &sources);
                self.sources = sources;
                if only_hang_up {
                    self.mute(index, source);
                }
            }
        }
    }

    fn serve_signals(&mut self) {
        let Some((signals, stop)) = self.signals.as_ref() else { return };
        for signal in signals.take() {
            self.handle_signal(signal, stop);
        }
    }

    fn handle_signal(&self, signal: i32, stop: &StopRequest) {
        match signal {
            libc::SIGTSTP => terminal::suspend(),
            libc::SIGCONT => terminal::resume(),
            libc::SIGXFSZ => {}
            libc::SIGWINCH => terminal::resized(),
            _ => {
                // If the guest has stopped already, the loop is waiting for a slow reader of its output.
                self.shared.shorten(Self::DRAIN);
                if signal == libc::SIGTERM && self.button.as_ref().is_some_and(|b| b.press()) {
                    info!("SIGTERM presses the power button");
                } else {
                    info!("Stopping the machine on signal {signal}");
                    stop();
                }
            }
        }
    }

    fn end_shutdown(&self) {
        if self.button.as_ref().is_some_and(|button| button.is_over()) {
            warn!("The guest has not powered off in time: stopping the machine");
            let _ = self.signals.as_ref().map(|(_, stop)| stop());
        }
    }

    fn serve_external(&mut self) {
        let Some(WatchedSource { source, fd, .. }) = &self.external else { return };
        source.ready();
        if source.fd() == *fd {
            return;
        }
        let Some(WatchedSource { source, id, .. }) = self.external.take() else { return };
        self.unwatch(Some(id));
        if let Err(error) = self.watch_external(source) {
            warn!("Inspection socket no longer available: {error}");
        }
    }

    fn watch(&mut self, origin: Origin, fd: RawFd, interest: Interest) -> io::Result<SubscriberId> {
        let mut added = self.add(origin, fd, interest);
        if matches!(added, Err(event_manager::Error::FdAlreadyRegistered)) {
            self.forget_closed(fd);
            added = self.add(origin, fd, interest);
        }
        added.map_err(io::Error::other)
    }

    fn add(
        &mut self,
        origin: Origin,
        fd: RawFd,
        interest: Interest,
    ) -> event_manager::Result<SubscriberId> {
        let id = self.manager.add_subscriber(Watch { origin, ready: Arc::clone(&self.ready) });
        let events = match interest {
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
            Interest::ReadWrite => EventSet::IN | EventSet::OUT,
            Interest::Signal => EventSet::IN | EventSet::EDGE_TRIGGERED,
        };
        let added =
            self.manager.event_ops(id).and_then(|mut ops| ops.add(Events::new_raw(fd, events)));
        added.map(|()| id).inspect_err(|_| self.unwatch(Some(id)))
    }

    fn unwatch(&mut self, id: Option<SubscriberId>) {
        // A closed descriptor is no longer in the epoll set; the event manager removes its entry in any case.
        let _ = id.map(|id| self.manager.remove_subscriber(id));
    }
}

/// Milliseconds until `deadline`, rounded up, since the loop would spin for the last one; `None` if it has passed.
fn millis_until(deadline: Instant) -> Option<i32> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left_ms = left.as_nanos().div_ceil(1_000_000);
    (left_ms > 0).then(|| i32::try_from(left_ms).unwrap_or(i32::MAX))
}

impl std::fmt::Debug for IoLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoLoop").field("listed", &self.listed).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
