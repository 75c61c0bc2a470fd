//! The interrupt controllers: APLIC with IMSICs, or PLIC
//! (Documentation/devicetree/bindings/interrupt-controller/riscv,aplic.yaml, riscv,imsics.yaml,
//! sifive,plic-1.0.0.yaml).

use super::board::{Board, Irqchip, PlicContexts};
use super::phandles::Phandles;
use super::writer::Writer;
use crate::error::BootError;
use crate::region::Region;

/// Interrupt causes of a hart (RISC-V privileged specification, table of `mcause` values).
const MACHINE_EXTERNAL: u32 = 11;
const SUPERVISOR_EXTERNAL: u32 = 9;

/// Interrupt flag of the generic binding: active high, level-sensitive.
const LEVEL_HIGH: u32 = 4;

/// An IMSIC interrupt file takes one page.
const IMSIC_PAGE_SHIFT: u32 = 12;

/// Writes the nodes of the interrupt controllers.
pub(super) fn write(
    writer: &mut Writer,
    board: &Board,
    phandles: &Phandles,
) -> Result<(), BootError> {
    match board.irqchip {
        Irqchip::Aia { aplic, sources, .. } => {
            write_imsics(writer, board, phandles)?;
            controller(writer, aplic, phandles.irqchip(), 2, |writer| {
                writer.strings("compatible", &["qemu,aplic".into(), "riscv,aplic".into()])?;
                writer.u32("msi-parent", phandles.msi())?;
                writer.u32("riscv,num-sources", sources)
            })
        }
        Irqchip::Plic { registers, sources, contexts } => {
            controller(writer, registers, phandles.irqchip(), 1, |writer| {
                writer
                    .strings("compatible", &["sifive,plic-1.0.0".into(), "riscv,plic0".into()])?;
                let levels: &[u32] = match contexts {
                    PlicContexts::Supervisor => &[SUPERVISOR_EXTERNAL],
                    PlicContexts::MachineAndSupervisor => &[MACHINE_EXTERNAL, SUPERVISOR_EXTERNAL],
                };
                writer.u32s("interrupts-extended", &to_harts(phandles, levels))?;
                writer.u32("riscv,ndev", sources)
            })
        }
    }
}

/// Writes the node of the supervisor-level IMSIC files, one per hart.
fn write_imsics(writer: &mut Writer, board: &Board, phandles: &Phandles) -> Result<(), BootError> {
    let Irqchip::Aia { imsic_base, num_ids, guest_index_bits, hart_index_bits, .. } = board.irqchip
    else {
        return Ok(());
    };
    let harts = board.cpus.len() as u64;
    if guest_index_bits > 7 || hart_index_bits > 15 || harts > 1 << hart_index_bits {
        return Err(BootError::Board(format!(
            "{hart_index_bits} hart index bits and {guest_index_bits} guest index bits \
             cannot address the IMSIC files of {harts} harts"
        )));
    }
    let files = Region::new(imsic_base, harts << (IMSIC_PAGE_SHIFT + guest_index_bits));
    controller(writer, files, phandles.msi(), 0, |writer| {
        writer.strings("compatible", &["qemu,imsics".into(), "riscv,imsics".into()])?;
        writer.empty("msi-controller")?;
        writer.u32("#msi-cells", 0)?;
        writer.u32s("interrupts-extended", &to_harts(phandles, &[SUPERVISOR_EXTERNAL]))?;
        writer.u32("riscv,num-ids", num_ids)?;
        if guest_index_bits > 0 {
            writer.u32("riscv,guest-index-bits", guest_index_bits)?;
        }
        writer.u32("riscv,hart-index-bits", hart_index_bits)
    })
}

/// Writes the properties that all interrupt controllers have, and those of `body`.
fn controller(
    writer: &mut Writer,
    registers: Region,
    phandle: u32,
    cells: u32,
    body: impl FnOnce(&mut Writer) -> Result<(), BootError>,
) -> Result<(), BootError> {
    writer.node(&format!("interrupt-controller@{:x}", registers.base), |writer| {
        body(writer)?;
        writer.u64s("reg", &[registers.base, registers.size])?;
        writer.empty("interrupt-controller")?;
        writer.u32("#interrupt-cells", cells)?;
        writer.u32("#address-cells", 0)?;
        writer.phandle(phandle)
    })
}

/// `interrupts-extended`: these causes of every hart, hart by hart.
fn to_harts(phandles: &Phandles, causes: &[u32]) -> Vec<u32> {
    phandles.intcs().flat_map(|intc| causes.iter().flat_map(move |cause| [intc, *cause])).collect()
}

impl Irqchip {
    /// Wired interrupt sources; source 0 is none.
    #[must_use]
    pub fn sources(&self) -> u32 {
        match *self {
            Self::Aia { sources, .. } | Self::Plic { sources, .. } => sources,
        }
    }

    /// The cells of `interrupts` for the source `irq`.
    pub(super) fn cells(&self, irq: u32) -> Vec<u32> {
        match self {
            Self::Aia { .. } => vec![irq, LEVEL_HIGH],
            Self::Plic { .. } => vec![irq],
        }
    }
}
