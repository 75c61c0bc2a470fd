//! Pause, save and restore of a virtio device with its queues.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::queue::QueueState;
use super::state::{DriverState, VirtioCore, status};
use super::work::Work;
use super::{DmaMemory, RemoteQueues};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use vm_memory::{Bytes, GuestAddress};

/// The state of a virtio device: that of the common part, of the queues, and of the device type.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VirtioState {
    driver: DriverState,
    interrupt_status: u32,
    queues: Vec<QueueState>,
    device: SavedState,
}

impl VirtioCore {
    /// Brings the device to rest, and delivers all results.
    pub(super) fn pause(&mut self) -> Result<(), PauseError> {
        let memory = Arc::clone(&self.memory);
        // Without a budget: nothing new is begun.
        let mut work = Work::new(&mut self.queues, memory.as_ref(), &mut self.interrupt, 0);
        let paused = self.device.pause(&mut work);
        let outcome = work.end();
        self.note(outcome);
        self.settle();
        self.interrupt.forget();
        // New chains are found when the device is resumed.
        self.signal(&memory);
        self.interrupt.sync();
        paused?;
        if !self.device.is_quiescent() {
            return Err(PauseError("its backend still accesses guest memory after a reset"));
        }
        Ok(())
    }

    /// Continues after a pause or a restore.
    pub(super) fn resume(&mut self) {
        self.device.resume();
        self.kick_active();
    }

    pub(super) fn save(&self) -> Result<SavedState, SaveError> {
        let Self {
            device,
            kind,
            memory,
            // Counters of the kernel: a restored device is kicked.
            kicks: _,
            // Each message is logged once in each process.
            logged: _,
            // A paused device has completed its resets.
            is_resetting: _,
            resetting_queues: _,
            queues,
            interrupt,
            // Depends on the host.
            uses_irqfd: _,
            state,
        } = self;
        let position = |index: u16, at: &super::queue::Queue| {
            let is_remote = kind.remote.include(index, state.driver_features);
            let rings = at.rings().filter(|_| is_remote)?;
            // A paused backend has returned all chains that it has taken.
            Some(used_index(memory.as_ref(), rings.device))
        };
        let queues = (0..).zip(queues).map(|(index, queue)| queue.save(position(index, queue)));
        SavedState::of(&VirtioState {
            driver: *state,
            interrupt_status: interrupt.raised(),
            queues: queues.collect(),
            device: device.save()?,
        })
    }

    pub(super) fn restore(&mut self, state: SavedState) -> Result<(), RestoreError> {
        let VirtioState { driver, interrupt_status, queues, device } = state.read()?;
        if queues.len() != self.queues.len() {
            return Err(RestoreError::invalid("the number of queues"));
        }
        let is_agreed = driver.status & status::FEATURES_OK != 0;
        if is_agreed && driver.driver_features & !self.offered() != 0 {
            let what = "the driver has accepted features that this device does not offer";
            return Err(RestoreError(what.into()));
        }
        if !driver.is_running() && queues.iter().any(QueueState::is_active) {
            return Err(RestoreError::invalid("a queue of an inactive device"));
        }
        self.state = driver;
        let memory = Arc::clone(&self.memory);
        let features = self.state.ring_features();
        let mut positions = Vec::new();
        for (queue, state) in self.queues.iter_mut().zip(queues) {
            positions.push(queue.restore(state, memory.view(), features)?);
        }
        let negotiated = driver.is_running().then_some(driver.driver_features);
        let mut work = Work::new(&mut self.queues, memory.as_ref(), &mut self.interrupt, 0);
        self.device.restore(device, negotiated, &mut work)?;
        let outcome = work.end();
        self.note(outcome);
        if negotiated.is_some() && self.kind.remote != RemoteQueues::None {
            self.share_line();
            let positions = positions.into_iter().enumerate();
            positions.for_each(|(queue, next)| self.start_remote(queue, next));
        }
        self.interrupt.restore(interrupt_status);
        self.interrupt.sync();
        Ok(())
    }
}

/// The index of a used ring, in guest memory.
fn used_index(memory: &dyn DmaMemory, ring: u64) -> u16 {
    let addr = ring.checked_add(2).map(GuestAddress);
    let index = addr.and_then(|addr| memory.view().read_obj::<u16>(addr).ok());
    index.map_or(0, u16::from_le)
}
