//! Registers by GDB's numbers and names, and the target description that lists them.
//!
//! GDB's manual, "RISC-V Features" in appendix G: `org.gnu.gdb.riscv.cpu`, `.fpu`, `.virtual` and `.csr`; the numbers are those of
//! its `riscv-tdep.h`, which QEMU uses too: x0 at 0, pc at 32, f0 at 33, CSR n at 65 + n, the privilege mode at 4161.
//! The packet `g` contains x and pc; all others are read one by one. Not covered: vector registers, which are wider than a [`Reg`];
//! counters; and those CSRs of the AIA that KVM does not expose (`sireg`, `stopei`, `stopi`).

use std::fmt::Write;
use std::num::NonZeroUsize;

use gdbstub::arch::{Arch, RegId, Registers};

use crate::riscv::csr;
use crate::riscv::register::{F_NAMES, S0, X_NAMES};
use crate::vcpu::hart::{Csr, Reg};

const PC: usize = 32;
const F0: usize = 33;
const F31: usize = 64;
const CSR0: usize = 65;
const PRIV: usize = 4161;
const FFLAGS: usize = CSR0 + csr::FFLAGS as usize;
const FRM: usize = CSR0 + csr::FRM as usize;
const FCSR: usize = CSR0 + csr::FCSR as usize;

/// The architecture for gdbstub. The target description depends on the machine: see [`description`].
pub(super) enum Rv64 {}

impl Arch for Rv64 {
    type Usize = u64;
    type Registers = CoreRegisters;
    /// The length of the instruction, which breakpoints here do not depend on.
    type BreakpointKind = usize;
    type RegId = Number;
}

/// The registers in the packets `g` and `G`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct CoreRegisters {
    pub(super) x: [u64; 32],
    pub(super) pc: u64,
}

impl Registers for CoreRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.pc
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for value in self.x.iter().chain([&self.pc]) {
            for byte in value.to_le_bytes() {
                write_byte(Some(byte));
            }
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let (values, rest) = bytes.as_chunks::<8>();
        if values.len() != PC + 1 || !rest.is_empty() {
            return Err(());
        }
        for (register, value) in self.x.iter_mut().chain([&mut self.pc]).zip(values) {
            *register = u64::from_le_bytes(*value);
        }
        Ok(())
    }
}

/// One register by GDB's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    /// The register that contains it.
    pub(super) reg: Reg,
    /// Its bits in that register.
    pub(super) part: Part,
}

/// The bits of a register that form another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) low: u32,
    pub(super) mask: u64,
    /// Size in bytes in the protocol.
    pub(super) size: usize,
}

const WHOLE: Part = Part { low: 0, mask: u64::MAX, size: 8 };

impl Part {
    /// Extracts the part from the value of the whole register.
    pub(super) fn of(self, whole: u64) -> u64 {
        whole >> self.low & self.mask
    }

    /// Returns the whole register with another value for the part.
    pub(super) fn put(self, whole: u64, value: u64) -> u64 {
        whole & !(self.mask << self.low) | (value & self.mask) << self.low
    }
}

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let narrow = |low, mask| Part { low, mask, size: 4 };
        let small = |base: usize| u8::try_from(id.checked_sub(base)?).ok();
        let (reg, part) = match id {
            ..PC => (Reg::X(small(0)?), WHOLE),
            PC => (Reg::Pc, WHOLE),
            F0..=F31 => (Reg::F(small(F0)?), WHOLE),
            FFLAGS => (Reg::Fcsr, narrow(0, 0x1f)),
            FRM => (Reg::Fcsr, narrow(5, 7)),
            FCSR => (Reg::Fcsr, narrow(0, 0xff)),
            PRIV => (Reg::Mode, WHOLE),
            _ => {
                let number = id.checked_sub(CSR0)?;
                let known = Csr::ALL.into_iter().find(|csr| usize::from(csr.number()) == number)?;
                (Reg::Csr(known), WHOLE)
            }
        };
        Some((Self { reg, part }, NonZeroUsize::new(part.size)))
    }
}

/// The registers that some machines lack.
pub(super) fn optional() -> [Reg; 5] {
    let [sstateen0, siselect, hviprio1, hviprio2] =
        [Csr::Sstateen0, Csr::Siselect, Csr::Hviprio1, Csr::Hviprio2].map(Reg::Csr);
    [Reg::F(0), sstateen0, siselect, hviprio1, hviprio2]
}

