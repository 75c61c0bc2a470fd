//! The I/O thread, with the only epoll set of a machine. It watches the descriptors of the devices and of the command.
//!
//! The contract with a device is [`rvmm_devices::MmioDevice`]'s: the loop reads its list of sources at the start and after every
//! `ready`, and applies the changes. The set is level-triggered, but for [`rvmm_devices::Interest::Signal`]. A descriptor that no device
//! lists is not in the set, so an unhandled hang-up costs nothing; one that reports only a hang-up or an error, and is still listed
//! unchanged afterwards, is removed until the device changes its list. A device reset closes descriptors on a hart's thread, and their
//! numbers stay in the set until the list is read again: if another descriptor gets such a number first, all lists are read again.
//!
//! Each device is a subscriber of the event manager, as are the signals, the power button and the external event source: an event is
//! served where it is dispatched, and changes the set there.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, Events, SubscriberId, SubscriberOps};
use rvmm_devices::Bus;
use vmm_sys_util::epoll::EventSet;

use crate::button::Button;
use crate::signals::{self, Signals};
use crate::terminal::StopRequest;

mod device;
mod running;
mod subscriber;

use device::DeviceSubscriber;
pub use running::IoThread;
use running::{Failure, LoopState};
pub use subscriber::EventSource;
use subscriber::{External, SignalActions, Subscriber};

/// Limit of the events of one epoll_wait(2).
const BATCH: usize = 32;

/// The loop before it runs. No descriptor is watched until [`IoLoop::spawn`].
pub struct IoLoop {
    bus: Arc<Bus>,
    manager: EventManager<Subscriber>,
    /// The devices that get events, by index.
    devices: BTreeMap<usize, SubscriberId>,
    signals: Option<(Signals, StopRequest)>,
    button: Option<Arc<Button>>,
    external: Option<Arc<dyn EventSource>>,
    failed: Option<OnFailure>,
    activity: Option<OnActivity>,
    state: Arc<LoopState>,
    /// No event is delivered to devices.
    is_paused: bool,
}

