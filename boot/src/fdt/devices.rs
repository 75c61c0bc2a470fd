//! The devices under `/soc`, and their companions at the root.

use super::board::{Board, DeviceNode, Node, Value};
use super::phandles::{Phandles, is_referred_to};
use super::writer::Writer;
use crate::error::BootError;

/// Writes the nodes of all devices, in the board's order.
pub(super) fn write(
    writer: &mut Writer,
    board: &Board,
    phandles: &Phandles,
) -> Result<(), BootError> {
    for (index, device) in board.devices.iter().enumerate() {
        let phandle = phandles.device(index);
        writer.node(&node_name(device), |writer| {
            write_properties(writer, &device.node, phandles, phandle)?;
            writer.u64s("reg", &[device.address, device.size])?;
            if !device.irqs.is_empty() {
                writer.u32("interrupt-parent", phandles.irqchip())?;
                writer.u32s("interrupts", &interrupts(board, device)?)?;
            }
            if is_referred_to(board, device) { writer.phandle(phandle) } else { Ok(()) }
        })?;
    }
    Ok(())
}

/// Writes the companion nodes of all devices, which have no registers.
pub(super) fn write_companions(
    writer: &mut Writer,
    board: &Board,
    phandles: &Phandles,
) -> Result<(), BootError> {
    for (index, device) in board.devices.iter().enumerate() {
        for node in &device.companions {
            let owner = phandles.device(index);
            let body = |writer: &mut Writer| write_properties(writer, node, phandles, owner);
            writer.node(&node.name, body)?;
        }
    }
    Ok(())
}

/// The path of the device with this label: `/soc/serial@10000000`.
pub(super) fn path(board: &Board, phandles: &Phandles, label: &str) -> Result<String, BootError> {
    let device = board.devices.get(phandles.index(label)?);
    Ok(format!("/soc/{}", device.map(node_name).unwrap_or_default()))
}

fn node_name(device: &DeviceNode) -> String {
    format!("{}@{:x}", device.node.name, device.address)
}

fn interrupts(board: &Board, device: &DeviceNode) -> Result<Vec<u32>, BootError> {
    let sources = board.irqchip.sources();
    match device.irqs.iter().find(|irq| !(1..=sources).contains(irq)) {
        Some(irq) => Err(BootError::Board(format!(
            "{:?} has interrupt {irq}, but the sources are 1 to {sources}",
            device.label
        ))),
        None => Ok(device.irqs.iter().flat_map(|irq| board.irqchip.cells(*irq)).collect()),
    }
}

fn write_properties(
    writer: &mut Writer,
    node: &Node,
    phandles: &Phandles,
    owner: u32,
) -> Result<(), BootError> {
    for property in &node.properties {
        let name = property.name.as_str();
        match &property.value {
            Value::Empty => writer.empty(name)?,
            Value::U32(cells) => writer.u32s(name, cells)?,
            Value::U64(values) => writer.u64s(name, values)?,
            Value::Strings(strings) => writer.strings(name, strings)?,
            Value::Phandle(label) => writer.u32(name, phandles.of(label)?)?,
            Value::Owner => writer.u32(name, owner)?,
        }
    }
    Ok(())
}
