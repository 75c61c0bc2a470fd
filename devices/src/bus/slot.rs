//! A device on the bus: its address range, its lock, its counters.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;

use super::{BusError, Claim};
use crate::device::{Access, AccessError, MmioDevice, RegisterName, Unlocked};
use crate::reserved::Reserved;

/// A snapshot of a device on the bus.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// The number for [`Bus::with_device`](super::Bus::with_device); never used for another device.
    pub index: usize,
    /// The device's name.
    pub name: &'static str,
    /// Guest-physical address of its first byte.
    pub base: u64,
    /// Bytes of address space.
    pub size: u64,
    /// Reads that reached it since the machine was built.
    pub reads: u64,
    /// Writes that reached it.
    pub writes: u64,
    /// Accesses that it refused.
    pub refused: u64,
    /// Names of its registers.
    pub registers: RegisterName,
}

/// A device and its place.
pub(super) struct BusSlot {
    pub(super) index: usize,
    pub(super) base: u64,
    pub(super) size: u64,
    pub(super) name: &'static str,
    registers: RegisterName,
    /// These two are written with the device's lock held, unless there are registers without a lock.
    reads: AtomicU64,
    writes: AtomicU64,
    pub(super) refused: AtomicU64,
    /// One bit per kind of refusal that has been logged.
    warned: AtomicU8,
    unlocked: Option<Arc<dyn Unlocked>>,
    device: Mutex<Box<dyn MmioDevice>>,
}

impl BusSlot {
    /// # Errors
    /// [`BusError::Size`] if the device has size zero or does not fit below 2^64.
    pub(super) fn new(
        index: usize,
        base: u64,
        device: Box<dyn MmioDevice>,
    ) -> Result<Self, BusError> {
        let (name, size) = (device.name(), device.size());
        let last = size.checked_sub(1).and_then(|span| base.checked_add(span));
        if last.is_none() {
            return Err(BusError::Size { name, base, size });
        }
        Ok(Self {
            index,
            base,
            size,
            name,
            registers: device.register_names(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            warned: AtomicU8::new(0),
            unlocked: device.unlocked(),
            device: Mutex::new(device),
        })
    }

    /// The device with its counters now.
    pub(super) fn snapshot(&self) -> Slot {
        Slot {
            index: self.index,
            name: self.name,
            base: self.base,
            size: self.size,
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            refused: self.refused.load(Relaxed),
            registers: self.registers,
        }
    }

    /// Takes the device out. An access that has found the slot before finds reserved registers.
    pub(super) fn take(&self) -> Box<dyn MmioDevice> {
        std::mem::replace(&mut *self.lock(), Box::new(Reserved::new(self.name, self.size)))
    }

    /// Counts an access that bypasses the registers. The device's lock is held.
    pub(super) fn count_write(&self) {
        count(&self.writes);
    }

    #[inline]
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        self.check_end(offset, data.len())?;
        let Some(registers) = &self.unlocked else {
            let mut device = self.lock();
            count(&self.reads);
            return device.read(offset, data);
        };
        self.reads.fetch_add(1, Relaxed);
        if registers.read(offset, data) { Ok(()) } else { self.lock().read(offset, data) }
    }

    #[inline]
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Access {
        self.check_end(offset, data.len())?;
        let Some(registers) = &self.unlocked else {
            let mut device = self.lock();
            count(&self.writes);
            return device.write(offset, data);
        };
        self.writes.fetch_add(1, Relaxed);
        if registers.write(offset, data) { Ok(()) } else { self.lock().write(offset, data) }
    }

    /// Checks that an access that begins at this offset also ends in the slot.
    fn check_end(&self, offset: u64, width: usize) -> Access {
        let room = self.size.wrapping_sub(offset);
        if width as u64 <= room { Ok(()) } else { Err(AccessError::PastEnd) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Box<dyn MmioDevice>> {
        // A device that panicked in a test must not block the whole bus.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    pub(super) fn refuse(&self, refusal: AccessError, addr: u64, width: usize) -> Claim {
        self.refused.fetch_add(1, Relaxed);
        let bit = 1 << (refusal as u8);
        if self.warned.fetch_or(bit, Relaxed) & bit == 0 {
            warn!(
                "{}: {refusal}: {width} bytes at {addr:#x} (further ones like it are not logged)",
                self.name
            );
        }
        Claim::Refused
    }
}

/// Increments a counter that only one thread writes at a time: cheaper than an atomic addition.
#[inline]
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}
