//! The device tree: generated from a [`Board`], or supplied by the user and compared with one ([`UserTree`]).
//!
//! A node combines the properties of a device with its address and interrupts on the board (Devicetree
//! Specification 0.4; Linux's bindings where the specification leaves it open). The layout is that of QEMU's
//! `virt` machine: devices under `/soc`, nodes without registers at the root.

pub mod blob;
mod board;
mod claims;
mod cpus;
mod devices;
mod given;
mod irqchip;
mod phandles;
mod splice;
mod writer;

pub use board::{
    Board, Chosen, Cpu, DeviceNode, Irqchip, Isa, MmuType, Node, PlicContexts, Property, Value,
};
pub use given::UserTree;
use phandles::Phandles;
use writer::Writer;

use crate::error::BootError;

/// The largest device tree that Linux always maps: two 2 MiB pages from the one it starts in
/// (arch/riscv/mm/init.c, create_fdt_early_page_table).
pub const MAX_LEN: u64 = 2 << 20;

/// Returns the device tree of `board`. Its length does not depend on the addresses and numbers in
/// [`Chosen`], so a tree built with dummy values has the length of the final one.
///
/// # Errors
/// [`BootError::Board`] for an invalid board (no hart, an unknown label), [`BootError::Tree`] for a
/// name or a value that is invalid in a device tree.
pub fn build(board: &Board) -> Result<Vec<u8>, BootError> {
    if board.cpus.is_empty() || board.memory.is_empty() {
        return Err(BootError::Board("it has no hart or no memory".into()));
    }
    let phandles = Phandles::new(board)?;
    let mut writer = Writer::new()?;
    writer.node("", |writer| {
        writer.u32("#address-cells", 2)?;
        writer.u32("#size-cells", 2)?;
        writer.strings("compatible", &board.compatible)?;
        writer.string("model", &board.model)?;
        write_chosen(writer, board, &phandles)?;
        for ram in &board.memory {
            writer.node(&format!("memory@{:x}", ram.base), |writer| {
                writer.string("device_type", "memory")?;
                writer.u64s("reg", &[ram.base, ram.size])
            })?;
        }
        if let Some(hypervisor) = &board.hypervisor {
            writer.node("hypervisor", |writer| writer.string("compatible", hypervisor))?;
        }
        cpus::write(writer, board, &phandles)?;
        writer.node("soc", |writer| {
            writer.u32("#address-cells", 2)?;
            writer.u32("#size-cells", 2)?;
            writer.string("compatible", "simple-bus")?;
            writer.empty("ranges")?;
            irqchip::write(writer, board, &phandles)?;
            devices::write(writer, board, &phandles)
        })?;
        devices::write_companions(writer, board, &phandles)
    })?;
    let bytes = writer.finish()?;
    match bytes.len() as u64 {
        0..=MAX_LEN => Ok(bytes),
        len => Err(BootError::Board(format!("its tree has {len} bytes, more than 2 MiB"))),
    }
}

/// Writes `/aliases` and `/chosen` (Devicetree Specification 3.3 and 3.6, and dt-schema's chosen.yaml).
fn write_chosen(writer: &mut Writer, board: &Board, phandles: &Phandles) -> Result<(), BootError> {
    let chosen = &board.chosen;
    let stdout = chosen.stdout.as_ref().map(|label| devices::path(board, phandles, label));
    let stdout = stdout.transpose()?;
    if let Some(path) = &stdout {
        writer.node("aliases", |writer| writer.string("serial0", path))?;
    }
    writer.node("chosen", |writer| {
        writer.string("bootargs", &chosen.bootargs)?;
        if let Some(path) = &stdout {
            writer.string("stdout-path", path)?;
        }
        if let Some(initrd) = chosen.initrd {
            writer.u64s("linux,initrd-start", &[initrd.base])?;
            writer.u64s("linux,initrd-end", &[initrd.end()])?;
        }
        writer.bytes("rng-seed", &chosen.rng_seed)?;
        writer.u64s("kaslr-seed", &[chosen.kaslr_seed])
    })
}
