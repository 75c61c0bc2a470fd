//! Guest RAM as a file: a page is at the offset that it has in RAM, pages of zeroes are holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::checksum::{self, PAGE_WORDS, PageSum};
use crate::memory::{PAGE, data_in};

/// Pages that are copied at once.
const BATCH: usize = 64;

/// Maximum number of regions of an image. Each is a mapping of the machine that is restored from it: their number is limited, and each
/// costs time.
const MOST_REGIONS: usize = 128;

/// The memory in a snapshot, as its state describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryImage {
    /// Size of guest RAM in bytes.
    pub size: u64,
    /// Offset and length of each region that the file has, multiples of 4096, in ascending order. What lies outside is zero, or in a
    /// difference as in its parent.
    pub regions: Vec<(u64, u64)>,
    /// The checksum of the pages in the regions, in hexadecimal.
    pub checksum: String,
}

impl MemoryImage {
    /// True if the regions are as described.
    pub(super) fn is_valid(&self) -> bool {
        let mut end = 0;
        let is_page = |number: u64| number.is_multiple_of(PAGE);
        is_page(self.size)
            && self.regions.len() <= MOST_REGIONS
            && self.regions.iter().all(|(at, len)| {
                let follows = *at >= end && *len > 0 && is_page(*at) && is_page(*len);
                end = at.checked_add(*len).unwrap_or(u64::MAX);
                follows && end <= self.size
            })
    }

