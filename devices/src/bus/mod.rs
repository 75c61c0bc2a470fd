//! The MMIO bus: dispatches an access to the device at its guest-physical address.
//!
//! | file | contents |
//! |---|---|
//! | `mod.rs` | [`Bus`]: the map, and its changes |
//! | `view.rs` | [`BusView`]: a hart's own copy of the map |
//! | `slot.rs` | a device on the bus |
//! | `states.rs` | pause, reset, save and restore of all devices |
//!
//! The map may change while the machine runs. Each hart has its own [`BusView`], a reference to a map that never changes, and compares
//! one number at each access: so finding a device takes no lock, and a hart uses a new map from its next access on. In the map it is first
//! the device found last, else a binary search over a few entries. Each device has its own lock, held for one access; registers
//! that need no lock ([`Unlocked`](crate::device::Unlocked)) are tried first.

use std::sync::atomic::{
    AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use thiserror::Error;

use crate::device::{MmioDevice, SerialLine};

mod slot;
mod states;
#[cfg(test)]
mod tests;
mod view;

pub use slot::Slot;
pub use states::{DeviceState, StateError};
pub use view::BusView;

use slot::BusSlot;

/// Maximum number of unassigned addresses that are logged, each once; one last line says that there are more.
const LOGGED_ADDRESSES: usize = 64;

/// All devices of a machine, by address.
pub struct Bus {
    map: Mutex<Arc<Map>>,
    /// Number of changes of the map so far.
    changes: AtomicU64,
    unassigned_reads: AtomicU64,
    unassigned_writes: AtomicU64,
    logged: LoggedAddresses,
}

/// A map of the bus; replaced as a whole.
struct Map {
    /// The bases of the slots, sorted and contiguous for the search.
    bases: Box<[u64]>,
    slots: Box<[Arc<BusSlot>]>,
    /// The index of the next device.
    next: usize,
}

/// The outcome of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The device at that address did it.
    Device,
    /// The device at that address refused it: a read returned zeroes, a write had no effect.
    Refused,
    /// No device has that address: a read returned zeroes, a write had no effect.
    Unassigned,
}

/// Numbers of a guest's failed accesses since the machine was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BusCounters {
    /// Accesses that a device refused.
    pub refused: u64,
    /// Reads of addresses without a device.
    pub unassigned_reads: u64,
    /// Writes to addresses without a device.
    pub unassigned_writes: u64,
}

/// An error in the placement of devices on a bus.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BusError {
    /// Two devices claim the same addresses.
    #[error("Device {a} at {a_base:#x} (size {a_size:#x}) overlaps {b} at {b_base:#x}")]
    Overlap {
        /// The lower device's name.
        a: &'static str,
        /// The lower device's base.
        a_base: u64,
        /// The lower device's size.
        a_size: u64,
        /// The higher device's name.
        b: &'static str,
        /// The higher device's base.
        b_base: u64,
    },
    /// A device has no size, or reaches past the last address.
    #[error("Device {name} at {base:#x} cannot have size {size:#x}")]
    Size {
        /// The device's name.
        name: &'static str,
        /// Its base.
        base: u64,
        /// Its size.
        size: u64,
    },
}

/// The unassigned addresses that have been logged, bounded.
struct LoggedAddresses {
    sorted: Mutex<Vec<u64>>,
    full: AtomicBool,
}

impl Bus {
    /// A bus with these devices at these bases.
    ///
    /// # Errors
    /// [`BusError`] if two overlap, or one has size zero or does not fit below 2^64.
    pub fn new(mut devices: Vec<(u64, Box<dyn MmioDevice>)>) -> Result<Self, BusError> {
        devices.sort_by_key(|(base, _)| *base);
        let next = devices.len();
        let slots = (0..)
            .zip(devices)
            .map(|(index, (base, device))| BusSlot::new(index, base, device).map(Arc::new));
        let map = Map::new(slots.collect::<Result<_, _>>()?, next)?;
        Ok(Self {
            map: Mutex::new(Arc::new(map)),
            changes: AtomicU64::new(0),
            unassigned_reads: AtomicU64::new(0),
            unassigned_writes: AtomicU64::new(0),
            logged: LoggedAddresses { sorted: Mutex::default(), full: AtomicBool::new(false) },
        })
    }

    /// A view of the bus for one thread.
    #[must_use]
    pub fn view(self: &Arc<Self>) -> BusView {
        BusView::new(Arc::clone(self))
    }

    /// Adds a device, also while the machine runs, and returns its index. The I/O loop has to be told.
    ///
    /// # Errors
    /// As for [`Bus::new`]; nothing has changed then.
    pub fn add(&self, base: u64, device: Box<dyn MmioDevice>) -> Result<usize, BusError> {
        let mut map = self.lock();
        let index = map.next;
        let slot = Arc::new(BusSlot::new(index, base, device)?);
        let at = map.bases.partition_point(|other| *other <= base);
        let mut slots = map.slots.to_vec();
        slots.insert(at, slot);
        self.replace(&mut map, Map::new(slots, index.saturating_add(1))?);
        Ok(index)
    }

    /// Takes a device off the bus, also while the machine runs, and returns it; `None` if there is no such device. An access that is
    /// under way finds the device, or reserved registers. The I/O loop has to be told.
    pub fn remove(&self, index: usize) -> Option<Box<dyn MmioDevice>> {
        let mut map = self.lock();
        let at = map.slots.iter().position(|slot| slot.index == index)?;
        let mut slots = map.slots.to_vec();
        let slot = slots.remove(at);
        // No overlap can arise.
        let smaller = Map::new(slots, map.next).ok()?;
        self.replace(&mut map, smaller);
        drop(map);
        Some(slot.take())
    }

