//! Numbers and names of the integer and floating-point registers (RISC-V ELF psABI, "Register Convention").

/// Number of `sp`.
pub const SP: u8 = 2;
/// Number of `s0`.
pub const S0: u8 = 8;
/// Number of `a0`: first argument, and an SBI call's error.
pub const A0: u8 = 10;
/// Number of `a1`: second argument, and an SBI call's value.
pub const A1: u8 = 11;
/// Number of `a6`: an SBI call's function.
pub const A6: u8 = 16;
/// Number of `a7`: an SBI call's extension.
pub const A7: u8 = 17;

/// ABI names of x0 to x31.
pub const X_NAMES: [&str; 32] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4",
    "a5", "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4",
    "t5", "t6",
];

/// ABI names of f0 to f31.
pub const F_NAMES: [&str; 32] = [
    "ft0", "ft1", "ft2", "ft3", "ft4", "ft5", "ft6", "ft7", "fs0", "fs1", "fa0", "fa1", "fa2",
    "fa3", "fa4", "fa5", "fa6", "fa7", "fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9",
    "fs10", "fs11", "ft8", "ft9", "ft10", "ft11",
];
