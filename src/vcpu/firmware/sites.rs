//! Finds `ecall`s of a guest that may be SBI calls which the host's kernel does not handle.
//!
//! The call's number is in a7, and is nearly always loaded shortly before, as a constant or, in a function that makes all calls,
//! from another register or the stack: so the code before each `ecall` in a file is searched backwards for an instruction that does
//! so and from which execution falls through to the `ecall`, without a jump, a call, or another value for a7. Conditional branches
//! in between are assumed not taken. If there is none, the `ecall` stays as it is: so a function that receives the number in a7 is
//! not found, and neither is a data word that looks like a number.
//!
//! The result is a guess. The hart that hits the breakpoint decides: see `patches.rs`.

use crate::riscv::insn::{
    EBREAK, ECALL, SRET, bits, c_funct3, c_imm_i, c_rs2, funct3, imm_i, imm_u, length, length_of,
    opcode, quadrant, rd, rs1,
};
use crate::riscv::jump;
use crate::riscv::register::{A7, S0, SP};

/// Maximum number of bytes searched before an `ecall`.
pub const REACH: usize = 256;

/// An `ecall` and the instruction that loads its number, as offsets in the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Offset of the `ecall`.
    pub at: usize,
    /// Offset of the first instruction that contributes to a7, at most [`REACH`] before.
    pub start: usize,
    /// The call's number.
    pub number: Number,
}

/// The value of a7 at an `ecall`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// A constant.
    Constant(u64),
    /// A copy from another register or the stack: known only when the call is made.
    Moved,
}

impl Number {
    fn known(self) -> Option<u64> {
        match self {
            Self::Constant(value) => Some(value),
            Self::Moved => None,
        }
    }

    /// True if it is or may be `wanted`.
    pub fn may_be(self, wanted: impl Fn(u64) -> bool) -> bool {
        self.known().is_none_or(wanted)
    }
}

/// Finds the `ecall`s in `code` whose number is a constant, or is moved into a7.
pub fn find(code: &[u8]) -> Vec<Site> {
    let calls = (0..code.len().saturating_sub(3)).step_by(2);
    let calls = calls.filter(|at| word(code, *at) == Some(ECALL));
    calls.filter_map(|at| site(code, at)).collect()
}

/// The `ecall` at offset `at` with the nearest instruction that sets a7.
fn site(code: &[u8], at: usize) -> Option<Site> {
    let first = at.saturating_sub(REACH);
    (first..at).rev().step_by(2).find_map(|start| {
        // In steps of two bytes, aligned to the call, to cover every possible start of an instruction.
        let start = start & !1 | at & 1;
        number(word(code, start)?, None)?;
        let number = follow(code, start, at)?;
        Some(Site { at, start, number })
    })
}

/// The value of a7 after executing the instructions from `start` to `at`.
fn follow(code: &[u8], start: usize, at: usize) -> Option<Number> {
    let (mut here, mut a7) = (start, None);
    while here < at {
        let word = word(code, here)?;
        match number(word, a7) {
            Some(value) => a7 = Some(value),
            None if leaves(word) || destination(word) == Some(A7) => return None,
            None => {}
        }
        here += usize::try_from(length_of(word)).ok()?;
    }
    if here == at { a7 } else { None }
}

/// The value that the instruction writes to a7, which was `before`, if it can be a call's number.
fn number(word: u32, before: Option<Number>) -> Option<Number> {
    let before = before.and_then(Number::known);
    constant(word, before).map(Number::Constant).or_else(|| moves(word).then_some(Number::Moved))
}

/// The instruction at an offset: two bytes if it is compressed.
fn word(code: &[u8], at: usize) -> Option<u32> {
    let low = code.get(at..at.checked_add(2)?)?;
    let low = u16::from_le_bytes(low.try_into().ok()?);
    if length(low) == 2 {
        return Some(low.into());
    }
    let all = code.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(all.try_into().ok()?))
}

/// The low half, sign-extended, as word instructions (`addiw`) produce it.
fn word_of(value: u64) -> u64 {
    ((value << 32).cast_signed() >> 32).cast_unsigned()
}

