//! The guest-physical map and the interrupt numbers: one table, the addresses of QEMU's `virt` machine, so that guests
//! written for it find their devices. `vmgenid`, which that machine lacks, is between its own.

/// A span of guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Span {
    /// The first address after the span.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.base + self.size
    }
}

/// One row of the map.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Name of the region; for a device, that of its model in the catalog.
    pub name: &'static str,
    /// Its addresses.
    pub span: Span,
    /// Interrupt source at the APLIC or PLIC; 0 for none.
    pub irq: u32,
}

const fn row(name: &'static str, base: u64, size: u64, irq: u32) -> Row {
    Row { name, span: Span { base, size }, irq }
}

/// All regions with a fixed address below RAM, in ascending order.
pub const MAP: &[Row] = &[
    row("power", 0x0010_0000, 0x1000, 0),
    row("rtc", 0x0010_1000, 0x1000, 11),
    row("vmgenid", 0x0010_2000, 0x1000, 12),
    row("plic", 0x0c00_0000, 0x60_0000, 0),
    row("aplic", 0x0d00_0000, 0x4000, 0),
    row("serial", 0x1000_0000, 0x100, 10),
    row("slots", SLOTS.base, SLOTS.size, 0),
    row("flash", 0x2000_0000, 0x400_0000, 0),
    row("imsics", 0x2800_0000, 0x100_0000, 0),
    row("pci-ecam", 0x3000_0000, 0x1000_0000, 0),
    row("pci-mmio", 0x4000_0000, 0x4000_0000, 0),
];

/// Start address of RAM.
pub const RAM_BASE: u64 = 0x8000_0000;

/// The windows for devices without a fixed address (virtio-mmio and the like), [`SLOT_SIZE`] bytes each. QEMU's `virt` has the first
/// eight.
pub const SLOTS: Span = Span { base: 0x1000_1000, size: SLOT_COUNT as u64 * SLOT_SIZE };

/// Number of windows in [`SLOTS`].
pub const SLOT_COUNT: usize = 32;

/// Size of one window of [`SLOTS`].
pub const SLOT_SIZE: u64 = 0x1000;

/// Interrupt sources of both irqchips: 1 to this number (QEMU's `virt` has 95 and 96; PCI takes 32 to 35).
pub const IRQ_SOURCES: u32 = 95;

/// The row named `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static Row> {
    MAP.iter().find(|row| row.name == name)
}

/// The span of the row named `name`.
///
/// # Errors
/// There is no such row: a bug of the caller.
pub(crate) fn span(name: &str) -> Result<Span, crate::error::Error> {
    find(name).map(|row| row.span).ok_or_else(|| {
        crate::error::Error::Config(format!("The memory map has no row named {name}"))
    })
}

/// Interrupt sources for slots, in order: all that neither a row nor a PCI pin uses.
pub fn slot_irqs() -> impl Iterator<Item = u32> {
    (1..=IRQ_SOURCES)
        .filter(|irq| !(32..=35).contains(irq) && MAP.iter().all(|row| row.irq != *irq))
}

/// The highest interrupt source in use in a machine with devices in the first `slots` slots.
#[must_use]
pub fn last_source(slots: usize) -> u32 {
    let fixed = MAP.iter().map(|row| row.irq);
    fixed.chain(slot_irqs().take(slots)).max().unwrap_or(IRQ_SOURCES)
}

/// Number of interrupt sources in use in a machine with interrupting devices in `slots` slots.
#[must_use]
pub fn sources_in_use(slots: usize) -> u32 {
    let fixed = MAP.iter().filter(|row| row.irq != 0).count();
    u32::try_from(fixed.saturating_add(slots)).unwrap_or(IRQ_SOURCES).min(IRQ_SOURCES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uart_the_clock_and_the_generation_id_interrupt_in_every_machine() {
        assert_eq!([0, 1, 27, usize::MAX].map(sources_in_use), [3, 4, 30, IRQ_SOURCES]);
    }

    /// Linux maps a source to any IMSIC identity; a guest that uses the source's number as the identity has the first 31 sources.
    #[test]
    fn up_to_31_interrupts_no_source_has_a_number_above_31() {
        for slots in 0..=27 {
            assert!(sources_in_use(slots) < 31 && last_source(slots) <= 31, "{slots}");
        }
    }

    #[test]
    fn no_two_rows_overlap_and_none_reaches_ram() {
        for pair in MAP.windows(2) {
            assert!(
                pair[0].span.end() <= pair[1].span.base,
                "{} and {}",
                pair[0].name,
                pair[1].name
            );
        }
        assert!(MAP.last().unwrap().span.end() <= RAM_BASE);
    }

    #[test]
    fn every_row_is_page_aligned_and_not_empty() {
        for row in MAP {
            assert!(row.span.base.is_multiple_of(0x1000) && row.span.size > 0, "{}", row.name);
        }
    }

    #[test]
    fn every_slot_has_an_interrupt_that_nothing_else_uses() {
        let irqs: Vec<u32> = slot_irqs().collect();
        assert!(irqs.len() as u64 >= SLOTS.size / SLOT_SIZE);
        for irq in irqs {
            assert!(
                MAP.iter().all(|row| row.irq != irq) && (1..=IRQ_SOURCES).contains(&irq),
                "{irq}"
            );
        }
    }

    #[test]
    fn the_last_source_depends_on_the_slots_in_use() {
        assert_eq!([0, 1, 9, 10].map(last_source), [12, 12, 12, 13]);
        let all = slot_irqs().take(32).max().unwrap();
        assert_eq!(last_source(32), all);
        assert!(last_source(usize::MAX) <= IRQ_SOURCES);
    }

    #[test]
    fn guests_of_qemus_virt_machine_find_their_devices() {
        for (name, base, irq) in [
            ("power", 0x10_0000, 0),
            ("rtc", 0x10_1000, 11),
            ("plic", 0xc00_0000, 0),
            ("serial", 0x1000_0000, 10),
            ("slots", 0x1000_1000, 0),
            ("flash", 0x2000_0000, 0),
            ("imsics", 0x2800_0000, 0),
            ("pci-ecam", 0x3000_0000, 0),
        ] {
            let row = find(name).unwrap();
            assert_eq!((row.span.base, row.irq), (base, irq), "{name}");
        }
        assert_eq!(slot_irqs().next(), Some(1));
        assert_eq!(find("nothing").map(|row| row.name), None);
    }
}
