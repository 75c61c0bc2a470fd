//! The I/O thread: the only epoll set of a machine. It watches what the devices ask for and what the command asks for.
//!
//! The contract with a device is [`rvmm_devices::MmioDevice`]'s: it is asked for its sources at the start and after every
//! `ready`, and what has changed is applied. The set is level-triggered. A descriptor that nobody lists is not in the set, so
//! a hang-up that nobody handles costs nothing; one that is listed, reports only a hang-up or an error, and is listed the same
//! afterwards, is taken out until the device changes its mind. A device that is reset closes descriptors on a hart's thread, and the set
//! has their numbers until it is asked again: where another descriptor gets such a number first, the closed one is forgotten.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, Events, SubscriberId, SubscriberOps};
use log::{info, warn};
use rvmm_devices::{Bus, Interest, Source};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::button::Button;
use crate::signals::{self, Signals};
use crate::terminal::{self, StopRequest};

mod running;
mod watch;

pub use running::IoThread;
use running::{Failure, Shared};
pub use watch::EventSource;
use watch::{Meaning, ReadyEvent, Watch, WatchedSource};

/// Events taken from the kernel at once.
const BATCH: usize = 32;

/// A source that a device lists, and its place in the epoll set; none where the set does not hold it.
#[derive(Debug)]
struct Listed {
    source: Source,
    id: Option<SubscriberId>,
}

/// The loop before it runs. Nothing is watched until [`IoLoop::spawn`].
pub struct IoLoop {
    bus: Arc<Bus>,
    manager: EventManager<Watch>,
    ready: Arc<Mutex<Vec<ReadyEvent>>>,
    /// By the index of the device.
    listed: Vec<Vec<Listed>>,
    signals: Option<(Signals, StopRequest)>,
    button: Option<Arc<Button>>,
    external: Option<WatchedSource>,
    failed: Option<OnFailure>,
    shared: Arc<Shared>,
}

/// Who is told, in one line, that the thread has ended although nobody has ended it.
pub type OnFailure = Box<dyn FnOnce(String) + Send>;

impl IoLoop {
    /// How long a machine that is told to end lets its devices hand over what the guest has written.
    pub const DRAIN: Duration = Duration::from_secs(1);
    /// The same where it ends by itself: nobody waits for that, and who reads slowly is to have all of it. A signal cuts it short.
    pub const LONG_DRAIN: Duration = Duration::from_secs(5);

    /// A loop over the devices of `bus`.
    ///
    /// # Errors
    /// What the kernel says when it has no descriptors left.
    pub fn new(bus: Arc<Bus>) -> io::Result<Self> {
        let manager = EventManager::new_with_capacity(BATCH).map_err(io::Error::other)?;
        let shared = Arc::new(Shared::new()?);
        let listed = bus.devices().map(|_| Vec::new()).collect();
        let mut new = Self {
            bus,
            manager,
            ready: Arc::default(),
            listed,
            signals: None,
            button: None,
            external: None,
            failed: None,
            shared,
        };
        let wake = new.shared.wake.as_raw_fd();
        new.watch(Meaning::Wake, wake, Interest::Read)?;
        Ok(new)
    }

    /// Takes over the process's signals, once for all loops: SIGTERM, SIGINT, SIGHUP and SIGQUIT no longer end it, SIGTSTP
    /// no longer stops it, SIGXFSZ becomes a write error, SIGWINCH tells a console of a new size. What comes before a loop watches is kept.
    ///
    /// Only for a program that is the machine and nothing else, before it changes the terminal.
    ///
    /// # Errors
    /// `AlreadyExists` where somebody in this process has them.
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

    /// Serves `signals`: SIGTERM, SIGINT, SIGHUP and SIGQUIT call `stop`; SIGTSTP gives the terminal back while the process is
    /// stopped, SIGCONT takes it again. One loop at a time may.
    ///
    /// # Errors
    /// What epoll says.
    pub fn watch_signals(&mut self, signals: Signals, stop: StopRequest) -> io::Result<()> {
        self.watch(Meaning::Signal, signals.as_raw_fd(), Interest::Read)?;
        self.signals = Some((signals, stop));
        Ok(())
    }

    /// Has the first SIGTERM press `button` instead, and ends the machine when the guest has had its time.
    ///
    /// # Errors
    /// What epoll says.
    pub fn watch_button(&mut self, button: Arc<Button>) -> io::Result<()> {
        self.watch(Meaning::ShutdownTimeout, button.as_raw_fd(), Interest::Read)?;
        self.button = Some(button);
        Ok(())
    }

