//! The device tree's input: the facts of hypervisor, memory map and devices, in `rvmm_boot`'s types.

use rustix::rand::{GetRandomFlags, getrandom};
use rvmm_boot::Region;
use rvmm_boot::fdt::{
    Board, Chosen, Cpu, DeviceNode, Irqchip as Controller, Isa, MmuType, PlicContexts,
};

use crate::error::Error;
use crate::hypervisor::{CpuFacts, Irqchip};
use crate::layout::{self, IRQ_SOURCES, Span};

/// The input of the tree besides the devices.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) harts: u32,
    pub(super) cpu: &'a CpuFacts,
    pub(super) irqchip: Irqchip,
    pub(super) ram: Span,
    pub(super) cmdline: &'a str,
}

/// Describes the board; /chosen's initrd is filled in after placement, which does not change the tree's length.
pub(super) fn board(facts: &Facts<'_>, devices: Vec<DeviceNode>) -> Result<Board, Error> {
    let cpu = describe(facts.cpu)?;
    Ok(Board {
        model: "rvmm".into(),
        compatible: vec!["rvmm,virt".into(), "riscv-virtio".into()],
        cpus: (0..facts.harts).map(|hartid| Cpu { hartid, ..cpu.clone() }).collect(),
        hypervisor: Some("linux,kvm".into()),
        timebase_frequency: u32::try_from(facts.cpu.timebase_hz).map_err(|_| {
            Error::Config(format!(
                "A timebase of {} Hz does not fit a device tree",
                facts.cpu.timebase_hz
            ))
        })?,
        memory: vec![region(facts.ram)],
        chosen: chosen(facts.cmdline)?,
        irqchip: controller(facts.irqchip)?,
        devices,
    })
}

pub(super) fn region(span: Span) -> Region {
    Region::new(span.base, span.size)
}

fn describe(facts: &CpuFacts) -> Result<Cpu, Error> {
    let mmu = match facts.satp_mode {
        0 => MmuType::None,
        8 => MmuType::Sv39,
        9 => MmuType::Sv48,
        10 => MmuType::Sv57,
        other => {
            return Err(Error::Config(format!("The host's satp mode {other} is unknown to rvmm")));
        }
    };
    Ok(Cpu {
        hartid: 0,
        isa: Isa { base: "rv64i".into(), extensions: facts.extensions.clone() },
        mmu,
        cbom_block_size: facts.cbom_block,
        cboz_block_size: facts.cboz_block,
        cbop_block_size: facts.cbop_block,
    })
}

fn chosen(cmdline: &str) -> Result<Chosen, Error> {
    let mut seeds = [0; 72];
    let source = |source: rustix::io::Errno| Error::Host {
        what: "Cannot get random numbers for the guest's seeds".into(),
        source: source.into(),
    };
    let mut have = 0;
    while let Some(rest) = seeds.get_mut(have..).filter(|rest| !rest.is_empty()) {
        have += getrandom(rest, GetRandomFlags::empty()).map_err(source)?;
    }
    let (rng, kaslr) = seeds.split_at(64);
    let mut chosen = Chosen {
        bootargs: cmdline.into(),
        initrd: None,
        stdout: Some("serial".into()),
        rng_seed: [0; 64],
        kaslr_seed: kaslr.iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte)),
    };
    chosen.rng_seed.copy_from_slice(rng);
    Ok(chosen)
}

fn controller(irqchip: Irqchip) -> Result<Controller, Error> {
    Ok(match irqchip {
        Irqchip::Aia(aia) => Controller::Aia {
            aplic: region(layout::span("aplic")?),
            sources: aia.sources,
            imsic_base: layout::span("imsics")?.base,
            num_ids: aia.ids,
            guest_index_bits: aia.guest_index_bits,
            hart_index_bits: aia.hart_index_bits,
        },
        Irqchip::None => Controller::Plic {
            registers: region(layout::span("plic")?),
            sources: IRQ_SOURCES,
            contexts: PlicContexts::MachineAndSupervisor,
        },
    })
}
