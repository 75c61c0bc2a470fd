//! One descriptor in the epoll set, and what an event on it means.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId};
use rvmm_devices::Source;
use vmm_sys_util::epoll::EventSet;

/// What one watched descriptor means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Somebody outside wants the loop to look at its flags.
    Wake,
    /// A signal has come.
    Signal,
    /// A guest that was asked to power off has had its time.
    ShutdownTimeout,
    /// Somebody wants to look at the machine.
    External,
    /// A device's source.
    Device { index: usize, source: Source },
}

/// An event that has come, and whether it was nothing but a hang-up or an error.
pub(super) type ReadyEvent = (Meaning, bool);

/// One descriptor in the epoll set. The event manager calls it; the loop does the work afterwards, when sources may be
/// added and removed freely.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) meaning: Meaning,
    pub(super) ready: Arc<Mutex<Vec<ReadyEvent>>>,
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let only_hang_up = !events.event_set().intersects(EventSet::IN | EventSet::OUT);
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((self.meaning, only_hang_up));
    }

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

/// Somebody outside of the machine's devices who is called when a descriptor is readable.
pub trait EventSource: Send + Sync {
    /// The descriptor that is watched for reading. Asked for again after every [`EventSource::ready`].
    fn fd(&self) -> RawFd;

    /// Does what there is to do. Must not block.
    fn ready(&self);
}

/// Who is called, and the descriptor that is watched for it.
pub(super) struct WatchedSource {
    pub(super) source: Arc<dyn EventSource>,
    pub(super) fd: RawFd,
    pub(super) id: SubscriberId,
}
