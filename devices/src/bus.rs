//! The MMIO bus: dispatches an access to the device at its guest-physical address.
//!
//! The map is built once and never changes, so finding a device takes no lock: first the one
//! found last, else a binary search over a few entries. Each device has its own lock, held for one access; registers
//! that need no lock ([`Unlocked`]) are tried first.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use thiserror::Error;

use crate::device::{Access, AccessError, MmioDevice, RegisterName, SerialLine, Source, Unlocked};

/// Maximum number of unassigned addresses that are logged, each once; one last line says that there are more.
const LOGGED_ADDRESSES: usize = 64;

/// All devices of a machine, by address.
pub struct Bus {
    /// The bases of the slots, sorted and contiguous for the search.
    bases: Box<[u64]>,
    slots: Box<[BusSlot]>,
    /// The slot that was found last: accesses come in runs, and one comparison is cheaper than the search.
    last: AtomicUsize,
    unassigned_reads: AtomicU64,
    unassigned_writes: AtomicU64,
    logged: LoggedAddresses,
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

/// A snapshot of a device on the bus.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// The index for [`Bus::with_device`].
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

struct BusSlot {
    base: u64,
    size: u64,
    name: &'static str,
    registers: RegisterName,
    /// These two are written with the device's lock held, unless there are registers without a lock.
    reads: AtomicU64,
    writes: AtomicU64,
    refused: AtomicU64,
    /// One bit per kind of refusal that has been logged.
    warned: AtomicU8,
    unlocked: Option<Arc<dyn Unlocked>>,
    device: Mutex<Box<dyn MmioDevice>>,
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
        let slots = devices
            .into_iter()
            .map(|(base, device)| BusSlot::new(base, device))
            .collect::<Result<Box<[_]>, _>>()?;
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
        Ok(Self {
            bases: slots.iter().map(|slot| slot.base).collect(),
            slots,
            last: AtomicUsize::new(0),
            unassigned_reads: AtomicU64::new(0),
            unassigned_writes: AtomicU64::new(0),
            logged: LoggedAddresses { sorted: Mutex::default(), full: AtomicBool::new(false) },
        })
    }

