//! The counter `time` (Unprivileged specification, Zicntr), read by its own instruction: one instead of the hundred or so of
//! the C library's way to CLOCK_MONOTONIC, which on RISC-V reads this counter, too, and is no finer.
#![expect(unsafe_code, reason = "one instruction that has no name in Rust")]

use std::arch::asm;

/// The counter of the host, the same on all of its CPUs.
pub(super) fn ticks() -> u64 {
    let ticks: u64;
    // SAFETY: reads a counter that Linux opens to user mode, since its own vDSO needs it, and touches nothing else.
    unsafe { asm!("rdtime {}", out(reg) ticks, options(nomem, nostack, preserves_flags)) };
    ticks
}
