//! Work that the controller does for a machine at certain times.

use std::time::{Duration, Instant};

use super::Machine;
use super::stall::{PERIOD, StallWatch};
use crate::hypervisor::Vm;
use crate::memory;

/// Time after which rvmm frees the memory that only the guest's start needed. Only memory use depends on it.
const GUEST_START: Duration = Duration::from_secs(2);

/// The work of one run.
#[derive(Default)]
pub(super) struct Upkeep {
    /// Frees memory of the start, of rvmm's and of the guest's.
    frees_memory: bool,
    free_at: Option<Instant>,
    stall: Option<StallWatch>,
    check_at: Option<Instant>,
}

impl Upkeep {
    /// The work of a run whose harts do not run yet.
    pub(super) fn of_run(vm: &dyn Vm, owns_process: bool) -> Self {
        Self { frees_memory: owns_process, stall: StallWatch::new(vm), ..Self::default() }
    }

    /// Begins the work: the harts run.
    pub(super) fn started(&mut self) {
        let now = Instant::now();
        if self.frees_memory {
            // It is loaded again where it is needed after all. Once after rvmm's own start, and once after the guest's, whose
            // requests are hardly repeated.
            memory::discard_program_pages();
            self.free_at = now.checked_add(GUEST_START);
        }
        self.check_at = self.stall.as_ref().and_then(|_| now.checked_add(GUEST_START + PERIOD));
    }
}

impl Machine {
    /// The time of the next work; `None` if there is none.
    pub(crate) fn next_work(&self) -> Option<Instant> {
        self.upkeep.free_at.into_iter().chain(self.upkeep.check_at).min()
    }

    /// Does the work that is due.
    pub(crate) fn work(&mut self) {
        let now = Instant::now();
        let upkeep = &mut self.upkeep;
        if upkeep.free_at.take_if(|at| *at <= now).is_some() {
            memory::discard_program_pages();
        }
        if upkeep.check_at.is_some_and(|at| at <= now) {
            let goes_on = upkeep.stall.as_mut().is_some_and(|s| s.check(self.board.vm.as_ref()));
            upkeep.check_at = now.checked_add(PERIOD).filter(|_| goes_on);
        }
    }
}
