//! A device at work: bounded passes over its queues, and what the driver is told of them.

use std::sync::Arc;

use log::warn;

use super::hold::Hold;
use super::interrupt::isr;
use super::life::Core;
use super::queue::Queue;
use super::work::{Outcome, Work};
use super::{DmaMemory, VirtioDevice, VirtioError};

impl Core {
    /// Lets the device work for a bounded time, and draws the consequences.
    pub(super) fn work(
        &mut self,
        task: impl Fn(&mut dyn VirtioDevice, &mut Work<'_>) -> Result<(), VirtioError>,
        kicked: Option<u16>,
    ) {
        let memory = Arc::clone(&self.memory);
        let mut budget = self.queues.iter().map(Queue::max_size).max().unwrap_or(0);
        loop {
            let mut work = Work::new(&mut self.queues, memory.view(), &mut self.interrupt, budget);
            let result = task(self.device.as_mut(), &mut work);
            let outcome = work.end();
            budget = outcome.budget;
            let cut_short = outcome.cut_short;
            self.note(outcome);
            self.settle();
            if let Err(error) = result {
                self.break_down(&error.to_string());
                return;
            }
            let has_more = self.end_pass(&memory);
            let own = kicked.map_or(0, |queue| 1 << (queue % 64));
            if cut_short != 0 || has_more & own == 0 || budget == 0 {
                // The rest comes after everybody else had a turn.
                return self.ring_all(has_more | cut_short);
            }
            // A device may have looked at other queues too.
            self.ring_all(has_more & !own);
        }
    }

    /// The time in which results wait for others is up.
    pub(super) fn look(&mut self) {
        if !self.interrupt.hold.as_mut().is_some_and(Hold::is_time) {
            return;
        }
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        // Notifications are off meanwhile.
        self.work(|device, work| (0..queues).try_for_each(|q| device.kicked(q, work)), None);
        if self.interrupt.hold.as_mut().is_some_and(Hold::is_over) {
            let memory = Arc::clone(&self.memory);
            let has_more = self.tell(&memory);
            self.ring_all(has_more);
        }
    }

    /// Ends a pass, unless its results wait for others. Gives the queues to which something has come meanwhile, a bit each.
    fn end_pass(&mut self, memory: &Arc<dyn DmaMemory>) -> u64 {
        let untold = self.queues.iter().map(Queue::untold).fold(0, u16::saturating_add);
        let hold = self.interrupt.hold.as_mut().filter(|_| untold > 0);
        if hold.is_none_or(|hold| hold.tells(untold)) { self.tell(memory) } else { 0 }
    }

    /// Turns notifications on where a queue was drained, and the interrupt where the driver wants it. Gives the queues
    /// to which something has come meanwhile, a bit each.
    fn tell(&mut self, memory: &Arc<dyn DmaMemory>) -> u64 {
        let memory = memory.view();
        let (mut has_more, mut interrupts) = (0, 0);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if queue.wants_interrupt(memory) {
                interrupts |= isr::USED_BUFFER;
            }
            if queue.has_more(memory) {
                has_more |= 1 << (index % 64);
            }
        }
        self.interrupt.raise(interrupts);
        has_more
    }

    fn ring_all(&self, queues: u64) {
        (0..64).filter(|queue| queues >> queue & 1 == 1).for_each(|queue| self.ring(queue));
    }

    fn note(&mut self, outcome: Outcome) {
        if outcome.notify && self.state.is_running() {
            self.interrupt.raise(isr::USED_BUFFER);
        }
        if outcome.config_changed {
            self.state.generation = self.state.generation.wrapping_add(1);
            if self.state.is_running() {
                self.interrupt.raise(isr::CONFIG_CHANGE);
            }
        }
        self.state.refused = self.state.refused.saturating_add(outcome.refused.into());
        if let (Some(why), false) = (outcome.why_refused, self.said.refused) {
            self.said.refused = true;
            warn!("{}: a request was refused: {why}", self.device.name());
        }
    }
}