/// The target description, without the registers in `missing`.
pub(super) fn description(missing: &[Reg]) -> String {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\
         <target version=\"1.0\"><architecture>riscv:rv64</architecture>\
         <feature name=\"org.gnu.gdb.riscv.cpu\">",
    );
    for (number, name) in X_NAMES.into_iter().enumerate() {
        // The other name of s0, which GDB expects.
        let name = if number == usize::from(S0) { "fp" } else { name };
        let kind = match name {
            "ra" => "code_ptr",
            "sp" | "gp" | "tp" | "fp" => "data_ptr",
            _ => "int",
        };
        reg(&mut xml, name, 64, number, kind);
    }
    reg(&mut xml, "pc", 64, PC, "code_ptr");
    xml.push_str("</feature>");
    if !missing.contains(&Reg::F(0)) {
        xml.push_str(
            "<feature name=\"org.gnu.gdb.riscv.fpu\"><union id=\"riscv_double\">\
             <field name=\"float\" type=\"ieee_single\"/><field name=\"double\" type=\"ieee_double\"/></union>",
        );
        for (number, name) in (F0..).zip(F_NAMES) {
            reg(&mut xml, name, 64, number, "riscv_double");
        }
        for (number, name) in [(FFLAGS, "fflags"), (FRM, "frm"), (FCSR, "fcsr")] {
            reg(&mut xml, name, 32, number, "int");
        }
        xml.push_str("</feature>");
    }
    xml.push_str("<feature name=\"org.gnu.gdb.riscv.virtual\">");
    reg(&mut xml, "priv", 64, PRIV, "int");
    xml.push_str("</feature><feature name=\"org.gnu.gdb.riscv.csr\">");
    for csr in Csr::ALL {
        if !missing.contains(&Reg::Csr(csr)) {
            reg(&mut xml, csr.name(), 64, CSR0 + usize::from(csr.number()), "int");
        }
    }
    xml.push_str("</feature></target>");
    xml
}

fn reg(xml: &mut String, name: &str, bits: u32, number: usize, kind: &str) {
    // Writing into a String cannot fail.
    let _ = write!(
        xml,
        "<reg name=\"{name}\" bitsize=\"{bits}\" regnum=\"{number}\" type=\"{kind}\"/>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_of_the_description_has_a_number_and_its_size() {
        let xml = description(&[]);
        let mut count = 0;
        for text in xml.split("<reg ").skip(1) {
            let value = |key: &str| {
                let rest = text.split(&format!("{key}=\"")).nth(1).unwrap();
                rest.split('"').next().unwrap().to_owned()
            };
            let number: usize = value("regnum").parse().unwrap();
            let bits: usize = value("bitsize").parse().unwrap();
            let (_, size) = Number::from_raw_id(number).unwrap();
            assert_eq!(size.unwrap().get() * 8, bits, "{text}");
            count += 1;
        }
        assert_eq!(count, 32 + 1 + 32 + 3 + 1 + Csr::ALL.len());
    }

    #[test]
    fn registers_that_a_machine_lacks_are_not_described() {
        let xml = description(&optional());
        for name in ["riscv.fpu", "sstateen0", "siselect", "hviprio1", "hviprio2"] {
            assert!(!xml.contains(name), "{name} is in {xml}");
        }
        assert!(xml.contains("\"satp\"") && xml.contains("regnum=\"449\""), "{xml}");
    }

    #[test]
    fn csrs_of_the_aia_have_the_numbers_of_its_specification() {
        for (number, csr) in
            [(0x150, Csr::Siselect), (0x646, Csr::Hviprio1), (0x647, Csr::Hviprio2)]
        {
            let (known, size) = Number::from_raw_id(CSR0 + number).unwrap();
            assert_eq!((known.reg, size.unwrap().get()), (Reg::Csr(csr), 8));
        }
        // sireg, stopei and stopi.
        for number in [0x151, 0x15c, 0xdb0] {
            assert!(Number::from_raw_id(CSR0 + number).is_none(), "{number:#x}");
        }
        let xml = description(&[]);
        assert!(xml.contains("\"siselect\" bitsize=\"64\" regnum=\"401\""), "{xml}");
    }

    #[test]
    fn numbers_without_a_register_are_refused() {
        for number in [65, 69, CSR0 + 0x300, 4160, 4162, usize::MAX] {
            assert!(Number::from_raw_id(number).is_none(), "{number}");
        }
    }

    #[test]
    fn flags_and_rounding_mode_are_parts_of_fcsr() {
        let part = |number| Number::from_raw_id(number).unwrap().0.part;
        assert_eq!(part(FFLAGS).of(0xf5), 0x15);
        assert_eq!(part(FRM).of(0xf5), 7);
        assert_eq!(part(FRM).put(0x15, 2), 0x55);
        assert_eq!(part(FFLAGS).put(0xff, 0x100), 0xe0);
        assert_eq!(WHOLE.put(1, u64::MAX), u64::MAX);
    }

    #[test]
    fn a_packet_of_registers_has_all_of_them_or_none() {
        let mut core = CoreRegisters::default();
        let bytes: Vec<u8> = (0..33_u64).flat_map(u64::to_le_bytes).collect();
        core.gdb_deserialize(&bytes).unwrap();
        assert_eq!((core.x[31], core.pc), (31, 32));
        let mut again = Vec::new();
        core.gdb_serialize(|byte| again.extend(byte));
        assert_eq!(again, bytes);
        for wrong in [&bytes[1..], &bytes[8..], &[], &[&bytes[..], &[0]].concat()] {
            assert!(core.gdb_deserialize(wrong).is_err(), "{} bytes", wrong.len());
        }
    }
}
