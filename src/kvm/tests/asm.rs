//! Just enough of an assembler (unprivileged ISA manual, chapter "Instruction Set Listings").

pub(super) use crate::riscv::csr::{SCAUSE, SIE, SIP, SIREG, SISELECT, SSTATUS, STVEC};
pub(super) use crate::riscv::insn::{EBREAK, ECALL, WFI};

pub(super) const ZERO: u32 = 0;
pub(super) const T0: u32 = 5;
pub(super) const T1: u32 = 6;
pub(super) const A0: u32 = 10;
pub(super) const A1: u32 = 11;
pub(super) const A6: u32 = 16;
pub(super) const A7: u32 = 17;

/// `j .`
pub(super) const SPIN: u32 = 0x0000_006f;

fn i_type(opcode: u32, funct3: u32, rd: u32, rs1: u32, imm: u32) -> u32 {
    opcode | rd << 7 | funct3 << 12 | rs1 << 15 | (imm & 0xfff) << 20
}

/// `rd = imm << 12`, sign-extended.
pub(super) fn lui(rd: u32, imm: u32) -> u32 {
    0x37 | rd << 7 | imm << 12
}

/// `auipc rd, 0`: `rd` = the address of this instruction.
pub(super) fn here(rd: u32) -> u32 {
    0x17 | rd << 7
}

/// `slli rd, rs1, shift`
pub(super) fn slli(rd: u32, rs1: u32, shift: u32) -> u32 {
    i_type(0x13, 1, rd, rs1, shift)
}

/// `rd = rs1 + imm`
pub(super) fn addi(rd: u32, rs1: u32, imm: u32) -> u32 {
    i_type(0x13, 0, rd, rs1, imm)
}

/// A load into `rd`: 0 lb, 1 lh, 2 lw, 3 ld, 4 lbu, 5 lhu, 6 lwu.
pub(super) fn load(funct3: u32, rd: u32, rs1: u32, imm: u32) -> u32 {
    i_type(0x03, funct3, rd, rs1, imm)
}

/// A store of `rs2`: 0 sb, 1 sh, 2 sw, 3 sd.
pub(super) fn store(funct3: u32, rs2: u32, rs1: u32, imm: u32) -> u32 {
    0x23 | (imm & 0x1f) << 7 | funct3 << 12 | rs1 << 15 | rs2 << 20 | (imm >> 5 & 0x7f) << 25
}

/// `amoadd.w rd, rs2, (rs1)`
pub(super) fn amoadd_w(rd: u32, rs2: u32, rs1: u32) -> u32 {
    0x2f | rd << 7 | 2 << 12 | rs1 << 15 | rs2 << 20
}

/// `csrw csr, rs1`
pub(super) fn csrw(csr: u16, rs1: u32) -> u32 {
    i_type(0x73, 1, 0, rs1, csr.into())
}

/// `csrrw rd, csr, rs1`
pub(super) fn csrrw(rd: u32, csr: u16, rs1: u32) -> u32 {
    i_type(0x73, 1, rd, rs1, csr.into())
}

/// `j` to `words` instructions before this one, 255 at most.
pub(super) fn jump_back(words: u32) -> u32 {
    // All of the upper bits of the offset are sign bits.
    0x801f_f06f | ((4 * words).wrapping_neg() & 0x7fe) << 20
}

/// `bnez rs1` to `words` instructions before this one, 15 at most.
pub(super) fn branch_back(rs1: u32, words: u32) -> u32 {
    let offset = (4 * words).wrapping_neg();
    // All of the bits above bit 6 are sign bits.
    0xfc00_10e3 | rs1 << 15 | (offset & 0x1e) << 7 | (offset & 0x20) << 20
}

/// `csrs csr, rs1`
pub(super) fn csrs(csr: u16, rs1: u32) -> u32 {
    i_type(0x73, 2, 0, rs1, csr.into())
}

/// `csrr rd, csr`
pub(super) fn csrr(rd: u32, csr: u16) -> u32 {
    i_type(0x73, 2, rd, 0, csr.into())
}

/// `rd = value`, for a value of up to 31 bits: two instructions.
pub(super) fn li(rd: u32, value: u32) -> [u32; 2] {
    let low = value & 0xfff;
    // `addi` subtracts where bit 11 is set, so `lui` adds one more.
    let high = (value + if low >= 0x800 { 0x1000 } else { 0 }) >> 12;
    [lui(rd, high & 0xf_ffff), addi(rd, rd, low)]
}

#[test]
fn the_encodings_are_those_of_the_gnu_assembler() {
    assert_eq!(li(T0, 0x1000_0005), [0x1000_02b7, 0x0052_8293]);
    assert_eq!(li(A7, 0x4442_434e), [0x4442_48b7, 0x34e8_8893]);
    assert_eq!(here(T0), 0x0000_0297);
    assert_eq!(load(2, A0, T0, 4), 0x0042_a503);
    assert_eq!(store(3, A0, T0, 0x28), 0x02a2_b423);
    assert_eq!(amoadd_w(A0, A1, T0), 0x00b2_a52f);
    assert_eq!(csrw(STVEC, T0), 0x1052_9073);
    assert_eq!(csrrw(A0, 0x15c, ZERO), 0x15c0_1573);
    assert_eq!((jump_back(1), jump_back(5)), (0xffdf_f06f, 0xfedf_f06f));
    assert_eq!(branch_back(T0, 6), 0xfe02_94e3);
    assert_eq!(csrs(SIE, T0), 0x1042_a073);
    assert_eq!(csrr(A0, SSTATUS), 0x1000_2573);
}
