//! The memory access of an instruction, as far as needed for the accesses that KVM cannot emulate.
//!
//! Unprivileged specification, chapters "RV32/64G Instruction Set Listings" and "C"; Zcb, Zacas, Zabha, Zalasr, Zicbom,
//! Zicboz and V add to the same opcodes. Instructions that access memory without an explicit base register (`cm.push`,
//! `sspush`) are not decoded.

use super::insn::{
    bits, c_funct3, c_rs1_short, funct3, funct5, imm_i, imm_s, opcode, quadrant, rd, rs1,
};
use super::register::SP;

/// Load or store, as trap causes distinguish them: everything but a pure load is a store or AMO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessKind {
    /// A load.
    Load,
    /// A store or AMO.
    Store,
}

/// A memory access: the address is register `base` plus `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Load or store.
    pub kind: AccessKind,
    /// Number of the base register.
    pub base: u8,
    /// Added to the base, with wrap-around.
    pub offset: i64,
    /// Size in bytes; 1 if the instruction cannot be misaligned or has several elements.
    pub size: u8,
}

/// The memory access of an instruction, or `None` if it makes none that is decoded. A 16-bit instruction has zeros in
/// the upper half.
#[must_use]
pub fn decode(word: u32) -> Option<Operand> {
    match quadrant(word) {
        3 => full(word),
        0 => compressed(word),
        2 => stack(word),
        _ => None,
    }
}

fn full(word: u32) -> Option<Operand> {
    let funct3 = funct3(word);
    let of = |kind, offset, size| Some(Operand { kind, base: rs1(word), offset, size });
    match opcode(word) {
        opcode::LOAD if funct3 < 7 => of(AccessKind::Load, imm_i(word), 1 << (funct3 & 3)),
        opcode::STORE if funct3 < 4 => of(AccessKind::Store, imm_s(word), 1 << funct3),
        opcode::LOAD_FP if is_vector(funct3) => of(AccessKind::Load, 0, 1),
        opcode::LOAD_FP => of(AccessKind::Load, imm_i(word), 1 << funct3),
        opcode::STORE_FP if is_vector(funct3) => of(AccessKind::Store, 0, 1),
        opcode::STORE_FP => of(AccessKind::Store, imm_s(word), 1 << funct3),
        opcode::AMO if funct3 < 5 => of(atomic(word)?, 0, 1),
        // cbo.inval, cbo.clean, cbo.flush, cbo.zero; prefetches are hints elsewhere and never fault.
        opcode::MISC_MEM if funct3 == 2 && matches!(word >> 20, 0 | 1 | 2 | 4) => {
            of(AccessKind::Store, 0, 1)
        }
        _ => None,
    }
}

/// True for vector accesses in LOAD-FP and STORE-FP: widths 1 to 4 are scalar.
fn is_vector(funct3: u32) -> bool {
    !(1..=4).contains(&funct3)
}

/// LR and the load-acquires of Zalasr are loads; everything else with this opcode is a store.
fn atomic(word: u32) -> Option<AccessKind> {
    match funct5(word) {
        0b00010 | 0b00110 => Some(AccessKind::Load),
        0b00000 | 0b00001 | 0b00011 | 0b00100 | 0b00101 | 0b00111 | 0b01000 | 0b01001 | 0b01100
        | 0b10000 | 0b10100 | 0b11000 | 0b11100 => Some(AccessKind::Store),
        _ => None,
    }
}

/// Quadrant 0: three-bit base register, word and doubleword offsets, and Zcb.
fn compressed(word: u32) -> Option<Operand> {
    let word_offset = bits(word, 10, 3) << 3 | bits(word, 6, 1) << 2 | bits(word, 5, 1) << 6;
    let double_offset = bits(word, 10, 3) << 3 | bits(word, 5, 2) << 6;
    let byte_offset = bits(word, 6, 1) | bits(word, 5, 1) << 1;
    let half_offset = bits(word, 5, 1) << 1;
    let (kind, offset, size) = match c_funct3(word) {
        0b001 | 0b011 => (AccessKind::Load, double_offset, 8),
        0b010 => (AccessKind::Load, word_offset, 4),
        0b100 => match bits(word, 10, 3) {
            0b000 => (AccessKind::Load, byte_offset, 1),
            0b001 => (AccessKind::Load, half_offset, 2),
            0b010 => (AccessKind::Store, byte_offset, 1),
            0b011 if bits(word, 6, 1) == 0 => (AccessKind::Store, half_offset, 2),
            _ => return None,
        },
        0b101 | 0b111 => (AccessKind::Store, double_offset, 8),
        0b110 => (AccessKind::Store, word_offset, 4),
        _ => return None,
    };
    Some(Operand { kind, base: c_rs1_short(word), offset: i64::from(offset), size })
}