    /// Calls `source` when somebody comes.
    ///
    /// # Errors
    /// What epoll says.
    pub fn watch_external(&mut self, source: Arc<dyn EventSource>) -> io::Result<()> {
        let fd = source.fd();
        let id = self.watch(Meaning::External, fd, Interest::Read)?;
        self.external = Some(WatchedSource { source, fd, id });
        Ok(())
    }

    /// Calls `failed` where epoll fails or the thread panics: no device gets any input from then on, and no kick comes to one.
    pub fn watch_failure(&mut self, failed: OnFailure) {
        self.failed = Some(failed);
    }

    /// Starts the thread, named `io`.
    ///
    /// # Errors
    /// What the kernel says when it has no threads left.
    pub fn spawn(mut self) -> io::Result<IoThread> {
        let shared = Arc::clone(&self.shared);
        let failure = Failure(self.failed.take());
        let body = move || match self.run() {
            Ok(()) => failure.none(),
            Err(error) => failure.tell(format!("The I/O thread cannot go on: {error}")),
        };
        let thread = thread::Builder::new().name("io".into()).spawn(body)?;
        Ok(IoThread { shared, thread: Some(thread) })
    }

    fn run(mut self) -> event_manager::Result<()> {
        loop {
            if self.shared.wants_refresh.swap(false, Ordering::SeqCst) {
                (0..self.listed.len()).for_each(|index| self.sync(index));
            }
            let Some(timeout_ms) = self.timeout_ms() else { return Ok(()) };
            self.manager.run_with_timeout(timeout_ms)?;
            let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            let batch = std::mem::take(&mut *ready);
            drop(ready);
            for (meaning, only_hang_up) in batch {
                self.serve(meaning, only_hang_up);
            }
            // Counted when it is over: who sees the count finds everything served.
            self.shared.turns.fetch_add(1, Ordering::Release);
        }
    }

