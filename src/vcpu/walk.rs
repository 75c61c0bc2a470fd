//! Walks of the guest's page tables (Privileged specification, 12.3 to 12.6; Svnapot, chapter 13).
//!
//! Only translates: permissions, accessed and dirty bits are not checked, since hardware has already checked them by then. Every
//! address in the tables is the guest's and may be anything.

use crate::memory::{GuestRam, PAGE, RamError};

/// The reason for which a virtual address has no translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalkError {
    /// A page fault: no valid leaf, or not a canonical address.
    Page,
    /// An access fault: a table that is not in RAM.
    Access,
    /// A table in memory that the host has lost.
    Lost,
}

const VALID: u64 = 1;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const NAPOT: u64 = 1 << 63;
/// The 44 bits of a physical page number, in an entry at bit 10 and in satp at bit 0.
const PPN: u64 = (1 << 44) - 1;
/// Of the low four bits of a NAPOT entry's page number, the pattern for 64 KiB.
const NAPOT_64K: u64 = 0b1000;

/// An entry read during a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Its level: 0 is that of pages of 4 KiB.
    pub level: u32,
    /// Its guest-physical address.
    pub addr: u64,
    /// Its value.
    pub entry: u64,
}

/// Translates virtual address `va` under `satp` to a guest-physical address, which need not be in RAM.
pub(crate) fn translate(ram: &GuestRam, satp: u64, va: u64) -> Result<u64, WalkError> {
    walk(ram, satp, va, |_| {})
}

/// As `translate`, and passes every entry that is read to `seen`.
///
/// # Errors
/// The address has no translation; the last step is the entry that ends the walk.
pub fn walk(
    ram: &GuestRam,
    satp: u64,
    va: u64,
    mut seen: impl FnMut(Step),
) -> Result<u64, WalkError> {
    let levels = match satp >> 60 {
        0 => return Ok(va),
        8 => 3,
        9 => 4,
        10 => 5,
        _ => return Err(WalkError::Page),
    };
    let unused = 64 - (12 + 9 * levels);
    if (va << unused).cast_signed() >> unused != va.cast_signed() {
        return Err(WalkError::Page);
    }
    let mut table = satp & PPN;
    for level in (0..levels).rev() {
        let index = va >> (12 + 9 * level) & 0x1ff;
        let addr = table * PAGE + index * 8;
        let entry = read_entry(ram, addr)?;
        seen(Step { level, addr, entry });
        if entry & VALID == 0 || entry & (READ | WRITE) == WRITE {
            return Err(WalkError::Page);
        }
        if entry & (READ | EXECUTE) != 0 {
            return leaf(entry, level, va);
        }
        table = entry >> 10 & PPN;
    }
    Err(WalkError::Page)
}

fn leaf(entry: u64, level: u32, va: u64) -> Result<u64, WalkError> {
    let mut page = entry >> 10 & PPN;
    if entry & NAPOT != 0 {
        if level != 0 || page & 0xf != NAPOT_64K {
            return Err(WalkError::Page);
        }
        page = page & !0xf | va >> 12 & 0xf;
    }
    let offset = (1 << (12 + 9 * level)) - 1;
    let base = page * PAGE;
    if base & offset != 0 {
        return Err(WalkError::Page);
    }
    Ok(base | va & offset)
}

fn read_entry(ram: &GuestRam, addr: u64) -> Result<u64, WalkError> {
    let mut bytes = [0; 8];
    ram.read(addr, &mut bytes).map_err(|error| match error {
        RamError::NotRam => WalkError::Access,
        RamError::Lost => WalkError::Lost,
    })?;
    Ok(u64::from_le_bytes(bytes))
}
