//! The device tree: written from a [`Board`], or a user's own, checked.

mod board;

use std::path::Path;

pub use board::{
    Board, Chosen, Cpu, DeviceNode, Irqchip, Isa, MmuType, Node, PlicContexts, Property, Value,
};

use crate::error::BootError;

/// The largest device tree that Linux is sure to map: two 2 MiB pages from the one it starts in
/// (arch/riscv/mm/init.c, create_fdt_early_page_table).
pub const MAX_LEN: u64 = 2 << 20;

/// Writes the device tree of `board`. Its length does not depend on the addresses and numbers in
/// [`Chosen`], so a tree built with dummies has the length of the final one.
///
/// # Errors
/// [`BootError::Board`] for a board that cannot be (no hart, an unknown label), [`BootError::Tree`] for a
/// name or a value that a device tree cannot hold.
pub fn build(board: &Board) -> Result<Vec<u8>, BootError> {
    let _ = board;
    Err(BootError::Board("not yet".into()))
}

/// Reads a user's own device tree (`--dtb`), which the guest is given verbatim.
///
/// # Errors
/// [`BootError::Open`], [`BootError::Read`], or [`BootError::Unusable`] for a file that is no sound device
/// tree blob of at most [`MAX_LEN`] bytes.
pub fn open(path: &Path) -> Result<Vec<u8>, BootError> {
    let _ = path;
    Err(BootError::Board("not yet".into()))
}
