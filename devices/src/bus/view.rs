//! A thread's own view of the bus: accesses without a lock on the map.

use std::sync::Arc;

use super::slot::BusSlot;
use super::{Bus, Claim, Map};
use crate::device::Source;

/// The bus as one thread accesses it. Each hart has one. Accesses are out of line, so that the run loop stays small enough for the
/// dispatch of exits to be part of it.
pub struct BusView {
    bus: Arc<Bus>,
    map: Arc<Map>,
    /// The number of changes of the bus that `map` includes.
    changes: u64,
    /// The position of the slot that was found last: accesses come in runs, and one comparison is cheaper than the search.
    last: usize,
}

impl BusView {
    pub(super) fn new(bus: Arc<Bus>) -> Self {
        // The number first: a change in between is noticed at the first access.
        let changes = bus.changes();
        let map = bus.map();
        Self { bus, map, changes, last: 0 }
    }

    /// Reads `data.len()` bytes at a guest-physical address; fills `data` in every case.
    #[inline(never)]
    pub fn read(&mut self, addr: u64, data: &mut [u8]) -> Claim {
        self.update();
        let found = find(&self.map, &mut self.last, addr);
        self.bus.read_in(found, addr, data)
    }

    /// Writes `data.len()` bytes at a guest-physical address.
    #[inline(never)]
    pub fn write(&mut self, addr: u64, data: &[u8]) -> Claim {
        self.update();
        let found = find(&self.map, &mut self.last, addr);
        self.bus.write_in(found, addr, data)
    }

    /// Calls [`MmioDevice::ready`](crate::MmioDevice::ready) of this device, and delivers the resulting interrupt after releasing the
    /// device's lock. Replaces `sources` by those that the device lists then.
    pub fn ready(&mut self, index: usize, token: u32, sources: &mut Vec<Source>) {
        self.update();
        sources.clear();
        let Some(slot) = self.map.slot(index) else { return };
        let mut device = slot.lock();
        device.ready(token);
        device.list_sources(sources);
        let pending = device.take_pending_irq();
        drop(device);
        if let Some(pending) = pending {
            pending.deliver();
        }
    }

    /// Replaces `sources` by those that this device lists now.
    pub fn list_sources(&mut self, index: usize, sources: &mut Vec<Source>) {
        self.update();
        sources.clear();
        if let Some(slot) = self.map.slot(index) {
            slot.lock().list_sources(sources);
        }
    }

    /// Takes over the map, if it has changed.
    #[inline]
    fn update(&mut self) {
        if self.bus.changes() != self.changes {
            self.renew();
        }
    }

    #[cold]
    fn renew(&mut self) {
        *self = Self::new(Arc::clone(&self.bus));
    }
}

/// Finds the slot with this address, and the offset in it.
#[inline]
fn find<'a>(map: &'a Map, last: &mut usize, addr: u64) -> Option<(&'a BusSlot, u64)> {
    if let Some(slot) = map.slots.get(*last) {
        let offset = addr.wrapping_sub(slot.base);
        if offset < slot.size {
            return Some((slot, offset));
        }
    }
    search(map, last, addr)
}

#[inline(never)]
fn search<'a>(map: &'a Map, last: &mut usize, addr: u64) -> Option<(&'a BusSlot, u64)> {
    let at = map.position(addr)?;
    *last = at;
    let slot = map.slots.get(at)?;
    Some((slot, addr.wrapping_sub(slot.base)))
}
