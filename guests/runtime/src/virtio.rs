//! A driver for virtio devices over MMIO, version 2 (virtio 1.3, section 4.2.2), with split queues in otherwise unused RAM.

use core::sync::atomic::{Ordering, fence};

use crate::board::Board;
use crate::{Failure, ensure, ensure_eq, mmio, time};

/// Register offsets.
pub mod reg {
    /// "virt"
    pub const MAGIC: usize = 0x00;
    /// 2
    pub const VERSION: usize = 0x04;
    /// Kind of device; 0 for none
    pub const DEVICE_ID: usize = 0x08;
    /// Offered features, in the word selected by the next register
    pub const DEVICE_FEATURES: usize = 0x10;
    /// Selects a word of the offered features
    pub const DEVICE_FEATURES_SEL: usize = 0x14;
    /// Accepted features
    pub const DRIVER_FEATURES: usize = 0x20;
    /// Selects a word of the accepted features
    pub const DRIVER_FEATURES_SEL: usize = 0x24;
    /// Selects a queue
    pub const QUEUE_SEL: usize = 0x30;
    /// The largest size of the queue; 0 for none
    pub const QUEUE_SIZE_MAX: usize = 0x34;
    /// Its size
    pub const QUEUE_SIZE: usize = 0x38;
    /// 1 if it is set up
    pub const QUEUE_READY: usize = 0x44;
    /// Notifies the device of a queue
    pub const QUEUE_NOTIFY: usize = 0x50;
    /// Pending interrupts
    pub const INTERRUPT_STATUS: usize = 0x60;
    /// Clears interrupts
    pub const INTERRUPT_ACK: usize = 0x64;
    /// Device status
    pub const STATUS: usize = 0x70;
    /// Address of the descriptor table (two words)
    pub const QUEUE_DESC: usize = 0x80;
    /// Address of the available ring
    pub const QUEUE_DRIVER: usize = 0x90;
    /// Address of the used ring
    pub const QUEUE_DEVICE: usize = 0xa0;
    /// The device's own configuration
    pub const CONFIG: usize = 0x100;
}

/// DEVICE_NEEDS_RESET
pub const NEEDS_RESET: u32 = 64;
/// VIRTIO_F_INDIRECT_DESC
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1
pub const VERSION_1: u64 = 1 << 32;

/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor: address, bytes, flags, next.
pub type Descriptor = (usize, u32, u16, u16);

/// Entries of every queue.
pub const SIZE: u16 = 8;

/// Bytes of RAM per queue and per device, and the offset of the first one in RAM: after image, stacks and tree of a 64 MiB guest.
const ROOM: usize = 0x1_0000;
const ROOMS: usize = 0x10_0000;
const CORNER: usize = 0x8300_0000;
/// Offsets of the rings and of the buffers in a queue's RAM.
const DRIVER: usize = 0x1000;
const DEVICE: usize = 0x2000;
const BUFFERS: usize = 0x4000;

/// A device in the device tree.
#[derive(Clone, Copy)]
pub struct Device {
    /// Address of its registers.
    pub base: usize,
    /// Its interrupt source.
    pub irq: u32,
}

/// A queue of a running device. Its descriptors are used in order, one request at a time.
pub struct Queue {
    index: u32,
    room: usize,
    available: u16,
    used: u16,
}

impl Device {
    /// The first device with this id.
    #[must_use]
    pub fn find(board: &Board, id: u32) -> Option<Self> {
        let nodes =
            board.fdt.nodes().filter(|node| node.strings("compatible").any(|s| s == "virtio,mmio"));
        let devices = nodes.filter_map(|node| {
            Some(Self { base: node.reg(0)?.0 as usize, irq: node.cell("interrupts")? })
        });
        let mut devices = devices.filter(|device| device.read(reg::DEVICE_ID) == id);
        devices.next()
    }

    /// Reads a register.
    #[must_use]
    pub fn read(&self, register: usize) -> u32 {
        mmio::read32(self.base + register)
    }

    /// Writes a register.
    pub fn write(&self, register: usize, value: u32) {
        mmio::write32(self.base + register, value);
    }