    /// Reads `data.len()` bytes at a guest-physical address; fills `data` in every case.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Claim {
        let Some((slot, offset)) = self.find(addr) else {
            data.fill(0);
            return self.unassigned(addr, &self.unassigned_reads);
        };
        let access = slot.check_end(offset, data.len()).and_then(|()| slot.read(offset, data));
        let Err(refusal) = access else { return Claim::Device };
        data.fill(0);
        slot.refuse(refusal, addr, data.len())
    }

    /// Writes `data.len()` bytes at a guest-physical address.
    pub fn write(&self, addr: u64, data: &[u8]) -> Claim {
        let Some((slot, offset)) = self.find(addr) else {
            return self.unassigned(addr, &self.unassigned_writes);
        };
        let access = slot.check_end(offset, data.len()).and_then(|()| slot.write(offset, data));
        let Err(refusal) = access else { return Claim::Device };
        slot.refuse(refusal, addr, data.len())
    }

    /// Calls `f` with the line of the serial port at a guest-physical address, counted as one write; `None` if there is no serial port.
    pub fn serial_line<R>(&self, addr: u64, f: impl FnOnce(&mut dyn SerialLine) -> R) -> Option<R> {
        let (slot, _) = self.find(addr)?;
        let mut device = slot.lock();
        let line = device.serial_line()?;
        count(&slot.writes);
        Some(f(line))
    }

    /// Resets every device, in order of address. No hart may run meanwhile.
    pub fn reset(&self) {
        for slot in &self.slots {
            slot.lock().reset();
        }
    }

    /// The devices on the bus, in order of address.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = Slot> {
        self.slots.iter().enumerate().map(|(index, slot)| Slot {
            index,
            name: slot.name,
            base: slot.base,
            size: slot.size,
            reads: slot.reads.load(Relaxed),
            writes: slot.writes.load(Relaxed),
            refused: slot.refused.load(Relaxed),
            registers: slot.registers,
        })
    }

    /// Calls `f` with the device in this slot, under its lock; `None` if there is no such slot.
    pub fn with_device<R>(
        &self,
        index: usize,
        f: impl FnOnce(&mut dyn MmioDevice) -> R,
    ) -> Option<R> {
        self.slots.get(index).map(|slot| f(slot.lock().as_mut()))
    }

    /// Calls [`MmioDevice::ready`] of the device in this slot, and drives the resulting interrupt after releasing the
    /// device's lock. Replaces `sources` by those that the device lists then.
    pub fn ready(&self, index: usize, token: u32, sources: &mut Vec<Source>) {
        sources.clear();
        let pending = self.with_device(index, |device| {
            device.ready(token);
            device.list_sources(sources);
            device.take_pending_irq()
        });
        if let Some(pin) = pending.flatten() {
            pin.drive();
        }
    }

    /// Numbers of the guest's failed accesses.
    pub fn counters(&self) -> BusCounters {
        BusCounters {
            refused: self.slots.iter().map(|slot| slot.refused.load(Relaxed)).sum(),
            unassigned_reads: self.unassigned_reads.load(Relaxed),
            unassigned_writes: self.unassigned_writes.load(Relaxed),
        }
    }

    #[cold]
    fn unassigned(&self, addr: u64, counter: &AtomicU64) -> Claim {
        counter.fetch_add(1, Relaxed);
        self.logged.note(addr);
        Claim::Unassigned
    }

    /// Finds the slot with this address, and the offset in it.
    #[inline]
    fn find(&self, addr: u64) -> Option<(&BusSlot, u64)> {
        if let Some(slot) = self.slots.get(self.last.load(Relaxed)) {
            let offset = addr.wrapping_sub(slot.base);
            if offset < slot.size {
                return Some((slot, offset));
            }
        }
        self.search(addr)
    }

    #[inline(never)]
    fn search(&self, addr: u64) -> Option<(&BusSlot, u64)> {
        let index = self.bases.partition_point(|base| *base <= addr).checked_sub(1)?;
        let slot = self.slots.get(index)?;
        let offset = addr.wrapping_sub(slot.base);
        (offset < slot.size).then(|| {
            self.last.store(index, Relaxed);
            (slot, offset)
        })
    }
}

/// Increments a counter that only one thread writes at a time: cheaper than an atomic addition.
#[inline]
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