    /// How long the next turn may wait: -1 is for ever. `None` when the loop is over: it was told so, and no device owes
    /// the host any output, or the time for that is up.
    fn timeout_ms(&self) -> Option<i32> {
        let Some(deadline) = self.shared.deadline() else { return Some(-1) };
        let is_owing = |listed: &Listed| listed.id.is_some() && listed.source.interest.writes();
        if !self.listed.iter().flatten().any(is_owing) {
            return None;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, or the last millisecond would be spent spinning.
        let left_ms = left.as_nanos().div_ceil(1_000_000);
        (left_ms > 0).then(|| i32::try_from(left_ms).unwrap_or(i32::MAX))
    }

    fn serve(&mut self, meaning: Meaning, only_hang_up: bool) {
        match meaning {
            Meaning::Wake => {
                // Refused means that it was read already.
                let _ = self.shared.wake.read();
            }
            Meaning::Signal => self.serve_signals(),
            Meaning::ShutdownTimeout => self.end_grace(),
            Meaning::External => self.serve_visits(),
            Meaning::Device { index, source } => {
                let is_listed = |listed: &Listed| listed.source == source && listed.id.is_some();
                // An earlier event of the same batch may have changed the device's mind.
                if !self.listed.get(index).is_some_and(|list| list.iter().any(is_listed)) {
                    return;
                }
                self.bus.ready(index, source.token);
                self.sync(index);
                if only_hang_up {
                    self.mute(index, source);
                }
            }
        }
    }

    fn serve_signals(&mut self) {
        let Some((signals, stop)) = self.signals.as_ref() else { return };
        for signal in signals.take() {
            self.obey(signal, stop);
        }
    }

    fn obey(&self, signal: i32, stop: &StopRequest) {
        match signal {
            libc::SIGTSTP => terminal::suspend(),
            libc::SIGCONT => terminal::resume(),
            libc::SIGXFSZ => {}
            libc::SIGWINCH => terminal::resized(),
            _ => {
                // Where the guest is gone already, somebody does not take what it has written.
                self.shared.hurry(Self::DRAIN);
                if signal == libc::SIGTERM && self.button.as_ref().is_some_and(|b| b.press()) {
                    info!("SIGTERM presses the power button");
                } else {
                    info!("Signal {signal} asks for an end");
                    stop();
                }
            }
        }
    }

    fn end_grace(&self) {
        if self.button.as_ref().is_some_and(|button| button.is_over()) {
            warn!("The guest has not powered off in time: it is stopped");
            let _ = self.signals.as_ref().map(|(_, stop)| stop());
        }
    }

    fn serve_visits(&mut self) {
        let Some(WatchedSource { source, fd, .. }) = &self.external else { return };
        source.ready();
        if source.fd() == *fd {
            return;
        }
        let Some(WatchedSource { source, id, .. }) = self.external.take() else { return };
        self.unwatch(Some(id));
        if let Err(error) = self.watch_external(source) {
            warn!("Nobody can look at this machine any more: {error}");
        }
    }

    /// Makes the epoll set hold what the device lists now.
    fn sync(&mut self, index: usize) {
        let wanted = self.bus.with_device(index, |device| device.sources()).unwrap_or_default();
        let Some(listed) = self.listed.get_mut(index) else { return };
        if listed.iter().map(|listed| &listed.source).eq(&wanted) {
            return;
        }
        // What is gone leaves first: a new source may have the same descriptor.
        let stays: HashSet<&Source> = wanted.iter().collect();
        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(listed).into_iter().partition(|listed| stays.contains(&listed.source));
        gone.into_iter().for_each(|listed| self.unwatch(listed.id));
        let mut kept: HashMap<Source, _> = kept.into_iter().map(|l| (l.source, l.id)).collect();
        let now = wanted.into_iter().map(|source| {
            let id = kept.remove(&source).unwrap_or_else(|| self.watch_source(index, source));
            Listed { source, id }
        });
        let now = now.collect();
        if let Some(listed) = self.listed.get_mut(index) {
            *listed = now;
        }
    }

    fn watch_source(&mut self, index: usize, source: Source) -> Option<SubscriberId> {
        let meaning = Meaning::Device { index, source };
        let result = self.watch(meaning, source.fd, source.interest);
        result
            .inspect_err(|error| {
                warn!("Cannot watch descriptor {} of device {index}: {error}", source.fd)
            })
            .ok()
    }

    /// Takes a source out of the set that would report the same hang-up again and again.
    fn mute(&mut self, index: usize, source: Source) {
        let listed = self.listed.get_mut(index).into_iter().flatten();
        let id =
            listed.filter(|listed| listed.source == source).find_map(|listed| listed.id.take());
        self.unwatch(id);
    }

    fn watch(
        &mut self,
        meaning: Meaning,
        fd: RawFd,
        interest: Interest,
    ) -> io::Result<SubscriberId> {
        let mut added = self.add(meaning, fd, interest);
        if matches!(added, Err(event_manager::Error::FdAlreadyRegistered)) {
            self.forget_closed(fd);
            added = self.add(meaning, fd, interest);
        }
        added.map_err(io::Error::other)
    }

    fn add(
        &mut self,
        meaning: Meaning,
        fd: RawFd,
        interest: Interest,
    ) -> event_manager::Result<SubscriberId> {
        let id = self.manager.add_subscriber(Watch { meaning, ready: Arc::clone(&self.ready) });
        let events = match interest {
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
            Interest::ReadWrite => EventSet::IN | EventSet::OUT,
        };
        let added =
            self.manager.event_ops(id).and_then(|mut ops| ops.add(Events::new_raw(fd, events)));
        added.map(|()| id).inspect_err(|_| self.unwatch(Some(id)))
    }

    /// Forgets a descriptor of this number that a device has closed without being asked for its sources since, as on a hart's
    /// thread in a reset: another device has the number now.
    fn forget_closed(&mut self, fd: RawFd) {
        for index in 0..self.listed.len() {
            let has_it = |listed: &&mut Listed| listed.source.fd == fd && listed.id.is_some();
            let listed = self.listed.get_mut(index).into_iter().flatten().find(has_it);
            let Some(Listed { source, id }) = listed else { continue };
            let sources = self.bus.with_device(index, |device| device.sources());
            if !sources.is_some_and(|sources| sources.contains(source)) {
                let id = id.take();
                self.unwatch(id);
            }
        }
    }

    fn unwatch(&mut self, id: Option<SubscriberId>) {
        // The descriptor may be closed, and with that out of the set; the event manager forgets it in any case.
        let _ = id.map(|id| self.manager.remove_subscriber(id));
    }
}

impl std::fmt::Debug for IoLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoLoop").field("listed", &self.listed).finish_non_exhaustive()
    }
}

/// Whether epoll can watch a descriptor; it refuses files and devices that are always ready (epoll_ctl(2), EPERM).
///
/// # Errors
/// What else the kernel says.
pub(crate) fn accepts(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let event = EpollEvent::new(EventSet::IN, 0);
    match Epoll::new()?.ctl(ControlOperation::Add, fd.as_raw_fd(), event) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        result => result.map(|()| true),
    }
}

#[cfg(test)]
mod tests;
