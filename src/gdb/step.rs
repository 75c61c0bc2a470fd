//! The addresses at which a hart may be after one instruction: software single-stepping, since KVM on RISC-V has none.
//!
//! Unprivileged specification, chapters "RV32I" (jumps, branches), "Zalrsc" and "C"; Privileged specification, 12.2 and 3.3.
//! Every instruction may trap, so a breakpoint at the trap vector is always needed as well. A sequence from LR to its SC counts
//! as one instruction: a stop in between would invalidate the reservation, and the sequence would be retried forever.
//!
//! Not covered: jumps of Zcmp and Zcmt and instructions of more than 32 bits, none of which KVM gives a guest; and the address
//! after an SBI call that does not return (a hart that stops or suspends itself).

use std::io;

use crate::riscv::csr;
use crate::riscv::insn::{
    ECALL, SRET, WFI, is_load_reserved, is_store_conditional, length_of, opcode, quadrant,
};
use crate::riscv::jump::{self, Jump};
use crate::riscv::trap::SUPERVISOR;
use crate::riscv::zicsr::{self, Operand};
use crate::vcpu::hart::{Csr, Hart, Reg};

/// Maximum number of instructions examined between LR and SC: that of a constrained loop (Zalrsc).
const SEQUENCE: usize = 16;

/// The registers that determine the next address.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Frame {
    pub(super) x: [u64; 32],
    pub(super) pc: u64,
    pub(super) mode: u64,
    pub(super) sepc: u64,
    pub(super) stvec: u64,
    pub(super) satp: u64,
    pub(super) sie: u64,
}

impl Frame {
    /// Reads them, on the hart's own thread.
    ///
    /// # Errors
    /// The kernel's error, which no guest causes.
    pub(super) fn of(hart: &dyn Hart) -> io::Result<Self> {
        let mut frame = Self {
            pc: hart.get(Reg::Pc)?,
            mode: hart.get(Reg::Mode)?,
            sepc: hart.get(Reg::Csr(Csr::Sepc))?,
            stvec: hart.get(Reg::Csr(Csr::Stvec))?,
            satp: hart.get(Reg::Csr(Csr::Satp))?,
            sie: hart.get(Reg::Csr(Csr::Sie))?,
            x: [0; 32],
        };
        for (number, x) in (0..).zip(&mut frame.x) {
            *x = hart.get(Reg::X(number))?;
        }
        Ok(frame)
    }

    fn x(&self, number: u8) -> u64 {
        self.x.get(usize::from(number)).copied().unwrap_or(0)
    }
}

/// The effect of the instruction at the program counter, as far as a step needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Next {
    /// Virtual addresses, one of which the hart reaches unless the instruction traps.
    pub(super) places: Vec<u64>,
    /// The new value of `satp`, if the instruction writes it.
    pub(super) satp: Option<u64>,
    /// True if interrupts must not be masked for it: it waits for one, or accesses `sie`.
    pub(super) needs_interrupts: bool,
    /// True for `wfi`, which may be a `nop` (Privileged specification, 3.3.3).
    pub(super) is_wfi: bool,
}

/// Decodes the instruction at `frame.pc`; `fetch` returns 16 bits of code, or `None` if they cannot be read. `None` if the
/// instruction cannot be read: then it traps.
pub(super) fn next(frame: &Frame, fetch: &dyn Fn(u64) -> Option<u16>) -> Option<Next> {
    let word = instruction(frame.pc, fetch)?;
    let after = frame.pc.wrapping_add(length_of(word));
    let plain = |places| Next { places, satp: None, needs_interrupts: false, is_wfi: false };
    Some(match jump(frame, word) {
        Some(place) => plain(vec![place]),
        None if quadrant(word) != 3 => plain(vec![after]),
        None if is_load_reserved(word) => {
            plain(sequence(frame, fetch).unwrap_or_else(|| vec![after]))
        }
        None if opcode(word) == opcode::SYSTEM => system(frame, word, plain(vec![after])),
        None => plain(vec![after]),
    })
}

fn instruction(pc: u64, fetch: &dyn Fn(u64) -> Option<u16>) -> Option<u32> {
    let low = fetch(pc)?;
    if low & 3 != 3 {
        return Some(low.into());
    }
    Some(u32::from(fetch(pc.wrapping_add(2))?) << 16 | u32::from(low))
}

/// The address an instruction jumps to, with branches evaluated; `None` if the next instruction in memory follows.
fn jump(frame: &Frame, word: u32) -> Option<u64> {
    match jump::decode(word)? {
        Jump::Relative(offset) => Some(frame.pc.wrapping_add_signed(offset)),
        Jump::Register { base, offset } => Some(frame.x(base).wrapping_add_signed(offset) & !1),
        Jump::Branch(branch) => {
            let (a, b) = branch.operands;
            let target = frame.pc.wrapping_add_signed(branch.offset);
            branch.is_taken(frame.x(a), frame.x(b)).then_some(target)
        }
    }
}

fn system(frame: &Frame, word: u32, mut next: Next) -> Next {
    match word {
        SRET if frame.mode == SUPERVISOR => next.places = vec![frame.sepc],
        WFI => next.is_wfi = true,
        // An SBI call may wait for an interrupt in the kernel.
        ECALL => next.needs_interrupts = true,
        _ => {}
    }
    let Some(access) = zicsr::decode(word) else { return next };
    match access.number {
        csr::SIE => next.needs_interrupts = true,
        csr::SATP => {
            let value = access.write.map(|write| {
                let operand = match write.operand {
                    Operand::Register(number) => frame.x(number),
                    Operand::Immediate(value) => value,
                };
                write.apply(frame.satp, operand)
            });
            next.satp = value;
        }
        _ => {}
    }
    next
}

/// The exits of a sequence that begins with LR: the address after its SC, and the target of every branch out of it. `None` if
/// it has another shape.
fn sequence(frame: &Frame, fetch: &dyn Fn(u64) -> Option<u16>) -> Option<Vec<u64>> {
    let start = frame.pc;
    let mut at = start.wrapping_add(4);
    let mut exits = Vec::new();
    for _ in 0..SEQUENCE {
        let word = instruction(at, fetch)?;
        let after = at.wrapping_add(length_of(word));
        if is_store_conditional(word) {
            let inside = |place: &u64| {
                place.wrapping_sub(start) != 0
                    && place.wrapping_sub(start) < after.wrapping_sub(start)
            };
            exits.retain(|place| !inside(place));
            exits.push(after);
            return Some(exits);
        }
        let leaves = jump::is_unconditional(word)
            || is_load_reserved(word)
            || opcode(word) == opcode::SYSTEM;
        match jump::decode(word) {
            Some(Jump::Branch(branch)) => exits.push(at.wrapping_add_signed(branch.offset)),
            _ if leaves => return None,
            _ => {}
        }
        at = after;
    }
    None
}

#[cfg(test)]
#[path = "tests/step.rs"]
mod tests;
