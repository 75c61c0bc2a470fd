//! What a device gets to work with: the queues, guest memory, and ways to answer.

use vm_memory::GuestMemoryMmap;

use super::VirtioError;
use super::chain::{Chain, ChainError};
use super::interrupt::{Interrupt, isr};
use super::queue::{Popped, Queue};

/// One bounded pass of a device over its queues. What is left at its end is looked at again after everybody else had a turn.
pub struct Work<'a> {
    queues: &'a mut [Queue],
    memory: &'a GuestMemoryMmap,
    interrupt: &'a mut Interrupt,
    outcome: Outcome,
}

/// What came of a pass.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Chains that may still be taken, refused ones included.
    pub(super) budget: u16,
    /// Queues, a bit each, that were left because the budget was used up.
    pub(super) cut_short: u64,
    /// The device's configuration is another.
    pub(super) config_changed: bool,
    /// The driver is to look at its queues.
    pub(super) notify: bool,
    /// Chains that were refused, and why the last one was.
    pub(super) refused: u32,
    pub(super) why_refused: Option<ChainError>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        queues: &'a mut [Queue],
        memory: &'a GuestMemoryMmap,
        interrupt: &'a mut Interrupt,
        budget: u16,
    ) -> Self {
        Self { queues, memory, interrupt, outcome: Outcome { budget, ..Outcome::default() } }
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &'a GuestMemoryMmap {
        self.memory
    }

    /// Whether the driver has set up this queue and the device runs.
    #[must_use]
    pub fn is_active(&self, queue: u16) -> bool {
        self.queues.get(usize::from(queue)).is_some_and(Queue::is_active)
    }

    /// Takes the next chain of `queue`; `None` where there is none now, or this pass has done enough. Chains that are none
    /// go back to the driver here.
    ///
    /// # Errors
    /// The ring itself is broken: the device needs a reset. To be handed on.
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
                Popped::Refused(why) => {
                    self.outcome.budget -= 1;
                    self.outcome.refused += 1;
                    self.outcome.why_refused = Some(why);
                }
            }
        }
    }

    /// Gives a chain back to the driver, with the first `written` bytes of its writable part filled.
    pub fn complete(&mut self, chain: Chain, written: u32) {
        if let Some(queue) = self.queues.get_mut(usize::from(chain.queue)) {
            queue.complete(self.memory, chain, written);
        }
    }

    /// Gives chains of one queue back that belong together, such as the parts of one frame: the driver sees all of them or
    /// none.
    pub fn complete_together(&mut self, queue: u16, chains: impl Iterator<Item = (Chain, u32)>) {
        if let Some(queue) = self.queues.get_mut(usize::from(queue)) {
            queue.complete_together(self.memory, chains);
        }
    }

    /// Chains that this pass may still take.
    #[must_use]
    pub fn budget(&self) -> u16 {
        self.outcome.budget
    }

    /// Tells the driver of what went back in `queue` so far, where it wants to know, so that it need not wait for the end of the pass.
    pub fn tell(&mut self, queue: u16) {
        let queue = self.queues.get_mut(usize::from(queue));
        if queue.is_some_and(|queue| queue.wants_interrupt(self.memory)) {
            self.interrupt.raise(isr::USED_BUFFER);
            // The hart asks for the cause without the device's lock.
            self.interrupt.sync();
        }
    }

    /// The device has done enough of `queue` for this pass: it is kicked again after everybody else had a turn.
    pub fn leave(&mut self, queue: u16) {
        self.outcome.cut_short |= 1 << (queue % 64);
    }

    /// Gives a chain back that makes no sense to the device, and counts it.
    pub fn refuse(&mut self, chain: Chain) {
        self.outcome.refused += 1;
        self.complete(chain, 0);
    }

    /// Undoes the last [`pop`](Self::pop) of that queue: the chain is the next one again. The device looks for it itself
    /// when it can go on; no notification tells it to. Several are put back in the opposite order; one whose turn it is not
    /// goes back to the driver empty.
    pub fn put_back(&mut self, chain: Chain) {
        if let Some(queue) = self.queues.get_mut(usize::from(chain.queue)) {
            queue.put_back(self.memory, chain);
        }
    }

    /// The device's configuration has changed: the driver is told.
    pub fn config_changed(&mut self) {
        self.outcome.config_changed = true;
    }

    /// Another program that works on the queues wants the driver to look at them.
    pub fn notify_driver(&mut self) {
        self.outcome.notify = true;
    }

    pub(super) fn end(self) -> Outcome {
        self.outcome
    }
}
