//! CSR instructions (Unprivileged specification, Zicsr).

use super::insn::{funct3, opcode, rd, rs1};

/// A CSR instruction: the CSR, the destination register, and the write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CsrInstruction {
    /// Number of the CSR.
    pub number: u16,
    /// Number of the register that receives the old value.
    pub rd: u8,
    /// The write, if the instruction makes one.
    pub write: Option<CsrWrite>,
}

/// The write of a CSR instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CsrWrite {
    op: WriteOp,
    /// The source of the value.
    pub operand: Operand,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteOp {
    Swap,
    Set,
    Clear,
}

/// The source of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// The register with this number.
    Register(u8),
    /// The value itself.
    Immediate(u64),
}

impl CsrWrite {
    /// Returns the CSR's new value.
    #[must_use]
    pub const fn apply(&self, old: u64, operand: u64) -> u64 {
        match self.op {
            WriteOp::Swap => operand,
            WriteOp::Set => old | operand,
            WriteOp::Clear => old & !operand,
        }
    }
}

/// Decodes a CSR instruction.
#[must_use]
pub fn decode(word: u32) -> Option<CsrInstruction> {
    if opcode(word) != opcode::SYSTEM {
        return None;
    }
    let (source, funct3) = (rs1(word), funct3(word));
    let op = match funct3 & 3 {
        1 => WriteOp::Swap,
        2 => WriteOp::Set,
        3 => WriteOp::Clear,
        _ => return None,
    };
    let operand =
        if funct3 & 4 == 0 { Operand::Register(source) } else { Operand::Immediate(source.into()) };
    // Setting and clearing with x0 or 0 only reads.
    let write = (op == WriteOp::Swap || source != 0).then_some(CsrWrite { op, operand });
    Some(CsrInstruction { number: (word >> 20) as u16, rd: rd(word), write })
}
