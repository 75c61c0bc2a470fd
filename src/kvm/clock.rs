//! The counter `time` (Unprivileged specification, Zicntr), read with one instruction. The C library's CLOCK_MONOTONIC takes about
//! a hundred, reads the same counter on RISC-V, and is no finer.
#![expect(unsafe_code, reason = "rdtime has no intrinsic in Rust")]

use std::arch::asm;

/// The host's counter, the same on all of its CPUs.
pub(super) fn ticks() -> u64 {
    let ticks: u64;
    // SAFETY: reads a counter that Linux makes readable in user mode, since its vDSO needs it, and has no other effect.
    unsafe { asm!("rdtime {}", out(reg) ticks, options(nomem, nostack, preserves_flags)) };
    ticks
}
