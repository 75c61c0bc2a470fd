//! The PLIC (RISC-V PLIC specification 1.0.0), S-mode contexts only.

use crate::board::Board;
use crate::entry::MAX_HARTS;
use crate::mmio;

/// Interrupt number of S-mode external interrupts at a hart's `riscv,cpu-intc`.
const S_EXTERNAL: u32 = 9;

/// A PLIC and the contexts of the harts.
pub struct Plic {
    /// First address.
    pub base: usize,
    /// Size of its registers in bytes.
    pub size: usize,
    /// Sources: 1 to this number (`riscv,ndev`).
    pub sources: u32,
    /// Number of contexts, those of M-mode included.
    pub contexts: usize,
    /// (hart, context)
    owners: [(usize, usize); MAX_HARTS],
    count: usize,
}

impl Plic {
    pub(crate) fn find(board: &Board) -> Option<Self> {
        let node =
            ["riscv,plic0", "sifive,plic-1.0.0"].iter().find_map(|c| board.fdt.compatible(c))?;
        let (base, size) = node.reg(0)?;
        let mut plic = Self {
            base: base as usize,
            size: size as usize,
            sources: node.cell("riscv,ndev")?,
            contexts: node.cells("interrupts-extended").count() / 2,
            owners: [(0, 0); MAX_HARTS],
            count: 0,
        };
        for context in 0..plic.contexts {
            let mut entry = node.cells("interrupts-extended").skip(2 * context);
            let (intc, irq) = (entry.next()?, entry.next()?);
            if let Some(cpu) = board.cpus().iter().find(|cpu| cpu.intc == intc && irq == S_EXTERNAL)
            {
                plic.owners[plic.count] = (cpu.hart, context);
                plic.count += 1;
            }
        }
        Some(plic)
    }

    /// The S-mode context of a hart.
    #[must_use]
    pub fn context(&self, hart: usize) -> usize {
        let owner = self.owners[..self.count].iter().find(|(h, _)| *h == hart);
        owner.expect("a hart without a PLIC context").1
    }

    /// Address of a source's priority.
    #[must_use]
    pub fn priority(&self, source: u32) -> usize {
        self.base + 4 * source as usize
    }

    /// Address of the pending word that holds `source`.
    #[must_use]
    pub fn pending(&self, source: u32) -> usize {
        self.base + 0x1000 + 4 * (source as usize / 32)
    }

    /// Address of a context's enable word that holds `source`.
    #[must_use]
    pub fn enables(&self, context: usize, source: u32) -> usize {
        self.base + 0x2000 + 0x80 * context + 4 * (source as usize / 32)
    }

    /// Address of a context's threshold; claim and complete are at offset 4 from it.
    #[must_use]
    pub fn threshold(&self, context: usize) -> usize {
        self.base + 0x20_0000 + 0x1000 * context
    }

    /// Address of a context's claim and complete register.
    #[must_use]
    pub fn claim_register(&self, context: usize) -> usize {
        self.threshold(context) + 4
    }

    /// Disables all sources for this hart and sets the threshold to 0.
    pub fn init(&self, hart: usize) {
        let context = self.context(hart);
        for source in (0..=self.sources).step_by(32) {
            mmio::write32(self.enables(context, source), 0);
        }
        mmio::write32(self.threshold(context), 0);
    }

    /// Sets priority 1 and clears the enable bit.
    pub fn route(&self, source: u32, hart: usize) {
        mmio::write32(self.priority(source), 1);
        self.mask(source, hart);
    }

    /// Sets the enable bit.
    pub fn unmask(&self, source: u32, hart: usize) {
        let word = self.enables(self.context(hart), source);
        mmio::write32(word, mmio::read32(word) | 1 << (source % 32));
    }

    /// Clears the enable bit.
    pub fn mask(&self, source: u32, hart: usize) {
        let word = self.enables(self.context(hart), source);
        mmio::write32(word, mmio::read32(word) & !(1 << (source % 32)));
    }

    /// The pending bit.
    #[must_use]
    pub fn is_pending(&self, source: u32) -> bool {
        mmio::read32(self.pending(source)) >> (source % 32) & 1 != 0
    }

    /// Claims; 0 if nothing is pending.
    #[must_use]
    pub fn claim(&self, hart: usize) -> u32 {
        mmio::read32(self.claim_register(self.context(hart)))
    }

    /// Completes.
    pub fn complete(&self, source: u32, hart: usize) {
        mmio::write32(self.claim_register(self.context(hart)), source);
    }
}
