//! The saved state of a queue.

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::{Active, Queue, SetUp};
use crate::lifecycle::RestoreError;
use crate::virtio::DmaMemory;
use crate::virtio::chain::{Chain, SavedChain};

/// The state of a queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::virtio) struct QueueState {
    set_up: SetUp,
    is_ready: bool,
    was_reset: bool,
    /// None if the queue is not active.
    ring: Option<RingState>,
}

impl QueueState {
    /// True if the device processes the queue.
    pub(in crate::virtio) fn is_active(&self) -> bool {
        self.ring.is_some()
    }
}

/// The device's position in the rings of an active queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RingState {
    next_available: u16,
    next_used: u16,
    signalled: u16,
    /// The heads of the chains that the device has taken and not returned.
    in_flight: Vec<u16>,
}

impl Queue {
    /// The state of the queue. `position` is that of the backend of a remote queue.
    pub(in crate::virtio) fn save(&self, position: Option<u16>) -> QueueState {
        let Self { index: _, max_size: _, set_up, is_ready, was_reset, epoch: _, active, spare: _ } =
            self;
        let ring = active.as_ref().map(|active| active.save(position));
        QueueState { set_up: *set_up, is_ready: *is_ready, was_reset: *was_reset, ring }
    }

    /// Takes over a state; the features of the ring are those of [`start`](Self::start). Returns the position for a remote queue.
    pub(in crate::virtio) fn restore(
        &mut self,
        state: QueueState,
        memory: &GuestMemoryMmap,
        (indirect, event_idx): (bool, bool),
    ) -> Result<u16, RestoreError> {
        let QueueState { set_up, is_ready, was_reset, ring } = state;
        self.set_up = set_up;
        self.is_ready = is_ready;
        let next = ring.as_ref().map_or(0, |ring| ring.next_available);
        if let Some(ring) = ring {
            let is_started = is_ready && self.start(memory, indirect, event_idx);
            let active = self.active.as_mut().filter(|_| is_started);
            active.ok_or_else(|| RestoreError::invalid("the set-up of a queue"))?.restore(&ring)?;
        }
        self.was_reset = was_reset;
        Ok(next)
    }

    /// Parses a chain in flight again, after a restore. None if the driver has overwritten it with an invalid one: it is returned then.
    pub(in crate::virtio) fn retake(
        &mut self,
        memory: &dyn DmaMemory,
        chain: SavedChain,
    ) -> Result<Option<Chain>, RestoreError> {
        let SavedChain { queue: _, head, position } = chain;
        let active = self.active.as_mut().filter(|active| active.is_in_flight(head));
        let active = active.ok_or_else(|| RestoreError::invalid("a chain in flight"))?;
        match active.tables.walk(memory.view(), (self.index, self.epoch), head, Vec::new()) {
            Ok(mut chain) => {
                chain.position = position;
                Ok(Some(chain))
            }
            Err(_) => {
                active.complete(memory, head, 0);
                Ok(None)
            }
        }
    }
}

impl Active {
    fn save(&self, position: Option<u16>) -> RingState {
        let Self { ring: _, tables, in_flight: _, signalled, is_drained: _ } = self;
        let (next_available, next_used) = self.position();
        RingState {
            next_available: position.unwrap_or(next_available),
            next_used: position.unwrap_or(next_used),
            signalled: *signalled,
            in_flight: (0..tables.size).filter(|head| self.is_in_flight(*head)).collect(),
        }
    }

    fn restore(&mut self, state: &RingState) -> Result<(), RestoreError> {
        let RingState { next_available, next_used, signalled, in_flight } = state;
        self.set_position(*next_available, *next_used);
        self.signalled = *signalled;
        let mut heads = in_flight.iter();
        heads
            .try_for_each(|head| self.take(*head))
            .map_err(|_| RestoreError::invalid("a chain in flight"))
    }
}
