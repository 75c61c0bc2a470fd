//! Sv39 with three gigapage mappings of the first 4 GiB: identity, at an offset for S-mode, and at an offset for U-mode.

use core::arch::asm;

use crate::csr_write;

/// Size of the mappings in bytes: devices and 2 GiB of RAM.
const COVERED: usize = 4 << 30;
const GIGABYTE: usize = 1 << 30;
/// Offset of the S-mode mapping that is not the identity.
pub const OFFSET: usize = 32 * GIGABYTE;
/// Offset of the U-mode mapping.
pub const USER: usize = 64 * GIGABYTE;
/// Start of an unmapped address range.
pub const UNMAPPED: usize = 16 * GIGABYTE;

const VALID_RWX_ACCESSED_DIRTY: usize = 0b1100_1111;
const FOR_USER: usize = 1 << 4;
const SV39: usize = 8 << 60;

#[repr(C, align(4096))]
struct Table([usize; 512]);

static mut ROOT: Table = Table([0; 512]);

/// Builds the mappings and enables translation for the calling hart.
pub fn on() {
    let root = &raw mut ROOT;
    for gigabyte in 0..COVERED / GIGABYTE {
        let entry = gigabyte << 28 | VALID_RWX_ACCESSED_DIRTY;
        // SAFETY: entries are written before they are used; every hart writes the same.
        unsafe {
            (*root).0[gigabyte] = entry;
            (*root).0[gigabyte + OFFSET / GIGABYTE] = entry;
            (*root).0[gigabyte + USER / GIGABYTE] = entry | FOR_USER;
        }
    }
    switch(SV39 | root as usize >> 12);
}

/// Disables translation for the calling hart, which must be running in the identity mapping.
pub fn off() {
    switch(0);
}

fn switch(satp: usize) {
    csr_write!("satp", satp);
    // SAFETY: code and stacks are at the same addresses before and after.
    unsafe { asm!("sfence.vma", options(nostack)) }
}
