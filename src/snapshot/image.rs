//! Guest RAM as a file: a page is at the offset that it has in RAM, pages of zeroes are holes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::checksum::{self, PAGE_BYTES, PAGE_WORDS, PageSum};
use super::words;
use crate::memory::{GuestRam, PAGE, append, data_in};

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

/// Writes guest RAM into a file. Pages may be written again: the last contents count, so the guest may run meanwhile as long as every page
/// that it has written since is added once more at the end.
#[derive(Debug)]
pub(super) struct ImageWriter {
    file: File,
    size: u64,
    /// Zero pages are part of a difference: they replace others.
    is_difference: bool,
    pages: PageTable,
    words: Vec<u64>,
    written: u64,
}

impl ImageWriter {
    /// Begins the image of `size` bytes of RAM in a new file.
    ///
    /// # Errors
    /// The file cannot be enlarged.
    pub(super) fn new(file: File, size: u64, is_difference: bool) -> io::Result<Self> {
        file.set_len(size)?;
        let words = vec![0; BATCH * PAGE_WORDS];
        Ok(Self { file, size, is_difference, pages: PageTable::default(), words, written: 0 })
    }

    /// Number of bytes written so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Writes the pages in `ranges`, which `read` reads; zero pages only where others were written before.
    ///
    /// # Errors
    /// RAM cannot be read, or the file not be written.
    pub(super) fn add(&mut self, ranges: &[Range<u64>], read: ReadRam<'_>) -> io::Result<()> {
        for batch in ranges.iter().cloned().flat_map(batches) {
            // Copied first: what is written is what was summed up, even if the guest changes it meanwhile.
            read(batch.start, bytes_of(&mut self.words, &batch))?;
            let mut runs = Vec::new();
            let pages = (batch.start..batch.end).step_by(PAGE_BYTES);
            for (at, words) in pages.zip(self.words.chunks(PAGE_WORDS)) {
                let checksum = checksum::of_page(words);
                if self.pages.set(at / PAGE, checksum) || checksum.is_some() {
                    append(&mut runs, at..at + PAGE);
                }
            }
            let bytes = bytes_of(&mut self.words, &batch);
            for run in runs {
                let from = usize::try_from(run.start - batch.start).unwrap_or(0);
                let to = usize::try_from(run.end - batch.start).unwrap_or(0);
                self.file.write_all_at(bytes.get(from..to).unwrap_or_default(), run.start)?;
                self.written += run.end - run.start;
            }
        }
        Ok(())
    }

    /// The same without a copy in between: nobody changes RAM meanwhile.
    ///
    /// # Errors
    /// As for [`ImageWriter::add`].
    pub(super) fn add_in_place(&mut self, ranges: &[Range<u64>], ram: &GuestRam) -> io::Result<()> {
        for batch in ranges.iter().cloned().flat_map(batches) {
            let mut runs = Vec::new();
            for at in (batch.start..batch.end).step_by(PAGE_BYTES) {
                let page = ram.page_at(at).ok_or(io::ErrorKind::InvalidInput)?;
                let checksum = checksum::of_page_in_place(|index| page.word(index));
                if self.pages.set(at / PAGE, checksum) || checksum.is_some() {
                    append(&mut runs, at..at + PAGE);
                }
            }
            for run in runs {
                ram.write_to(&run, &self.file)?;
                self.written += run.end - run.start;
            }
        }
        Ok(())
    }

    /// Completes the image. The guest does not run: a difference of many parts gets the pages between them, too, from `read`.
    ///
    /// # Errors
    /// As for [`ImageWriter::add`].
    pub(super) fn finish(mut self, read: ReadRam<'_>) -> io::Result<MemoryImage> {
        let regions = fewer(self.pages.ranges(self.is_difference));
        if self.is_difference {
            let missing = regions.iter().flat_map(|region| self.pages.missing_in(region));
            let missing: Vec<_> = missing.collect();
            self.add(&missing, read)?;
        }
        let sum = self.pages.sum();
        let regions = regions.into_iter().map(|range| (range.start, range.end - range.start));
        Ok(MemoryImage { size: self.size, regions: regions.collect(), checksum: shown(sum) })
    }
}

/// The checksum of each page that was written, in blocks: most of a large guest's memory is not there.
#[derive(Debug, Default)]
struct PageTable(BTreeMap<u64, Box<PageBlock>>);

/// Pages of a block.
const BLOCK_PAGES: usize = 512;
const BLOCK: u64 = BLOCK_PAGES as u64;

#[derive(Debug)]
struct PageBlock {
    /// `None` for a zero page.
    checksums: [Option<u64>; BLOCK_PAGES],
    /// A bit for each page that was added.
    added: [u64; BLOCK_PAGES / 64],
}

impl PageTable {
    /// Notes a page. True if it had other contents than zeroes before.
    fn set(&mut self, number: u64, checksum: Option<u64>) -> bool {
        let block = self.0.entry(number / BLOCK).or_insert_with(|| {
            Box::new(PageBlock { checksums: [None; BLOCK_PAGES], added: [0; BLOCK_PAGES / 64] })
        });
        let index = usize::try_from(number % BLOCK).unwrap_or(0);
        if let Some(word) = block.added.get_mut(index / 64) {
            *word |= 1 << (index % 64);
        }
        let slot = block.checksums.get_mut(index);
        slot.is_some_and(|slot| mem::replace(slot, checksum).is_some())
    }