/// Quadrant 2: relative to the stack pointer.
fn stack(word: u32) -> Option<Operand> {
    let load_double = bits(word, 12, 1) << 5 | bits(word, 5, 2) << 3 | bits(word, 2, 3) << 6;
    let load_word = bits(word, 12, 1) << 5 | bits(word, 4, 3) << 2 | bits(word, 2, 2) << 6;
    let store_double = bits(word, 10, 3) << 3 | bits(word, 7, 3) << 6;
    let store_word = bits(word, 9, 4) << 2 | bits(word, 7, 2) << 6;
    let (kind, offset, size) = match c_funct3(word) {
        0b001 => (AccessKind::Load, load_double, 8),
        0b010 if rd(word) != 0 => (AccessKind::Load, load_word, 4),
        0b011 if rd(word) != 0 => (AccessKind::Load, load_double, 8),
        0b101 | 0b111 => (AccessKind::Store, store_double, 8),
        0b110 => (AccessKind::Store, store_word, 4),
        _ => return None,
    };
    Some(Operand { kind, base: SP, offset: i64::from(offset), size })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::insn::length;
    use super::*;

    #[track_caller]
    fn check(word: u32, kind: AccessKind, base: u8, offset: i64, size: u8) {
        assert_eq!(decode(word), Some(Operand { kind, base, offset, size }), "{word:#x}");
    }

    #[test]
    fn integer_loads_and_stores_give_their_address() {
        check(0xffd5_8503, AccessKind::Load, 11, -3, 1); // lb a0,-3(a1)
        check(0x7ff9_5283, AccessKind::Load, 18, 2047, 2); // lhu t0,2047(s2)
        check(0x800f_6f83, AccessKind::Load, 30, -2048, 4); // lwu t6,-2048(t5)
        check(0xfea5_8ea3, AccessKind::Store, 11, -3, 1); // sb a0,-3(a1)
        check(0x7e59_1fa3, AccessKind::Store, 18, 2047, 2); // sh t0,2047(s2)
        check(0x81ff_2023, AccessKind::Store, 30, -2048, 4); // sw t6,-2048(t5)
    }

    #[test]
    fn floating_point_loads_and_stores_give_their_address() {
        check(0xffc5_a507, AccessKind::Load, 11, -4, 4); // flw fa0,-4(a1)
        check(0x0025_9507, AccessKind::Load, 11, 2, 2); // flh fa0,2(a1)
        check(0xfea5_ae27, AccessKind::Store, 11, -4, 4); // fsw fa0,-4(a1)
        check(0x7ea5_bc27, AccessKind::Store, 11, 2040, 8); // fsd fa0,2040(a1)
        check(0xfea5_9f27, AccessKind::Store, 11, -2, 2); // fsh fa0,-2(a1)
    }

    #[test]
    fn load_reserved_loads_and_every_other_atomic_stores() {
        check(0x1005_a52f, AccessKind::Load, 11, 0, 1); // lr.w a0,(a1)
        check(0x1606_b52f, AccessKind::Load, 13, 0, 1); // lr.d.aqrl a0,(a3)
        check(0x18c5_a52f, AccessKind::Store, 11, 0, 1); // sc.w a0,a2,(a1)
        check(0x18c5_b52f, AccessKind::Store, 11, 0, 1); // sc.d a0,a2,(a1)
        check(0x00c5_a52f, AccessKind::Store, 11, 0, 1); // amoadd.w a0,a2,(a1)
        check(0x0ecf_b52f, AccessKind::Store, 31, 0, 1); // amoswap.d.aqrl a0,a2,(t6)
        check(0xe0c5_a52f, AccessKind::Store, 11, 0, 1); // amomaxu.w a0,a2,(a1)
        check(0x60c5_b52f, AccessKind::Store, 11, 0, 1); // amoand.d a0,a2,(a1)
        check(0x28c5_a52f, AccessKind::Store, 11, 0, 1); // amocas.w a0,a2,(a1)
        check(0x28c5_c52f, AccessKind::Store, 11, 0, 1); // amocas.q a0,a2,(a1)
        check(0x00c5_852f, AccessKind::Store, 11, 0, 1); // amoadd.b a0,a2,(a1)
        check(0x08c5_952f, AccessKind::Store, 11, 0, 1); // amoswap.h a0,a2,(a1)
    }

    #[test]
    fn vector_accesses_begin_at_their_base() {
        check(0x0205_8087, AccessKind::Load, 11, 0, 1); // vle8.v v1,(a1)
        check(0x0205_f087, AccessKind::Load, 11, 0, 1); // vle64.v v1,(a1)
        check(0x0ac5_e087, AccessKind::Load, 11, 0, 1); // vlse32.v v1,(a1),a2
        check(0x0625_d087, AccessKind::Load, 11, 0, 1); // vluxei16.v v1,(a1),v2
        check(0x6285_e207, AccessKind::Load, 11, 0, 1); // vl4re32.v v4,(a1)
        check(0x0205_80a7, AccessKind::Store, 11, 0, 1); // vse8.v v1,(a1)
        check(0x0ac5_f0a7, AccessKind::Store, 11, 0, 1); // vsse64.v v1,(a1),a2
        check(0xe282_8427, AccessKind::Store, 5, 0, 1); // vs8r.v v8,(t0)
    }

    #[test]
    fn cache_block_operations_store() {
        check(0x0045_a00f, AccessKind::Store, 11, 0, 1); // cbo.zero (a1)
        check(0x0005_a00f, AccessKind::Store, 11, 0, 1); // cbo.inval (a1)
        check(0x0015_a00f, AccessKind::Store, 11, 0, 1); // cbo.clean (a1)
        check(0x0025_a00f, AccessKind::Store, 11, 0, 1); // cbo.flush (a1)
    }

    #[test]
    fn compressed_loads_and_stores_give_their_address() {
        check(0x5de8, AccessKind::Load, 11, 124, 4); // c.lw a0,124(a1)
        check(0x405c, AccessKind::Load, 8, 4, 4); // c.lw a5,4(s0)
        check(0x7de8, AccessKind::Load, 11, 248, 8); // c.ld a0,248(a1)
        check(0x63a4, AccessKind::Load, 15, 64, 8); // c.ld s1,64(a5)
        check(0x3de8, AccessKind::Load, 11, 248, 8); // c.fld fa0,248(a1)
        check(0x2480, AccessKind::Load, 9, 8, 8); // c.fld fs0,8(s1)
        check(0xdde8, AccessKind::Store, 11, 124, 4); // c.sw a0,124(a1)
        check(0xc3a0, AccessKind::Store, 15, 64, 4); // c.sw s0,64(a5)
        check(0xfde8, AccessKind::Store, 11, 248, 8); // c.sd a0,248(a1)
        check(0xbde8, AccessKind::Store, 11, 248, 8); // c.fsd fa0,248(a1)
        check(0x81e8, AccessKind::Load, 11, 3, 1); // c.lbu a0,3(a1)
        check(0x85a8, AccessKind::Load, 11, 2, 2); // c.lhu a0,2(a1)
        check(0x85e8, AccessKind::Load, 11, 2, 2); // c.lh a0,2(a1)
        check(0x89c8, AccessKind::Store, 11, 1, 1); // c.sb a0,1(a1)
        check(0x8da8, AccessKind::Store, 11, 2, 2); // c.sh a0,2(a1)
    }

    #[test]
    fn stack_relative_loads_and_stores_give_their_address() {
        check(0x557e, AccessKind::Load, 2, 252, 4); // c.lwsp a0,252(sp)
        check(0x4092, AccessKind::Load, 2, 4, 4); // c.lwsp ra,4(sp)
        check(0x757e, AccessKind::Load, 2, 504, 8); // c.ldsp a0,504(sp)
        check(0x60a2, AccessKind::Load, 2, 8, 8); // c.ldsp ra,8(sp)
        check(0x357e, AccessKind::Load, 2, 504, 8); // c.fldsp fa0,504(sp)
        check(0x2506, AccessKind::Load, 2, 64, 8); // c.fldsp fa0,64(sp)
        check(0xdfaa, AccessKind::Store, 2, 252, 4); // c.swsp a0,252(sp)
        check(0xc0aa, AccessKind::Store, 2, 64, 4); // c.swsp a0,64(sp)
        check(0xffaa, AccessKind::Store, 2, 504, 8); // c.sdsp a0,504(sp)
        check(0xe0aa, AccessKind::Store, 2, 64, 8); // c.sdsp a0,64(sp)
        check(0xbfaa, AccessKind::Store, 2, 504, 8); // c.fsdsp fa0,504(sp)
        check(0xa42a, AccessKind::Store, 2, 8, 8); // c.fsdsp fa0,8(sp)
    }

    #[test]
    fn instructions_that_access_no_memory_are_not_accesses() {
        // ecall, wfi, nop, jal, beq, fence, a reserved load width, c.nop, c.jr, zeros, ones.
        for word in [
            0x73,
            0x1050_0073,
            0x13,
            0x6f,
            0x63,
            0x0ff0_000f,
            0x7003,
            0x4023,
            0x0001,
            0x8082,
            0,
            !0,
        ] {
            assert_eq!(decode(word), None, "{word:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_word_decodes_or_not_without_a_panic(word: u32) {
            if let Some(operand) = decode(word) {
                prop_assert!(operand.base < 32);
                prop_assert!((-2048..2048).contains(&operand.offset));
                prop_assert!(operand.size.is_power_of_two() && operand.size <= 16);
            }
        }

        #[test]
        fn any_halfword_decodes_or_not_without_a_panic(low: u16) {
            let operand = decode(u32::from(low));
            prop_assert!(operand.is_none_or(|o| length(low) == 2 && (0..512).contains(&o.offset) || length(low) == 4));
        }
    }
}
