//! The addresses at which a hart may be after one instruction: software single-stepping, since KVM on RISC-V has none.
//!
//! Unprivileged specification, chapters "RV32I" (jumps, branches), "Zalrsc" and "C"; Privileged specification, 12.2 and 3.3.
//! Every instruction may trap, so a breakpoint at the trap vector is always needed as well. A sequence from LR to its SC counts
//! as one instruction: a stop in between would invalidate the reservation, and the sequence would be retried forever.
//!
//! Not covered: jumps of Zcmp and Zcmt and instructions of more than 32 bits, none of which KVM gives a guest; and the address
//! after an SBI call that does not return (a hart that stops or suspends itself).

use std::io;

use crate::vcpu::hart::{Csr, Hart, Reg};

/// Maximum number of instructions examined between LR and SC: that of a constrained loop (Zalrsc).
const SEQUENCE: usize = 16;

const SUPERVISOR: u64 = 1;
const SCSR_SIE: u32 = 0x104;
const SCSR_SATP: u32 = 0x180;

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

    fn x(&self, number: u32) -> u64 {
        self.x.get(number as usize).copied().unwrap_or(0)
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
    let after = frame.pc.wrapping_add(length(word));
    let plain = |places| Next { places, satp: None, needs_interrupts: false, is_wfi: false };
    Some(match jump(frame, word) {
        Some(place) => plain(vec![place]),
        None if word & 3 != 3 => plain(vec![after]),
        None if is_load_reserved(word) => {
            plain(sequence(frame, fetch).unwrap_or_else(|| vec![after]))
        }
        None if word & 0x7f == 0x73 => system(frame, word, plain(vec![after])),
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

fn length(word: u32) -> u64 {
    if word & 3 == 3 { 4 } else { 2 }
}

/// The address an instruction jumps to, with branches evaluated; `None` if the next instruction in memory follows.
fn jump(frame: &Frame, word: u32) -> Option<u64> {
    if let Some((taken, place)) = branch(frame, word) {
        return taken.then_some(place);
    }
    let by = |offset: i64| Some(frame.pc.wrapping_add_signed(offset));
    let to = |base: u32, offset: i64| Some(frame.x(base).wrapping_add_signed(offset) & !1);
    match (word & 3, bits(word, 13, 3)) {
        (3, _) if word & 0x7f == 0x6f => by(offset_j(word)),
        (3, _) if word & 0x707f == 0x67 => {
            to(bits(word, 15, 5), i64::from(word.cast_signed() >> 20))
        }
        // c.j
        (1, 0b101) => by(offset_cj(word)),
        // c.jr and c.jalr; with x0 they encode other instructions.
        (2, 0b100) if bits(word, 2, 5) == 0 && bits(word, 7, 5) != 0 => to(bits(word, 7, 5), 0),
        _ => None,
    }
}

/// Evaluates a conditional branch: taken or not, and its target.
fn branch(frame: &Frame, word: u32) -> Option<(bool, u64)> {
    let to = |offset: i64| frame.pc.wrapping_add_signed(offset);
    match (word & 3, bits(word, 13, 3)) {
        (3, _) if word & 0x7f == 0x63 => {
            let (a, b) = (frame.x(bits(word, 15, 5)), frame.x(bits(word, 20, 5)));
            let taken = match bits(word, 12, 3) {
                0 => a == b,
                1 => a != b,
                4 => a.cast_signed() < b.cast_signed(),
                5 => a.cast_signed() >= b.cast_signed(),
                6 => a < b,
                7 => a >= b,
                _ => return None,
            };
            Some((taken, to(offset_b(word))))
        }
        // c.beqz and c.bnez
        (1, quarter @ (0b110 | 0b111)) => {
            let is_zero = frame.x(8 + bits(word, 7, 3)) == 0;
            Some((is_zero == (quarter == 0b110), to(offset_cb(word))))
        }
        _ => None,
    }
}

fn system(frame: &Frame, word: u32, mut next: Next) -> Next {
    let (csr, source) = (word >> 20, frame.x(bits(word, 15, 5)));
    match (bits(word, 12, 3), word) {
        (0, 0x1020_0073) if frame.mode == SUPERVISOR => next.places = vec![frame.sepc],
        (0, 0x1050_0073) => next.is_wfi = true,
        // An SBI call may wait for an interrupt in the kernel.
        (0, 0x0000_0073) => next.needs_interrupts = true,
        (0, _) => {}
        (_, _) if csr == SCSR_SIE => next.needs_interrupts = true,
        (how, _) if csr == SCSR_SATP => {
            let value = if how & 4 == 0 { source } else { u64::from(bits(word, 15, 5)) };
            next.satp = Some(match how & 3 {
                1 => value,
                2 => frame.satp | value,
                _ => frame.satp & !value,
            });
        }
        _ => {}
    }
    next
}

fn is_load_reserved(word: u32) -> bool {
    word & 0x7f == 0x2f && word >> 27 == 0b00010
}

fn is_store_conditional(word: u32) -> bool {
    word & 0x7f == 0x2f && word >> 27 == 0b00011
}

/// The exits of a sequence that begins with LR: the address after its SC, and the target of every branch out of it. `None` if
/// it has another shape.
fn sequence(frame: &Frame, fetch: &dyn Fn(u64) -> Option<u16>) -> Option<Vec<u64>> {
    let start = frame.pc;
    let mut at = Frame { pc: start.wrapping_add(4), ..frame.clone() };
    let mut exits = Vec::new();
    for _ in 0..SEQUENCE {
        let word = instruction(at.pc, fetch)?;
        let after = at.pc.wrapping_add(length(word));
        if is_store_conditional(word) {
            let inside = |place: &u64| {
                place.wrapping_sub(start) != 0
                    && place.wrapping_sub(start) < after.wrapping_sub(start)
            };
            exits.retain(|place| !inside(place));
            exits.push(after);
            return Some(exits);
        }
        match branch(&at, word) {
            Some((_, place)) => exits.push(place),
            None if jumps(word) || is_load_reserved(word) || word & 0x7f == 0x73 => return None,
            None => {}
        }
        at.pc = after;
    }
    None
}

/// True if an instruction jumps unconditionally.
fn jumps(word: u32) -> bool {
    match (word & 3, bits(word, 13, 3)) {
        (3, _) => matches!(word & 0x7f, 0x67 | 0x6f),
        (1, 0b101) => true,
        // c.jr, c.jalr and c.ebreak
        (2, 0b100) => bits(word, 2, 5) == 0,
        _ => false,
    }
}

fn bits(word: u32, low: u32, count: u32) -> u32 {
    (word >> low) & ((1 << count) - 1)
}

/// Assembles an immediate from runs of bits (position in the instruction, count, position in the value), sign-extended from bit
/// `sign`.
fn immediate(word: u32, runs: &[(u32, u32, u32)], sign: u32) -> i64 {
    let value =
        runs.iter().fold(0, |value, (from, count, to)| value | bits(word, *from, *count) << to);
    let unused = 31 - sign;
    i64::from((value << unused).cast_signed() >> unused)
}

fn offset_b(word: u32) -> i64 {
    immediate(word, &[(31, 1, 12), (7, 1, 11), (25, 6, 5), (8, 4, 1)], 12)
}

fn offset_j(word: u32) -> i64 {
    immediate(word, &[(31, 1, 20), (12, 8, 12), (20, 1, 11), (21, 10, 1)], 20)
}

fn offset_cb(word: u32) -> i64 {
    immediate(word, &[(12, 1, 8), (5, 2, 6), (2, 1, 5), (10, 2, 3), (3, 2, 1)], 8)
}

fn offset_cj(word: u32) -> i64 {
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
    immediate(word, &runs, 11)
}

#[cfg(test)]
#[path = "tests/step.rs"]
mod tests;