/// The constant that the instruction writes to a7, which was `before`: `li`, `lui`, and `addi` to a known value.
fn constant(word: u32, before: Option<u64>) -> Option<u64> {
    let add = |immediate: i64| before.map(|old| old.wrapping_add_signed(immediate));
    if quadrant(word) == 3 {
        let (upper, immediate) = (imm_u(word), imm_i(word));
        return match (opcode(word), funct3(word), rd(word), rs1(word)) {
            (opcode::LUI, _, A7, _) => Some(upper.cast_unsigned()),
            (opcode::OP_IMM, 0, A7, 0) => Some(immediate.cast_unsigned()),
            (opcode::OP_IMM, 0, A7, A7) => add(immediate),
            (opcode::OP_IMM_32, 0, A7, A7) => add(immediate).map(word_of),
            _ => None,
        };
    }
    let immediate = c_imm_i(word);
    match (quadrant(word), c_funct3(word), rd(word)) {
        (1, 0b010, A7) => Some(immediate.cast_unsigned()),
        (1, 0b011, A7) => Some((immediate << 12).cast_unsigned()),
        (1, 0b000, A7) => add(immediate),
        (1, 0b001, A7) => add(immediate).map(word_of),
        _ => None,
    }
}

/// True if the instruction copies a word into a7 from another register or from the stack.
fn moves(word: u32) -> bool {
    if rd(word) != A7 {
        return false;
    }
    match (quadrant(word), opcode(word)) {
        // addi with 0, i.e. mv
        (3, opcode::OP_IMM) => {
            funct3(word) == 0 && imm_i(word) == 0 && !matches!(rs1(word), 0 | A7)
        }
        // lw and ld, from the frame
        (3, opcode::LOAD) => matches!(funct3(word), 2 | 3) && matches!(rs1(word), SP | S0),
        // c.mv; c.lwsp and c.ldsp
        (2, _) => match c_funct3(word) {
            0b100 => bits(word, 12, 1) == 0 && !matches!(c_rs2(word), 0 | A7),
            0b010 | 0b011 => true,
            _ => false,
        },
        _ => false,
    }
}

/// True if the next instruction is not reached from this one, or not with the same registers: jumps, calls, returns, `ecall`s, and
/// invalid instructions.
fn leaves(word: u32) -> bool {
    // Zero is c.unimp.
    jump::is_unconditional(word) || matches!(word, ECALL | EBREAK | SRET | 0xffff_ffff | 0)
}