    /// The pages in a range that were added, with their checksums, in ascending order.
    fn pages_in(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, Option<u64>)> {
        let numbers = range.start / PAGE..range.end.div_ceil(PAGE);
        let blocks = numbers.start / BLOCK..numbers.end.div_ceil(BLOCK);
        let pages = self.0.range(blocks).flat_map(|(block, pages)| {
            let is_added = |index: usize| {
                pages.added.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
            };
            let numbered = (block * BLOCK..).zip(pages.checksums).enumerate();
            numbered.filter(move |(index, _)| is_added(*index)).map(|(_, page)| page)
        });
        pages.filter(move |(number, _)| numbers.contains(number))
    }

    fn pages(&self) -> impl Iterator<Item = (u64, Option<u64>)> {
        self.pages_in(&(0..u64::MAX))
    }

    /// The ranges of the pages that are not zero, or of all.
    fn ranges(&self, with_zeroes: bool) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        for (number, _) in self.pages().filter(|(_, checksum)| with_zeroes || checksum.is_some()) {
            append(&mut ranges, number * PAGE..(number + 1) * PAGE);
        }
        ranges
    }

    /// The parts of a region that were not added.
    fn missing_in(&self, region: &Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = region.start;
        for page in self.pages_in(region).map(|(number, _)| number * PAGE).chain([region.end]) {
            if at < page {
                missing.push(at..page);
            }
            at = page + PAGE;
        }
        missing
    }

    fn sum(&self) -> PageSum {
        let mut sum = PageSum::default();
        let pages = self.pages().filter_map(|(number, checksum)| Some((number, checksum?)));
        pages.for_each(|(number, checksum)| sum.add(number, checksum));
        sum
    }
}

fn shown(sum: PageSum) -> String {
    format!("{:016x}", sum.total())
}

/// Adds the pages of a batch to the sum.
fn sum_up(sum: &mut PageSum, batch: &Range<u64>, words: &[u64]) {
    let pages = (batch.start..batch.end).step_by(PAGE_BYTES);
    for (at, page) in pages.zip(words.chunks(PAGE_WORDS)) {
        if let Some(checksum) = checksum::of_page(page) {
            sum.add(at / PAGE, checksum);
        }
    }
}

/// Parts of a range that are copied at once.
fn batches(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let step = BATCH as u64 * PAGE;
    let starts = (range.start..range.end).step_by(BATCH * PAGE_BYTES);
    starts.map(move |at| at..range.end.min(at.saturating_add(step)))
}

/// The bytes of a buffer that a batch fills.
fn bytes_of<'a>(words: &'a mut [u64], batch: &Range<u64>) -> &'a mut [u8] {
    let len = usize::try_from(batch.end - batch.start).unwrap_or(0);
    words::bytes_mut(words).get_mut(..len).unwrap_or_default()
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
    #![allow(clippy::cast_possible_truncation, reason = "a test's sizes are small")]

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn saved(ram: &[u8], ranges: &[Range<u64>], is_difference: bool) -> (File, MemoryImage) {
        let file = tempfile::tempfile().unwrap();
        let read = |at: u64, to: &mut [u8]| {
            to.copy_from_slice(&ram[usize::try_from(at).unwrap()..][..to.len()]);
            Ok(())
        };
        let copy = file.try_clone().unwrap();
        let mut writer = ImageWriter::new(copy, ram.len() as u64, is_difference).unwrap();
        writer.add(ranges, &read).unwrap();
        let image = writer.finish(&read).unwrap();
        assert!(image.is_valid(), "{image:?}");
        image.check(&file).unwrap();
        (file, image)
    }

    #[test]
    fn a_page_that_is_written_again_has_its_last_contents() {
        let mut ram = vec![0; MIB as usize];
        ram[4096..12288].fill(1);
        let file = tempfile::tempfile().unwrap();
        let mut writer = ImageWriter::new(file.try_clone().unwrap(), MIB, false).unwrap();
        let read_from = |ram: &[u8], at: u64, to: &mut [u8]| {
            to.copy_from_slice(&ram[at as usize..][..to.len()]);
            Ok(())
        };
        writer.add(std::slice::from_ref(&(0..MIB)), &|at, to| read_from(&ram, at, to)).unwrap();
        assert_eq!(writer.written(), 8192);
        ram[4096..8192].fill(0);
        ram[8192..12288].fill(2);
        ram[20480] = 3;
        let dirty = [4096..12288, 20480..24576, 40960..45056];
        writer.add(&dirty, &|at, to| read_from(&ram, at, to)).unwrap();
        let image = writer.finish(&|_, _| unreachable!()).unwrap();
        assert_eq!(image.regions, [(8192, 4096), (20480, 4096)]);
        image.check(&file).unwrap();
        let mut read = vec![1; ram.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == ram);
    }

    #[test]
    fn a_difference_of_many_parts_has_the_pages_between_them_too() {
        let ram: Vec<u8> = (0..16 * MIB).map(|at| (at / 4096 % 251) as u8).collect();
        let ranges: Vec<_> = (0..2000).map(|page| page * 8192..page * 8192 + 4096).collect();
        let (file, image) = saved(&ram, &ranges, true);
        for (at, len) in image.regions {
            let mut read = vec![0; len as usize];
            file.read_exact_at(&mut read, at).unwrap();
            assert!(read == ram[at as usize..][..len as usize]);
        }
    }

    #[test]
    fn pages_of_zeroes_are_holes_and_in_no_region() {
        let mut ram = vec![0; 4 * MIB as usize];
        for page in [0, 1, 300, 1023] {
            ram[page * 4096 + page % 7] = 1;
        }
        let (file, image) = saved(&ram, std::slice::from_ref(&(0..4 * MIB)), false);
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
        let (_, image) = saved(&ram, &[4096..8192, 16384..20480], true);
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
            let (_, image) = saved(&ram, &ranges, keeps_zeroes);
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
            let (file, image) = saved(&ram, std::slice::from_ref(&(0..MIB)), false);
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
