//! SBI calls (RISC-V SBI specification 2.0): a7 extension, a6 function, a0 to a5 in; a0 error and a1 value out.

use core::arch::asm;

use crate::csr;

/// The result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ret {
    /// 0 or one of the negative error codes below.
    pub error: isize,
    /// The value, if the call has one.
    pub value: usize,
}

/// No error
pub const SUCCESS: isize = 0;
/// The extension, the function or the requested feature does not exist
pub const NOT_SUPPORTED: isize = -2;
/// An argument is wrong
pub const INVALID_PARAM: isize = -3;
/// An address is wrong
pub const INVALID_ADDRESS: isize = -5;
/// The hart is started already
pub const ALREADY_AVAILABLE: isize = -6;
/// The hart is stopped already
pub const ALREADY_STOPPED: isize = -8;

/// Base extension (chapter 4)
pub const BASE: usize = 0x10;
/// Timer (chapter 6)
pub const TIME: usize = 0x5449_4d45;
/// IPI (chapter 7)
pub const IPI: usize = 0x73_5049;
/// Remote fences (chapter 8)
pub const RFENCE: usize = 0x5246_4e43;
/// Hart state management (chapter 9)
pub const HSM: usize = 0x48_534d;
/// System reset (chapter 10)
pub const SRST: usize = 0x5352_5354;
/// Debug console (chapter 12)
pub const DBCN: usize = 0x4442_434e;
/// System suspend (chapter 13)
pub const SUSP: usize = 0x5355_5350;

/// The result of `get_impl_id` under KVM (section 4.4).
const IMPL_KVM: usize = 3;

/// Makes an SBI call.
pub fn call(extension: usize, function: usize, args: [usize; 6]) -> Ret {
    let (error, value);
    // SAFETY: the firmware or the hypervisor preserves all registers except a0 and a1; it accesses only the memory
    // given by the arguments, for which the caller is responsible.
    unsafe {
        asm!(
            "ecall",
            inlateout("a0") args[0] as isize => error,
            inlateout("a1") args[1] => value,
            in("a2") args[2],
            in("a3") args[3],
            in("a4") args[4],
            in("a5") args[5],
            in("a6") function,
            in("a7") extension,
            options(nostack),
        );
    }
    Ret { error, value }
}

/// Makes a call with up to two arguments.
pub fn call2(extension: usize, function: usize, a0: usize, a1: usize) -> Ret {
    call(extension, function, [a0, a1, 0, 0, 0, 0])
}

/// True if `probe_extension` finds `extension`.
#[must_use]
pub fn has(extension: usize) -> bool {
    let ret = call2(BASE, 3, extension, 0);
    ret.error == SUCCESS && ret.value != 0
}

/// True under KVM; false on QEMU's own machine, where OpenSBI is the firmware.
#[must_use]
pub fn is_kvm() -> bool {
    call2(BASE, 1, 0, 0).value == IMPL_KVM
}

/// Sets this hart's timer to `time` (SBI 6.1), which clears a pending timer interrupt if it is in the future.
pub fn set_timer(time: u64) -> Ret {
    call2(TIME, 0, time as usize, 0)
}

/// Starts a hart at a physical address with `opaque` in a1 (SBI 9.1).
pub fn hart_start(hart: usize, addr: usize, opaque: usize) -> Ret {
    call(HSM, 0, [hart, addr, opaque, 0, 0, 0])
}

/// Stops the calling hart (SBI 9.2); returns only with an error.
pub fn hart_stop() -> Ret {
    call2(HSM, 1, 0, 0)
}

/// The state of a hart (SBI 9.3): 0 started, 1 stopped, 2 start pending, 3 stop pending, 4 suspended, ...
pub fn hart_status(hart: usize) -> Ret {
    call2(HSM, 2, hart, 0)
}

/// Sends an IPI to the harts in `mask`, whose bit 0 is hart `base` (SBI 7.1).
pub fn send_ipi(mask: usize, base: usize) -> Ret {
    call2(IPI, 0, mask, base)
}

/// Writes memory to the debug console (SBI 12.1); `value` is the number of bytes written.
pub fn console_write(len: usize, lo: usize, hi: usize) -> Ret {
    call(DBCN, 0, [len, lo, hi, 0, 0, 0])
}

/// Reads from the debug console into memory (SBI 12.2); `value` is the number of bytes read.
pub fn console_read(len: usize, lo: usize, hi: usize) -> Ret {
    call(DBCN, 1, [len, lo, hi, 0, 0, 0])
}

/// Writes one byte to the debug console (SBI 12.3).
pub fn console_write_byte(byte: usize) -> Ret {
    call2(DBCN, 2, byte, 0)
}

/// System reset: 0 shutdown, 1 cold reboot, 2 warm reboot (SBI 10.1).
pub fn system_reset(kind: usize, reason: usize) -> Ret {
    call2(SRST, 0, kind, reason)
}

/// Powers the machine off; sleeps forever if that fails.
pub fn power_off() -> ! {
    system_reset(0, 0);
    sleep_forever()
}

/// Powers off with a system failure as the reason.
pub fn power_off_with_failure() -> ! {
    system_reset(0, 1);
    sleep_forever()
}

/// Sleeps with all interrupts disabled.
pub fn sleep_forever() -> ! {
    csr::interrupts_off();
    crate::csr_write!("sie", 0);
    loop {
        csr::wait_for_interrupt();
    }
}
