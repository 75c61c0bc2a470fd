//! A virtio device, its registers as the driver has written them, and the checker of its behaviour.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use rvmm_devices::testing::{TestIrq, create, dispatch_event, turn, wiring};
use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::{MmioDevice, Wiring};

use super::backends::Backends;
use super::kind::{Kind, Piece};
use super::oracle::{ActiveQueue, SetUp, overlap};
use super::ram::{HIGH, LOW, Ram, Watched, not_noted};

/// Size of the area for each queue's rings, and start of the buffers.
const RINGS: u64 = 0x2800;
pub(crate) const BUFFERS: u64 = LOW.start + 0x1_8000;

/// Unused memory between both.
pub(crate) const CANARY: Range<u64> = LOW.start + 0x1_7000..BUFFERS;

/// Number of events of the device's sources after which it must be idle.
const TURNS: usize = 3000;

/// Maximum number of bytes that one call of a device may release to the host: the documented limit and one piece.
const MOST_RELEASED: u64 = (4096 + 1024) * 4096;

mod reg {
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const STATUS: u64 = 0x70;
    /// Low words; the high ones follow.
    pub(super) const ADDRESSES: [u64; 3] = [0x80, 0x90, 0xa0];
    pub(super) const QUEUE_RESET: u64 = 0xc0;
}

const DRIVER_OK: u32 = 4;
const SILENT: u32 = 64 | 128;

/// A queue from the driver's side.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    set_up: SetUp,
    max: u32,
    is_ready: bool,
    pub(crate) active: Option<ActiveQueue>,
    /// The driver's available index.
    pub(crate) available: u16,
    next: u16,
}

/// Number of bytes that a device has changed in RAM.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Changed {
    pub(crate) rings: u64,
    pub(crate) buffers: u64,
    /// The longest change outside of used rings.
    pub(crate) longest: u64,
}

/// A device and its guest.
pub(crate) struct Stage {
    pub(crate) kind: Kind,
    options: &'static str,
    pub(crate) device: Box<dyn MmioDevice>,
    pub(crate) ends: Backends,
    pub(crate) ram: Ram,
    pub(crate) queues: Vec<Queue>,
    pub(crate) offered: u64,
    irq: TestIrq,
    watched: Watched,
    /// What the device has changed in RAM since it was last checked.
    changes: Vec<Range<u64>>,
    pub(crate) changed: Changed,
    /// The fill of the next writable buffer.
    fill: u8,
    selected: u32,
    /// True if the guest's buffers or tables overlap its rings: see `oracle.rs`.
    is_tainted: bool,
    free: u64,
    free_table: u64,
}

impl Stage {
    /// Creates a device as after power-on.
    pub(crate) fn new(kind: Kind, options: &'static str) -> Self {
        let (ram, ends, irq) = (Ram::new(), Backends::new(), TestIrq::default());
        let watched = Watched::new(ram.memory.clone());
        let device = Self::device(options, &watched, &ends, &irq);
        let mut stage = Self {
            kind,
            options,
            device,
            ends,
            ram,
            queues: Vec::new(),
            offered: 0,
            irq,
            watched,
            changes: Vec::new(),
            changed: Changed::default(),
            fill: 0x80,
            selected: 0,
            is_tainted: false,
            free: BUFFERS,
            free_table: HIGH.start,
        };
        stage.look();
        stage
    }

    fn device(
        options: &str,
        watched: &Watched,
        ends: &Backends,
        irq: &TestIrq,
    ) -> Box<dyn MmioDevice> {
        let wiring = Wiring {
            irq: Arc::new(irq.clone()),
            memory: Arc::new(watched.clone()),
            host: Arc::new(ends.clone()),
            power_button: Some(ends.button.try_clone().unwrap()),
            ..wiring()
        };
        create(options, wiring).unwrap()
    }

