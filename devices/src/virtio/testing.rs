//! A virtio driver for tests: it follows the specification, except where a test makes it violate it.

use std::collections::HashMap;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::vhost_user::testing::shared_memory;
use super::{VirtioDevice, VirtioMmio, feature};
use crate::catalog::{BuildError, Wiring};
use crate::device::MmioDevice;
use crate::irq::Interrupt;
use crate::testing::{TestIrq, turn, wiring};

/// Start address of the test's RAM.
pub const RAM: u64 = 0x8000_0000;
/// Size of the test's RAM.
pub const RAM_SIZE: u64 = 8 << 20;
/// Size of each queue, if the device allows it.
pub const QUEUE_SIZE: u16 = 16;

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Size of the RAM for one queue's rings, and start address of the buffers.
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = RAM + (1 << 20);

/// Bits of the status register.
pub mod status {
    /// ACKNOWLEDGE and DRIVER.
    pub const FOUND: u32 = 3;
    /// FEATURES_OK and the bits before it.
    pub const FEATURES_OK: u32 = 11;
    /// DRIVER_OK and the bits before it.
    pub const RUNNING: u32 = 15;
    /// DEVICE_NEEDS_RESET
    pub const NEEDS_RESET: u32 = 64;
}

/// A buffer of a request.
#[derive(Debug, Clone, Copy)]
pub enum Buffer<'a> {
    /// Bytes for the device to read.
    Read(&'a [u8]),
    /// Number of bytes for the device to write.
    Write(u32),
}

/// Puts a device on the MMIO transport, with the memory and the line of `wiring`. Panics if the host has no descriptors left.
#[must_use]
#[expect(clippy::unwrap_used, reason = "a failed step fails the test")]
pub fn on_mmio(device: Box<dyn VirtioDevice>, wiring: Wiring) -> Box<dyn MmioDevice> {
    Box::new(VirtioMmio::create(device, wiring.memory, Interrupt::Line(wiring.irq)).unwrap())
}

/// A machine with one virtio device and its driver. Panics if a step fails.
pub struct Rig {
    /// The device with its transport.
    pub device: Box<dyn MmioDevice>,
    /// Its interrupt line.
    pub irq: TestIrq,
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    queues: HashMap<u32, Rings>,
    free: u64,
}

/// A queue from the driver's side.
#[derive(Debug, Clone, Default)]
struct Rings {
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    /// Writable buffers by the head of their chain.
    writable: HashMap<u16, Vec<(u64, u32)>>,
}

