//! Interrupt lines, whoever takes them: the kernel's APLIC or our own PLIC.

use std::sync::Arc;

use rvmm_devices::irq::IrqLine;
use rvmm_devices::{MmioDevice, Plic, Reserved};
use vmm_sys_util::eventfd::EventFd;

use super::vm::{Irqchip, Vm};
use crate::error::Error;
use crate::layout::{self, IRQ_SOURCES};
use crate::vcpu::Control;

/// Where devices' interrupts go.
pub(super) enum Lines {
    /// Into the kernel's APLIC.
    Aia(Arc<dyn Vm>),
    /// Into the PLIC on the bus.
    Plic(Plic),
}

impl Lines {
    /// The lines of `vm` with the irqchip that it granted, for `harts` harts.
    pub(super) fn new(vm: &Arc<dyn Vm>, irqchip: Irqchip, harts: u32) -> Result<Self, Error> {
        if let Irqchip::Aia(_) = irqchip {
            return Ok(Self::Aia(Arc::clone(vm)));
        }
        let outputs =
            (0..harts).map(|hart| vm.external_line(hart)).collect::<Result<Vec<_>, _>>()?;
        let plic = Plic::new(IRQ_SOURCES, outputs).map_err(|e| Error::Device(e.to_string()))?;
        Ok(Self::Plic(plic))
    }

    /// The line of interrupt source `number` (1 to [`IRQ_SOURCES`]).
    pub(super) fn source(&self, number: u32) -> Result<Arc<dyn IrqLine>, Error> {
        match self {
            Self::Aia(vm) => Ok(vm.irq_line(number)?),
            Self::Plic(plic) => plic.source(number).ok_or_else(|| {
                Error::Device(format!(
                    "Interrupt source {number} does not exist (1 to {IRQ_SOURCES})"
                ))
            }),
        }
    }

    /// What of the controller is on the bus: all of the PLIC, or the registers of the APLIC that the kernel leaves, with
    /// the base address.
    pub(super) fn registers(&self) -> Result<(u64, Box<dyn MmioDevice>), Error> {
        Ok(match self {
            Self::Aia(_) => {
                let span = layout::span("aplic")?;
                (span.base, Box::new(Reserved::new("aplic", span.size)))
            }
            Self::Plic(plic) => (layout::span("plic")?.base, Box::new(plic.clone())),
        })
    }
}

/// A line whose rise wakes a guest that has suspended itself (SBI SUSP).
pub(super) struct WakingLine {
    pub(super) line: Arc<dyn IrqLine>,
    pub(super) control: Arc<Control>,
}

impl IrqLine for WakingLine {
    fn set_level(&self, high: bool) {
        self.line.set_level(high);
        if high {
            self.control.wake();
        }
    }

    fn raise_by(&self, event: &EventFd) -> bool {
        // It wakes nobody: the line itself refuses where the guest may suspend itself.
        self.line.raise_by(event)
    }
}