    /// Replaces the device by one that is restored from its saved state, and checks that the driver sees no difference.
    pub(crate) fn save_and_restore(&mut self) {
        // A disk that does not answer cannot be paused, and a network that fails cannot be opened.
        self.ends.disk.release();
        self.ends.net.fail(None);
        self.before();
        self.device.pause().unwrap();
        self.after();
        let text = serde_json::to_string(&self.device.save().unwrap()).unwrap();
        let seen = self.visible();
        self.ends.reopen();
        let irq = TestIrq::default();
        let new = Self::device(self.options, &self.watched, &self.ends, &irq);
        (self.device, self.irq) = (new, irq);
        self.before();
        self.device.restore(serde_json::from_str(&text).unwrap()).unwrap();
        // A chain in flight that the driver has overwritten with an invalid one is returned.
        let returned = self.after();
        if returned.iter().all(|count| *count == 0) {
            assert_eq!(self.visible(), seen, "{text}");
            let again = serde_json::to_string(&self.device.save().unwrap()).unwrap();
            assert_eq!(again, text, "a restored device has another state");
        }
        self.device.resume();
        self.run();
    }

    /// Everything that a driver can read, but for configuration spaces that show the backend, which may have changed.
    fn visible(&mut self) -> Vec<u32> {
        let registers = (0..0x100).step_by(4).map(|register| self.read(register));
        let mut seen: Vec<u32> = registers.collect();
        seen.push(self.irq.is_high().into());
        seen
    }

    /// Reads the features and the queues of the device.
    fn look(&mut self) {
        for word in [1, 0] {
            self.write(reg::DEVICE_FEATURES_SEL, word);
            self.offered = self.offered << 32 | u64::from(self.read(reg::DEVICE_FEATURES));
        }
        loop {
            self.write(reg::QUEUE_SEL, self.queues.len() as u32);
            match self.read(reg::QUEUE_SIZE_MAX) {
                0 => break,
                max => {
                    let set_up = SetUp { size: max, at: [0; 3] };
                    self.queues.push(Queue { max, set_up, ..Queue::default() });
                }
            }
        }
        assert!(!self.queues.is_empty() && self.queues.len() <= 9);
    }

