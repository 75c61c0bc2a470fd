//! APLIC in MSI delivery mode and IMSIC (RISC-V Advanced Interrupt Architecture 1.0, chapters 3 and 4), S-mode.

use crate::board::Board;
use crate::entry::MAX_HARTS;
use crate::{csr_read, csr_swap, csr_write, mmio};

/// APLIC register offsets (AIA 4.5).
pub mod reg {
    /// Domain configuration
    pub const DOMAINCFG: usize = 0x0000;
    /// Source configuration of source 1
    pub const SOURCECFG: usize = 0x0004;
    /// Interrupt-pending bits
    pub const SETIP: usize = 0x1c00;
    /// Sets one pending bit by number
    pub const SETIPNUM: usize = 0x1cdc;
    /// Rectified input values; writes clear pending bits
    pub const IN_CLRIP: usize = 0x1d00;
    /// Sets one enable bit by number
    pub const SETIENUM: usize = 0x1edc;
    /// Clears one enable bit by number
    pub const CLRIENUM: usize = 0x1fdc;
    /// Like [`SETIPNUM`], always little-endian
    pub const SETIPNUM_LE: usize = 0x2000;
    /// Target of source 1
    pub const TARGET: usize = 0x3004;
}

/// `domaincfg`: interrupts enabled, MSI delivery.
const DOMAINCFG_IE_MSI: u32 = 1 << 8 | 1 << 2;
/// `sourcecfg.SM`: active while the line is high.
const LEVEL_HIGH: u32 = 6;
/// Interrupt number of S-mode external interrupts at a hart's `riscv,cpu-intc`.
const S_EXTERNAL: u32 = 9;

/// IMSIC registers accessed through `siselect` (AIA 3.8).
pub mod imsic {
    /// 1: interrupts are delivered
    pub const EIDELIVERY: usize = 0x70;
    /// Identities from this number on are masked; 0: none
    pub const EITHRESHOLD: usize = 0x72;
    /// Pending bits; even numbers only on a 64-bit hart
    pub const EIP0: usize = 0x80;
    /// Enable bits; even numbers only on a 64-bit hart
    pub const EIE0: usize = 0xc0;
}

/// An APLIC and the IMSICs to which it sends.
pub struct Aia {
    /// First address of the APLIC.
    pub aplic: usize,
    /// Wired sources: 1 to this number.
    pub sources: u32,
    /// Identities of each IMSIC: 1 to this number.
    pub ids: u32,
    /// The memory of the IMSICs: (first address, bytes).
    pub imsics: (usize, usize),
    /// Hart ids in the order of the IMSICs' hart index.
    harts: [usize; MAX_HARTS],
    count: usize,
}

impl Aia {
    pub(crate) fn find(board: &Board) -> Option<Self> {
        let aplic = board.fdt.compatible("riscv,aplic")?;
        let imsics = board.fdt.compatible("riscv,imsics")?;
        let (addr, size) = imsics.reg(0)?;
        let mut aia = Self {
            aplic: aplic.reg(0)?.0 as usize,
            sources: aplic.cell("riscv,num-sources")?,
            ids: imsics.cell("riscv,num-ids")?,
            imsics: (addr as usize, size as usize),
            harts: [0; MAX_HARTS],
            count: 0,
        };
        let entries = imsics.cells("interrupts-extended").count() / 2;
        for index in 0..entries {
            let mut entry = imsics.cells("interrupts-extended").skip(2 * index);
            let (intc, irq) = (entry.next()?, entry.next()?);
            let cpu = board.cpus().iter().find(|cpu| cpu.intc == intc && irq == S_EXTERNAL)?;
            aia.harts[aia.count] = cpu.hart;
            aia.count += 1;
        }
        Some(aia)
    }

    fn index(&self, hart: usize) -> usize {
        self.harts[..self.count].iter().position(|h| *h == hart).expect("a hart without an IMSIC")
    }

    /// Address of an APLIC register.
    #[must_use]
    pub fn register(&self, offset: usize) -> usize {
        self.aplic + offset
    }

    /// Enables the APLIC's domain and the delivery of this hart's IMSIC.
    pub fn init(&self) {
        mmio::write32(self.register(reg::DOMAINCFG), DOMAINCFG_IE_MSI);
        write_imsic(imsic::EITHRESHOLD, 0);
        write_imsic(imsic::EIDELIVERY, 1);
    }

    /// Routes `source` to the identity of the same number at `hart`, which must be the calling hart; masked.
    pub fn route(&self, source: u32, hart: usize) {
        let offset = 4 * (source as usize - 1);
        self.mask(source);
        set_imsic_bit(imsic::EIE0, source, true);
        mmio::write32(self.register(reg::SOURCECFG + offset), LEVEL_HIGH);
        mmio::write32(
            self.register(reg::TARGET + offset),
            (self.index(hart) as u32) << 18 | source,
        );
    }

    /// Enables `source`.
    pub fn unmask(&self, source: u32) {
        mmio::write32(self.register(reg::SETIENUM), source);
    }

    /// Disables `source`.
    pub fn mask(&self, source: u32) {
        mmio::write32(self.register(reg::CLRIENUM), source);
    }

    /// True if `source` is pending in the APLIC or in this hart's IMSIC.
    #[must_use]
    pub fn is_pending(&self, source: u32) -> bool {
        let word = self.register(reg::SETIP + 4 * (source as usize / 32));
        let sent = read_imsic(imsic::EIP0 + source as usize / 64 * 2) >> (source % 64) & 1 != 0;
        sent || mmio::read32(word) >> (source % 32) & 1 != 0
    }

    /// The rectified input: true if the line is high.
    #[must_use]
    pub fn input(&self, source: u32) -> bool {
        let word = self.register(reg::IN_CLRIP + 4 * (source as usize / 32));
        mmio::read32(word) >> (source % 32) & 1 != 0
    }

    /// Claims through `stopei`; 0 if nothing is pending.
    #[must_use]
    pub fn claim(&self) -> u32 {
        (csr_swap!("0x15c", 0) >> 16) as u32
    }

    /// Makes the APLIC sample the level again (AIA 4.9.2: a write to `setipnum` does so for a level source).
    pub fn complete(&self, source: u32) {
        mmio::write32(self.register(reg::SETIPNUM_LE), source);
    }
}

/// Reads a register of this hart's IMSIC.
#[must_use]
pub fn read_imsic(select: usize) -> usize {
    csr_write!("0x150", select);
    csr_read!("0x151")
}

/// Writes a register of this hart's IMSIC.
pub fn write_imsic(select: usize, value: usize) {
    csr_write!("0x150", select);
    csr_write!("0x151", value);
}

fn set_imsic_bit(base: usize, id: u32, on: bool) {
    let select = base + id as usize / 64 * 2;
    let bit = 1 << (id % 64);
    let old = read_imsic(select);
    write_imsic(select, if on { old | bit } else { old & !bit });
}
