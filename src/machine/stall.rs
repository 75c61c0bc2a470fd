//! Detects a guest that waits for interrupts that never arrive: one without a driver for the in-kernel controller (AIA), which the
//! machine has because the host has one. Such a guest prints nothing, since its console needs an interrupt, too; so rvmm logs it.

use std::time::Duration;

use crate::hypervisor::{Counters, Vm};

/// Interval between two checks of the guest.
pub(super) const PERIOD: Duration = Duration::from_secs(1);

/// Number of consecutive checks that must find the guest waiting.
const STALLED_CHECKS: u32 = 5;

/// Maximum number of checks. A guest that runs without interrupts for so long does so on purpose.
const MAX_CHECKS: u32 = 300;

/// KVM's counters in use: 1 while a hart waits inside the kernel (`wfi`), and the number of its exits.
const BLOCKING: &str = "blocking";
const EXITS: &str = "exits";

/// Number of consecutive checks that found the guest waiting.
#[derive(Default)]
struct StallCounter(u32);

impl StallCounter {
    /// Evaluates one more check of a guest without interrupts; true if it has stalled. `harts` are KVM's counters of each hart.
    fn is_stalled(&mut self, harts: &[Vec<(String, u64)>]) -> bool {
        let count = |hart: &[(String, u64)], name: &str| {
            hart.iter().find(|(found, _)| found == name).map(|(_, value)| *value)
        };
        let waits = |hart: &Vec<_>| count(hart, BLOCKING) == Some(1);
        // A hart that the guest has not started yet waits for nothing.
        let idles = |hart: &Vec<_>| waits(hart) || count(hart, EXITS) == Some(0);
        self.0 = if harts.iter().any(waits) && harts.iter().all(idles) { self.0 + 1 } else { 0 };
        self.0 >= STALLED_CHECKS
    }
}

/// Watches the progress of a guest.
pub(super) struct StallWatch {
    counters: Vec<Box<dyn Counters>>,
    stall: StallCounter,
    checks: u32,
}

impl StallWatch {
    /// Opens the counters of a guest whose harts do not run yet: later the kernel would return them only after an exit. `None` where
    /// there is no in-kernel controller.
    pub(super) fn new(vm: &dyn Vm) -> Option<Self> {
        vm.has_set_up_irqchip()?;
        Some(Self { counters: vm.counters(), stall: StallCounter::default(), checks: 0 })
    }

    /// Checks the guest, given [`Vm::has_set_up_irqchip`], and logs a warning where it has stalled. False if it need not be checked
    /// again: it has set up interrupts, has stalled, or has run long enough without them. To be called every [`PERIOD`].
    pub(super) fn check(&mut self, has_set_up: Option<bool>) -> bool {
        self.checks += 1;
        if has_set_up != Some(false) {
            return false;
        }
        let harts: Option<Vec<_>> = self.counters.iter().map(|hart| hart.read().ok()).collect();
        let Some(harts) = harts else { return false };
        let is_stalled = self.stall.is_stalled(&harts);
        if is_stalled {
            log::warn!(
                "The guest waits and has not set up any device interrupt. If it has no driver for the AIA, like Linux before 6.10, FreeBSD and RT-Thread, use --irqchip plic"
            );
        }
        !is_stalled && self.checks < MAX_CHECKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hart(blocking: u64, exits: u64) -> Vec<(String, u64)> {
        vec![(EXITS.into(), exits), ("wfi_exit_stat".into(), 1), (BLOCKING.into(), blocking)]
    }

    #[test]
    fn a_guest_that_waits_without_interrupts_has_stalled_after_some_checks() {
        let mut stall = StallCounter::default();
        // The second hart was never started.
        let harts = [hart(1, 500), hart(0, 0)];
        for _ in 1..STALLED_CHECKS {
            assert!(!stall.is_stalled(&harts));
        }
        assert!(stall.is_stalled(&harts));
    }

    #[test]
    fn a_guest_that_runs_or_waits_only_briefly_has_not_stalled() {
        let mut stall = StallCounter::default();
        for busy in [vec![hart(0, 9)], vec![hart(1, 9), hart(0, 9)], vec![hart(0, 0)], vec![]] {
            for _ in 0..2 * STALLED_CHECKS {
                assert!(!stall.is_stalled(&busy), "{busy:?}");
            }
        }
        for _ in 1..STALLED_CHECKS {
            assert!(!stall.is_stalled(&[hart(1, 9)]));
        }
        assert!(!stall.is_stalled(&[hart(0, 9)]));
        assert!(!stall.is_stalled(&[hart(1, 9)]), "the count restarts");
    }

    #[test]
    fn a_guest_that_has_set_up_interrupts_is_not_checked_again() {
        let mut watch =
            StallWatch { counters: Vec::new(), stall: StallCounter::default(), checks: 0 };
        assert!(watch.check(Some(false)), "it may still");
        assert!(!watch.check(Some(true)));
        assert!(!watch.check(None), "the kernel cannot tell");
        watch.checks = MAX_CHECKS;
        assert!(!watch.check(Some(false)), "it does so on purpose");
    }

    #[test]
    fn counters_that_kvm_does_not_have_decide_nothing() {
        let mut stall = StallCounter::default();
        for _ in 0..2 * STALLED_CHECKS {
            assert!(!stall.is_stalled(&[vec![("halted".into(), 1)]]));
        }
    }
}
