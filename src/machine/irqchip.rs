//! Interrupt lines of devices, into the kernel's APLIC or into rvmm's own PLIC.

use std::sync::Arc;

use rvmm_devices::irq::IrqLine;
use rvmm_devices::{MmioDevice, Plic, Reserved};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::hypervisor::{Irqchip, Vm};
use crate::layout::{self, IRQ_SOURCES};
use crate::vcpu::Control;

/// The controller that receives devices' interrupts.
pub(super) enum Lines {
    /// The kernel's APLIC; a rise of a line wakes a guest that has suspended itself.
    Aia(Arc<dyn Vm>, Arc<Control>),
    /// The PLIC on the bus.
    Plic(Plic),
}

impl Lines {
    /// The lines of `vm` with this irqchip, for `harts` harts. An interrupt that reaches a hart wakes a guest that has suspended
    /// itself (SBI SUSP). rvmm does not see which interrupts the kernel's controller passes on, so with it every rise wakes the guest.
    pub(super) fn new(
        vm: &Arc<dyn Vm>,
        irqchip: Irqchip,
        harts: u32,
        control: &Arc<Control>,
    ) -> Result<Self, Error> {
        if let Irqchip::Aia(_) = irqchip {
            return Ok(Self::Aia(Arc::clone(vm), Arc::clone(control)));
        }
        let outputs = (0..harts).map(|hart| {
            let line = vm.external_line(hart)?;
            Ok(WakingLine::over(line, control))
        });
        let outputs = outputs.collect::<Result<Vec<_>, Error>>()?;
        let plic = Plic::new(IRQ_SOURCES, outputs).map_err(|e| Error::Device(e.to_string()))?;
        Ok(Self::Plic(plic))
    }

    /// The line of interrupt source `number` (1 to [`IRQ_SOURCES`]).
    pub(super) fn source(&self, number: u32) -> Result<Arc<dyn IrqLine>, Error> {
        match self {
            Self::Aia(vm, control) => Ok(WakingLine::over(vm.irq_line(number)?, control)),
            Self::Plic(plic) => plic.source(number).ok_or_else(|| {
                Error::Device(format!(
                    "Interrupt source {number} does not exist (1 to {IRQ_SOURCES})"
                ))
            }),
        }
    }

    /// The part of the controller that is on the bus, with its base address: all of the PLIC, or the registers of the APLIC
    /// that the kernel does not implement.
    pub(super) fn registers(&self) -> Result<(u64, Box<dyn MmioDevice>), Error> {
        Ok(match self {
            Self::Aia(..) => {
                let span = layout::span("aplic")?;
                (span.base, Box::new(Reserved::new("aplic", span.size)))
            }
            Self::Plic(plic) => (layout::span("plic")?.base, Box::new(plic.clone())),
        })
    }
}

/// A line whose rise wakes a guest that has suspended itself (SBI SUSP).
struct WakingLine {
    line: Arc<dyn IrqLine>,
    control: Arc<Control>,
}

impl WakingLine {
    fn over(line: Arc<dyn IrqLine>, control: &Arc<Control>) -> Arc<dyn IrqLine> {
        Arc::new(Self { line, control: Arc::clone(control) })
    }
}

impl IrqLine for WakingLine {
    fn set_level(&self, high: bool) {
        self.line.set_level(high);
        if high {
            self.control.wake();
        }
    }

    fn attach_irqfd(&self, event: &EventFd) -> bool {
        // An event does not wake the guest: the line itself refuses where the guest may suspend itself.
        self.line.attach_irqfd(event)
    }
}
