//! Register ids for KVM_GET_ONE_REG and KVM_SET_ONE_REG.
//!
//! An id is `RISCV | size | type | subtype | index` (kernel, `Documentation/virt/kvm/api.rst` 4.68). Pure arithmetic:
//! compiled and tested on every host.

use crate::vcpu::hart::{Csr, Reg};

const RISCV: u64 = 0x8000_0000_0000_0000;
const U32: u64 = 0x0020_0000_0000_0000;
const U64: u64 = 0x0030_0000_0000_0000;

pub(super) const CONFIG: u64 = 0x01 << 24;
const CORE: u64 = 0x02 << 24;
const CSR: u64 = 0x03 << 24;
pub(super) const TIMER: u64 = 0x04 << 24;
/// The registers of the F extension.
pub(super) const FP_F: u64 = 0x05 << 24;
/// The registers of the D extension, of which the lower halves are those of F.
pub(super) const FP_D: u64 = 0x06 << 24;
pub(super) const ISA: u64 = 0x07 << 24;
pub(super) const SBI: u64 = 0x08 << 24;
const VECTOR: u64 = 0x09 << 24;
const SBI_STATE: u64 = 0x0a << 24;

/// The bits of an id for its type, one of the above, and for its index within type and subtype.
const TYPE_MASK: u64 = 0xff << 24;
const INDEX_MASK: u64 = 0xffff;

/// Subtype of the CSRs of Ssaia. Those after the third are for RV32.
const CSR_AIA: u64 = 1 << 16;
/// Subtype of the CSRs of Smstateen.
const CSR_SMSTATEEN: u64 = 2 << 16;
/// Subtype of the words of 64 extensions, one bit each.
const MULTI_ENABLED: u64 = 1 << 16;

/// Index of the privilege mode among the core registers.
const CORE_MODE: u64 = 32;

/// The guest's `time`, which all harts of a VM share.
pub(super) const TIME: u64 = id(TIMER, 1);

/// The deadline of the guest's timer; all ones where it is not set.
pub(super) const TIMER_COMPARE: u64 = id(TIMER, 2);

/// State of the guest's timer: writing 1 starts the kernel's timer for the deadline, on hosts without Sstc.
pub(super) const TIMER_STATE: u64 = id(TIMER, 3);

/// Index of `fcsr`, after `f0` to `f31`; the only 32-bit register here.
const FP_FCSR: u64 = 32;

const fn id(class: u64, index: u64) -> u64 {
    RISCV | U64 | class | index
}

/// Program counter.
pub(super) const PC: u64 = id(CORE, 0);
/// Block size of `cbo.clean`, `cbo.flush` and `cbo.inval`, in bytes.
pub(super) const ZICBOM_BLOCK: u64 = id(CONFIG, 1);
/// `mvendorid`
pub(super) const MVENDORID: u64 = id(CONFIG, 2);
/// `marchid`
pub(super) const MARCHID: u64 = id(CONFIG, 3);
/// `mimpid`
pub(super) const MIMPID: u64 = id(CONFIG, 4);
/// Block size of `cbo.zero`, in bytes.
pub(super) const ZICBOZ_BLOCK: u64 = id(CONFIG, 5);
/// The widest `satp.MODE`.
pub(super) const SATP_MODE: u64 = id(CONFIG, 6);
/// Block size of the prefetches, in bytes (Linux 6.18).
pub(super) const ZICBOP_BLOCK: u64 = id(CONFIG, 7);
/// `sscratch` of the guest.
pub(super) const SSCRATCH: u64 = id(CSR, 3);
/// `sip` of the guest.
pub(super) const SIP: u64 = id(CSR, 7);
/// Ticks of `time` per second.
pub(super) const TIMEBASE: u64 = id(TIMER, 0);
/// `vlenb`, which cannot be changed.
pub(super) const VLENB: u64 = id(VECTOR, 4);
/// The address of the steal time's page: lower and upper half.
pub(super) const STEAL_LOW: u64 = id(SBI_STATE, 0);
/// See [`STEAL_LOW`].
pub(super) const STEAL_HIGH: u64 = id(SBI_STATE, 1);

/// The type in an id.
pub(super) const fn type_of(id: u64) -> u64 {
    id & TYPE_MASK
}

/// The index in an id.
pub(super) const fn index_of(id: u64) -> u64 {
    id & INDEX_MASK
}

/// Bytes of the register with this id.
pub(super) const fn size_of_register(id: u64) -> usize {
    1 << (id >> 52 & 0xf)
}

/// State of ISA extension `number`: 1 if it is on, else 0.
pub(super) const fn isa_extension(number: u64) -> u64 {
    id(ISA, number)
}

/// State of Ssaia (`KVM_RISCV_ISA_EXT_SSAIA`).
pub(super) const SSAIA: u64 = isa_extension(14);

/// State of Sstc (`KVM_RISCV_ISA_EXT_SSTC`).
pub(super) const SSTC: u64 = isa_extension(8);

/// States of the 64 extensions from number `64 * word` on, one bit each.
pub(super) const fn isa_word(word: u64) -> u64 {
    id(ISA, MULTI_ENABLED | word)
}

/// State of SBI extension `number`: 1 if it is on, else 0.
pub(super) const fn sbi_extension(number: u64) -> u64 {
    id(SBI, number)
}

