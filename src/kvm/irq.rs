//! Interrupt lines into the kernel: a wired source of its APLIC, or the external interrupt of a vCPU.
//!
//! The in-kernel APLIC (up to Linux 7.3) differs from the specification (AIA 4.7) in one point that cannot be corrected
//! from outside: a level that rises while its source is still inactive does not become pending when the guest
//! configures the source. Drivers configure the source first and enable the device's interrupts afterwards, so they are not affected.
//!
//! A source may also be raised by an eventfd (KVM_IRQFD). In Linux 6.12 that raises the source and never lowers it (the fast path, which is
//! taken, only raises; the slow path sends a pulse). So the device that owns the line lowers it, and every fall is passed to the kernel,
//! since the line may have been raised by an event.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use rvmm_devices::irq::IrqLine;
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::Vcpu;

/// The kernel's end of a line.
enum End {
    /// A wired source of the in-kernel APLIC (KVM_IRQ_LINE).
    Source(Arc<VmFd>, u32),
    /// VSEIP of a hart (KVM_INTERRUPT); the number is the hart's id.
    External(Arc<Vcpu>, u32),
}

/// A line into the kernel. Only changes are passed on, and every fall where eventfds raise the line, too.
pub(super) struct KernelLine {
    end: End,
    /// Held during the system call, so that the kernel sees changes by several threads in their order. The call neither
    /// blocks nor calls back.
    high: Mutex<bool>,
    /// True if eventfds may raise it.
    may_share: bool,
    /// True if an eventfd does.
    is_shared: AtomicBool,
    has_warned: AtomicBool,
}

impl KernelLine {
    /// The line into source `number` of the in-kernel APLIC; with `may_share` eventfds may raise it.
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
            has_warned: AtomicBool::new(false),
        }
    }

    fn send(&self, high: bool) -> io::Result<()> {
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
        match self.send(high) {
            Ok(()) => *level = high,
            Err(error) if self.has_warned.swap(true, Ordering::Relaxed) => {
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

    fn attach_irqfd(&self, event: &EventFd) -> bool {
        let End::Source(vm, number) = &self.end else { return false };
        if !self.may_share {
            return false;
        }
        // Set before the first event, or a level that it raises would be taken to be low.
        let was_shared = self.is_shared.swap(true, Ordering::Relaxed);
        let bound = vm.register_irqfd(event, *number);
        if let Err(error) = &bound {
            self.is_shared.store(was_shared, Ordering::Relaxed);
            log::debug!("Cannot bind an event descriptor to interrupt source {number}: {error}");
        }
        bound.is_ok()
    }
}
