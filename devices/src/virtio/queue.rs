//! A split virtqueue (virtio 1.3, section 2.7): the only file that uses the crate `virtio-queue`.
//!
//! That crate implements the rings' indices and notifications. This file adds: the set-up is fixed while
//! the queue is active, rings are checked before it starts, chains are parsed in `chain.rs`, a head that is in flight
//! is not accepted again, the driver's suppression flag is honoured, an invalid ring is distinguished from an empty one, and
//! what is written to guest memory is noted: the used ring here, and the bytes of a chain when it is returned.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::chain::{Chain, Segment, Tables};
use super::{DmaMemory, Rings};

mod saved;

pub(super) use saved::QueueState;

/// Maximum size of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Maximum number of segment lists kept for reuse.
const SPARE: usize = 64;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`
const NO_INTERRUPT: u16 = 1;

/// The contents of the queue's registers, as written by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetUp {
    /// Entries; a power of two up to the device's maximum once it is accepted.
    pub(super) size: u32,
    /// Descriptor area.
    pub(super) descriptors: u64,
    /// Driver area: the available ring.
    pub(super) driver: u64,
    /// Device area: the used ring.
    pub(super) device: u64,
}

/// An error of the ring: the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The available index is ahead by more than the queue's size.
    #[error("the available index is ahead by more than the queue's size")]
    Index,
    /// A head is not an index into the descriptor table.
    #[error("the available ring holds an index outside the descriptor table")]
    Head,
    /// A head was made available again while in flight.
    #[error("a descriptor chain was made available twice")]
    Twice,
}

/// The next chain, if any.
pub(super) enum Popped {
    Chain(Chain),
    /// The chain was invalid, and was returned to the driver with length 0.
    Refused(super::chain::ChainError),
    Nothing,
}

/// A virtqueue from the device's side.
#[derive(Debug)]
pub(super) struct Queue {
    index: u16,
    max_size: u16,
    pub(super) set_up: SetUp,
    /// The driver has completed the set-up (QueueReady).
    is_ready: bool,
    /// The driver has reset this queue alone, and may set it up again while the device runs.
    was_reset: bool,
    /// Number of starts and stops so far: chains from before the last one are not completed.
    epoch: u32,
    active: Option<Active>,
    spare: Vec<Vec<Segment>>,
}

/// The state of an active queue.
#[derive(Debug)]
struct Active {
    ring: Ring,
    tables: Tables,
    /// One bit per head, set while it is in flight.
    in_flight: Box<[u64]>,
    /// The used index at the last decision on an interrupt.
    signalled: u16,
    /// The last `pop` found no chain: notifications have to be enabled.
    is_drained: bool,
}

impl Queue {
    pub(super) fn new(index: u16, max_size: u16) -> Self {
        let max_size = max_size.min(MAX_QUEUE_SIZE);
        Self {
            index,
            max_size,
            set_up: SetUp::default_for(max_size),
            is_ready: false,
            was_reset: false,
            epoch: 0,
            active: None,
            spare: Vec::new(),
        }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_active(&self) -> bool {
        self.active.is_some()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    pub(super) fn set_ready(&mut self, ready: bool) {
        self.is_ready = ready;
    }

    /// True if the driver has reset this queue alone since the last device reset, and not started it again.
    pub(super) fn was_reset(&self) -> bool {
        self.was_reset
    }

    /// The set-up, if the queue is active.
    pub(super) fn rings(&self) -> Option<Rings> {
        let SetUp { descriptors, driver, device, .. } = self.set_up;
        let size = self.active.as_ref()?.ring.size();
        Some(Rings { queue: self.index, size, descriptors, driver, device, next: 0 })
    }

    /// Starts the queue; returns false if its set-up is invalid.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        indirect: bool,
        event_idx: bool,
    ) -> bool {
        let Some(mut ring) = self.ring(memory) else { return false };
        ring.set_event_idx(event_idx);
        let size = ring.size();
        let tables = Tables { descriptors: self.set_up.descriptors, size, indirect };
        let words = usize::from(size).div_ceil(64);
        self.was_reset = false;
        self.epoch = self.epoch.wrapping_add(1);
        self.active = Some(Active {
            ring,
            tables,
            in_flight: vec![0; words].into(),
            signalled: 0,
            is_drained: false,
        });
        true
    }

    /// The ring of the set-up, if every part of it is aligned and entirely in RAM.
    fn ring(&self, memory: &GuestMemoryMmap) -> Option<Ring> {
        let SetUp { size, descriptors, driver, device } = self.set_up;
        let size = u16::try_from(size).ok()?;
        let mut ring = Ring::new(self.max_size).ok()?;
        ring.try_set_size(size).ok()?;
        ring.try_set_desc_table_address(GuestAddress(descriptors)).ok()?;
        ring.try_set_avail_ring_address(GuestAddress(driver)).ok()?;
        ring.try_set_used_ring_address(GuestAddress(device)).ok()?;
        ring.set_ready(true);
        let entries = usize::from(size);
        // Section 2.7: 16 bytes per descriptor; for the rings with their event fields 6, and 2 or 8 per entry.
        let parts =
            [(descriptors, 16 * entries), (driver, 6 + 2 * entries), (device, 6 + 8 * entries)];
        // The crate treats address 0 as not set up.
        let is_ram = |(addr, len)| addr != 0 && memory.check_range(GuestAddress(addr), len);
        parts.into_iter().all(is_ram).then_some(ring)
    }

    /// Stops the queue; chains in flight are never returned. The set-up stays.
    pub(super) fn stop(&mut self) {
        self.active = None;
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Stops the queue and clears its set-up; `alone` if the device keeps running.
    pub(super) fn reset(&mut self, alone: bool) {
        self.stop();
        self.is_ready = false;
        self.was_reset = alone;
        self.set_up = SetUp::default_for(self.max_size);
    }

    /// Takes the next chain. An inactive queue has none.
    pub(super) fn pop(&mut self, memory: &dyn DmaMemory) -> Result<Popped, RingError> {
        let Some(active) = &mut self.active else { return Ok(Popped::Nothing) };
        let view = memory.view();
        let next = active.ring.iter(view).map(|mut iter| iter.next().map(|c| c.head_index()));
        let Ok(next) = next else { return Err(RingError::Index) };
        let Some(head) = next else {
            active.is_drained = true;
            return Ok(Popped::Nothing);
        };
        active.take(head)?;
        let segments = self.spare.pop().unwrap_or_default();
        match active.tables.walk(view, (self.index, self.epoch), head, segments) {
            Ok(mut chain) => {
                chain.position = active.ring.next_avail().wrapping_sub(1);
                Ok(Popped::Chain(chain))
            }
            Err((error, segments)) => {
                active.complete(memory, head, 0);
                self.keep(segments);
                Ok(Popped::Refused(error))
            }
        }
    }

    /// Returns a chain to the driver, with `written` bytes from the start of its writable part filled. One of an earlier epoch is dropped.
    pub(super) fn complete(&mut self, memory: &dyn DmaMemory, chain: Chain, written: u32) {
        let written = written.min(chain.writable_bytes());
        chain.note_written(memory, 0, written);
        if let (Some(active), true) = (&mut self.active, chain.epoch == self.epoch) {
            active.complete(memory, chain.head, written);
        }
        self.keep(chain.segments);
    }

    /// Returns chains that belong together: the driver sees all of them or none.
    pub(super) fn complete_together(
        &mut self,
        memory: &dyn DmaMemory,
        chains: impl Iterator<Item = (Chain, u32)>,
    ) {
        let mut count = 0;
        for (chain, written) in chains {
            let written = written.min(chain.writable_bytes());
            chain.note_written(memory, 0, written);
            if let (Some(active), true) = (&mut self.active, chain.epoch == self.epoch) {
                active.stage(memory, count, chain.head, written);
                count += 1;
            }
            self.keep(chain.segments);
        }
        if let Some(active) = &mut self.active {
            active.publish(memory, count);
        }
    }

    /// Undoes the last [`pop`](Self::pop): the chain is the next again. One that is not the last is returned with length 0.
    pub(super) fn put_back(&mut self, memory: &dyn DmaMemory, chain: Chain) {
        if let (Some(active), true) = (&mut self.active, chain.epoch == self.epoch) {
            if active.ring.next_avail() == chain.position.wrapping_add(1) {
                active.ring.set_next_avail(chain.position);
                active.release(chain.head);
                active.is_drained = false;
            } else {
                active.complete(memory, chain.head, 0);
            }
        }
        self.keep(chain.segments);
    }

    /// Ends a pass: enables notifications if the queue was drained, and returns true if new chains are available.
    pub(super) fn has_more(&mut self, memory: &dyn DmaMemory) -> bool {
        let Some(active) = &mut self.active else { return false };
        if !std::mem::take(&mut active.is_drained) || !active.ring.event_idx_enabled() {
            return false;
        }
        let has_more = active.ring.enable_notification(memory.view()).unwrap_or(false);
        if memory.records_writes() {
            // The driver's next notification is due at this index, behind the elements.
            active.note_element(memory, active.ring.size(), 2);
        }
        has_more
    }

    /// Number of chains returned since the last call of [`wants_interrupt`](Self::wants_interrupt).
    pub(super) fn unsignalled(&self) -> u16 {
        self.active
            .as_ref()
            .map_or(0, |active| active.ring.next_used().wrapping_sub(active.signalled))
    }

    /// Returns true if the driver wants an interrupt for the chains returned since the last call (virtio 1.3, sections 2.7.7 and 2.7.10).
    pub(super) fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> bool {
        let Some(active) = &mut self.active else { return false };
        let used = active.ring.next_used();
        let before = std::mem::replace(&mut active.signalled, used);
        let count = used.wrapping_sub(before);
        if count == 0 {
            return false;
        }
        // The used index must be visible before the driver's suppression is read; else both could wait for each other.
        fence(Ordering::SeqCst);
        let read = |offset: u64| {
            let addr = active.ring.avail_ring().checked_add(offset)?;
            let word: u16 = memory.load(GuestAddress(addr), Ordering::SeqCst).ok()?;
            Some(u16::from_le(word))
        };
        if active.ring.event_idx_enabled() {
            let used_event = read(4 + 2 * u64::from(active.ring.size()));
            return used_event.is_none_or(|event| used.wrapping_sub(event).wrapping_sub(1) < count);
        }
        read(0).is_none_or(|flags| flags & NO_INTERRUPT == 0)
    }

    fn keep(&mut self, segments: Vec<Segment>) {
        if self.spare.len() < SPARE {
            self.spare.push(segments);
        }
    }
}

impl SetUp {
    fn default_for(max_size: u16) -> Self {
        Self { size: max_size.into(), descriptors: 0, driver: 0, device: 0 }
    }
}

impl Active {
    fn is_in_flight(&self, head: u16) -> bool {
        let word = self.in_flight.get(usize::from(head / 64));
        head < self.ring.size() && word.is_some_and(|word| word >> (head % 64) & 1 == 1)
    }

    /// The next entries of the available ring and of the used ring.
    fn position(&self) -> (u16, u16) {
        (self.ring.next_avail(), self.ring.next_used())
    }

    fn set_position(&mut self, next_available: u16, next_used: u16) {
        self.ring.set_next_avail(next_available);
        self.ring.set_next_used(next_used);
    }

    /// Marks `head` as in flight.
    fn take(&mut self, head: u16) -> Result<(), RingError> {
        if head >= self.ring.size() {
            return Err(RingError::Head);
        }
        let bit = 1 << (head % 64);
        let word = self.in_flight.get_mut(usize::from(head / 64)).ok_or(RingError::Head)?;
        if *word & bit != 0 {
            return Err(RingError::Twice);
        }
        *word |= bit;
        Ok(())
    }

    fn release(&mut self, head: u16) {
        if let Some(word) = self.in_flight.get_mut(usize::from(head / 64)) {
            *word &= !(1 << (head % 64));
        }
    }

    fn complete(&mut self, memory: &dyn DmaMemory, head: u16, written: u32) {
        self.stage(memory, 0, head, written);
        self.publish(memory, 1);
    }

    /// The slot of the used ring that is `ahead` of the used index.
    fn slot(&self, ahead: u16) -> u16 {
        self.ring.next_used().wrapping_add(ahead) % self.ring.size()
    }

    /// The address of a slot's element in the used ring, behind flags and index.
    fn element(&self, slot: u16) -> Option<u64> {
        self.ring.used_ring().checked_add(4 + 8 * u64::from(slot))
    }

    /// Writes a used element `ahead` of the used index, which the driver does not read yet.
    fn stage(&mut self, memory: &dyn DmaMemory, ahead: u16, head: u16, written: u32) {
        self.release(head);
        let element = u64::from(head) | u64::from(written) << 32;
        let addr = self.element(self.slot(ahead)).map(GuestAddress);
        // Cannot fail: the ring was checked to be in RAM, and RAM is never removed.
        let _ = addr.map(|addr| memory.view().write_slice(&element.to_le_bytes(), addr));
    }

    /// Advances the used index by `count` elements, and notes them and the index as written.
    fn publish(&mut self, memory: &dyn DmaMemory, count: u16) {
        let used = self.ring.next_used().wrapping_add(count);
        let addr = self.ring.used_ring().checked_add(2).map(GuestAddress);
        let _ = addr.map(|addr| memory.view().store(used.to_le(), addr, Ordering::Release));
        if memory.records_writes() {
            memory.note_written(self.ring.used_ring(), 4);
            (0..count).for_each(|ahead| self.note_element(memory, self.slot(ahead), 8));
        }
        self.ring.set_next_used(used);
    }

    fn note_element(&self, memory: &dyn DmaMemory, slot: u16, len: u64) {
        let _ = self.element(slot).map(|addr| memory.note_written(addr, len));
    }
}
