//! The sources of the devices in the epoll set.

use std::collections::{HashMap, HashSet};
use std::os::fd::RawFd;
use std::time::Instant;

use event_manager::SubscriberId;
use log::warn;
use rvmm_devices::Source;

use super::watch::Origin;
use super::{IoLoop, Listed};

impl IoLoop {
    /// Stops or continues the delivery of events to devices, as requested.
    pub(super) fn follow_rest(&mut self) {
        let (is_paused, drain_until) = self.shared.wanted_rest();
        if self.is_paused == is_paused {
            return;
        }
        if is_paused {
            let may_wait = drain_until.is_some_and(|until| until > Instant::now());
            if may_wait && self.has_output() {
                return;
            }
            let listed: Vec<usize> = self.listed.keys().copied().collect();
            listed.into_iter().for_each(|index| self.apply(index, &[]));
        }
        self.is_paused = is_paused;
        if !is_paused {
            self.sync_all();
        }
        self.shared.set_rest(is_paused);
    }

    /// Updates the epoll set to the devices that the bus has now, and to their sources.
    pub(super) fn sync_all(&mut self) {
        if self.is_paused {
            return;
        }
        let devices: Vec<usize> = self.bus.devices().map(|slot| slot.index).collect();
        let gone: Vec<usize> =
            self.listed.keys().filter(|index| !devices.contains(index)).copied().collect();
        for index in gone {
            self.apply(index, &[]);
            self.listed.remove(&index);
        }
        devices.into_iter().for_each(|index| self.sync(index));
    }

    /// Updates the epoll set to the sources that the device lists now.
    fn sync(&mut self, index: usize) {
        let sources = self.bus.with_device(index, |device| device.sources()).unwrap_or_default();
        self.apply(index, &sources);
    }

    /// Updates the epoll set to these sources of the device.
    pub(super) fn apply(&mut self, index: usize, wanted: &[Source]) {
        let listed = self.listed.entry(index).or_default();
        if listed.iter().map(|listed| &listed.source).eq(wanted) {
            return;
        }
        // Old sources are removed first: a new one may have the same descriptor.
        let stays: HashSet<&Source> = wanted.iter().collect();
        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(listed).into_iter().partition(|listed| stays.contains(&listed.source));
        gone.into_iter().for_each(|listed| self.unwatch(listed.id));
        let mut kept: HashMap<Source, _> = kept.into_iter().map(|l| (l.source, l.id)).collect();
        let now = wanted.iter().copied().map(|source| {
            let id = kept.remove(&source).unwrap_or_else(|| self.watch_source(index, source));
            Listed { source, id }
        });
        let now = now.collect();
        self.listed.insert(index, now);
    }

    fn watch_source(&mut self, index: usize, source: Source) -> Option<SubscriberId> {
        let origin = Origin::Device { index, source };
        let result = self.watch(origin, source.fd, source.interest);
        result
            .inspect_err(|error| {
                warn!("Cannot watch descriptor {} of device {index}: {error}", source.fd)
            })
            .ok()
    }

    /// Removes a source from the set that would report the same hang-up over and over.
    pub(super) fn mute(&mut self, index: usize, source: Source) {
        let listed = self.listed.get_mut(&index).into_iter().flatten();
        let id =
            listed.filter(|listed| listed.source == source).find_map(|listed| listed.id.take());
        self.unwatch(id);
    }

    /// Removes a descriptor of this number that a device has closed since its list was last read, as a reset does on a hart's
    /// thread: another descriptor has the number now.
    pub(super) fn forget_closed(&mut self, fd: RawFd) {
        let mut closed = Vec::new();
        for (index, listed) in &mut self.listed {
            let has_it = |listed: &&mut Listed| listed.source.fd == fd && listed.id.is_some();
            let Some(Listed { source, id }) = listed.iter_mut().find(has_it) else { continue };
            let sources = self.bus.with_device(*index, |device| device.sources());
            if !sources.is_some_and(|sources| sources.contains(source)) {
                closed.push(id.take());
            }
        }
        closed.into_iter().for_each(|id| self.unwatch(id));
    }
}