    fn replace(&self, map: &mut Arc<Map>, new: Map) {
        *map = Arc::new(new);
        // A view that sees the new number takes the lock, and so finds the new map.
        self.changes.fetch_add(1, Release);
    }

    /// Reads as [`BusView::read`] does; for threads without a view.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Claim {
        self.read_in(self.map().find(addr), addr, data)
    }

    /// Writes as [`BusView::write`] does; for threads without a view.
    pub fn write(&self, addr: u64, data: &[u8]) -> Claim {
        self.write_in(self.map().find(addr), addr, data)
    }

    /// Calls `f` with the line of the serial port at a guest-physical address, counted as one write; `None` if there is no serial port.
    pub fn serial_line<R>(&self, addr: u64, f: impl FnOnce(&mut dyn SerialLine) -> R) -> Option<R> {
        let map = self.map();
        let (slot, _) = map.find(addr)?;
        let mut device = slot.lock();
        let line = device.serial_line()?;
        slot.count_write();
        Some(f(line))
    }

    #[inline]
    fn read_in(&self, found: Option<(&BusSlot, u64)>, addr: u64, data: &mut [u8]) -> Claim {
        let Some((slot, offset)) = found else {
            data.fill(0);
            return self.unassigned(addr, &self.unassigned_reads);
        };
        let Err(refusal) = slot.read(offset, data) else { return Claim::Device };
        data.fill(0);
        slot.refuse(refusal, addr, data.len())
    }

    #[inline]
    fn write_in(&self, found: Option<(&BusSlot, u64)>, addr: u64, data: &[u8]) -> Claim {
        let Some((slot, offset)) = found else {
            return self.unassigned(addr, &self.unassigned_writes);
        };
        let Err(refusal) = slot.write(offset, data) else { return Claim::Device };
        slot.refuse(refusal, addr, data.len())
    }

    /// The devices on the bus, in order of address.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = Slot> + use<> {
        let slots: Vec<Slot> = self.map().slots.iter().map(|slot| slot.snapshot()).collect();
        slots.into_iter()
    }

    /// Calls `f` with this device, under its lock; `None` if there is none.
    pub fn with_device<R>(
        &self,
        index: usize,
        f: impl FnOnce(&mut dyn MmioDevice) -> R,
    ) -> Option<R> {
        self.map().slot(index).map(|slot| f(slot.lock().as_mut()))
    }

    /// Numbers of the guest's failed accesses.
    pub fn counters(&self) -> BusCounters {
        BusCounters {
            refused: self.map().slots.iter().map(|slot| slot.refused.load(Relaxed)).sum(),
            unassigned_reads: self.unassigned_reads.load(Relaxed),
            unassigned_writes: self.unassigned_writes.load(Relaxed),
        }
    }

    /// The map now.
    fn map(&self) -> Arc<Map> {
        Arc::clone(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Map>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of changes of the map so far.
    #[inline]
    fn changes(&self) -> u64 {
        self.changes.load(Acquire)
    }

    #[cold]
    fn unassigned(&self, addr: u64, counter: &AtomicU64) -> Claim {
        counter.fetch_add(1, Relaxed);
        self.logged.note(addr);
        Claim::Unassigned
    }
}

impl Map {
    /// A map of these slots, in order of address.
    fn new(slots: Vec<Arc<BusSlot>>, next: usize) -> Result<Self, BusError> {
        for (a, b) in slots.iter().zip(slots.iter().skip(1)) {
            if b.base - a.base < a.size {
                return Err(BusError::Overlap {
                    a: a.name,
                    a_base: a.base,
                    a_size: a.size,
                    b: b.name,
                    b_base: b.base,
                });
            }
        }
        Ok(Self { bases: slots.iter().map(|slot| slot.base).collect(), slots: slots.into(), next })
    }

    /// The slot with this index.
    fn slot(&self, index: usize) -> Option<&BusSlot> {
        self.slots.iter().find(|slot| slot.index == index).map(AsRef::as_ref)
    }

    /// Finds the position of the slot with this address.
    fn position(&self, addr: u64) -> Option<usize> {
        let at = self.bases.partition_point(|base| *base <= addr).checked_sub(1)?;
        let slot = self.slots.get(at)?;
        (addr.wrapping_sub(slot.base) < slot.size).then_some(at)
    }

    /// Finds the slot with this address, and the offset in it.
    fn find(&self, addr: u64) -> Option<(&BusSlot, u64)> {
        let slot = self.slots.get(self.position(addr)?)?;
        Some((slot, addr.wrapping_sub(slot.base)))
    }
}

impl LoggedAddresses {
    fn note(&self, addr: u64) {
        if self.full.load(Relaxed) {
            return;
        }
        let mut sorted = self.sorted.lock().unwrap_or_else(PoisonError::into_inner);
        let Err(position) = sorted.binary_search(&addr) else { return };
        if sorted.len() < LOGGED_ADDRESSES {
            sorted.insert(position, addr);
            warn!("Guest access at {addr:#x}, where there is no device");
        } else if !self.full.swap(true, Relaxed) {
            warn!("Further addresses without a device are not logged");
        }
    }
}
