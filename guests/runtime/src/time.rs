//! The `time` counter and waits that are bounded by it. Bounds are generous: a guest may run on a very slow machine.

use core::arch::{asm, global_asm};

use crate::board::Board;
use crate::trap::{self, USER_ECALL};
use crate::{csr_read, sbi};

/// The `time` CSR.
#[must_use]
pub fn now() -> u64 {
    let now;
    // SAFETY: `rdtime` changes nothing.
    unsafe { asm!("rdtime {}", out(reg) now, options(nomem, nostack)) }
    now
}

/// Ticks in `ms` milliseconds.
#[must_use]
pub fn ticks(ms: u64) -> u64 {
    Board::get().timebase_hz * ms / 1000
}

/// Waits until `done`, at most a minute; false after that.
pub fn wait_until(mut done: impl FnMut() -> bool) -> bool {
    let start = now();
    while !done() {
        if now() - start > ticks(60_000) {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Waits `ms` milliseconds.
pub fn pause(ms: u64) {
    let start = now();
    while now() - start < ticks(ms) {
        core::hint::spin_loop();
    }
}

/// Sets the SBI timer reliably. KVM on a host with Sstc loses a call when the hart's thread is preempted right after it:
/// the comparator, which is the guest's `stimecmp`, then still holds its old value.
pub fn set_timer(due: u64) -> sbi::Ret {
    loop {
        let ret = sbi::set_timer(due);
        if ret.error != 0 || !Board::get().has_extension("sstc") || csr_read!("0x14d") as u64 == due
        {
            return ret;
        }
    }
}

global_asm!(
    r#"
    .section .text.user_time, "ax"
    .balign 4
    .globl time_in_user_mode
time_in_user_mode:
    rdtime a0
    ecall
"#
);

unsafe extern "C" {
    static time_in_user_mode: u8;
}

/// True if user mode may read `time` on this hart (`scounteren.TM`): it reads it and returns by an `ecall`.
#[must_use]
pub fn is_open_to_user_mode() -> bool {
    let code = &raw const time_in_user_mode;
    trap::user(code as usize, 0).is_some_and(|trap| trap.cause == USER_ECALL)
}
