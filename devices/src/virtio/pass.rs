//! Bounded passes of a device over its queues, and the resulting interrupts and notifications.

use std::sync::Arc;

use log::warn;

use super::hold::Hold;
use super::queue::Queue;
use super::state::VirtioCore;
use super::work::{Outcome, Work};
use super::{DmaMemory, VirtioDevice, VirtioError};

impl VirtioCore {
    /// Runs `task` of the device for a bounded number of chains, then interrupts the driver and re-enables notifications as needed.
    pub(super) fn work(
        &mut self,
        task: impl Fn(&mut dyn VirtioDevice, &mut Work<'_>) -> Result<(), VirtioError>,
        kicked: Option<u16>,
    ) {
        let memory = Arc::clone(&self.memory);
        let mut budget = self.queues.iter().map(Queue::max_size).max().unwrap_or(0);
        loop {
            let mut work =
                Work::new(&mut self.queues, memory.as_ref(), &mut self.interrupt, budget);
            let result = task(self.device.as_mut(), &mut work);
            let outcome = work.end();
            budget = outcome.budget;
            let cut_short = outcome.cut_short;
            self.note(outcome);
            self.settle();
            if let Err(error) = result {
                self.fail(&error.to_string());
                return;
            }
            let has_more = self.end_pass(&memory);
            let own = kicked.map_or(0, |queue| 1 << (queue % 64));
            if cut_short != 0 || has_more & own == 0 || budget == 0 {
                // The rest follows after the other devices' events.
                return self.kick_all(has_more | cut_short);
            }
            // A device may have processed other queues, too.
            self.kick_all(has_more & !own);
        }
    }

    /// Processes an event of the timer for interrupt coalescing.
    pub(super) fn hold_expired(&mut self) {
        if !self.interrupt.hold.as_mut().is_some_and(Hold::is_time) {
            return;
        }
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        // Notifications are off while results are held: poll all queues.
        self.work(|device, work| (0..queues).try_for_each(|q| device.kicked(q, work)), None);
        if self.interrupt.hold.as_mut().is_some_and(Hold::is_over) {
            let memory = Arc::clone(&self.memory);
            let has_more = self.signal(&memory);
            self.kick_all(has_more);
        }
    }

    /// Ends a pass, unless its results are held. Returns the queues in which new chains are available, a bit each.
    fn end_pass(&mut self, memory: &Arc<dyn DmaMemory>) -> u64 {
        let count = self.queues.iter().map(Queue::unsignalled).fold(0, u16::saturating_add);
        let hold = self.interrupt.hold.as_mut().filter(|_| count > 0);
        if hold.is_none_or(|hold| hold.interrupts(count)) { self.signal(memory) } else { 0 }
    }

    /// Enables notifications of drained queues, and raises the interrupt if the driver wants it. Returns the queues
    /// in which new chains are available, a bit each.
    pub(super) fn signal(&mut self, memory: &Arc<dyn DmaMemory>) -> u64 {
        let (mut has_more, mut interrupts) = (0, 0_u64);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if queue.wants_interrupt(memory.view()) {
                interrupts |= 1 << (index % 64);
            }
            if queue.has_more(memory.as_ref()) {
                has_more |= 1 << (index % 64);
            }
        }
        self.interrupt.raise_queues(interrupts);
        has_more
    }

    fn kick_all(&self, queues: u64) {
        (0..64).filter(|queue| queues >> queue & 1 == 1).for_each(|queue| self.kick(queue));
    }

    /// Wakes the I/O thread for every active queue.
    pub(super) fn kick_active(&self) {
        let active = (0..).zip(&self.queues).filter(|(_, queue)| queue.is_active());
        active.for_each(|(index, _)| self.kick(index));
    }

    pub(super) fn note(&mut self, outcome: Outcome) {
        if self.state.is_running() {
            self.interrupt.raise_queues(outcome.notify);
        }
        if outcome.config_changed {
            self.state.generation = self.state.generation.wrapping_add(1);
            if self.state.is_running() {
                self.interrupt.raise_configuration();
            }
        }
        self.state.refused = self.state.refused.saturating_add(outcome.refused.into());
        if let (Some(error), false) = (outcome.last_error, self.logged.refused) {
            self.logged.refused = true;
            warn!("{}: a request was refused: {error}", self.kind.name);
        }
    }
}
