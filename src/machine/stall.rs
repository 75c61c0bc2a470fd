//! Notices a guest that waits for interrupts that cannot come: one without a driver for the in-kernel controller (AIA), which it got since the host
//! has one. Such a guest says nothing, since its console needs an interrupt, too; so rvmm says it.

use std::time::Duration;

use super::hypervisor::{Counters, Vm};
use crate::vcpu::Control;

/// How often the guest is looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// How many looks in a row must find the guest waiting.
const STALLED_LOOKS: u32 = 5;

/// How many looks there are at most. A guest that is busy without interrupts for so long has its reasons.
const MAX_LOOKS: u32 = 300;

/// KVM's counters that tell: 1 while a hart waits inside the kernel (`wfi`), and how often it came out of the guest.
const BLOCKING: &str = "blocking";
const EXITS: &str = "exits";

/// What a look says.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// The guest has set up interrupts: all is well.
    HasInterrupts,
    /// It may still do so.
    Undecided,
    /// It has had time, and waits.
    Stalled,
}

/// How often in a row the guest was found waiting.
#[derive(Default)]
struct StallCounter(u32);

impl StallCounter {
    /// One more look. `harts` are KVM's counters of each.
    fn look(&mut self, has_set_up: bool, harts: &[Vec<(String, u64)>]) -> Progress {
        if has_set_up {
            return Progress::HasInterrupts;
        }
        let count = |hart: &[(String, u64)], name: &str| {
            hart.iter().find(|(found, _)| found == name).map(|(_, value)| *value)
        };
        let waits = |hart: &Vec<_>| count(hart, BLOCKING) == Some(1);
        // A hart that the guest has not started yet waits for nothing.
        let rests = |hart: &Vec<_>| waits(hart) || count(hart, EXITS) == Some(0);
        self.0 = if harts.iter().any(waits) && harts.iter().all(rests) { self.0 + 1 } else { 0 };
        if self.0 >= STALLED_LOOKS { Progress::Stalled } else { Progress::Undecided }
    }
}

/// What is looked at.
pub(super) struct StallWatch {
    counters: Vec<Box<dyn Counters>>,
}

impl StallWatch {
    /// A watch over a guest whose harts do not run yet: later the kernel would hand the counters out only when they come out. `None` where
    /// there is no in-kernel controller.
    pub(super) fn new(vm: &dyn Vm) -> Option<Self> {
        vm.has_set_up_irqchip()?;
        Some(Self { counters: vm.counters() })
    }

    /// Looks at the guest until it has set up interrupts, or waits without, or ends; and says so once where it waits.
    pub(super) fn look_on(self, vm: &dyn Vm, control: &Control) {
        let mut patience = StallCounter::default();
        for _ in 0..MAX_LOOKS {
            if control.ends_within(PERIOD) {
                return;
            }
            let harts: Option<Vec<_>> = self.counters.iter().map(|hart| hart.read().ok()).collect();
            let (Some(has_set_up), Some(harts)) = (vm.has_set_up_irqchip(), harts) else { return };
            match patience.look(has_set_up, &harts) {
                Progress::Undecided => {}
                Progress::HasInterrupts => return,
                Progress::Stalled => {
                    log::warn!(
                        "The guest waits and has set up no interrupt of a device. If it has no driver for the AIA, as Linux before 6.10, FreeBSD and RT-Thread have none, use --irqchip plic"
                    );
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hart(blocking: u64, exits: u64) -> Vec<(String, u64)> {
        vec![(EXITS.into(), exits), ("wfi_exit_stat".into(), 1), (BLOCKING.into(), blocking)]
    }

    #[test]
    fn a_guest_that_waits_without_interrupts_is_noticed_after_some_looks() {
        let mut patience = StallCounter::default();
        // The second hart was never started.
        let harts = [hart(1, 500), hart(0, 0)];
        for _ in 1..STALLED_LOOKS {
            assert_eq!(patience.look(false, &harts), Progress::Undecided);
        }
        assert_eq!(patience.look(false, &harts), Progress::Stalled);
    }

    #[test]
    fn a_guest_that_works_or_is_taken_out_is_none_that_waits() {
        let mut patience = StallCounter::default();
        for busy in [vec![hart(0, 9)], vec![hart(1, 9), hart(0, 9)], vec![hart(0, 0)], vec![]] {
            for _ in 0..2 * STALLED_LOOKS {
                assert_eq!(patience.look(false, &busy), Progress::Undecided, "{busy:?}");
            }
        }
        for _ in 1..STALLED_LOOKS {
            assert_eq!(patience.look(false, &[hart(1, 9)]), Progress::Undecided);
        }
        assert_eq!(patience.look(false, &[hart(0, 9)]), Progress::Undecided);
        assert_eq!(patience.look(false, &[hart(1, 9)]), Progress::Undecided, "it begins anew");
    }

    #[test]
    fn a_guest_that_has_set_up_interrupts_may_wait() {
        let mut patience = StallCounter::default();
        assert_eq!(patience.look(true, &[hart(1, 9)]), Progress::HasInterrupts);
    }

    #[test]
    fn counters_that_kvm_does_not_have_say_nothing() {
        let mut patience = StallCounter::default();
        for _ in 0..2 * STALLED_LOOKS {
            assert_eq!(patience.look(false, &[vec![("halted".into(), 1)]]), Progress::Undecided);
        }
    }
}