    /// Compares the checksum with a file, whose pages outside of the regions must be zero.
    ///
    /// # Errors
    /// The file cannot be read; `InvalidData` if its pages are others.
    pub(super) fn check(&self, file: &File) -> io::Result<()> {
        let mut sum = PageSum::default();
        let mut words = vec![0; BATCH * PAGE_WORDS];
        for batch in data_in(file)?.into_iter().flat_map(batches) {
            file.read_exact_at(bytes_of(&mut words, &batch), batch.start)?;
            sum_up(&mut sum, &batch, &words);
        }
        if shown(sum) == self.checksum { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

/// Reads guest RAM at an offset from its start.
pub type ReadRam<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

/// Writes the pages in `ranges` of a RAM of `size` bytes into a new file. With `keeps_zeroes` pages of zeroes are part of the image, too:
/// in a difference they replace others.
///
/// # Errors
/// The memory cannot be read, or the file not be written.
pub(super) fn write(
    file: &File,
    size: u64,
    ranges: Vec<Range<u64>>,
    read: ReadRam<'_>,
    keeps_zeroes: bool,
) -> io::Result<(MemoryImage, u64)> {
    file.set_len(size)?;
    let (mut regions, mut written) = (Vec::new(), 0);
    let mut sum = PageSum::default();
    let mut words = vec![0; BATCH * PAGE_WORDS];
    // What lies between the regions of a difference is its parent's, so they are joined before the pages are read.
    let ranges = if keeps_zeroes { fewer(ranges) } else { ranges };
    for batch in ranges.iter().cloned().flat_map(batches) {
        read(batch.start, bytes_of(&mut words, &batch))?;
        let runs = sum_up(&mut sum, &batch, &words);
        let bytes = bytes_of(&mut words, &batch);
        for run in runs {
            let from = usize::try_from(run.start - batch.start).unwrap_or(0);
            let to = usize::try_from(run.end - batch.start).unwrap_or(0);
            file.write_all_at(bytes.get(from..to).unwrap_or_default(), run.start)?;
            written += run.end - run.start;
            push(&mut regions, run);
        }
    }
    let regions = if keeps_zeroes { ranges } else { fewer(regions) };
    let regions = regions.into_iter().map(|range| (range.start, range.end - range.start)).collect();
    Ok((MemoryImage { size, regions, checksum: shown(sum) }, written))
}

fn shown(sum: PageSum) -> String {
    format!("{:016x}", sum.total())
}

/// Adds the pages of a batch to the sum. Returns the ranges of those that are not zero.
fn sum_up(sum: &mut PageSum, batch: &Range<u64>, words: &[u64]) -> Vec<Range<u64>> {
    let mut runs = Vec::new();
    for (at, page) in (batch.start..batch.end).step_by(PAGE as usize).zip(words.chunks(PAGE_WORDS))
    {
        if let Some(checksum) = checksum::of_page(page) {
            sum.add(at / PAGE, checksum);
            push(&mut runs, at..at + PAGE);
        }
    }
    runs
}

/// Appends a range, joined with the last one if it follows it.
fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Parts of a range that are copied at once.
fn batches(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let step = BATCH as u64 * PAGE;
    let starts = (range.start..range.end).step_by(BATCH * PAGE as usize);
    starts.map(move |at| at..range.end.min(at.saturating_add(step)))
}

/// The bytes of a buffer that a batch fills.
fn bytes_of<'a>(words: &'a mut [u64], batch: &Range<u64>) -> &'a mut [u8] {
    let len = usize::try_from(batch.end - batch.start).unwrap_or(0);
    bytemuck::cast_slice_mut(words).get_mut(..len).unwrap_or_default()
}

/// At most [`MOST_REGIONS`] ranges that include these, which are in ascending order: the smallest gaps are closed.
fn fewer(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let gap = |pair: &[Range<u64>]| match pair {
        [a, b] => b.start.saturating_sub(a.end),
        _ => 0,
    };
    let mut gaps: Vec<u64> = ranges.windows(2).map(gap).collect();
    gaps.sort_unstable_by(|a, b| b.cmp(a));
    let Some(limit) = gaps.get(MOST_REGIONS - 1).copied() else { return ranges };
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(MOST_REGIONS);
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start.saturating_sub(last.end) <= limit => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn saved(ram: &[u8], ranges: Vec<Range<u64>>, keeps_zeroes: bool) -> (File, MemoryImage) {
        let file = tempfile::tempfile().unwrap();
        let read = |at: u64, to: &mut [u8]| {
            to.copy_from_slice(&ram[usize::try_from(at).unwrap()..][..to.len()]);
            Ok(())
        };
        let (image, _) = write(&file, ram.len() as u64, ranges, &read, keeps_zeroes).unwrap();
        assert!(image.is_valid(), "{image:?}");
        image.check(&file).unwrap();
        (file, image)
    }

    #[test]
    fn pages_of_zeroes_are_holes_and_in_no_region() {
        let mut ram = vec![0; 4 * MIB as usize];
        for page in [0, 1, 300, 1023] {
            ram[page * 4096 + page % 7] = 1;
        }
        let (file, image) = saved(&ram, vec![0..4 * MIB], false);
        assert_eq!(image.regions, [(0, 8192), (300 * 4096, 4096), (1023 * 4096, 4096)]);
        let data: u64 = data_in(&file).unwrap().iter().map(|range| range.end - range.start).sum();
        assert!(data <= 4 * 65536, "{data} bytes are no holes");
        let mut read = vec![1; ram.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == ram);
        // A copy without holes is the same image.
        file.write_all_at(&ram, 0).unwrap();
        image.check(&file).unwrap();
    }

    #[test]
    fn a_difference_has_zeroes_that_replace_other_pages() {
        let ram = vec![0; MIB as usize];
        let (_, image) = saved(&ram, vec![4096..8192, 16384..20480], true);
        assert_eq!(image.regions, [(4096, 4096), (16384, 4096)]);
    }

    #[test]
    fn an_image_has_few_regions_however_many_pages_are_written_apart() {
        let mut ram = vec![0; 16 * MIB as usize];
        for (index, page) in ram.chunks_mut(4096).enumerate() {
            page[0] = u8::from(index % 3 == 0 || index > 4000);
        }
        for keeps_zeroes in [false, true] {
            let ranges: Vec<_> =
                (0..4096).step_by(2).map(|page| page * 4096..(page + 1) * 4096).collect();
            let (_, image) = saved(&ram, ranges, keeps_zeroes);
            assert!(image.regions.len() <= MOST_REGIONS);
        }
    }

    #[test]
    fn regions_that_overlap_wrap_or_leave_ram_are_invalid() {
        let image = |regions: &[(u64, u64)]| MemoryImage {
            size: MIB,
            regions: regions.to_vec(),
            checksum: String::new(),
        };
        assert!(image(&[]).is_valid() && image(&[(0, 4096), (4096, MIB - 4096)]).is_valid());
        for regions in [
            &[(0, MIB + 4096)][..],
            &[(0, 0)],
            &[(1, 4096)],
            &[(0, 100)],
            &[(0, 8192), (4096, 4096)],
            &[(8192, 4096), (0, 4096)],
            &[(u64::MAX - 4095, 4096)],
            &[(4096, u64::MAX - 4095)],
            &[(0, 4096); 200],
        ] {
            assert!(!image(regions).is_valid(), "{regions:?}");
        }
        assert!(!MemoryImage { size: 100, ..image(&[]) }.is_valid());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_page_that_changes_in_the_file_is_noticed(
            pages in prop::collection::btree_set(0_usize..256, 1..20), which in any::<prop::sample::Index>(),
            byte in 0_usize..4096, bit in 0..8_u8,
        ) {
            let mut ram = vec![0; MIB as usize];
            for page in &pages {
                ram[page * 4096 + byte] = 7;
            }
            let (file, image) = saved(&ram, vec![0..MIB], false);
            let page = *pages.iter().nth(which.index(pages.len())).unwrap();
            let at = (page * 4096 + (byte + 1) % 4096) as u64;
            file.write_all_at(&[1_u8 << bit], at).unwrap();
            prop_assert!(image.check(&file).is_err());
            file.write_all_at(&[0], at).unwrap();
            prop_assert!(image.check(&file).is_ok());
            file.set_len(at / 4096 * 4096).unwrap();
            prop_assert!(image.check(&file).is_err());
        }
    }
}
