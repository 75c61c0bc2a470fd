//! A device as a subscriber: its sources in the epoll set.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{Error, EventOps, Events};
use log::warn;
use rvmm_devices::{BusView, Interest, Source};
use vmm_sys_util::epoll::EventSet;

use super::running::LoopState;

/// A device of the bus.
pub(super) struct DeviceSubscriber {
    index: usize,
    view: BusView,
    state: Arc<LoopState>,
    /// The sources that the device has listed last.
    listed: Vec<Listed>,
    /// Those that it lists now: a buffer, kept to reuse its allocation.
    sources: Vec<Source>,
    /// A descriptor that the device has closed is in the way.
    is_stale: bool,
}

/// A listed source; it is not watched if epoll does not accept it, or after a hang-up.
#[derive(Debug, Clone, Copy)]
struct Listed {
    source: Source,
    is_watched: bool,
}

impl DeviceSubscriber {
    pub(super) fn new(index: usize, view: BusView, state: Arc<LoopState>) -> Self {
        let (listed, sources) = (Vec::new(), Vec::new());
        Self { index, view, state, listed, sources, is_stale: false }
    }

    /// True if the device has pending output.
    pub(super) fn has_output(&self) -> bool {
        self.listed.iter().any(|listed| listed.is_watched && listed.source.interest.writes())
    }

    /// True if what is watched is not what the device lists now.
    pub(super) fn has_changed(&mut self) -> bool {
        self.view.list_sources(self.index, &mut self.sources);
        self.is_stale || !self.is_listed()
    }

    /// True if the device has listed the same as the last time.
    fn is_listed(&self) -> bool {
        self.listed.iter().map(|listed| &listed.source).eq(&self.sources)
    }

    /// Watches all sources that the device lists.
    pub(super) fn subscribe(&mut self, ops: &mut EventOps<'_>) {
        self.view.list_sources(self.index, &mut self.sources);
        for source in &self.sources {
            let added = watch(*source, ops);
            if let Err(error) = &added {
                warn!("Cannot watch descriptor {} of device {}: {error}", source.fd, self.index);
            }
            self.listed.push(Listed { source: *source, is_watched: added.is_ok() });
        }
    }

    /// Serves an event of one of the sources, and applies the changes of the list.
    pub(super) fn serve(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.view.ready(self.index, events.data(), &mut self.sources);
        if !self.is_listed() {
            self.apply(ops);
        } else if !events.event_set().intersects(EventSet::IN | EventSet::OUT) {
            self.mute(events, ops);
        }
    }

    /// Watches what the device lists now, and no longer what it does not list.
    fn apply(&mut self, ops: &mut EventOps<'_>) {
        let (kept, gone): (Vec<Listed>, Vec<Listed>) =
            self.listed.drain(..).partition(|listed| self.sources.contains(&listed.source));
        // Old sources are removed first: a new one may have the same descriptor.
        let removed = gone
            .iter()
            .filter(|listed| listed.is_watched)
            .all(|listed| ops.remove(Events::empty_raw(listed.source.fd)).is_ok());
        // A closed descriptor is no longer in epoll's set, but in the event manager's.
        let mut is_stale = !removed;
        for source in &self.sources {
            let known = kept.iter().find(|listed| listed.source == *source).copied();
            let listed = known.unwrap_or_else(|| {
                let added = watch(*source, ops);
                match &added {
                    Ok(()) => {}
                    // The number of a closed descriptor.
                    Err(Error::FdAlreadyRegistered) => is_stale = true,
                    Err(error) => {
                        let (fd, index) = (source.fd, self.index);
                        warn!("Cannot watch descriptor {fd} of device {index}: {error}");
                    }
                }
                Listed { source: *source, is_watched: added.is_ok() }
            });
            self.listed.push(listed);
        }
        if is_stale {
            self.is_stale = true;
            self.state.wants_refresh.store(true, Ordering::SeqCst);
        }
    }

    /// Removes a source from the set that would report the same hang-up over and over.
    fn mute(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let is_it = |listed: &&mut Listed| listed.source.fd == events.fd() && listed.is_watched;
        if let Some(listed) = self.listed.iter_mut().find(is_it) {
            listed.is_watched = false;
            let _ = ops.remove(Events::empty_raw(listed.source.fd));
        }
    }
}

fn watch(source: Source, ops: &mut EventOps<'_>) -> Result<(), Error> {
    let events = match source.interest {
        Interest::Read => EventSet::IN,
        Interest::Write => EventSet::OUT,
        Interest::ReadWrite => EventSet::IN | EventSet::OUT,
        Interest::Signal => EventSet::IN | EventSet::EDGE_TRIGGERED,
    };
    ops.add(Events::with_data_raw(source.fd, source.token, events))
}