/// Integer register `x1` to `x31`, by its number.
pub(super) const fn core(number: u64) -> u64 {
    id(CORE, number)
}

/// Id of a guest register; `None` for `x0`, which has none, and for a number above 31.
pub(super) const fn guest(reg: Reg) -> Option<u64> {
    match reg {
        Reg::Pc => Some(PC),
        Reg::X(number @ 1..=31) => Some(id(CORE, number as u64)),
        Reg::X(_) => None,
        Reg::Mode => Some(id(CORE, CORE_MODE)),
        Reg::Time => Some(TIME),
        Reg::TimeCompare => Some(TIMER_COMPARE),
        Reg::Csr(csr) => Some(id(CSR, csr_index(csr))),
        Reg::F(number @ 0..=31) => Some(id(FP_D, number as u64)),
        Reg::F(_) => None,
        Reg::Fcsr => Some(RISCV | U32 | FP_D | FP_FCSR),
    }
}

const fn csr_index(csr: Csr) -> u64 {
    match csr {
        Csr::Sstatus => 0,
        Csr::Sie => 1,
        Csr::Stvec => 2,
        Csr::Sscratch => 3,
        Csr::Sepc => 4,
        Csr::Scause => 5,
        Csr::Stval => 6,
        Csr::Sip => 7,
        Csr::Satp => 8,
        Csr::Scounteren => 9,
        Csr::Senvcfg => 10,
        Csr::Sstateen0 => CSR_SMSTATEEN,
        Csr::Siselect => CSR_AIA,
        Csr::Hviprio1 => CSR_AIA | 1,
        Csr::Hviprio2 => CSR_AIA | 2,
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::isa_number;
    use super::*;

    #[test]
    fn ids_are_those_of_the_kernels_abi() {
        for (id, expected) in [
            (ZICBOM_BLOCK, 0x8030_0000_0100_0001),
            (MIMPID, 0x8030_0000_0100_0004),
            (SATP_MODE, 0x8030_0000_0100_0006),
            (ZICBOP_BLOCK, 0x8030_0000_0100_0007),
            (TIMEBASE, 0x8030_0000_0400_0000),
            (TIMER_COMPARE, 0x8030_0000_0400_0002),
            (isa_extension(79), 0x8030_0000_0700_004f),
            (SSAIA, 0x8030_0000_0700_000e),
            (SSAIA, isa_extension(isa_number("ssaia").unwrap())),
            (SSTC, isa_extension(isa_number("sstc").unwrap())),
            (TIMER_STATE, 0x8030_0000_0400_0003),
            (SIP, 0x8030_0000_0300_0007),
            (TIME, 0x8030_0000_0400_0001),
            (VLENB, 0x8030_0000_0900_0004),
            (STEAL_LOW, 0x8030_0000_0a00_0000),
            (STEAL_HIGH, 0x8030_0000_0a00_0001),
            (isa_word(1), 0x8030_0000_0701_0001),
            (sbi_extension(9), 0x8030_0000_0800_0009),
        ] {
            assert_eq!(id, expected, "{id:#x}");
        }
    }

    #[test]
    fn an_id_has_the_type_the_index_and_the_size_of_its_register() {
        let vector = 0x8040_0000_0900_0006;
        assert_eq!((type_of(vector), index_of(vector), size_of_register(vector)), (VECTOR, 6, 16));
        let fcsr = guest(Reg::Fcsr).unwrap();
        assert_eq!((type_of(fcsr), index_of(fcsr), size_of_register(fcsr)), (FP_D, 32, 4));
        assert_eq!((type_of(SSAIA), size_of_register(SSAIA)), (ISA, 8));
    }

    #[test]
    fn registers_lie_where_the_kernel_keeps_them() {
        assert_eq!(guest(Reg::Pc), Some(0x8030_0000_0200_0000));
        assert_eq!(guest(Reg::X(10)), Some(0x8030_0000_0200_000a));
        assert_eq!(guest(Reg::X(31)), Some(0x8030_0000_0200_001f));
        assert_eq!(guest(Reg::Mode), Some(0x8030_0000_0200_0020));
        assert_eq!(guest(Reg::Csr(Csr::Sstatus)), Some(0x8030_0000_0300_0000));
        assert_eq!(guest(Reg::Csr(Csr::Senvcfg)), Some(0x8030_0000_0300_000a));
        assert_eq!(guest(Reg::Csr(Csr::Sstateen0)), Some(0x8030_0000_0302_0000));
        assert_eq!(guest(Reg::Csr(Csr::Siselect)), Some(0x8030_0000_0301_0000));
        assert_eq!(guest(Reg::Csr(Csr::Hviprio2)), Some(0x8030_0000_0301_0002));
        assert_eq!(guest(Reg::F(0)), Some(0x8030_0000_0600_0000));
        assert_eq!(guest(Reg::F(31)), Some(0x8030_0000_0600_001f));
        assert_eq!(guest(Reg::Fcsr), Some(0x8020_0000_0600_0020));
    }

    #[test]
    fn x0_and_numbers_that_no_register_has_have_no_id() {
        for number in [0, 32, 255] {
            assert_eq!(guest(Reg::X(number)), None);
        }
        assert_eq!(guest(Reg::F(32)), None);
    }
}
