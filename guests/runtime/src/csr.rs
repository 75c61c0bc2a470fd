//! Supervisor CSRs by name (Privileged specification, chapter 12), and the bits of them that guests use.

/// Reads a CSR by name or number.
#[macro_export]
macro_rules! csr_read {
    ($csr:literal) => {{
        let value: usize;
        // SAFETY: reading a supervisor CSR changes no memory; if it traps, the trap handler reports it.
        unsafe {
            core::arch::asm!(concat!("csrr {}, ", $csr), out(reg) value, options(nostack));
        }
        value
    }};
}

/// Writes a CSR by name or number.
#[macro_export]
macro_rules! csr_write {
    ($csr:literal, $value:expr) => {{
        let value: usize = $value;
        // SAFETY: the runtime and the guests write CSRs only if the hart's state allows it; see each caller.
        unsafe {
            core::arch::asm!(concat!("csrw ", $csr, ", {}"), in(reg) value, options(nostack));
        }
    }};
}

/// Writes a CSR and returns its old value.
#[macro_export]
macro_rules! csr_swap {
    ($csr:literal, $value:expr) => {{
        let value: usize = $value;
        let old: usize;
        // SAFETY: as `csr_write`.
        unsafe {
            core::arch::asm!(concat!("csrrw {}, ", $csr, ", {}"), out(reg) old, in(reg) value, options(nostack));
        }
        old
    }};
}

/// Sets bits of a CSR.
#[macro_export]
macro_rules! csr_set {
    ($csr:literal, $bits:expr) => {{
        let bits: usize = $bits;
        // SAFETY: as `csr_write`.
        unsafe {
            core::arch::asm!(concat!("csrs ", $csr, ", {}"), in(reg) bits, options(nostack));
        }
    }};
}

/// Clears bits of a CSR.
#[macro_export]
macro_rules! csr_clear {
    ($csr:literal, $bits:expr) => {{
        let bits: usize = $bits;
        // SAFETY: as `csr_write`.
        unsafe {
            core::arch::asm!(concat!("csrc ", $csr, ", {}"), in(reg) bits, options(nostack));
        }
    }};
}

/// `sstatus.SIE`
pub const SSTATUS_SIE: usize = 1 << 1;
/// `sstatus.SPIE`
pub const SSTATUS_SPIE: usize = 1 << 5;
/// `sstatus.SPP`
pub const SSTATUS_SPP: usize = 1 << 8;
/// `sie.SSIE`, `sip.SSIP`: the software interrupt (IPI)
pub const SIE_SOFTWARE: usize = 1 << 1;
/// `sie.STIE`, `sip.STIP`: the timer interrupt
pub const SIE_TIMER: usize = 1 << 5;
/// `sie.SEIE`, `sip.SEIP`: the external interrupt
pub const SIE_EXTERNAL: usize = 1 << 9;

/// Sleeps until an enabled interrupt is pending, independent of `sstatus.SIE`.
pub fn wait_for_interrupt() {
    // SAFETY: `wfi` only waits.
    unsafe { core::arch::asm!("wfi", options(nostack)) }
}

/// Enables interrupts of this hart.
pub fn interrupts_on() {
    csr_set!("sstatus", SSTATUS_SIE);
}

/// Disables interrupts of this hart.
pub fn interrupts_off() {
    csr_clear!("sstatus", SSTATUS_SIE);
}
