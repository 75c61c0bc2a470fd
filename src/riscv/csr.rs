//! CSRs by number and name (Privileged specification, "CSR Listing"; AIA specification, chapter 2; Unprivileged specification, Zkr).

/// Defines a constant for each CSR, and the table of their names.
macro_rules! csrs {
    ($($constant:ident = $number:literal $name:literal,)*) => {
        $(
            #[doc = concat!("`", $name, "`")]
            pub const $constant: u16 = $number;
        )*
        const NAMES: &[(u16, &str)] = &[$(($number, $name)),*];
    };
}

csrs! {
    FFLAGS = 0x001 "fflags",
    FRM = 0x002 "frm",
    FCSR = 0x003 "fcsr",
    SEED = 0x015 "seed",
    SSTATUS = 0x100 "sstatus",
    SIE = 0x104 "sie",
    STVEC = 0x105 "stvec",
    SCOUNTEREN = 0x106 "scounteren",
    SENVCFG = 0x10a "senvcfg",
    SSTATEEN0 = 0x10c "sstateen0",
    SSCRATCH = 0x140 "sscratch",
    SEPC = 0x141 "sepc",
    SCAUSE = 0x142 "scause",
    STVAL = 0x143 "stval",
    SIP = 0x144 "sip",
    SISELECT = 0x150 "siselect",
    SIREG = 0x151 "sireg",
    STOPEI = 0x15c "stopei",
    SATP = 0x180 "satp",
    MSTATUS = 0x300 "mstatus",
    MISA = 0x301 "misa",
    MEDELEG = 0x302 "medeleg",
    MIDELEG = 0x303 "mideleg",
    MIE = 0x304 "mie",
    MTVEC = 0x305 "mtvec",
    MCOUNTEREN = 0x306 "mcounteren",
    MENVCFG = 0x30a "menvcfg",
    MSCRATCH = 0x340 "mscratch",
    MEPC = 0x341 "mepc",
    MCAUSE = 0x342 "mcause",
    MTVAL = 0x343 "mtval",
    MIP = 0x344 "mip",
    HVIPRIO1 = 0x646 "hviprio1",
    HVIPRIO2 = 0x647 "hviprio2",
    STOPI = 0xdb0 "stopi",
    MVENDORID = 0xf11 "mvendorid",
    MARCHID = 0xf12 "marchid",
    MIMPID = 0xf13 "mimpid",
    MHARTID = 0xf14 "mhartid",
    MCONFIGPTR = 0xf15 "mconfigptr",
}

/// Largest number of a CSR.
pub const LAST: u16 = 0xfff;

/// Returns the name of a CSR.
#[must_use]
pub fn name(number: u16) -> Option<&'static str> {
    NAMES.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// Returns the number of a CSR.
#[must_use]
pub fn number(name: &str) -> Option<u16> {
    NAMES.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
}

/// True for a CSR of machine mode (bits 9 and 8 of the number).
#[must_use]
pub const fn is_machine(number: u16) -> bool {
    number >> 8 & 3 == 3
}

/// True for a read-only CSR (bits 11 and 10 of the number).
#[must_use]
pub const fn is_read_only(number: u16) -> bool {
    number >> 10 == 3
}

/// The supervisor CSRs that KVM keeps for a guest (Privileged specification, chapter 12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub enum Csr {
    Sstatus,
    Sie,
    Stvec,
    Sscratch,
    Sepc,
    Scause,
    Stval,
    Sip,
    Satp,
    Scounteren,
    Senvcfg,
    /// Needs Smstateen; refused with ENOENT where the vCPU lacks it.
    Sstateen0,
    /// Needs Ssaia, as the next two do; refused with ENOENT where the vCPU lacks it.
    Siselect,
    /// The priorities of the guest's major interrupts, one byte each, which it accesses as `iprio` registers through `sireg` (AIA
    /// specification, "Interrupts for Virtual Machines").
    Hviprio1,
    /// The remaining priorities.
    Hviprio2,
}

impl Csr {
    /// All of them, by number.
    pub const ALL: [Self; 15] = [
        Self::Sstatus,
        Self::Sie,
        Self::Stvec,
        Self::Scounteren,
        Self::Senvcfg,
        Self::Sstateen0,
        Self::Sscratch,
        Self::Sepc,
        Self::Scause,
        Self::Stval,
        Self::Sip,
        Self::Siselect,
        Self::Satp,
        Self::Hviprio1,
        Self::Hviprio2,
    ];

    /// Returns the CSR's number.
    #[must_use]
    pub const fn number(self) -> u16 {
        match self {
            Self::Sstatus => SSTATUS,
            Self::Sie => SIE,
            Self::Stvec => STVEC,
            Self::Sscratch => SSCRATCH,
            Self::Sepc => SEPC,
            Self::Scause => SCAUSE,
            Self::Stval => STVAL,
            Self::Sip => SIP,
            Self::Satp => SATP,
            Self::Scounteren => SCOUNTEREN,
            Self::Senvcfg => SENVCFG,
            Self::Sstateen0 => SSTATEEN0,
            Self::Siselect => SISELECT,
            Self::Hviprio1 => HVIPRIO1,
            Self::Hviprio2 => HVIPRIO2,
        }
    }

    /// Returns the CSR's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        name(self.number()).unwrap_or("?")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_unique_and_in_order() {
        assert!(NAMES.is_sorted_by(|(a, _), (b, _)| a < b));
        for (known, name) in NAMES {
            assert_eq!((number(name), super::name(*known)), (Some(*known), Some(*name)));
            assert!(*known <= LAST);
        }
        assert_eq!((name(0x7ff), number("mhartid "), number("")), (None, None, None));
    }

    #[test]
    fn every_csr_of_a_guest_has_its_specified_name_and_number() {
        assert!(Csr::ALL.is_sorted_by_key(|csr| csr.number()));
        for csr in Csr::ALL {
            assert_eq!(csr.name(), format!("{csr:?}").to_lowercase());
        }
    }

    #[test]
    fn the_number_has_the_privilege_mode_and_the_access() {
        assert!(is_machine(MHARTID) && is_read_only(MHARTID));
        assert!(is_machine(MSCRATCH) && !is_read_only(MSCRATCH));
        assert!(!is_machine(SSTATUS) && !is_machine(STOPI) && is_read_only(STOPI));
    }
}