    /// The offered features.
    #[must_use]
    pub fn features(&self) -> u64 {
        let word = |index| {
            self.write(reg::DEVICE_FEATURES_SEL, index);
            u64::from(self.read(reg::DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    /// Resets the device and starts it with `features` and `N` queues.
    pub fn start<const N: usize>(&self, features: u64) -> Result<[Queue; N], Failure> {
        ensure_eq!(
            (self.read(reg::MAGIC), self.read(reg::VERSION)),
            (0x7472_6976, 2),
            "magic and version"
        );
        self.write(reg::STATUS, 0);
        ensure_eq!(self.read(reg::STATUS), 0, "status after the reset");
        for status in [1, 3] {
            self.write(reg::STATUS, status);
        }
        let features = features | VERSION_1;
        for (index, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(reg::DRIVER_FEATURES_SEL, index);
            self.write(reg::DRIVER_FEATURES, word);
        }
        self.write(reg::STATUS, 11);
        ensure_eq!(self.read(reg::STATUS), 11, "FEATURES_OK for {features:#x}");
        let queues = core::array::from_fn(|index| self.set_up(index as u32));
        self.write(reg::STATUS, 15);
        ensure_eq!(self.read(reg::STATUS), 15, "DRIVER_OK");
        Ok(queues)
    }

    fn set_up(&self, index: u32) -> Queue {
        // One of eight devices.
        let rooms = CORNER + (self.base >> 12) % 8 * ROOMS;
        let room = rooms + index as usize * ROOM;
        for at in (room..room + BUFFERS).step_by(8) {
            mmio::write64(at, 0);
        }
        self.write(reg::QUEUE_SEL, index);
        self.write(reg::QUEUE_SIZE, SIZE.into());
        for (register, addr) in [
            (reg::QUEUE_DESC, room),
            (reg::QUEUE_DRIVER, room + DRIVER),
            (reg::QUEUE_DEVICE, room + DEVICE),
        ] {
            self.write(register, addr as u32);
            self.write(register + 4, (addr as u64 >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
        Queue { index, room, available: 0, used: 0 }
    }
}

impl Queue {
    /// The address of buffer `number` of this queue; 4 KiB each, eight of them.
    #[must_use]
    pub fn buffer(&self, number: usize) -> usize {
        self.room + BUFFERS + (number % 8) * 0x1000
    }

    /// Writes a descriptor.
    pub fn describe(&self, index: u16, (addr, len, flags, next): Descriptor) {
        let at = self.room + 16 * usize::from(index);
        mmio::write64(at, addr as u64);
        mmio::write64(at + 8, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48);
    }

    /// Makes the chain of `head` available, without notifying the device.
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.available % SIZE);
        mmio::write16(self.room + DRIVER + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.publish(self.available);
    }

    /// Sets the available index to any value.
    pub fn publish(&self, index: u16) {
        fence(Ordering::SeqCst);
        mmio::write16(self.room + DRIVER + 2, index);
        fence(Ordering::SeqCst);
    }

    /// Writes the available ring's flags: 1 suppresses interrupts.
    pub fn set_flags(&self, flags: u16) {
        mmio::write16(self.room + DRIVER, flags);
    }

    /// Requests an interrupt at used index `index`, if event indices were negotiated.
    pub fn ask_at(&self, index: u16) {
        mmio::write16(self.room + DRIVER + 4 + 2 * usize::from(SIZE), index);
    }

    /// Notifies the device.
    pub fn ring(&self, device: &Device) {
        device.write(reg::QUEUE_NOTIFY, self.index);
    }

    /// The next returned chain: its head and the number of bytes written.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        fence(Ordering::SeqCst);
        if mmio::read16(self.room + DEVICE + 2) == self.used {
            return None;
        }
        let at = self.room + DEVICE + 4 + 8 * usize::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        Some((mmio::read32(at), mmio::read32(at + 4)))
    }

    /// Waits for the next returned chain.
    pub fn wait(&mut self) -> Result<(u32, u32), Failure> {
        let mut came = None;
        ensure!(
            time::wait_until(|| {
                came = came.or_else(|| self.take());
                came.is_some()
            }),
            "queue {}: nothing came back",
            self.index
        );
        came.ok_or_else(|| Failure::new(format_args!("nothing came back")))
    }

    /// Makes one request with one writable buffer and waits for it.
    pub fn fill(&mut self, device: &Device, len: u32) -> Result<u32, Failure> {
        self.describe(0, (self.buffer(0), len, WRITE, 0));
        self.offer(0);
        self.ring(device);
        let (head, written) = self.wait()?;
        ensure_eq!(head, 0, "the head that came back");
        Ok(written)
    }
}
