//! The permitted accesses of a device to guest memory, computed from the rings by an independent, slow and simple reader.
//!
//! * A chain is returned at most as often as it was made available.
//! * Only used rings and writable buffers that have not been returned change.
//! * A used length is at most the size of the chain's writable buffers.
//!
//! The buffers of a guest may overlap its own rings, and a guest may overwrite used rings itself. Then any of its memory may
//! change, and only the state of the device is checked.

use std::collections::HashMap;
use std::ops::Range;

use super::ram::Ram;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A queue as the driver has set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SetUp {
    pub(crate) size: u32,
    /// Descriptor table, available ring, used ring.
    pub(crate) at: [u64; 3],
}

impl SetUp {
    /// The address ranges of the three parts.
    pub(crate) fn parts(&self) -> [Range<u64>; 3] {
        let size = u64::from(self.size);
        let part = |index: usize, len: u64| self.at[index]..self.at[index].saturating_add(len);
        [part(0, 16 * size), part(1, 6 + 2 * size), part(2, 6 + 8 * size)]
    }
}

/// An active queue.
#[derive(Debug)]
pub(crate) struct ActiveQueue {
    pub(crate) set_up: SetUp,
    /// Number of returned chains, and the maximum number of chains made available.
    completed: u64,
    most: u64,
    /// The used index in memory before the device runs.
    used_before: u16,
    /// The head that each slot of the available ring had when it was counted.
    slots: HashMap<u64, u16>,
    /// By head: how often it may be returned, and its writable buffers.
    pub(crate) with_device: HashMap<u16, Given>,
    /// True if the driver has overwritten the used ring.
    pub(crate) is_scribbled: bool,
}

/// Chains of one head.
#[derive(Debug, Default)]
pub(crate) struct Given {
    times: u32,
    writable: Vec<Range<u64>>,
}

impl ActiveQueue {
    pub(crate) fn new(set_up: SetUp) -> Self {
        Self {
            set_up,
            completed: 0,
            most: 0,
            used_before: 0,
            slots: HashMap::new(),
            with_device: HashMap::new(),
            is_scribbled: false,
        }
    }

    /// Records the chains that the device may find.
    pub(crate) fn note(&mut self, ram: &Ram, tables: &mut Vec<Range<u64>>) {
        let [_, available, used] = self.set_up.at;
        let size = u64::from(self.set_up.size);
        self.used_before = ram.peek16(used + 2);
        let ahead = ram.peek16(available + 2).wrapping_sub(self.completed as u16);
        let claimed = self.completed + u64::from(ahead);
        if claimed > self.most && claimed <= self.most + size {
            self.most = claimed;
        }
        let first = self.completed.max(self.most.saturating_sub(size));
        for position in first..self.most {
            let head = ram.peek16(available + 4 + 2 * (position % size));
            if self.slots.insert(position, head) != Some(head) {
                self.with_device.entry(head).or_default().times += 1;
            }
            let ranges = writable(ram, &self.set_up, head, tables);
            let given = self.with_device.entry(head).or_default();
            ranges.into_iter().for_each(|range| {
                if !given.writable.contains(&range) {
                    given.writable.push(range);
                }
            });
        }
        self.slots.retain(|position, _| *position >= first);
    }

    /// The writable buffers that have not been returned.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.with_device.values().flat_map(|given| given.writable.iter().cloned())
    }

    /// The memory that the device may write to.
    pub(crate) fn writable(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let [.., used] = self.set_up.parts();
        self.buffers().chain([used])
    }

    /// Checks the returned chains and removes them; returns their number.
    pub(crate) fn settle(&mut self, ram: &Ram, is_tainted: bool) -> u64 {
        let [.., used] = self.set_up.at;
        let size = u64::from(self.set_up.size);
        let index = ram.peek16(used + 2);
        if index == self.used_before {
            return 0;
        }
        let count = u64::from(index.wrapping_sub(self.completed as u16));
        if is_tainted {
            return count;
        }
        assert!(
            self.completed + count <= self.most,
            "{count} chains were returned after {}, and only {} were available",
            self.completed,
            self.most
        );
        for position in self.completed..self.completed + count {
            let element: [u8; 8] = ram.peek(used + 4 + 8 * (position % size)).unwrap();
            let [h0, h1, h2, h3, l0, l1, l2, l3] = element;
            let head = u32::from_le_bytes([h0, h1, h2, h3]);
            let len = u32::from_le_bytes([l0, l1, l2, l3]);
            if self.is_scribbled || position + size < self.completed + count {
                continue;
            }
            let given = u16::try_from(head).ok().and_then(|head| self.with_device.get_mut(&head));
            let given =
                given.unwrap_or_else(|| panic!("{head} was returned and was never available"));
            assert!(given.times > 0, "{head} was returned more often than it was available");
            given.times -= 1;
            let room: u64 = given.writable.iter().map(|range| range.end - range.start).sum();
            assert!(u64::from(len) <= room, "{len} bytes written to {room}");
        }
        self.completed += count;
        if !self.is_scribbled {
            self.with_device.retain(|_, given| given.times > 0);
        }
        count
    }
}

/// The writable buffers of a chain; adds the range of its indirect table to `tables`.
fn writable(ram: &Ram, set_up: &SetUp, head: u16, tables: &mut Vec<Range<u64>>) -> Vec<Range<u64>> {
    let (mut table, mut entries) = (set_up.at[0], set_up.size);
    let mut index = head;
    let mut ranges = Vec::new();
    let mut is_indirect = false;
    for _ in 0..=set_up.size {
        if u32::from(index) >= entries {
            break;
        }
        let Some(at) = table.checked_add(16 * u64::from(index)) else { break };
        let Some(raw) = ram.peek::<16>(at) else { break };
        let raw = u128::from_le_bytes(raw);
        let (addr, len) = (raw as u64, (raw >> 64) as u32);
        let (flags, next) = ((raw >> 96) as u16, (raw >> 112) as u16);
        if flags & INDIRECT != 0 {
            if is_indirect {
                break;
            }
            is_indirect = true;
            tables.push(addr..addr.saturating_add(len.into()));
            (table, entries, index) = (addr, len / 16, 0);
            continue;
        }
        if flags & WRITE != 0 && len > 0 && ram.holds(addr, len.into()) {
            ranges.push(addr..addr + u64::from(len));
        }
        if flags & NEXT == 0 {
            break;
        }
        index = next;
    }
    ranges
}

/// True if the two ranges overlap.
pub(crate) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
