//! A device's access to its queues and guest memory during one pass.

use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, ChainError, SavedChain};
use super::interrupt::DriverInterrupt;
use super::queue::{Popped, Queue};
use super::{DmaMemory, VirtioError};
use crate::lifecycle::RestoreError;

/// One bounded pass of a device over its queues. Remaining chains are processed in another pass, after the other devices' events.
pub struct Work<'a> {
    queues: &'a mut [Queue],
    memory: &'a dyn DmaMemory,
    interrupt: &'a mut DriverInterrupt,
    outcome: Outcome,
}

/// The result of a pass.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Number of chains that may still be taken, refused ones included.
    pub(super) budget: u16,
    /// Queues, a bit each, to be processed again: the budget was used up, or the device asked for it.
    pub(super) cut_short: u64,
    /// The configuration space has changed.
    pub(super) config_changed: bool,
    /// Remote queues for which the driver is to be interrupted, a bit each.
    pub(super) notify: u64,
    /// Number of refused chains, and the last error of an invalid one.
    pub(super) refused: u32,
    pub(super) last_error: Option<ChainError>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        queues: &'a mut [Queue],
        memory: &'a dyn DmaMemory,
        interrupt: &'a mut DriverInterrupt,
        budget: u16,
    ) -> Self {
        Self { queues, memory, interrupt, outcome: Outcome { budget, ..Outcome::default() } }
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &'a GuestMemoryMmap {
        self.memory.view()
    }

    /// True if the driver has set up this queue and the device runs.
    #[must_use]
    pub fn is_active(&self, queue: u16) -> bool {
        self.queues.get(usize::from(queue)).is_some_and(Queue::is_active)
    }

    /// Takes the next chain of `queue`; `None` if there is none now, or the budget of this pass is used up. Invalid chains
    /// are returned to the driver.
    ///
    /// # Errors
    /// The ring is invalid: the device needs a reset. The caller must return the error.
    pub fn pop(&mut self, queue: u16) -> Result<Option<Chain>, VirtioError> {
        let Some(from) = self.queues.get_mut(usize::from(queue)) else { return Ok(None) };
        loop {
            if self.outcome.budget == 0 {
                self.outcome.cut_short |= u64::from(from.is_active()) << (queue % 64);
                return Ok(None);
            }
            match from.pop(self.memory)? {
                Popped::Nothing => return Ok(None),
                Popped::Chain(chain) => {
                    self.outcome.budget -= 1;
                    return Ok(Some(chain));
                }
                Popped::Refused(error) => {
                    self.outcome.budget -= 1;
                    self.outcome.refused += 1;
                    self.outcome.last_error = Some(error);
                }
            }
        }
    }

    /// Notes writable bytes of a chain as written: those that are not among the first ones, of which [`complete`](Self::complete) is
    /// told, and those of a chain that is put back.
    pub fn note_written(&self, chain: &Chain, offset: u32, count: u32) {
        chain.note_written(self.memory, offset, count);
    }

    /// Returns a chain to the driver, with the first `written` bytes of its writable part filled.
    pub fn complete(&mut self, chain: Chain, written: u32) {
        if let Some(queue) = self.queues.get_mut(usize::from(chain.queue)) {
            queue.complete(self.memory, chain, written);
        }
    }

    /// Returns chains of one queue that belong together, such as the buffers of one frame: the driver sees all of them or
    /// none.
    pub fn complete_together(&mut self, queue: u16, chains: impl Iterator<Item = (Chain, u32)>) {
        if let Some(queue) = self.queues.get_mut(usize::from(queue)) {
            queue.complete_together(self.memory, chains);
        }
    }

    /// Number of chains that this pass may still take.
    #[must_use]
    pub fn budget(&self) -> u16 {
        self.outcome.budget
    }

    /// Interrupts the driver for the chains returned to `queue` so far, if it wants that, before the end of the pass.
    pub fn interrupt_driver(&mut self, queue: u16) {
        let from = self.queues.get_mut(usize::from(queue));
        if from.is_some_and(|from| from.wants_interrupt(self.memory.view())) {
            self.interrupt.raise_queues(1 << (queue % 64));
            // The hart reads the cause without the device's lock.
            self.interrupt.sync();
        }
    }

    /// Stops processing `queue` in this pass: it is kicked again, after the other devices' events.
    pub fn end_pass(&mut self, queue: u16) {
        self.outcome.cut_short |= 1 << (queue % 64);
    }

    /// Returns a chain that is invalid for the device with length 0, and counts it.
    pub fn refuse(&mut self, chain: Chain) {
        self.outcome.refused += 1;
        self.complete(chain, 0);
    }

    /// Undoes the last [`pop`](Self::pop) of that queue: the chain is the next one again. The device must take it again by itself
    /// when it can continue; there is no notification. Several must be put back in reverse order; one that was not the last
    /// is returned to the driver with length 0.
    pub fn put_back(&mut self, chain: Chain) {
        if let Some(queue) = self.queues.get_mut(usize::from(chain.queue)) {
            queue.put_back(self.memory, chain);
        }
    }

    /// Takes a chain of a saved state again. `None` if the driver has overwritten it with an invalid one: then it was returned.
    ///
    /// # Errors
    /// [`RestoreError`] if the queue has no such chain.
    pub fn retake(&mut self, chain: SavedChain) -> Result<Option<Chain>, RestoreError> {
        let queue = self.queues.get_mut(usize::from(chain.queue));
        let queue = queue.ok_or_else(|| RestoreError::invalid("a chain in flight"))?;
        queue.retake(self.memory, chain)
    }

    /// Marks the configuration space as changed: the driver gets an interrupt.
    pub fn config_changed(&mut self) {
        self.outcome.config_changed = true;
    }

    /// Interrupts the driver for a remote queue.
    pub fn notify_driver(&mut self, queue: u16) {
        self.outcome.notify |= 1 << (queue % 64);
    }

    pub(super) fn end(self) -> Outcome {
        self.outcome
    }
}
