//! Wakes harts that were restored with a pending software interrupt.
//!
//! KVM restores the interrupt as a bit that the guest sees, but a `wfi` looks at the kernel's own queue, which has no such interrupt
//! (`kvm_riscv_vcpu_has_interrupts`): a hart that executes `wfi` with interrupts disabled, as Linux's idle loop does, would sleep for
//! ever. A kick ends the `wfi`. So these harts are kicked again and again, until they have taken the interrupt.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::control::Control;
use super::hart::{Csr, Hart, Reg};
use crate::riscv::trap::interrupt;

/// The harts of one run that were restored with a pending software interrupt.
pub struct Wakeups {
    /// The harts, each with whether it still has the interrupt.
    harts: Vec<(u32, AtomicBool)>,
}

impl Wakeups {
    /// Time between two kicks.
    pub const INTERVAL: Duration = Duration::from_millis(10);
    /// Number of kicks: a guest that does not take the interrupt for ten seconds of running does so on purpose.
    pub const MOST: u32 = 1000;

    /// Of these harts, which have not run since.
    #[must_use]
    pub fn new(harts: Vec<u32>) -> Self {
        Self { harts: harts.into_iter().map(|hart| (hart, AtomicBool::new(true))).collect() }
    }

    /// Kicks every hart that has the interrupt. True if there is one.
    pub fn kick(&self, control: &Control) -> bool {
        let pending = self.harts.iter().filter(|(_, is_pending)| is_pending.load(SeqCst));
        pending.map(|(hart, _)| control.kick(*hart)).count() > 0
    }

    /// Examines a hart that has left the guest.
    pub(super) fn handle_kick(&self, hart: &dyn Hart) -> io::Result<()> {
        let id = hart.id();
        let Some((_, is_pending)) = self.harts.iter().find(|(hart, _)| *hart == id) else {
            return Ok(());
        };
        if is_pending.load(SeqCst) && hart.get(Reg::Csr(Csr::Sip))? & interrupt::SSI == 0 {
            is_pending.store(false, SeqCst);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::vcpu::hart::Kick;
    use crate::vcpu::testing::ScriptHart;

    struct Counted(AtomicUsize);

    impl Kick for Counted {
        fn kick(&self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn a_hart_is_kicked_until_it_has_taken_its_interrupt() {
        let control = Arc::new(Control::new());
        let kicks = Arc::new(Counted(AtomicUsize::new(0)));
        let _registration = control.register(2, Arc::clone(&kicks) as Arc<dyn Kick>);
        let wakeups = Wakeups::new(vec![2]);
        let with = |sip| ScriptHart::new(2, []).with([(Reg::Csr(Csr::Sip), sip)]);
        assert!(wakeups.kick(&control));
        wakeups.handle_kick(&with(interrupt::SSI | interrupt::STI)).unwrap();
        wakeups.handle_kick(&ScriptHart::new(1, [])).unwrap();
        assert!(wakeups.kick(&control));
        assert_eq!(kicks.0.load(SeqCst), 2);
        wakeups.handle_kick(&with(interrupt::STI)).unwrap();
        assert!(!wakeups.kick(&control));
        assert_eq!(kicks.0.load(SeqCst), 2);
        assert!(!Wakeups::new(Vec::new()).kick(&control));
    }
}