#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed step fails the test"
)]
impl Rig {
    /// A machine with this device.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::build(|wiring| on_mmio(device, wiring))
    }

    /// A machine with the device that `build` creates with the wiring.
    pub fn build(build: impl FnOnce(Wiring) -> Box<dyn MmioDevice>) -> Self {
        Self::try_build(|wiring| Ok(build(wiring))).unwrap()
    }

    /// As [`build`](Self::build), if the device may be refused.
    ///
    /// # Errors
    /// The error of `build`.
    pub fn try_build(
        build: impl FnOnce(Wiring) -> Result<Box<dyn MmioDevice>, BuildError>,
    ) -> Result<Self, BuildError> {
        let memory = shared_memory(RAM, RAM_SIZE).unwrap();
        let irq = TestIrq::default();
        let device = build(Wiring {
            irq: Arc::new(irq.clone()),
            memory: Arc::new(memory.clone()),
            ..wiring()
        })?;
        Ok(Self { device, irq, memory, queues: HashMap::new(), free: BUFFERS })
    }

    /// Reads a register; returns 0 if the device refuses.
    pub fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        match self.device.read(register, &mut data) {
            Ok(()) => u32::from_le_bytes(data),
            Err(_) => 0,
        }
    }

    /// Writes a register; returns false if the device refuses.
    pub fn write(&mut self, register: u64, value: u32) -> bool {
        self.device.write(register, &value.to_le_bytes()).is_ok()
    }

    /// The device's status.
    pub fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(self.read(0x10)) << 32 | u64::from(low)
    }

    /// Accepts these features and VERSION_1; returns true if the device sets FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.negotiate_only(features | feature::VERSION_1)
    }

    /// Accepts only these features; returns true if the device sets FEATURES_OK.
    pub fn negotiate_only(&mut self, features: u64) -> bool {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, status::FOUND);
        for (word, value) in [(0, features & u64::from(u32::MAX)), (1, features >> 32)] {
            self.write(0x24, word);
            self.write(0x20, u32::try_from(value).unwrap());
        }
        self.write(0x70, status::FEATURES_OK);
        self.status() == status::FEATURES_OK
    }

    /// Resets the device and starts it with these features and all its queues.
    pub fn start(&mut self, features: u64) {
        assert!(self.negotiate(features), "the device refuses features {features:#x}");
        self.queues.clear();
        self.free = BUFFERS;
        let mut queue = 0;
        while self.set_up(queue) {
            queue += 1;
        }
        self.write(0x70, status::RUNNING);
        assert_eq!(self.status(), status::RUNNING, "the device does not start");
        self.run();
    }

    /// Sets a queue up, without starting the device; returns false if there is no queue of that number.
    pub fn set_up(&mut self, queue: u32) -> bool {
        self.write(0x30, queue);
        let size = self.read(0x34).min(QUEUE_SIZE.into());
        if size == 0 {
            return false;
        }
        let base = RAM + u64::from(queue) * RINGS;
        self.memory
            .write_slice(&vec![0; usize::try_from(RINGS).unwrap()], GuestAddress(base))
            .unwrap();
        self.write(0x38, size);
        for (register, addr) in [(0x80, base), (0x90, base + 0x4000), (0xa0, base + 0x8000)] {
            self.write(register, u32::try_from(addr & u64::from(u32::MAX)).unwrap());
            self.write(register + 4, u32::try_from(addr >> 32).unwrap());
        }
        self.write(0x44, 1);
        let size = u16::try_from(size).unwrap();
        self.queues.insert(queue, Rings { size, ..Rings::default() });
        true
    }

    /// The addresses of the descriptor table, the available ring and the used ring of a queue.
    #[must_use]
    pub fn rings(&self, queue: u32) -> [u64; 3] {
        let base = RAM + u64::from(queue) * RINGS;
        [base, base + 0x4000, base + 0x8000]
    }

    /// Allocates RAM until the next start.
    pub fn allocate(&mut self, len: u64) -> u64 {
        let addr = self.free;
        self.free = (addr + len).next_multiple_of(64);
        assert!(self.free <= RAM + RAM_SIZE, "the test's RAM is used up");
        addr
    }

    /// Writes a descriptor.
    pub fn set_descriptor(
        &mut self,
        table: u64,
        index: u16,
        (addr, len, flags, next): (u64, u32, u16, u16),
    ) {
        let raw = u128::from(addr)
            | u128::from(len) << 64
            | u128::from(flags) << 96
            | u128::from(next) << 112;
        let at = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_slice(&raw.to_le_bytes(), at).unwrap();
    }

    /// Makes a head available, without any check.
    pub fn make_available(&mut self, queue: u32, head: u16) {
        let [_, ring, _] = self.rings(queue);
        let rings = self.queues.get_mut(&queue).unwrap();
        let slot = u64::from(rings.available % rings.size);
        rings.available = rings.available.wrapping_add(1);
        let index = rings.available;
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * slot)).unwrap();
        self.memory.write_obj(index, GuestAddress(ring + 2)).unwrap();
    }

    /// Makes a request of these buffers available, and returns its head. Reuses descriptors without a check: a
    /// test has at most a queue's size of them in flight.
    pub fn add(&mut self, queue: u32, buffers: &[Buffer<'_>]) -> u16 {
        let [table, ..] = self.rings(queue);
        let Rings { size, next_descriptor, .. } = self.queues[&queue];
        let (mut writable, mut index, head) = (Vec::new(), next_descriptor, next_descriptor);
        for (position, buffer) in buffers.iter().enumerate() {
            let (len, flags) = match buffer {
                Buffer::Read(bytes) => (u32::try_from(bytes.len()).unwrap(), 0),
                Buffer::Write(len) => (*len, WRITE),
            };
            let addr = self.allocate(u64::from(len).max(1));
            match buffer {
                Buffer::Read(bytes) => self.memory.write_slice(bytes, GuestAddress(addr)).unwrap(),
                Buffer::Write(len) => writable.push((addr, *len)),
            }
            let next = (index + 1) % size;
            let flags = if position + 1 < buffers.len() { flags | NEXT } else { flags };
            self.set_descriptor(table, index, (addr, len, flags, next));
            index = next;
        }
        let rings = self.queues.get_mut(&queue).unwrap();
        rings.next_descriptor = index;
        rings.writable.insert(head, writable);
        self.make_available(queue, head);
        head
    }

    /// Notifies the device of a queue, and runs it until it is idle.
    pub fn kick(&mut self, queue: u32) {
        self.write(0x50, queue);
        self.run();
    }

    /// Runs the device until it is idle.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if turn(self.device.as_mut(), 0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device is never idle");
    }

    /// Returns the next used element: the head of the request, and the number of bytes written by the device.
    pub fn take_used(&mut self, queue: u32) -> Option<(u16, u32)> {
        let [.., ring] = self.rings(queue);
        let rings = self.queues.get_mut(&queue).unwrap();
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == rings.used {
            return None;
        }
        let slot = u64::from(rings.used % rings.size);
        rings.used = rings.used.wrapping_add(1);
        let element: u64 = self.memory.read_obj(GuestAddress(ring + 4 + 8 * slot)).unwrap();
        let head = u16::try_from(element & u64::from(u32::MAX)).unwrap();
        Some((head, u32::try_from(element >> 32).unwrap()))
    }

    /// The contents of the writable buffers of a request.
    #[must_use]
    pub fn written(&self, queue: u32, head: u16) -> Vec<u8> {
        let mut all = Vec::new();
        for (addr, len) in &self.queues[&queue].writable[&head] {
            let mut part = vec![0; usize::try_from(*len).unwrap()];
            self.memory.read_slice(&mut part, GuestAddress(*addr)).unwrap();
            all.extend(part);
        }
        all
    }

    /// Makes a request, runs the device, and returns the bytes it has written; `None` if the request is not completed.
    pub fn ask(&mut self, queue: u32, buffers: &[Buffer<'_>]) -> Option<Vec<u8>> {
        let head = self.add(queue, buffers);
        self.kick(queue);
        let (used, len) = self.take_used(queue)?;
        assert_eq!(used, head, "another request was completed");
        let mut written = self.written(queue, head);
        written.truncate(usize::try_from(len).unwrap());
        Some(written)
    }

    /// Acknowledges all interrupts, and returns the bits that were set.
    pub fn acknowledge(&mut self) -> u32 {
        let pending = self.read(0x60);
        self.write(0x64, pending);
        pending
    }
}
