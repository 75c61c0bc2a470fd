//! Interrupt lines into the kernel: a wired source of its APLIC, or the external interrupt of a vCPU.
//!
//! The in-kernel APLIC (up to Linux 7.3) differs from the specification (AIA 4.7) in one point that cannot be corrected
//! from outside: a level that rises while its source is still inactive does not become pending when the guest
//! configures the source. Drivers configure the source first and enable the device's interrupts afterwards, so they are not affected.
//!
//! A source may also be raised by an eventfd (KVM_IRQFD). In Linux 6.12 that raises the source and never lowers it (the fast path, which is
//! taken, only raises; the slow path sends a pulse). So the device that owns the line lowers it, and every fall is passed to the kernel,
//! since the line may have been raised by an event.
//!
//! A line is given out once and used until the machine ends, though a reset replaces the irqchip and the vCPUs that it leads to: between
//! the two it is disconnected and only remembers its level.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use rvmm_devices::irq::IrqLine;
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::Vcpu;
use crate::error::VmError;

/// The kernel's end of a line.
enum End {
    /// A wired source of the in-kernel APLIC (KVM_IRQ_LINE), which may not exist yet.
    Source { vm: Arc<VmFd>, number: u32, exists: bool },
    /// VSEIP of a hart (KVM_INTERRUPT), which may not exist yet.
    External { vcpu: Option<Arc<Vcpu>>, hart: u32 },
}

impl End {
    fn send(&self, high: bool) -> io::Result<()> {
        match self {
            Self::Source { vm, number, exists: true } => {
                vm.set_irq_line(*number, high).map_err(io::Error::from)
            }
            Self::External { vcpu: Some(vcpu), .. } => vcpu.interrupt(high),
            Self::Source { exists: false, .. } | Self::External { vcpu: None, .. } => Ok(()),
        }
    }
}

/// A line into the kernel. Only changes are passed on, and every fall where eventfds raise the line, too.
pub(super) struct KernelLine {
    /// Locked during the system call, so that the kernel sees changes by several threads in their order. The call neither
    /// blocks nor calls back.
    state: Mutex<LineState>,
    /// True if eventfds may raise it.
    may_share: bool,
    has_warned: AtomicBool,
}

struct LineState {
    end: End,
    high: bool,
    /// Raise the line, too.
    events: Vec<EventFd>,
}

impl KernelLine {
    fn new(end: End, may_share: bool) -> Self {
        let state = Mutex::new(LineState { end, high: false, events: Vec::new() });
        Self { state, may_share, has_warned: AtomicBool::new(false) }
    }

    fn state(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the level whatever the last one was.
    pub(super) fn force(&self, high: bool) -> io::Result<()> {
        let mut state = self.state();
        state.high = high;
        state.end.send(high)
    }

    /// Connects the line to what its end names, which has just been created, and drives its level.
    fn connect(&self, to: Option<&Arc<Vcpu>>) -> io::Result<()> {
        let mut state = self.state();
        match &mut state.end {
            End::Source { exists, .. } => *exists = true,
            End::External { vcpu, .. } => *vcpu = to.cloned(),
        }
        if let End::Source { vm, number, .. } = &state.end {
            for event in &state.events {
                vm.register_irqfd(event, *number)?;
            }
        }
        if state.high { state.end.send(true) } else { Ok(()) }
    }

    fn disconnect(&self) {
        match &mut self.state().end {
            End::Source { exists, .. } => *exists = false,
            End::External { vcpu, .. } => *vcpu = None,
        }
    }
}

impl IrqLine for KernelLine {
    fn set_level(&self, high: bool) {
        let mut state = self.state();
        if state.high == high && (high || state.events.is_empty()) {
            return;
        }
        match state.end.send(high) {
            Ok(()) => state.high = high,
            Err(error) if self.has_warned.swap(true, Ordering::Relaxed) => {
                log::debug!("KVM refused an interrupt again: {error}");
            }
            Err(error) => match &state.end {
                End::Source { number, .. } => {
                    log::warn!("KVM refused interrupt source {number}: {error}");
                }
                End::External { hart, .. } => {
                    log::warn!("KVM refused the external interrupt of hart {hart}: {error}");
                }
            },
        }
    }

    fn attach_irqfd(&self, event: &EventFd) -> bool {
        let mut state = self.state();
        let End::Source { vm, number, exists: true } = &state.end else { return false };
        if !self.may_share {
            return false;
        }
        // A copy, for the time after a reset.
        let bound = event
            .try_clone()
            .and_then(|copy| vm.register_irqfd(event, *number).map(|()| copy).map_err(Into::into));
        match bound {
            Ok(copy) => state.events.push(copy),
            Err(error) => {
                log::debug!(
                    "Cannot bind an event descriptor to interrupt source {number}: {error}"
                );
                return false;
            }
        }
        true
    }
}

/// The lines that a VM has given out: one for each source and each hart.
#[derive(Default)]
pub(super) struct Lines {
    sources: BTreeMap<u32, Arc<KernelLine>>,
    external: BTreeMap<u32, Arc<KernelLine>>,
}

impl Lines {
    /// The line into source `number` of the in-kernel APLIC, which exists; with `may_share` eventfds may raise it.
    pub(super) fn source(
        &mut self,
        vm: &Arc<VmFd>,
        number: u32,
        may_share: bool,
    ) -> Arc<KernelLine> {
        let line = || {
            let end = End::Source { vm: Arc::clone(vm), number, exists: true };
            Arc::new(KernelLine::new(end, may_share))
        };
        Arc::clone(self.sources.entry(number).or_insert_with(line))
    }

    /// The external interrupt line of hart `hart`.
    pub(super) fn external(&mut self, vcpu: &Arc<Vcpu>, hart: u32) -> Arc<KernelLine> {
        let line = || {
            let end = End::External { vcpu: Some(Arc::clone(vcpu)), hart };
            Arc::new(KernelLine::new(end, false))
        };
        Arc::clone(self.external.entry(hart).or_insert_with(line))
    }

    /// Disconnects all lines from an irqchip and harts that end.
    pub(super) fn disconnect(&self) {
        self.sources.values().chain(self.external.values()).for_each(|line| line.disconnect());
    }

    /// Connects the lines into the sources of a new irqchip.
    pub(super) fn connect_sources(&self) -> Result<(), VmError> {
        for (number, line) in &self.sources {
            line.connect(None).map_err(|e| {
                VmError::io(format!("Cannot connect the line into interrupt source {number}"), e)
            })?;
        }
        Ok(())
    }

    /// Connects the external line of a new hart, if it was given out.
    pub(super) fn connect_external(&self, vcpu: &Arc<Vcpu>, hart: u32) -> Result<(), VmError> {
        let Some(line) = self.external.get(&hart) else { return Ok(()) };
        line.connect(Some(vcpu)).map_err(|e| {
            VmError::io(format!("Cannot connect the external interrupt line of hart {hart}"), e)
        })
    }

    /// True if the line into this source was given out and driven high.
    pub(super) fn is_high(&self, source: u32) -> bool {
        self.sources.get(&source).is_some_and(|line| line.state().high)
    }

    /// Sets the levels of the lines into these sources. A low line that was not given out is low already.
    pub(super) fn force_levels(
        &mut self,
        vm: &Arc<VmFd>,
        levels: impl Iterator<Item = (u32, bool)>,
        may_share: bool,
    ) -> io::Result<()> {
        for (number, high) in levels {
            if high || self.sources.contains_key(&number) {
                self.source(vm, number, may_share).force(high)?;
            }
        }
        Ok(())
    }
}
