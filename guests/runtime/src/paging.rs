//! Sv39 with three gigabyte-page views of the same first 4 GiB: as they are, moved up for S-mode, and moved up for U-mode.

use core::arch::asm;

use crate::csr_write;

/// Bytes that the views cover: devices and 2 GiB of RAM.
const COVERED: usize = 4 << 30;
const GIGABYTE: usize = 1 << 30;
/// What a physical address becomes in the S-mode view that does not lie where the memory is.
pub const OFFSET: usize = 32 * GIGABYTE;
/// What a physical address becomes in the U-mode view.
pub const USER: usize = 64 * GIGABYTE;
/// An address range that no view maps.
pub const UNMAPPED: usize = 16 * GIGABYTE;

const VALID_RWX_ACCESSED_DIRTY: usize = 0b1100_1111;
const FOR_USER: usize = 1 << 4;
const SV39: usize = 8 << 60;

#[repr(C, align(4096))]
struct Table([usize; 512]);

static mut ROOT: Table = Table([0; 512]);

/// Builds the views and switches translation on for the calling hart.
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

/// Switches translation off for the calling hart, which must be running in the view that lies where the memory is.
pub fn off() {
    switch(0);
}

fn switch(satp: usize) {
    csr_write!("satp", satp);
    // SAFETY: code and stacks lie at the same addresses before and after.
    unsafe { asm!("sfence.vma", options(nostack)) }
}
