//! Traps of supervisor mode: privilege modes, causes, and bits of the CSRs (Privileged specification, 12.1).

/// Privilege mode U.
pub const USER: u64 = 0;
/// Privilege mode S.
pub const SUPERVISOR: u64 = 1;

/// Values of `scause` (12.1.8).
pub mod cause {
    /// Instruction access fault.
    pub const FETCH_ACCESS: u64 = 1;
    /// Illegal instruction.
    pub const ILLEGAL_INSTRUCTION: u64 = 2;
    /// Breakpoint.
    pub const BREAKPOINT: u64 = 3;
    /// Load access fault.
    pub const LOAD_ACCESS: u64 = 5;
    /// Store or AMO access fault.
    pub const STORE_ACCESS: u64 = 7;
    /// Environment call from U-mode.
    pub const CALL_FROM_USER: u64 = 8;
    /// Instruction page fault.
    pub const FETCH_PAGE: u64 = 12;
    /// Supervisor timer interrupt.
    pub const TIMER_INTERRUPT: u64 = 1 << 63 | 5;
}

/// Bits of `sstatus` (12.1.1).
pub mod sstatus {
    /// Interrupts enabled in S-mode.
    pub const SIE: u64 = 1 << 1;
    /// `SIE` before the trap.
    pub const SPIE: u64 = 1 << 5;
    /// The privilege mode before the trap.
    pub const SPP: u64 = 1 << 8;
}

/// Bits of `sie` and `sip` (12.1.3).
pub mod interrupt {
    /// Supervisor software interrupt.
    pub const SSI: u64 = 1 << 1;
    /// Supervisor timer interrupt.
    pub const STI: u64 = 1 << 5;
    /// Supervisor external interrupt.
    pub const SEI: u64 = 1 << 9;
}
