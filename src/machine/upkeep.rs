//! Work that the controller does for a machine at certain times.

use std::time::{Duration, Instant};

use super::Machine;
use super::stall::{PERIOD, StallWatch};
use crate::hypervisor::Vm;
use crate::memory;
use crate::vcpu::Wakeups;

/// Time after which rvmm frees the memory that only the guest's start needed. Only memory use depends on it.
const GUEST_START: Duration = Duration::from_secs(2);

/// Interval of the checks for events of devices and clients, and the number of them without an event after which rvmm frees the memory
/// of its own code. It is loaded again when the devices are used next, so this is not done in the short pauses of a guest that works.
/// Only memory use depends on it. There are checks only after events: an idle machine wakes up for nothing.
const IDLE_CHECK: Duration = Duration::from_millis(250);
const IDLE_CHECKS: u8 = 6;

/// The work of one run.
#[derive(Default)]
pub(super) struct Upkeep {
    /// Frees memory of the start, of rvmm's and of the guest's.
    frees_memory: bool,
    free_at: Option<Instant>,
    stall: Option<StallWatch>,
    check_at: Option<Instant>,
    /// Time of the next check for idleness, the number of turns of the I/O thread at the last one, and how many found no event.
    idle_at: Option<Instant>,
    turns: u64,
    idle_checks: u8,
    /// Time of the next kick of harts that were restored with an interrupt, and number of kicks so far.
    wake_at: Option<Instant>,
    wakes: u32,
}

impl Upkeep {
    /// The work of a run whose harts do not run yet.
    pub(super) fn of_run(vm: &dyn Vm, owns_process: bool) -> Self {
        Self { frees_memory: owns_process, stall: StallWatch::new(vm), ..Self::default() }
    }

    /// Begins the work: the harts run. `wakes_harts` if some are to be woken.
    pub(super) fn started(&mut self, wakes_harts: bool) {
        let now = Instant::now();
        self.wake_at = now.checked_add(Wakeups::INTERVAL).filter(|_| wakes_harts);
        if self.frees_memory {
            // It is loaded again where it is needed after all. Once after rvmm's own start, and once after the guest's, whose
            // requests are hardly repeated.
            memory::discard_program_pages();
            self.free_at = now.checked_add(GUEST_START);
        }
        self.check_at = self.stall.as_ref().and_then(|_| now.checked_add(GUEST_START));
    }
}

impl Machine {
    /// The time of the next work; `None` if there is none.
    pub(crate) fn next_work(&self) -> Option<Instant> {
        let Upkeep { free_at, check_at, idle_at, wake_at, .. } = &self.upkeep;
        [free_at, check_at, idle_at, wake_at].into_iter().filter_map(|at| *at).min()
    }

    /// Does the work that is due.
    pub(crate) fn work(&mut self) {
        let now = Instant::now();
        let upkeep = &mut self.upkeep;
        if upkeep.check_at.is_some_and(|at| at <= now) {
            let goes_on =
                upkeep.stall.as_mut().is_some_and(|s| s.check(self.board.vm.has_set_up_irqchip()));
            upkeep.check_at = now.checked_add(PERIOD).filter(|_| goes_on);
        }
        if upkeep.wake_at.take_if(|at| *at <= now).is_some()
            && let Some(wakeups) = self.run.as_ref().and_then(|run| run.context.wakeups.as_ref())
        {
            let is_paused = self.board.control.is_paused();
            let goes_on = is_paused || wakeups.kick(&self.board.control);
            upkeep.wakes = upkeep.wakes.saturating_add(u32::from(!is_paused));
            let goes_on = goes_on && upkeep.wakes < Wakeups::MOST;
            upkeep.wake_at = now.checked_add(Wakeups::INTERVAL).filter(|_| goes_on);
        }
        // After the first check, which is the last one of most guests.
        if upkeep.free_at.take_if(|at| *at <= now).is_some() {
            memory::discard_program_pages();
        }
        if upkeep.idle_at.is_some_and(|at| at <= now)
            && let Some(io) = &self.io
        {
            let turns = io.turns();
            let is_quiet = std::mem::replace(&mut upkeep.turns, turns) == turns;
            upkeep.idle_checks = if is_quiet { upkeep.idle_checks.saturating_add(1) } else { 0 };
            let is_idle = upkeep.idle_checks >= IDLE_CHECKS;
            upkeep.idle_at = now.checked_add(IDLE_CHECK).filter(|_| !is_idle);
            if is_idle {
                // Before the memory is freed: the next event is another activity.
                io.expect_activity();
                memory::discard_program_pages();
            }
        }
    }

    /// Notes that the I/O thread has served events again.
    pub(crate) fn note_activity(&mut self) {
        self.upkeep.idle_at = Instant::now().checked_add(IDLE_CHECK);
        self.upkeep.idle_checks = 0;
    }
}
