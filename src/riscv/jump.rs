//! Jumps and branches (Unprivileged specification, chapters "RV32I" and "C"). Not covered: those of Zcmp and Zcmt.

use super::insn::{
    bits, c_funct3, c_imm_b, c_imm_j, c_rs1_short, c_rs2, funct3, imm_b, imm_i, imm_j, opcode,
    quadrant, rd, rs1, rs2,
};

/// An instruction after which another one than the next in memory may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jump {
    /// To the program counter plus an offset.
    Relative(i64),
    /// To the value of a register plus an offset, with bit 0 cleared.
    Register {
        /// Number of the register.
        base: u8,
        /// Added to its value.
        offset: i64,
    },
    /// A conditional branch.
    Branch(Branch),
}

/// A conditional branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Branch {
    condition: Condition,
    /// Numbers of the registers that are compared.
    pub operands: (u8, u8),
    /// The target, relative to the program counter.
    pub offset: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Equal,
    NotEqual,
    Less,
    NotLess,
    LessUnsigned,
    NotLessUnsigned,
}

impl Branch {
    /// True if the branch is taken with these values of the operands.
    #[must_use]
    pub const fn is_taken(&self, a: u64, b: u64) -> bool {
        match self.condition {
            Condition::Equal => a == b,
            Condition::NotEqual => a != b,
            Condition::Less => a.cast_signed() < b.cast_signed(),
            Condition::NotLess => a.cast_signed() >= b.cast_signed(),
            Condition::LessUnsigned => a < b,
            Condition::NotLessUnsigned => a >= b,
        }
    }
}

/// Decodes a jump or a branch; `None` if the instruction is neither.
#[must_use]
pub fn decode(word: u32) -> Option<Jump> {
    let branch = |condition, operands, offset| Jump::Branch(Branch { condition, operands, offset });
    Some(match (quadrant(word), c_funct3(word)) {
        (3, _) => match (opcode(word), funct3(word)) {
            (opcode::JAL, _) => Jump::Relative(imm_j(word)),
            (opcode::JALR, 0) => Jump::Register { base: rs1(word), offset: imm_i(word) },
            (opcode::BRANCH, funct3) => {
                let condition = match funct3 {
                    0 => Condition::Equal,
                    1 => Condition::NotEqual,
                    4 => Condition::Less,
                    5 => Condition::NotLess,
                    6 => Condition::LessUnsigned,
                    7 => Condition::NotLessUnsigned,
                    _ => return None,
                };
                branch(condition, (rs1(word), rs2(word)), imm_b(word))
            }
            _ => return None,
        },
        // c.j
        (1, 0b101) => Jump::Relative(c_imm_j(word)),
        // c.beqz and c.bnez
        (1, 0b110) => branch(Condition::Equal, (c_rs1_short(word), 0), c_imm_b(word)),
        (1, 0b111) => branch(Condition::NotEqual, (c_rs1_short(word), 0), c_imm_b(word)),
        // c.jr and c.jalr; with x0 they encode other instructions.
        (2, 0b100) if c_rs2(word) == 0 && rd(word) != 0 => {
            Jump::Register { base: rd(word), offset: 0 }
        }
        _ => return None,
    })
}

/// True if execution never continues after the instruction: unconditional jumps, valid or not, and `c.ebreak`.
#[must_use]
pub const fn is_unconditional(word: u32) -> bool {
    match (quadrant(word), c_funct3(word)) {
        (3, _) => matches!(opcode(word), opcode::JALR | opcode::JAL),
        (1, 0b101) => true,
        // c.jr, c.jalr and c.ebreak
        (2, 0b100) => bits(word, 2, 5) == 0,
        _ => false,
    }
}
