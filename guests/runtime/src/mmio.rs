//! Loads and stores at physical addresses with an exact width.

use core::arch::asm;

macro_rules! access {
    ($read:ident, $load:literal, $write:ident, $store:literal, $type:ty, $bits:literal) => {
        #[doc = concat!("Loads ", $bits, " bits from `addr` with one `", $load, "` (zero-extending where the kernel does).")]
        #[must_use]
        #[inline(always)]
        pub fn $read(addr: usize) -> $type {
            let value: u64;
            // SAFETY: guests map only devices and their own image; the effect of an address is under test.
            unsafe {
                asm!(concat!($load, " {v}, 0({a})"), v = out(reg) value, a = in(reg) addr, options(nostack));
            }
            value as $type
        }

        #[doc = concat!("Stores ", $bits, " bits to `addr` with one `", $store, "`.")]
        #[inline(always)]
        pub fn $write(addr: usize, value: $type) {
            // SAFETY: as above; the memory of the guest's own image is only written by tests that own it.
            unsafe {
                asm!(concat!($store, " {v}, 0({a})"), v = in(reg) u64::from(value), a = in(reg) addr, options(nostack));
            }
        }
    };
}

access!(read8, "lbu", write8, "sb", u8, "8");
access!(read16, "lhu", write16, "sh", u16, "16");
access!(read32, "lwu", write32, "sw", u32, "32");
access!(read64, "ld", write64, "sd", u64, "64");