    pub(crate) fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(register, &mut data).map_or(0, |()| u32::from_le_bytes(data))
    }

    /// Writes a register, and records the effect for the checker.
    pub(crate) fn write(&mut self, register: u64, value: u32) {
        let is_taken = self.device.write(register, &value.to_le_bytes()).is_ok();
        let queue = self.queues.get_mut(self.selected as usize);
        match (register, queue) {
            (reg::QUEUE_SEL, _) if is_taken => self.selected = value,
            (reg::QUEUE_SIZE, Some(queue)) if is_taken => queue.set_up.size = value,
            (reg::QUEUE_READY, Some(queue)) if is_taken => {
                let was_ready = std::mem::replace(&mut queue.is_ready, value == 1);
                if !was_ready && value == 1 && self.runs() {
                    self.activate(self.selected as usize);
                }
            }
            (reg::QUEUE_RESET, Some(queue)) if is_taken => {
                *queue = Queue { max: queue.max, ..Queue::default() };
                queue.set_up.size = queue.max;
            }
            (reg::STATUS, _) => self.note_status(),
            (_, Some(queue)) if is_taken => {
                for (at, low) in queue.set_up.at.iter_mut().zip(reg::ADDRESSES) {
                    if register == low {
                        *at = *at >> 32 << 32 | u64::from(value);
                    } else if register == low + 4 {
                        *at = *at << 32 >> 32 | u64::from(value) << 32;
                    }
                }
            }
            _ => {}
        }
        if matches!(register, reg::STATUS | reg::QUEUE_RESET | reg::QUEUE_READY) {
            assert_eq!(self.ram.changes(), [], "a register has written to RAM");
        }
    }

    pub(crate) fn status(&mut self) -> u32 {
        self.read(reg::STATUS)
    }

    fn runs(&mut self) -> bool {
        self.status() & (DRIVER_OK | SILENT) == DRIVER_OK
    }

    fn note_status(&mut self) {
        let status = self.status();
        if status == 0 {
            for queue in &mut self.queues {
                *queue = Queue { max: queue.max, ..Queue::default() };
                queue.set_up.size = queue.max;
            }
            // A reset clears the selection.
            self.selected = 0;
            self.is_tainted = false;
        } else if status & SILENT != 0 {
            self.queues.iter_mut().for_each(|queue| queue.active = None);
        } else if status & DRIVER_OK != 0 {
            let is_new = |queue: &Queue| queue.is_ready && queue.active.is_none();
            let ready: Vec<usize> =
                (0..self.queues.len()).filter(|index| is_new(&self.queues[*index])).collect();
            ready.into_iter().for_each(|index| self.activate(index));
        }
    }

    fn activate(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        queue.active = Some(ActiveQueue::new(queue.set_up));
        let parts: Vec<Range<u64>> = self.parts().collect();
        for (index, part) in parts.iter().enumerate() {
            self.is_tainted |= parts[..index].iter().any(|other| overlap(part, other));
        }
    }

    /// The rings of all active queues.
    fn parts(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.queues.iter().filter_map(|queue| queue.active.as_ref()).flat_map(|l| l.set_up.parts())
    }

    /// Resets the device and checks that it reports the end of the reset.
    pub(crate) fn reset(&mut self) {
        self.write(reg::STATUS, 0);
        assert_eq!(self.status(), 0, "a reset does not end");
        assert!(!self.irq.is_high(), "a reset leaves the line high");
        self.free = BUFFERS;
        self.free_table = HIGH.start;
    }

    /// Resets the device and starts it correctly, with the offered ones of `features` and queues of at most `size`.
    pub(crate) fn start(&mut self, features: u64, size: u32) {
        self.reset();
        self.write(reg::STATUS, 1);
        self.write(reg::STATUS, 3);
        let features = features & self.offered | 1 << 32;
        for word in 0..2 {
            self.write(reg::DRIVER_FEATURES_SEL, word);
            self.write(reg::DRIVER_FEATURES, (features >> (32 * word)) as u32);
        }
        self.write(reg::STATUS, 11);
        assert_eq!(self.status(), 11, "the device does not agree to what it offers");
        (0..self.queues.len()).for_each(|index| self.set_up(index, size));
        self.write(reg::STATUS, 15);
        assert_eq!(self.status(), 15, "the device does not start");
    }

    /// Sets a queue up at its default addresses.
    pub(crate) fn set_up(&mut self, index: usize, size: u32) {
        let base = LOW.start + RINGS * index as u64;
        self.ram.poke(base, &vec![0; RINGS as usize]);
        self.write(reg::QUEUE_SEL, index as u32);
        self.write(reg::QUEUE_SIZE, size.min(self.queues[index].max));
        for (low, addr) in reg::ADDRESSES.into_iter().zip(self.rings(index)) {
            self.write(low, addr as u32);
            self.write(low + 4, (addr >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
    }

    pub(crate) fn reset_queue(&mut self, index: usize) {
        self.write(reg::QUEUE_SEL, index as u32);
        self.write(reg::QUEUE_RESET, 1);
    }

    /// Writes to RAM as the driver, at any address.
    pub(crate) fn poke(&mut self, addr: u64, bytes: &[u8]) {
        let range = addr..addr.saturating_add(bytes.len() as u64);
        for active in self.queues.iter_mut().filter_map(|queue| queue.active.as_mut()) {
            active.is_scribbled |= overlap(&active.set_up.parts()[2], &range);
        }
        self.ram.poke(addr, bytes);
    }

    pub(crate) fn descriptor(&mut self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (addr, len, flags, next) = fields;
        let raw = u128::from(addr) | u128::from(len) << 64;
        let raw = raw | u128::from(flags) << 96 | u128::from(next) << 112;
        self.poke(table.wrapping_add(16 * u64::from(index)), &raw.to_le_bytes());
    }

    /// Allocates RAM; reuses the oldest if none is free.
    pub(crate) fn allocate(&mut self, len: u64) -> u64 {
        if self.free + len > LOW.end {
            self.free = BUFFERS;
        }
        let addr = self.free;
        self.free = (addr + len).next_multiple_of(16);
        addr
    }

    fn allocate_table(&mut self, entries: u64) -> u64 {
        if self.free_table + 16 * entries > HIGH.end {
            self.free_table = HIGH.start;
        }
        let addr = self.free_table;
        self.free_table += 16 * entries;
        addr
    }

    /// The default addresses of a queue's rings.
    pub(crate) fn rings(&self, index: usize) -> [u64; 3] {
        let base = LOW.start + RINGS * index as u64;
        [base, base + 0x1000, base + 0x1800]
    }

    /// Makes a request available without a check for free descriptors or for a working device.
    pub(crate) fn post_unchecked(&mut self, index: usize, pieces: &[Piece], indirect: bool) {
        if let Some(active) = self.queues[index].active.as_mut() {
            active.with_device.clear();
        }
        self.post(index, pieces, indirect);
    }

    /// Makes a request available, optionally as an indirect table; false if the queue is inactive or has no room.
    pub(crate) fn post(&mut self, index: usize, pieces: &[Piece], indirect: bool) -> bool {
        let Some(active) = self.queues.get(index).and_then(|queue| queue.active.as_ref()) else {
            return false;
        };
        let (table, size) = (active.set_up.at[0], active.set_up.size as u16);
        let needed = if indirect { 1 } else { pieces.len() as u16 };
        let used = active.with_device.len() * 4 + usize::from(needed);
        if needed == 0
            || needed > size
            || used > usize::from(size) && !active.with_device.is_empty()
        {
            return false;
        }
        let head = self.queues[index].next % size;
        self.queues[index].next = (head + needed) % size;
        let into = if indirect { self.allocate_table(pieces.len() as u64) } else { table };
        let mut at = if indirect { 0 } else { head };
        for (number, piece) in pieces.iter().enumerate() {
            let (addr, len, flags) = match piece {
                Piece::Read(bytes) => {
                    let addr = self.allocate(bytes.len() as u64);
                    self.poke(addr, bytes);
                    (addr, bytes.len() as u32, 0)
                }
                Piece::Write(len) => {
                    let addr = self.allocate((*len).into());
                    self.fill_buffer(addr, *len);
                    (addr, *len, 2)
                }
            };
            let flags = if number + 1 < pieces.len() { flags | 1 } else { flags };
            let next = if indirect { at + 1 } else { (at + 1) % size };
            self.descriptor(into, at, (addr, len, flags, next));
            at = next;
        }
        if indirect {
            self.descriptor(table, head, (into, 16 * pieces.len() as u32, 4, 0));
        }
        self.offer(index, head);
        true
    }

    /// Gives a writable buffer contents that a device hardly writes there, so that all it writes is seen as a change.
    fn fill_buffer(&mut self, addr: u64, len: u32) {
        self.fill = self.fill.wrapping_add(1) | 0x80;
        self.poke(addr, &vec![self.fill; len as usize]);
    }

    /// Makes any head available.
    pub(crate) fn offer(&mut self, index: usize, head: u16) {
        let Some(queue) = self.queues.get_mut(index) else { return };
        let Some(active) = &queue.active else { return };
        let ring = active.set_up.at[1];
        let slot = u64::from(queue.available) % u64::from(active.set_up.size);
        queue.available = queue.available.wrapping_add(1);
        let available = queue.available;
        self.poke(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.poke(ring + 2, &available.to_le_bytes());
    }

    pub(crate) fn kick(&mut self, queue: u32) {
        self.write(0x50, queue);
    }

    /// Runs the device until it is idle, and checks it. Returns the number of returned chains, by queue.
    pub(crate) fn run(&mut self) -> Vec<u64> {
        self.before();
        self.turns();
        self.after()
    }

    /// Checks the changes that `forge` makes to memory as if they were the device's, which has noted them.
    pub(crate) fn forge(&mut self, forge: impl FnOnce(&Self)) {
        self.before();
        forge(self);
        self.watched.note_written(0, u64::MAX);
        self.after();
    }

    /// The same for a device that notes these ranges.
    pub(crate) fn forge_and_note(&mut self, noted: &[Range<u64>], forge: impl FnOnce(&Self)) {
        self.before();
        forge(self);
        let note =
            |range: &Range<u64>| self.watched.note_written(range.start, range.end - range.start);
        noted.iter().for_each(note);
        self.after();
    }

    /// Calls the device once without a cause, and checks it.
    pub(crate) fn spurious_call(&mut self, token: u32) {
        self.before();
        dispatch_event(self.device.as_mut(), token);
        self.after();
    }

    fn turns(&mut self) {
        for _ in 0..TURNS {
            self.watched.take_released();
            let events = turn(self.device.as_mut(), 0).unwrap();
            self.compare();
            let released = self.watched.take_released();
            let most = MOST_RELEASED * events.max(1) as u64;
            assert!(released <= most, "{released} bytes were released at once");
            if events == 0 {
                return;
            }
        }
        panic!("the device never sleeps");
    }

    fn before(&mut self) {
        let mut tables = Vec::new();
        let Self { ram, queues, .. } = self;
        for active in queues.iter_mut().filter_map(|queue| queue.active.as_mut()) {
            active.note(ram, &mut tables);
        }
        let [used, rest] = [true, false].map(|used| {
            let active = self.queues.iter().filter_map(|queue| queue.active.as_ref());
            let parts = active.map(|active| active.set_up.parts());
            let parts = parts.flat_map(|[d, a, u]| if used { vec![u] } else { vec![d, a] });
            parts.collect::<Vec<_>>()
        });
        tables.extend(rest);
        let active = self.queues.iter().filter_map(|queue| queue.active.as_ref());
        let buffers: HashSet<Range<u64>> = active.flat_map(ActiveQueue::buffers).collect();
        self.is_tainted |=
            tables.iter().chain(&used).any(|part| buffers.iter().any(|b| overlap(b, part)));
        self.is_tainted |= tables.iter().any(|table| used.iter().any(|used| overlap(used, table)));
    }

    /// Finds what the device has changed in RAM, and checks that it has noted that.
    fn compare(&mut self) {
        let mut changes = self.ram.changes();
        let noted = self.watched.take_noted();
        if let Some(change) = not_noted(&changes, &noted) {
            panic!("the device wrote to {change:x?} and noted only {noted:x?}");
        }
        let rings: Vec<Range<u64>> = self.parts().skip(2).step_by(3).collect();
        for change in &changes {
            let is_ring = rings.iter().any(|ring| overlap(ring, change));
            let len = change.end - change.start;
            if is_ring {
                self.changed.rings += len;
            } else {
                self.changed.buffers += len;
                self.changed.longest = self.changed.longest.max(len);
            }
        }
        self.changes.append(&mut changes);
    }

    fn after(&mut self) -> Vec<u64> {
        self.compare();
        let changes = std::mem::take(&mut self.changes);
        let active = || self.queues.iter().filter_map(|queue| queue.active.as_ref());
        if !self.is_tainted {
            let allowed: Vec<Range<u64>> = active().flat_map(ActiveQueue::writable).collect();
            for change in changes {
                let mut at = change.start;
                while at < change.end {
                    let around = allowed.iter().find(|range| range.contains(&at));
                    let bad = || panic!("the device wrote to {at:x} of {change:x?}");
                    at = around.unwrap_or_else(bad).end;
                }
            }
        }
        let (ram, is_tainted) = (&self.ram, self.is_tainted);
        let settle = |queue: &mut Queue| {
            queue.active.as_mut().map_or(0, |active| active.settle(ram, is_tainted))
        };
        let counts = self.queues.iter_mut().map(settle).collect();
        if self.status() & SILENT != 0 {
            self.queues.iter_mut().for_each(|queue| queue.active = None);
        }
        let pending = self.read(reg::INTERRUPT_STATUS);
        assert_eq!(self.irq.is_high(), pending != 0, "the line and its register differ");
        counts
    }
}