/// The integer register that the instruction writes, if that can be a7.
fn destination(word: u32) -> Option<u8> {
    match (quadrant(word), c_funct3(word)) {
        // Branches, stores and fences have no destination; destinations of floating-point and vector instructions are not distinguished.
        (3, _) => (!matches!(
            opcode(word),
            opcode::BRANCH | opcode::STORE | opcode::STORE_FP | opcode::MISC_MEM
        ))
        .then_some(rd(word)),
        (1, 0b000..=0b011) | (2, 0b000 | 0b010 | 0b011 | 0b100) => Some(rd(word)),
        // Of quadrant 0 the registers are x8 to x15.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::riscv::sbi::is_v01;

    /// Instructions as words; those that fit in 16 bits are compressed.
    fn code(words: &[u32]) -> Vec<u8> {
        words
            .iter()
            .flat_map(|word| {
                let bytes = word.to_le_bytes();
                let len = usize::try_from(length_of(*word)).unwrap();
                bytes.into_iter().take(len)
            })
            .collect()
    }

    fn of(words: &[u32]) -> Vec<usize> {
        let is_v01 = |number: Number| number.known().is_some_and(is_v01);
        let sites = find(&code(words)).into_iter();
        sites.filter(|site| is_v01(site.number)).map(|site| site.at).collect()
    }

    fn moved(words: &[u32]) -> Vec<(usize, usize)> {
        let sites = find(&code(words)).into_iter();
        sites.filter(|site| site.number == Number::Moved).map(|s| (s.start, s.at)).collect()
    }

    const LI_A7_1: u32 = 0x0010_0893;
    const C_LI_A7_8: u32 = 0x48a1;
    const NOP: u32 = 0x0000_0013;
    const C_NOP: u32 = 0x0001;

    #[test]
    fn the_number_may_be_loaded_by_instructions_of_either_length_and_some_way_before() {
        assert_eq!(of(&[LI_A7_1, ECALL]), [4]);
        assert_eq!(of(&[C_LI_A7_8, ECALL]), [2]);
        assert_eq!(of(&[LI_A7_1, NOP, C_NOP, NOP, ECALL, C_LI_A7_8, ECALL]), [14, 20]);
        // li a7,1; beqz a0,.+8; mv a0,a1; ecall: the number for a loop is loaded before it.
        assert_eq!(of(&[LI_A7_1, 0x0005_0463, 0x852e, ECALL]), [10]);
    }

    #[test]
    fn calls_with_other_numbers_stay_calls() {
        // li a7,93
        assert!(of(&[0x05d0_0893, ECALL]).is_empty());
        // li a7,1; li a7,93
        assert!(of(&[LI_A7_1, 0x05d0_0893, ECALL]).is_empty());
        // lui a7,0x54495; addi a7,a7,-699: TIME
        let time = [0x5449_58b7, 0xd458_8893, ECALL];
        assert!(of(&time).is_empty());
        let site = Site { at: 8, start: 0, number: Number::Constant(0x5449_4d45) };
        assert_eq!(find(&code(&time)), [site]);
    }

    #[test]
    fn a_number_that_does_not_fall_through_to_the_call_does_not_count() {
        for between in [
            0x8882,      // c.jr a7
            0x8082,      // ret
            0x0080_006f, // j
            0x0080_00ef, // jal
            0x0005_80e7, // jalr a1
            0x88aa,      // mv a7,a0
            0x0005_3883, // ld a7,0(a0)
            ECALL,
        ] {
            let found = of(&[LI_A7_1, between, ECALL]);
            let last = code(&[LI_A7_1, between]).len();
            assert!(!found.contains(&last), "{between:#x}");
        }
        assert!(of(&[ECALL]).is_empty());
    }

    #[test]
    fn a_number_may_be_moved_from_another_register_or_from_the_stack() {
        for (way, len) in [
            (0x88aa, 2),      // c.mv a7,a0
            (0x0005_0893, 4), // addi a7,a0,0
            (0xfe84_3883, 4), // ld a7,-24(s0)
            (0x0081_2883, 4), // lw a7,8(sp)
            (0x68a2, 2),      // c.ldsp a7,8(sp)
            (0x48a2, 2),      // c.lwsp a7,8(sp)
        ] {
            assert_eq!(moved(&[NOP, way, ECALL]), [(4, 4 + len)], "{way:#x}");
            // mv a0,a1 may be in between, another value for a7 may not.
            assert_eq!(moved(&[way, 0x852e, ECALL]), [(0, len + 2)], "{way:#x}");
            assert!(moved(&[way, LI_A7_1, ECALL]).is_empty(), "{way:#x}");
            assert!(moved(&[way, 0x8082, ECALL]).is_empty(), "{way:#x}");
        }
        // Computed numbers, and numbers in other memory: add a7,a0,a1; addi a7,a0,1; ld a7,0(a0); c.add a7,a0.
        for way in [0x00b5_08b3, 0x0015_0893, 0x0005_3883, 0x98aa] {
            assert!(moved(&[way, ECALL]).is_empty(), "{way:#x}");
        }
    }

    #[test]
    fn a_call_far_after_its_number_stays_a_call() {
        let near: Vec<u32> =
            std::iter::once(LI_A7_1).chain(std::iter::repeat_n(NOP, 60)).chain([ECALL]).collect();
        let far: Vec<u32> =
            std::iter::once(LI_A7_1).chain(std::iter::repeat_n(NOP, 70)).chain([ECALL]).collect();
        assert_eq!((of(&near).len(), of(&far).len()), (1, 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_searched_and_only_calls_found(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            for Site { at, start, .. } in find(&bytes) {
                prop_assert_eq!(&bytes[at..at + 4], &[0x73, 0, 0, 0]);
                prop_assert!(start < at && at - start <= REACH);
            }
        }
    }
}
