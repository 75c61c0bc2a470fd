//! One descriptor in the epoll set, and the origin of its events.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId};
use rvmm_devices::Source;
use vmm_sys_util::epoll::EventSet;

/// The origin of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Another thread has set flags for the loop.
    Wake,
    /// A signal.
    Signal,
    /// The time-out of a guest that was asked to power off.
    ShutdownTimeout,
    /// The external event source.
    External,
    /// A device's source.
    Device { index: usize, source: Source },
}

/// The origin of a pending event, and true if it was only a hang-up or an error.
pub(super) type ReadyEvent = (Origin, bool);

/// One descriptor in the epoll set. The event manager calls it; the loop serves the event afterwards, when it may add and
/// remove sources.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) origin: Origin,
    pub(super) ready: Arc<Mutex<Vec<ReadyEvent>>>,
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let only_hang_up = !events.event_set().intersects(EventSet::IN | EventSet::OUT);
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push((self.origin, only_hang_up));
    }

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

/// A descriptor that the I/O thread watches and that is not a device's, such as a listening socket.
pub trait EventSource: Send + Sync {
    /// The descriptor that is watched for reading. Read again after every [`EventSource::ready`].
    fn fd(&self) -> RawFd;

    /// Serves the event. Must not block.
    fn ready(&self);
}

/// An event source, and its descriptor in the epoll set.
pub(super) struct WatchedSource {
    pub(super) source: Arc<dyn EventSource>,
    pub(super) fd: RawFd,
    pub(super) id: SubscriberId,
}
