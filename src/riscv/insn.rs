//! Fields, immediates, lengths and fixed encodings of instructions (Unprivileged specification, "Base Instruction Formats" and "C";
//! Privileged specification, 3.3 and 12.2). A 16-bit instruction has zeros in the upper half of its word.

/// `ecall`
pub const ECALL: u32 = 0x0000_0073;
/// `ebreak`
pub const EBREAK: u32 = 0x0010_0073;
/// `c.ebreak`
pub const C_EBREAK: u16 = 0x9002;
/// `sret`
pub const SRET: u32 = 0x1020_0073;
/// `wfi`
pub const WFI: u32 = 0x1050_0073;
/// `csrci sip, 2`: clears the hart's own software interrupt.
pub const CSRCI_SIP_SSIP: u32 = 0x1441_7073;

/// Major opcodes (Unprivileged specification, "RV32/64G Instruction Set Listings").
pub mod opcode {
    /// LOAD
    pub const LOAD: u32 = 0x03;
    /// LOAD-FP
    pub const LOAD_FP: u32 = 0x07;
    /// MISC-MEM
    pub const MISC_MEM: u32 = 0x0f;
    /// OP-IMM
    pub const OP_IMM: u32 = 0x13;
    /// OP-IMM-32
    pub const OP_IMM_32: u32 = 0x1b;
    /// STORE
    pub const STORE: u32 = 0x23;
    /// STORE-FP
    pub const STORE_FP: u32 = 0x27;
    /// AMO
    pub const AMO: u32 = 0x2f;
    /// LUI
    pub const LUI: u32 = 0x37;
    /// BRANCH
    pub const BRANCH: u32 = 0x63;
    /// JALR
    pub const JALR: u32 = 0x67;
    /// JAL
    pub const JAL: u32 = 0x6f;
    /// SYSTEM
    pub const SYSTEM: u32 = 0x73;
}

/// Length in bytes of the instruction with this low halfword.
#[must_use]
pub const fn length(low: u16) -> u64 {
    if low & 3 == 3 { 4 } else { 2 }
}

/// Length in bytes of an instruction.
#[must_use]
pub const fn length_of(word: u32) -> u64 {
    length((word & 0xffff) as u16)
}

/// The low two bits: 3 for a 32-bit instruction, else the quadrant of a compressed one.
#[must_use]
pub const fn quadrant(word: u32) -> u32 {
    word & 3
}

/// The major opcode, seven bits.
#[must_use]
pub const fn opcode(word: u32) -> u32 {
    word & 0x7f
}

/// `count` bits from bit `low` on.
#[must_use]
pub const fn bits(word: u32, low: u32, count: u32) -> u32 {
    (word >> low) & ((1 << count) - 1)
}

/// The number of a register whose field begins at bit `low`.
const fn register(word: u32, low: u32) -> u8 {
    (word >> low & 31) as u8
}

/// The destination register; in most compressed instructions, too.
#[must_use]
pub const fn rd(word: u32) -> u8 {
    register(word, 7)
}

/// The first source register.
#[must_use]
pub const fn rs1(word: u32) -> u8 {
    register(word, 15)
}

/// The second source register.
#[must_use]
pub const fn rs2(word: u32) -> u8 {
    register(word, 20)
}

/// `funct3`
#[must_use]
pub const fn funct3(word: u32) -> u32 {
    bits(word, 12, 3)
}

/// `funct5` of an atomic instruction.
#[must_use]
pub const fn funct5(word: u32) -> u32 {
    word >> 27
}

/// `funct3` of a compressed instruction.
#[must_use]
pub const fn c_funct3(word: u32) -> u32 {
    bits(word, 13, 3)
}

/// `rs2` of a compressed instruction (formats CR and CSS).
#[must_use]
pub const fn c_rs2(word: u32) -> u8 {
    register(word, 2)
}

/// `rs1'` of a compressed instruction: x8 to x15.
#[must_use]
pub const fn c_rs1_short(word: u32) -> u8 {
    8 + (register(word, 7) & 7)
}

/// The low `bits` bits of a value, sign-extended.
#[must_use]
pub const fn sign_extended(value: u32, bits: u32) -> i64 {
    let unused = 32 - bits;
    ((value << unused).cast_signed() >> unused) as i64
}

/// Immediate of format I.
#[must_use]
pub const fn imm_i(word: u32) -> i64 {
    sign_extended(word >> 20, 12)
}

/// Immediate of format S.
#[must_use]
pub const fn imm_s(word: u32) -> i64 {
    sign_extended(bits(word, 25, 7) << 5 | bits(word, 7, 5), 12)
}

/// Immediate of format U.
#[must_use]
pub const fn imm_u(word: u32) -> i64 {
    sign_extended(word & 0xffff_f000, 32)
}

/// Immediate of format B.
#[must_use]
pub fn imm_b(word: u32) -> i64 {
    immediate(word, &[(31, 1, 12), (7, 1, 11), (25, 6, 5), (8, 4, 1)], 13)
}

/// Immediate of format J.
#[must_use]
pub fn imm_j(word: u32) -> i64 {
    immediate(word, &[(31, 1, 20), (12, 8, 12), (20, 1, 11), (21, 10, 1)], 21)
}

/// Immediate of format CI: six bits.
#[must_use]
pub const fn c_imm_i(word: u32) -> i64 {
    sign_extended(bits(word, 12, 1) << 5 | bits(word, 2, 5), 6)
}

/// Immediate of format CB, of a branch.
#[must_use]
pub fn c_imm_b(word: u32) -> i64 {
    immediate(word, &[(12, 1, 8), (5, 2, 6), (2, 1, 5), (10, 2, 3), (3, 2, 1)], 9)
}

/// Immediate of format CJ.
#[must_use]
pub fn c_imm_j(word: u32) -> i64 {
    let runs = [
        (12, 1, 11),
        (8, 1, 10),
        (9, 2, 8),
        (6, 1, 7),
        (7, 1, 6),
        (2, 1, 5),
        (11, 1, 4),
        (3, 3, 1),
    ];
    immediate(word, &runs, 12)
}

/// Assembles an immediate of `width` bits from runs of bits: position in the instruction, count, position in the value.
fn immediate(word: u32, runs: &[(u32, u32, u32)], width: u32) -> i64 {
    let value =
        runs.iter().fold(0, |value, (from, count, to)| value | bits(word, *from, *count) << to);
    sign_extended(value, width)
}

/// True for LR.
#[must_use]
pub const fn is_load_reserved(word: u32) -> bool {
    opcode(word) == opcode::AMO && funct5(word) == 0b00010
}

/// True for SC.
#[must_use]
pub const fn is_store_conditional(word: u32) -> bool {
    opcode(word) == opcode::AMO && funct5(word) == 0b00011
}
