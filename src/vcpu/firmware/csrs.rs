//! CSRs of machine mode for guests that expect to run there, by emulation of the illegal instruction (Unprivileged specification,
//! Zicsr).

use std::io;

use super::Firmware;
use crate::config::CsrValue;
use crate::riscv::csr;
use crate::riscv::zicsr::{self, Operand};
use crate::vcpu::hart::{Hart, Reg};

impl Firmware {
    /// Emulates the instruction, if it accesses one of the configured CSRs; otherwise false.
    pub(super) fn emulate(&self, hart: &mut dyn Hart, word: u32) -> io::Result<bool> {
        let Some(access) = zicsr::decode(word) else { return Ok(false) };
        let Some(initial) = self.csrs.iter().find(|csr| csr.number == access.number) else {
            return Ok(false);
        };
        if access.write.is_some() && csr::is_read_only(access.number) {
            return Ok(false);
        }
        let id = hart.id();
        let is_same = |(owner, csr): &(u32, CsrValue)| *owner == id && csr.number == access.number;
        let old = self
            .written()
            .iter()
            .find(|entry| is_same(entry))
            .map_or(initial.value, |(_, csr)| csr.value);
        if let Some(write) = &access.write {
            let operand = match write.operand {
                Operand::Register(number) => hart.get(Reg::X(number))?,
                Operand::Immediate(value) => value,
            };
            let value = write.apply(old, operand);
            let mut written = self.written();
            written.retain(|entry| !is_same(entry));
            written.push((id, CsrValue { number: access.number, value }));
        }
        hart.set(Reg::X(access.rd), old)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::riscv::csr::{MHARTID, MSCRATCH};
    use crate::vcpu::firmware::patches::Patches;
    use crate::vcpu::testing::ScriptHart;

    fn firmware() -> Firmware {
        let csrs = vec![
            CsrValue { number: MHARTID, value: 0x1234 },
            CsrValue { number: MSCRATCH, value: 0xf0 },
        ];
        Firmware::new(Patches::none(), csrs, None)
    }

    #[test]
    fn a_read_gives_the_users_value() {
        let mut hart = ScriptHart::new(0, []);
        assert!(firmware().emulate(&mut hart, 0xf140_25f3).unwrap()); // csrr a1,mhartid
        assert_eq!(hart.get(Reg::X(11)).unwrap(), 0x1234);
    }

    #[test]
    fn a_write_is_read_back_by_the_same_hart_alone() {
        let firmware = firmware();
        let (mut first, mut second) = (ScriptHart::new(0, []), ScriptHart::new(1, []));
        first.set(Reg::X(10), 0x0f).unwrap();
        for (word, old) in [
            (0x3405_25f3, 0xf0), // csrrs a1,mscratch,a0
            (0x3405_35f3, 0xff), // csrrc a1,mscratch,a0
            (0x3405_15f3, 0xf0), // csrrw a1,mscratch,a0
            (0x340f_d5f3, 0x0f), // csrrwi a1,mscratch,31
            (0x340f_e5f3, 0x1f), // csrrsi a1,mscratch,31
            (0x340f_f5f3, 0x1f), // csrrci a1,mscratch,31
            (0x3400_25f3, 0x00), // csrr a1,mscratch
        ] {
            assert!(firmware.emulate(&mut first, word).unwrap(), "{word:#x}");
            assert_eq!(first.get(Reg::X(11)).unwrap(), old, "{word:#x}");
        }
        assert!(firmware.emulate(&mut second, 0x3400_25f3).unwrap());
        assert_eq!(second.get(Reg::X(11)).unwrap(), 0xf0);
    }

    #[test]
    fn other_instructions_and_accesses_to_other_csrs_stay_illegal() {
        let mut hart = ScriptHart::new(0, []);
        // unimp, sret, csrr a0,mstatus, csrw mhartid,a0, an addition.
        for word in [0, 0x1020_0073, 0x3000_2573, 0xf145_1073, 0x00b5_0533] {
            assert!(!firmware().emulate(&mut hart, word).unwrap(), "{word:#x}");
        }
    }
}
