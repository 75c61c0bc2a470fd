//! A hart's registers as text, for the message of a machine that stopped.

use std::fmt::Write;

use super::hart::{Csr, Hart, Reg};
use crate::riscv::register::X_NAMES;

const PER_LINE: usize = 4;

/// The registers of a hart whose last exit is settled or abandoned: 11 lines of at most 100 characters. A register that
/// cannot be read is shown as a question mark.
#[must_use]
pub fn dump(hart: &dyn Hart) -> String {
    let first = [("pc", Reg::Pc), ("mode", Reg::Mode)];
    let integers = (1..).zip(X_NAMES.iter().skip(1)).map(|(number, name)| (*name, Reg::X(number)));
    let csrs = [Csr::Sstatus, Csr::Stvec, Csr::Sepc, Csr::Scause, Csr::Stval, Csr::Satp];
    let mut text = String::new();
    block(&mut text, hart, first.into_iter());
    block(&mut text, hart, integers);
    block(&mut text, hart, csrs.into_iter().map(|csr| (csr.name(), Reg::Csr(csr))));
    text.pop();
    text
}

/// Every readable register, with its name.
pub fn registers() -> impl Iterator<Item = (&'static str, Reg)> {
    let first = [("pc", Reg::Pc), ("mode", Reg::Mode)];
    let integers = (1..).zip(X_NAMES.iter().skip(1)).map(|(number, name)| (*name, Reg::X(number)));
    let csrs = [
        Csr::Sstatus,
        Csr::Sie,
        Csr::Sip,
        Csr::Stvec,
        Csr::Sscratch,
        Csr::Sepc,
        Csr::Scause,
        Csr::Stval,
        Csr::Satp,
        Csr::Scounteren,
        Csr::Senvcfg,
        Csr::Sstateen0,
    ];
    first.into_iter().chain(integers).chain(csrs.map(|csr| (csr.name(), Reg::Csr(csr))))
}

fn block(text: &mut String, hart: &dyn Hart, regs: impl Iterator<Item = (&'static str, Reg)>) {
    let mut column = 0;
    for (name, reg) in regs {
        let value = hart.get(reg).map_or_else(|_| "?".into(), |value| format!("{value:016x}"));
        let end = if column % PER_LINE == PER_LINE - 1 { '\n' } else { ' ' };
        // Writing to a String cannot fail.
        let _ = write!(text, "{name:>7} {value:16}{end}");
        column += 1;
    }
    if !column.is_multiple_of(PER_LINE) {
        text.pop();
        text.push('\n');
    }
}