/// Receives that an event was served, once after [`IoThread::expect_activity`]. It must not block.
pub type OnActivity = Box<dyn Fn() + Send>;

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
        Ok(Self {
            bus,
            manager: EventManager::new_with_capacity(BATCH).map_err(io::Error::other)?,
            devices: BTreeMap::new(),
            signals: None,
            button: None,
            external: None,
            failed: None,
            activity: None,
            state: Arc::new(LoopState::new()?),
            is_paused: false,
        })
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
    pub fn watch_signals(&mut self, signals: Signals, stop: StopRequest) {
        self.signals = Some((signals, stop));
    }

    /// Makes the first SIGTERM press the power button instead, and stops the machine if the guest does not power off in time.
    pub fn watch_power_button(&mut self, button: Arc<Button>) {
        self.button = Some(button);
    }

    /// Calls `source` when its descriptor is readable.
    pub fn watch_external(&mut self, source: Arc<dyn EventSource>) {
        self.external = Some(source);
    }

    /// Starts the loop as after [`IoThread::pause`].
    pub fn start_paused(&mut self) {
        self.is_paused = true;
        self.state.rest_from_the_start();
    }

    /// Calls `failed` if epoll fails or the thread panics: from then on no device gets input or notifications.
    pub fn watch_failure(&mut self, failed: OnFailure) {
        self.failed = Some(failed);
    }

    /// Calls `active` after the first event, and after the first one that follows each [`IoThread::expect_activity`].
    pub fn watch_activity(&mut self, active: OnActivity) {
        self.activity = Some(active);
    }

    /// Starts the thread, named `io`.
    ///
    /// # Errors
    /// Those of epoll, or the error of the system call if the host has no threads left.
    pub fn spawn(mut self) -> io::Result<IoThread> {
        self.subscribe()?;
        let state = Arc::clone(&self.state);
        let failure = Failure(self.failed.take(), Arc::clone(&state));
        let body = move || match self.run() {
            Ok(()) => failure.none(),
            Err(error) => failure.report(format!("The I/O thread failed: {error}")),
        };
        let thread = thread::Builder::new().name("io".into()).spawn(body)?;
        Ok(IoThread { state, thread: Some(thread) })
    }

    /// Subscribes everything but the devices.
    fn subscribe(&mut self) -> io::Result<()> {
        let button = self.button.take();
        let signals = self.signals.take();
        let stop = signals.as_ref().map(|(_, stop)| Arc::clone(stop));
        self.add(Subscriber::Wake(Arc::clone(&self.state)))?;
        if let Some((signals, stop)) = signals {
            let (button, state) = (button.clone(), Arc::clone(&self.state));
            self.add(Subscriber::Signals(signals, SignalActions { stop, button, state }))?;
        }
        if let Some(button) = button {
            self.add(Subscriber::ShutdownTimeout { button, stop })?;
        }
        if let Some(source) = self.external.take() {
            self.add(Subscriber::External(External::new(source)))?;
        }
        Ok(())
    }

    fn add(&mut self, subscriber: Subscriber) -> io::Result<()> {
        let fd = subscriber.fd();
        let id = self.manager.add_subscriber(subscriber);
        let ops = self.manager.event_ops(id);
        let added = ops
            .and_then(|mut ops| fd.map_or(Ok(()), |fd| ops.add(Events::new_raw(fd, EventSet::IN))));
        added.map_err(io::Error::other)
    }

    fn run(mut self) -> event_manager::Result<()> {
        // The devices get events, and nobody waits for anything: most turns.
        let mut is_plain = false;
        loop {
            let is_asked = self.state.wants_refresh.swap(false, Ordering::SeqCst);
            if is_asked {
                self.sync_all();
            }
            let mut timeout_ms = -1;
            if is_asked || !is_plain {
                self.follow_rest();
                let Some(limit) = self.timeout_ms() else { return Ok(()) };
                (timeout_ms, is_plain) = (limit, limit < 0);
            }
            self.manager.run_with_timeout(timeout_ms)?;
            if let Some(active) = &self.activity
                && !self.state.is_active.load(Ordering::SeqCst)
            {
                self.state.is_active.store(true, Ordering::SeqCst);
                active();
            }
            // Counted at the end: when the count is visible, all events are served.
            self.state.turns.fetch_add(1, Ordering::Release);
        }
    }

    /// Time-out of the next turn; -1 for none. `None` if the loop is over: it was stopped, and no device has pending output,
    /// or the time-out for that is over.
    fn timeout_ms(&mut self) -> Option<i32> {
        let Some(deadline) = self.state.deadline() else { return Some(self.rest_timeout_ms()) };
        if !self.has_output() {
            return None;
        }
        millis_until(deadline)
    }

    /// Time-out of a turn before the devices rest: until the deadline for their pending output, if they are to.
    fn rest_timeout_ms(&self) -> i32 {
        let (wants_rest, drain_until) = self.state.wanted_rest();
        let until = drain_until.filter(|_| wants_rest && !self.is_paused);
        until.map_or(-1, |until| millis_until(until).unwrap_or(0))
    }

    /// True if a device has pending output.
    fn has_output(&mut self) -> bool {
        self.devices.values().any(|id| {
            let subscriber = self.manager.subscriber_mut(*id);
            matches!(subscriber, Ok(Subscriber::Device(device)) if device.has_output())
        })
    }

    /// Stops or continues the delivery of events to devices, as requested.
    fn follow_rest(&mut self) {
        let (is_paused, drain_until) = self.state.wanted_rest();
        if self.is_paused == is_paused {
            return;
        }
        let may_wait = drain_until.is_some_and(|until| until > Instant::now());
        if is_paused && may_wait && self.has_output() {
            return;
        }
        self.is_paused = is_paused;
        self.sync_all();
        self.state.set_rest(is_paused);
    }

    /// Subscribes the devices that the bus has now with the sources that they list now; none in a paused loop.
    fn sync_all(&mut self) {
        let devices: Vec<usize> = self.bus.devices().map(|slot| slot.index).collect();
        // First all that have changed are removed: a new source may have the number of a closed one.
        let (manager, is_paused) = (&mut self.manager, self.is_paused);
        self.devices.retain(|index, id| {
            let is_same = match manager.subscriber_mut(*id) {
                Ok(Subscriber::Device(device)) => !device.has_changed(),
                _ => false,
            };
            let stays = is_same && !is_paused && devices.contains(index);
            if !stays {
                let _ = manager.remove_subscriber(*id);
            }
            stays
        });
        for index in devices.into_iter().filter(|_| !is_paused) {
            self.devices.entry(index).or_insert_with(|| {
                let device = DeviceSubscriber::new(index, self.bus.view(), Arc::clone(&self.state));
                self.manager.add_subscriber(Subscriber::Device(device))
            });
        }
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
        f.debug_struct("IoLoop").field("devices", &self.devices).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
