//! Ranges of guest-physical addresses, and an allocator over them.

use std::fmt;

/// A range of guest-physical addresses. [`Region::end`] saturates, so a range that runs past the end of the
/// address space compares as if it ended there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Region {
    /// The first address.
    pub base: u64,
    /// The number of bytes.
    pub size: u64,
}

impl Region {
    /// The range of `size` bytes from `base` on.
    #[must_use]
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size }
    }

    /// The first address after the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// True if `address` is in the range.
    #[must_use]
    pub const fn contains(self, address: u64) -> bool {
        self.base <= address && address - self.base < self.size
    }

    /// True if `other` lies completely inside this range.
    #[must_use]
    pub fn encloses(self, other: Self) -> bool {
        let fits = |offset| self.size.checked_sub(other.size).is_some_and(|room| offset <= room);
        other.base.checked_sub(self.base).is_some_and(fits)
    }

    /// True if the two ranges have an address in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.size != 0 && other.size != 0 && self.base < other.end() && other.base < self.end()
    }
}

impl fmt::Display for Region {
    /// `0x80000000..0x80200000`, the end excluded.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.base, self.end())
    }
}

/// Free ranges, ascending, without overlap.
#[derive(Clone, Debug)]
pub(crate) struct Free(Vec<Region>);

impl Free {
    /// The parts of `ram` below `ceiling`.
    pub(crate) fn new(ram: &[Region], ceiling: u64) -> Self {
        let below = |r: &Region| Region::new(r.base, r.end().min(ceiling).saturating_sub(r.base));
        Self(ram.iter().map(below).collect())
    }

    /// Removes `used`.
    pub(crate) fn take(&mut self, used: Region) {
        let rest = |free: Region| {
            let low = used.base.clamp(free.base, free.end());
            let high = used.end().clamp(low, free.end());
            [Region::new(free.base, low - free.base), Region::new(high, free.end() - high)]
        };
        self.0 = self.0.iter().copied().flat_map(rest).filter(|part| part.size != 0).collect();
    }

    /// Allocates `size` bytes at a multiple of `align` from the highest range that has room for them.
    pub(crate) fn take_highest(&mut self, size: u64, align: u64) -> Option<Region> {
        let fit = |free: &Region| {
            let base = free.size.checked_sub(size)? + free.base;
            let base = base - base % align;
            (base >= free.base).then_some(Region::new(base, size))
        };
        let found = self.0.iter().rev().find_map(fit)?;
        self.take(found);
        Some(found)
    }
}

/// `value` rounded up to a multiple of `align`; saturates.
pub(crate) const fn round_up(value: u64, align: u64) -> u64 {
    match value.checked_next_multiple_of(align) {
        Some(rounded) => rounded,
        None => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_contains_its_first_address_and_not_its_end() {
        let region = Region::new(0x1000, 0x1000);
        assert!(region.contains(0x1000) && region.contains(0x1fff));
        assert!(!region.contains(0xfff) && !region.contains(0x2000));
    }

    #[test]
    fn ranges_that_touch_do_not_overlap() {
        let (low, high) = (Region::new(0, 16), Region::new(16, 16));
        assert!(!low.overlaps(high) && !high.overlaps(low));
        assert!(low.overlaps(Region::new(15, 1)));
        assert!(!low.overlaps(Region::new(8, 0)), "an empty range overlaps nothing");
    }

    #[test]
    fn a_range_encloses_only_what_fits_whole() {
        let region = Region::new(0x1000, 0x1000);
        assert!(region.encloses(region) && region.encloses(Region::new(0x1fff, 1)));
        assert!(!region.encloses(Region::new(0x1fff, 2)));
        assert!(!region.encloses(Region::new(0xfff, 2)));
        assert!(!region.encloses(Region::new(0x1800, u64::MAX)));
    }

    #[test]
    fn the_last_address_of_all_is_reached_without_overflow() {
        let region = Region::new(u64::MAX - 1, u64::MAX);
        assert_eq!(region.end(), u64::MAX);
        assert!(region.overlaps(Region::new(u64::MAX - 1, 1)));
        assert_eq!(round_up(u64::MAX - 1, 4096), u64::MAX);
    }

    #[test]
    fn the_highest_range_that_fits_is_taken() {
        let ram = [Region::new(0, 0x4000), Region::new(0x8000, 0x1800)];
        let mut free = Free::new(&ram, u64::MAX);
        assert_eq!(free.take_highest(0x800, 0x1000), Some(Region::new(0x9000, 0x800)));
        assert_eq!(free.take_highest(0x3000, 0x1000), Some(Region::new(0x1000, 0x3000)));
        assert_eq!(free.take_highest(0x1001, 0x1000), None);
        assert_eq!(free.take_highest(0x1000, 0x1000), Some(Region::new(0x8000, 0x1000)));
    }

    proptest! {
        #[test]
        fn what_was_taken_is_never_given_again(
            ram in (0_u64..1 << 20, 0_u64..1 << 20),
            holes in prop::collection::vec((0_u64..1 << 21, 0_u64..1 << 18), 0..8),
            sizes in prop::collection::vec((1_u64..1 << 17, 0_u32..17), 0..16),
        ) {
            let ram = Region::new(ram.0, ram.1);
            let mut free = Free::new(&[ram], u64::MAX);
            let mut taken: Vec<Region> = holes.iter().map(|h| Region::new(h.0, h.1)).collect();
            taken.iter().for_each(|hole| free.take(*hole));
            for (size, align) in sizes {
                let Some(got) = free.take_highest(size, 1 << align) else { continue };
                prop_assert!(ram.encloses(got) && got.size == size);
                prop_assert_eq!(got.base % (1 << align), 0);
                prop_assert!(!taken.iter().any(|other| other.overlaps(got)));
                taken.push(got);
            }
        }
    }
}
