//! Interrupt lines that end in the kernel: a wired source of its APLIC, or the external interrupt of a vCPU.
//!
//! The in-kernel APLIC (up to Linux 7.3) differs from the specification (AIA 4.7) in one thing that cannot be made up
//! for from outside: a level that rises while its source is still inactive does not become pending when the guest
//! configures the source. Drivers configure first and let the device interrupt afterwards, so they do not meet it.
//!
//! A source may also be raised by an eventfd (KVM_IRQFD). In Linux 6.12 that is a rise without a fall (the fast way, which it takes, raises
//! only; the slow way sends a pulse). So whoever answers for the line lowers it, and the kernel is told of every fall, since the line may
//! have risen unseen.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use rvmm_devices::irq::IrqLine;
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::Vcpu;

/// Where a line ends.
enum End {
    /// At a wired source of the in-kernel APLIC (KVM_IRQ_LINE).
    Source(Arc<VmFd>, u32),
    /// At the VSEIP of a hart (KVM_INTERRUPT); the number is its id.
    External(Arc<Vcpu>, u32),
}

/// A line into the kernel, which is told of changes only, or of every fall where others raise the line, too.
pub(super) struct KernelLine {
    end: End,
    /// Held over the system call: two threads that change the level are never told to the kernel in another order than
    /// the one in which they changed it. The call neither blocks nor calls back.
    high: Mutex<bool>,
    /// Whether eventfds may raise it.
    may_share: bool,
    /// Whether some do.
    is_shared: AtomicBool,
    complained: AtomicBool,
}

impl KernelLine {
    /// The line into source `number` of the in-kernel APLIC; `may_share` where eventfds may raise it.
    pub(super) fn source(vm: &Arc<VmFd>, number: u32, may_share: bool) -> Self {
        Self { may_share, ..Self::new(End::Source(Arc::clone(vm), number)) }
    }

    /// The external interrupt line of hart `id`.
    pub(super) fn external(vcpu: &Arc<Vcpu>, id: u32) -> Self {
        Self::new(End::External(Arc::clone(vcpu), id))
    }

    fn new(end: End) -> Self {
        Self {
            end,
            high: Mutex::new(false),
            may_share: false,
            is_shared: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        }
    }

    fn tell(&self, high: bool) -> io::Result<()> {
        match &self.end {
            End::Source(vm, number) => vm.set_irq_line(*number, high).map_err(io::Error::from),
            End::External(vcpu, _) => vcpu.interrupt(high),
        }
    }
}

impl IrqLine for KernelLine {
    fn set_level(&self, high: bool) {
        let mut level = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        if *level == high && (high || !self.is_shared.load(Ordering::Relaxed)) {
            return;
        }
        match self.tell(high) {
            Ok(()) => *level = high,
            Err(error) if self.complained.swap(true, Ordering::Relaxed) => {
                log::debug!("KVM refused an interrupt again: {error}");
            }
            Err(error) => match &self.end {
                End::Source(_, number) => {
                    log::warn!("KVM refused interrupt source {number}: {error}");
                }
                End::External(_, id) => {
                    log::warn!("KVM refused the external interrupt of hart {id}: {error}");
                }
            },
        }
    }

    fn raise_by(&self, event: &EventFd) -> bool {
        let End::Source(vm, number) = &self.end else { return false };
        if !self.may_share {
            return false;
        }
        // Before the first event, or a level that it raises would be taken to be low.
        let was_shared = self.is_shared.swap(true, Ordering::Relaxed);
        let bound = vm.register_irqfd(event, *number);
        if let Err(error) = &bound {
            self.is_shared.store(was_shared, Ordering::Relaxed);
            log::debug!("KVM takes no event descriptor for source {number}: {error}");
        }
        bound.is_ok()
    }
}
