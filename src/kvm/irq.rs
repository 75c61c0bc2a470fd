//! Interrupt lines that end in the kernel: a wired source of its APLIC, or the external interrupt of a vCPU.
//!
//! The in-kernel APLIC (up to Linux 7.3) differs from the specification (AIA 4.7) in one thing that cannot be made up
//! for from outside: a level that rises while its source is still inactive does not become pending when the guest
//! configures the source. Drivers configure first and let the device interrupt afterwards, so they do not meet it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use rvmm_devices::irq::IrqLine;

use super::vcpu::Vcpu;

/// Where a line ends.
enum End {
    /// At a wired source of the in-kernel APLIC (KVM_IRQ_LINE).
    Source(Arc<VmFd>, u32),
    /// At the VSEIP of a hart (KVM_INTERRUPT); the number is its id.
    External(Arc<Vcpu>, u32),
}

/// A line into the kernel, which is told of changes only.
pub(super) struct KernelLine {
    end: End,
    /// Held over the system call: two threads that change the level are never told to the kernel in another order than
    /// the one in which they changed it. The call neither blocks nor calls back.
    high: Mutex<bool>,
    complained: AtomicBool,
}

impl KernelLine {
    /// The line into source `number` of the in-kernel APLIC.
    pub(super) fn source(vm: &Arc<VmFd>, number: u32) -> Self {
        Self::new(End::Source(Arc::clone(vm), number))
    }

    /// The external interrupt line of hart `id`.
    pub(super) fn external(vcpu: &Arc<Vcpu>, id: u32) -> Self {
        Self::new(End::External(Arc::clone(vcpu), id))
    }

    fn new(end: End) -> Self {
        Self { end, high: Mutex::new(false), complained: AtomicBool::new(false) }
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
        if *level == high {
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
}
