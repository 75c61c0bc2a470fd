//! A driver's list of page numbers: sorted, without pages outside RAM and without duplicates.

/// Bytes of a page of the balloon, independent of the guest's page size.
pub(super) const PAGE: u64 = 4096;

/// The pages of a list.
#[derive(Debug)]
pub(super) struct List {
    /// Their addresses, ascending.
    pages: Vec<u64>,
    /// Count of numbers in the list.
    pub(super) count: usize,
    /// Count of those outside RAM.
    pub(super) ignored: usize,
}

impl List {
    /// Reads little-endian numbers of 32 bits.
    pub(super) fn parse(raw: &[u8], is_ram: impl Fn(u64) -> bool) -> Self {
        let number = |raw: &[u8]| raw.try_into().map_or(0, u32::from_le_bytes);
        let numbers = raw.chunks_exact(4).map(|raw| PAGE * u64::from(number(raw)));
        let mut pages: Vec<u64> = numbers.collect();
        let count = pages.len();
        pages.retain(|page| is_ram(*page));
        let ignored = count - pages.len();
        pages.sort_unstable();
        pages.dedup();
        Self { pages, count, ignored }
    }

    /// Runs of contiguous pages: the address of the first, and their count.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let runs = self.pages.chunk_by(|page, next| page + PAGE == *next);
        runs.filter_map(|run| Some((*run.first()?, run.len() as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_side_by_side_are_one_run_in_whatever_order_they_come() {
        let raw: Vec<u8> =
            [7_u32, 3, 4, 900, 5, 3, u32::MAX, 9].into_iter().flat_map(u32::to_le_bytes).collect();
        let list = List::parse(&raw, |page| page < 800 * PAGE);
        let runs: Vec<_> = list.runs().collect();
        assert_eq!(runs, [(3 * PAGE, 3), (7 * PAGE, 1), (9 * PAGE, 1)]);
        assert_eq!((list.count, list.ignored), (8, 2));
        assert_eq!(List::parse(&raw[..3], |_| true).count, 0);
    }
}
