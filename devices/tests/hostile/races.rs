//! A guest that changes its descriptors, rings, tables and headers on another hart while the device works on them.
//!
//! Anything that the device reads twice may differ the second time. Nothing here depends on time: the device makes a number
//! of passes, and the other thread writes until they are over.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use rvmm_devices::testing::turn;
use rvmm_devices::virtio::GuestMemoryMmap;
use vm_memory::{Bytes, GuestAddress};

use crate::scenario::kind::Kind;
use crate::scenario::ram::{HIGH, LOW};
use crate::scenario::script::Script;
use crate::scenario::stage::{BUFFERS, CANARY, Stage};
use crate::scenario::{RING_RESET, works};

/// Cycles of each device from start to reset, and passes in each cycle.
const CYCLES: u64 = 6;
const PASSES: usize = 60;

const SIZE: u16 = 16;

/// Pseudo-random numbers (xorshift).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 24) as u8).collect()
    }
}

/// The other hart, which writes to guest memory.
struct Mutator {
    memory: GuestMemoryMmap,
    /// Descriptor tables and available rings of the queues.
    rings: Vec<[u64; 2]>,
    /// True if it writes to the available rings as well, not only to the descriptors.
    wild: bool,
    numbers: Numbers,
}

impl Mutator {
    fn put(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// One write. No descriptor gets an address of the canary.
    fn step(&mut self) {
        let [table, available] = self.rings[self.numbers.below(self.rings.len() as u64) as usize];
        let table = if self.numbers.below(3) == 0 { HIGH.start } else { table };
        let descriptor = table + 16 * self.numbers.below(SIZE.into());
        let value = self.numbers.next();
        match self.numbers.below(if self.wild { 10 } else { 8 }) {
            0 | 1 => {
                let inside = BUFFERS + value % (LOW.end - BUFFERS);
                let bad = [0, LOW.end, HIGH.end - 8, u64::MAX - 15, LOW.start - 8];
                let addr = match value % 4 {
                    0 => bad[(value >> 8) as usize % bad.len()],
                    1 => HIGH.start + value % 4096 / 16 * 16,
                    _ => inside,
                };
                self.put(descriptor, &addr.to_le_bytes());
            }
            2 => {
                let lens = [0, 1, 16, 32, 44, 512, 4096, 0x1_0000, u32::MAX];
                self.put(descriptor + 8, &lens[value as usize % lens.len()].to_le_bytes());
            }
            3 => self.put(descriptor + 12, &((value % 8) as u16).to_le_bytes()),
            4 => self.put(descriptor + 14, &((value % 18) as u16).to_le_bytes()),
            // Headers and lists: their fields change while they are read.
            5..8 => self.put(BUFFERS + value % (LOW.end - BUFFERS - 8), &value.to_le_bytes()),
            8 => self
                .put(available + 4 + 2 * (value % 16), &((value >> 8) as u16 % 18).to_le_bytes()),
            _ => self.put(available + 2, &((value >> 8) as u16 % 64).to_le_bytes()),
        }
    }
}

/// Runs a started device while the other hart writes.
fn run_racing(stage: &mut Stage, numbers: &mut Numbers, wild: bool) {
    let is_over = AtomicBool::new(false);
    let queues = stage.queues.len();
    let mutator = Mutator {
        memory: stage.ram.memory.clone(),
        rings: (0..queues).map(|index| [stage.rings(index)[0], stage.rings(index)[1]]).collect(),
        wild,
        numbers: Numbers(numbers.next() | 1),
    };
    std::thread::scope(|scope| {
        let is_over = &is_over;
        scope.spawn(move || {
            let mut mutator = mutator;
            while !is_over.load(Relaxed) {
                (0..64).for_each(|_| mutator.step());
            }
        });
        for pass in 0..PASSES {
            let bytes = numbers.bytes(120);
            let mut script = Script::new(&bytes);
            for index in 0..queues {
                let request = stage.kind.request(index, &mut script);
                stage.post_unchecked(index, &request, pass % 2 == 1);
                stage.kick(index as u32);
            }
            stage.ends.random_event(stage.kind, &mut script);
            // The device may get new work for ever: do not wait until it is idle.
            for _ in 0..6 {
                turn(stage.device.as_mut(), 0).unwrap();
            }
        }
        is_over.store(true, Relaxed);
    });
}

fn race(kind: Kind, wild: bool) {
    for (index, options) in kind.options().iter().enumerate() {
        let mut stage = Stage::new(kind, options);
        let mut numbers = Numbers(0x9e37_79b9 + index as u64);
        let mut served = 0;
        for cycle in 0..CYCLES {
            let features = if cycle % 2 == 0 { 1 << 28 | RING_RESET } else { u64::MAX };
            stage.start(features, SIZE.into());
            stage.ram.memory.write_slice(&[0xca; 64], GuestAddress(CANARY.start)).unwrap();
            run_racing(&mut stage, &mut numbers, wild);
            let mut canary = [0; 64];
            stage.ram.memory.read_slice(&mut canary, GuestAddress(CANARY.start)).unwrap();
            assert_eq!(canary, [0xca; 64], "{kind:?} has written outside of all buffers");
            for index in 0..stage.queues.len() {
                served += came_back(&stage, index);
            }
            // The other hart's writes count as the driver's.
            stage.ram.changes();
            stage.reset();
            stage.ends.restore();
            // Without a driver the device must not access memory.
            stage.run();
        }
        works(&mut stage);
        assert!(served > 0, "{kind:?} has served nothing");
    }
}

/// Number of returned chains; checks that each head is valid.
fn came_back(stage: &Stage, index: usize) -> u64 {
    let used = stage.rings(index)[2];
    let count = stage.ram.peek16(used + 2);
    for slot in 0..count.min(SIZE) {
        let head: [u8; 4] = stage.ram.peek(used + 4 + 8 * u64::from(slot)).unwrap();
        let head = u32::from_le_bytes(head);
        assert!(head < SIZE.into(), "head {head} was returned");
    }
    count.into()
}

#[test]
fn descriptors_tables_and_headers_may_change_while_any_device_reads_them() {
    Kind::ALL.into_iter().for_each(|kind| race(kind, false));
}

#[test]
fn rings_may_change_while_any_device_reads_them() {
    Kind::ALL.into_iter().for_each(|kind| race(kind, true));
}

#[test]
fn one_hart_resets_and_starts_while_another_kicks_and_the_device_works() {
    for kind in Kind::ALL {
        let mut stage = Stage::new(kind, kind.options()[0]);
        stage.start(1 << 28, SIZE.into());
        let memory = stage.ram.memory.clone();
        let bytes = Numbers(7).bytes(200);
        for index in 0..stage.queues.len() {
            let request = kind.request(index, &mut Script::new(&bytes));
            stage.post_unchecked(index, &request, false);
        }
        let rings: Vec<[u64; 3]> =
            (0..stage.queues.len()).map(|index| stage.rings(index)).collect();
        let is_over = AtomicBool::new(false);
        let device = Arc::new(Mutex::new(&mut stage.device));
        std::thread::scope(|scope| {
            let (is_over, device) = (&is_over, &device);
            scope.spawn(move || {
                for _ in 0..300 {
                    let start = [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)];
                    let write = |register, value: u32| {
                        // A hart holds the device's lock for one access.
                        let _ = device.lock().unwrap().write(register, &value.to_le_bytes());
                    };
                    start.into_iter().for_each(|(register, value)| write(register, value));
                    for (index, [d, a, u]) in rings.iter().enumerate() {
                        let zero = [0; 4];
                        memory.write_slice(&zero, GuestAddress(*u)).unwrap();
                        write(0x30, index as u32);
                        write(0x38, SIZE.into());
                        for (low, addr) in [(0x80, d), (0x90, a), (0xa0, u)] {
                            write(low, *addr as u32);
                            write(low + 4, (*addr >> 32) as u32);
                        }
                        write(0x44, 1);
                    }
                    write(0x70, 15);
                }
                is_over.store(true, Relaxed);
            });
            scope.spawn(move || {
                let mut queue = 0_u32;
                while !is_over.load(Relaxed) {
                    queue = (queue + 1) % 4;
                    let _ = device.lock().unwrap().write(0x50, &queue.to_le_bytes());
                    std::thread::yield_now();
                }
            });
            while !is_over.load(Relaxed) {
                turn(device.lock().unwrap().as_mut(), 0).unwrap();
                std::thread::yield_now();
            }
        });
        stage.ram.changes();
        stage.reset();
        works(&mut stage);
    }
}
