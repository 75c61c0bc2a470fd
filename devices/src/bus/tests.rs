//! The bus with devices of four bytes.

use super::*;
use crate::device::{Access, AccessError, FdtDesc, Unlocked};
use crate::stateless;

/// Four bytes of memory that refuse other widths than 1 and 4.
struct Cells(&'static str, u64, [u8; 4]);

stateless!(Cells, |cells| cells.2 = [0; 4]);

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
    stateless!(Device);
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

#[test]
fn a_view_finds_a_device_that_was_added_and_no_longer_one_that_was_removed() {
    let bus = Arc::new(Bus::new(vec![cells(0x1000, "a", 4)]).unwrap());
    let mut view = bus.view();
    let mut read = |addr| {
        let mut data = [0xaa; 1];
        (view.read(addr, &mut data), data[0])
    };
    assert_eq!(read(0x1001), (Claim::Device, 2));
    assert_eq!(read(0x2001), (Claim::Unassigned, 0));
    let (base, device) = cells(0x2000, "b", 4);
    let index = bus.add(base, device).unwrap();
    assert_eq!(read(0x2001), (Claim::Device, 2));
    assert_eq!(read(0x1001), (Claim::Device, 2));
    let (base, device) = cells(0x800, "c", 4);
    assert_ne!(bus.add(base, device).unwrap(), index);
    assert_eq!(read(0x2001), (Claim::Device, 2), "the slot found last has moved");
    assert_eq!(bus.remove(index).unwrap().name(), "b");
    assert_eq!(read(0x2001), (Claim::Unassigned, 0));
    assert!(bus.remove(index).is_none());
    let names: Vec<_> = bus.devices().map(|slot| slot.name).collect();
    assert_eq!(names, ["c", "a"]);
}

#[test]
fn a_device_that_does_not_fit_is_not_added() {
    let bus = Bus::new(vec![cells(0x1000, "a", 4)]).unwrap();
    let (base, device) = cells(0x1002, "b", 4);
    assert!(matches!(bus.add(base, device), Err(BusError::Overlap { .. })));
    assert_eq!(bus.devices().len(), 1);
    let (base, device) = cells(0x1004, "b", 4);
    assert_eq!(bus.add(base, device).unwrap(), 1, "a refused device has no index");
}

#[test]
fn harts_access_a_bus_whose_map_changes_all_the_time() {
    let bus = Arc::new(Bus::new(vec![cells(0x1000, "a", 4)]).unwrap());
    let harts: Vec<_> = (0..2)
        .map(|_| {
            let mut view = bus.view();
            std::thread::spawn(move || {
                for _ in 0..20_000 {
                    let mut data = [0];
                    assert_eq!(view.read(0x1002, &mut data), Claim::Device);
                    assert_eq!(data, [3]);
                    let claim = view.read(0x2002, &mut data);
                    assert!(matches!(
                        (claim, data[0]),
                        (Claim::Device, 3 | 0) | (Claim::Unassigned, 0)
                    ));
                }
            })
        })
        .collect();
    for _ in 0..2_000 {
        let (base, device) = cells(0x2000, "b", 4);
        let index = bus.add(base, device).unwrap();
        assert!(bus.remove(index).is_some());
    }
    harts.into_iter().for_each(|hart| hart.join().unwrap());
    assert_eq!(bus.devices().len(), 1);
}