impl BusSlot {
    fn new(base: u64, device: Box<dyn MmioDevice>) -> Result<Self, BusError> {
        let (name, size) = (device.name(), device.size());
        let last = size.checked_sub(1).and_then(|span| base.checked_add(span));
        if last.is_none() {
            return Err(BusError::Size { name, base, size });
        }
        Ok(Self {
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

    /// Checks that an access that begins at this offset also ends in the slot.
    fn check_end(&self, offset: u64, width: usize) -> Access {
        let room = self.size.wrapping_sub(offset);
        if width as u64 <= room { Ok(()) } else { Err(AccessError::PastEnd) }
    }

    #[inline]
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let Some(registers) = &self.unlocked else {
            let mut device = self.lock();
            count(&self.reads);
            return device.read(offset, data);
        };
        self.reads.fetch_add(1, Relaxed);
        if registers.read(offset, data) { Ok(()) } else { self.lock().read(offset, data) }
    }

    #[inline]
    fn write(&self, offset: u64, data: &[u8]) -> Access {
        let Some(registers) = &self.unlocked else {
            let mut device = self.lock();
            count(&self.writes);
            return device.write(offset, data);
        };
        self.writes.fetch_add(1, Relaxed);
        if registers.write(offset, data) { Ok(()) } else { self.lock().write(offset, data) }
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn MmioDevice>> {
        // A device that panicked in a test must not block the whole bus.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    fn refuse(&self, refusal: AccessError, addr: u64, width: usize) -> Claim {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::FdtDesc;

    /// Four bytes of memory that refuse other widths than 1 and 4.
    struct Cells(&'static str, u64, [u8; 4]);

    impl MmioDevice for Cells {
        fn name(&self) -> &'static str {
            self.0
        }

        fn size(&self) -> u64 {
            self.1
        }

        fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
            let at = usize::try_from(offset).unwrap();
            data.fill(0xee);
            if !matches!(data.len(), 1 | 4) {
                return Err(AccessError::Width);
            }
            data.copy_from_slice(self.2.get(at..at + data.len()).ok_or(AccessError::NoRegister)?);
            Ok(())
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Access {
            let at = usize::try_from(offset).unwrap();
            let cells = self.2.get_mut(at..at + data.len()).ok_or(AccessError::NoRegister)?;
            cells.copy_from_slice(data);
            Ok(())
        }

        fn reset(&mut self) {
            self.2 = [0; 4];
        }

        fn fdt(&self) -> Option<FdtDesc> {
            None
        }
    }

    fn cells(base: u64, name: &'static str, size: u64) -> (u64, Box<dyn MmioDevice>) {
        (base, Box::new(Cells(name, size, [1, 2, 3, 4])))
    }

    fn read<const N: usize>(bus: &Bus, addr: u64) -> (Claim, [u8; N]) {
        let mut data = [0xaa; N];
        (bus.read(addr, &mut data), data)
    }

    #[test]
    fn an_access_reaches_the_device_at_its_address() {
        let bus = Bus::new(vec![cells(0x2000, "b", 4), cells(0x1000, "a", 4)]).unwrap();
        assert_eq!(bus.write(0x2001, &[9]), Claim::Device);
        assert_eq!(read(&bus, 0x2000), (Claim::Device, [1, 9, 3, 4]));
        assert_eq!(read(&bus, 0x1003), (Claim::Device, [4]));
        let devices: Vec<_> = bus.devices().map(|slot| (slot.name, slot.base)).collect();
        assert_eq!(devices, [("a", 0x1000), ("b", 0x2000)]);
        assert_eq!(bus.with_device(1, |device| device.name()), Some("b"));
        assert_eq!(bus.with_device(2, |device| device.name()), None);
        let counted: Vec<_> = bus.devices().map(|slot| (slot.reads, slot.writes)).collect();
        assert_eq!(counted, [(1, 0), (1, 1)]);
    }

    #[test]
    fn registers_without_a_lock_work_while_the_device_is_locked() {
        struct Two(AtomicU64);
        impl Unlocked for Two {
            fn read(&self, offset: u64, data: &mut [u8]) -> bool {
                data.fill(7);
                offset == 2
            }
            fn write(&self, offset: u64, _data: &[u8]) -> bool {
                self.0.fetch_add(1, Relaxed);
                offset == 2
            }
        }
        struct Device(Arc<Two>, Cells);
        impl MmioDevice for Device {
            fn name(&self) -> &'static str {
                self.1.name()
            }
            fn size(&self) -> u64 {
                self.1.size()
            }
            fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
                self.1.read(offset, data)
            }
            fn write(&mut self, offset: u64, data: &[u8]) -> Access {
                self.1.write(offset, data)
            }
            fn reset(&mut self) {
                self.1.reset();
            }
            fn fdt(&self) -> Option<FdtDesc> {
                None
            }
            fn unlocked(&self) -> Option<Arc<dyn Unlocked>> {
                Some(Arc::clone(&self.0) as Arc<dyn Unlocked>)
            }
        }
        let two = Arc::new(Two(AtomicU64::new(0)));
        let device = Device(Arc::clone(&two), Cells("a", 4, [1, 2, 3, 4]));
        let bus = Bus::new(vec![(0x1000, Box::new(device))]).unwrap();
        let answer = bus.with_device(0, |_| (read(&bus, 0x1002), bus.write(0x1002, &[9])));
        assert_eq!(answer, Some(((Claim::Device, [7]), Claim::Device)));
        assert_eq!(bus.write(0x1003, &[9]), Claim::Device, "the device serves the others");
        assert_eq!(read(&bus, 0x1003), (Claim::Device, [9]));
        assert_eq!(two.0.load(Relaxed), 2, "both writes were offered");
    }

    #[test]
    fn reads_without_a_device_return_zero_and_are_counted() {
        let bus = Bus::new(vec![cells(0x1000, "a", 4), cells(0x1008, "b", 4)]).unwrap();
        for addr in [0, 0xfff, 0x1004, 0x1007, 0x100c, u64::MAX] {
            assert_eq!(read(&bus, addr), (Claim::Unassigned, [0; 8]), "at {addr:#x}");
            assert_eq!(bus.write(addr, &[1]), Claim::Unassigned, "at {addr:#x}");
        }
        let counters = bus.counters();
        assert_eq!((counters.unassigned_reads, counters.unassigned_writes), (6, 6));
        assert_eq!(counters.refused, 0);
        assert_eq!(Bus::new(Vec::new()).unwrap().read(0, &mut [0]), Claim::Unassigned);
    }

    #[test]
    fn a_refused_read_returns_zeroes_whatever_the_device_wrote() {
        let bus = Bus::new(vec![cells(0x1000, "a", 8)]).unwrap();
        assert_eq!(read(&bus, 0x1000), (Claim::Refused, [0; 2]));
        assert_eq!(bus.write(0x1004, &[1]), Claim::Refused);
        assert_eq!(bus.counters().refused, 2);
        assert_eq!(bus.devices().next().unwrap().refused, 2);
    }

    #[test]
    fn an_access_across_the_end_of_a_device_is_refused() {
        let bus = Bus::new(vec![cells(0x1000, "a", 4), cells(0x1004, "b", 4)]).unwrap();
        assert_eq!(read(&bus, 0x1001), (Claim::Refused, [0; 4]));
        assert_eq!(bus.write(0x1002, &[9; 4]), Claim::Refused);
        assert_eq!(read(&bus, 0x1000), (Claim::Device, [1, 2, 3, 4]));
        assert_eq!(read(&bus, 0x1004), (Claim::Device, [1, 2, 3, 4]));
        // The bus decides that, not the device: this one would return data.
        let bus = Bus::new(vec![cells(0x1000, "a", 3)]).unwrap();
        assert_eq!(read(&bus, 0x1000), (Claim::Refused, [0; 4]));
    }

    #[test]
    fn a_device_may_end_with_the_last_address() {
        let bus = Bus::new(vec![cells(u64::MAX - 3, "a", 4)]).unwrap();
        assert_eq!(read(&bus, u64::MAX), (Claim::Device, [4]));
        assert_eq!(read(&bus, u64::MAX - 1), (Claim::Refused, [0; 4]));
    }

    #[test]
    fn overlapping_devices_are_refused_with_both_names() {
        let overlap = Bus::new(vec![cells(0x1003, "b", 4), cells(0x1000, "a", 4)]);
        assert_eq!(
            overlap.err().unwrap().to_string(),
            "Device a at 0x1000 (size 0x4) overlaps b at 0x1003"
        );
        let same = Bus::new(vec![cells(0x1000, "a", 4), cells(0x1000, "b", 4)]);
        assert!(matches!(same, Err(BusError::Overlap { .. })));
    }

    #[test]
    fn a_device_without_size_or_past_the_last_address_is_refused() {
        for (base, size) in [(0, 0), (u64::MAX, 2), (1, u64::MAX)] {
            let refused = Bus::new(vec![cells(base, "a", size)]).err();
            let fits = base.checked_add(size.wrapping_sub(1)).is_some() && size != 0;
            assert_eq!(refused.is_some(), !fits, "base {base:#x}, size {size:#x}");
        }
    }

    #[test]
    fn a_reset_reaches_every_device() {
        let bus = Bus::new(vec![cells(0x1000, "a", 4), cells(0x2000, "b", 4)]).unwrap();
        bus.reset();
        assert_eq!(read(&bus, 0x1000), (Claim::Device, [0; 4]));
        assert_eq!(read(&bus, 0x2000), (Claim::Device, [0; 4]));
    }

    #[test]
    fn the_list_of_logged_addresses_does_not_grow_with_the_guest() {
        let bus = Bus::new(Vec::new()).unwrap();
        for addr in (0..100_000).rev() {
            bus.read(addr, &mut [0]);
        }
        assert_eq!(bus.logged.sorted.lock().unwrap().len(), LOGGED_ADDRESSES);
        assert!(bus.logged.full.load(Relaxed));
        assert_eq!(bus.counters().unassigned_reads, 100_000);
    }

    #[test]
    fn a_bus_is_shared_by_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Bus>();
    }
}
