//! The parts of guest RAM that may hold other bytes than zeroes.

use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::pagemap::PageMap;
use super::{GuestRam, PAGE};

impl GuestRam {
    /// The ranges of RAM that may hold other bytes than zeroes: offsets from its start, multiples of 4096, ascending and apart from each
    /// other. Pages that the guest has never written and that come from no file are in none of them. If another program serves its page
    /// faults it is all of RAM.
    ///
    /// # Errors
    /// The host does not show which pages exist.
    pub fn occupied(&self) -> io::Result<Vec<Range<u64>>> {
        if self.is_paged() {
            return Ok(std::iter::once(0..self.span.size).collect());
        }
        let mut ranges = match self.reservation.file() {
            // Other programs may have written pages that this process has not mapped.
            Some(file) => data_in(file)?,
            None => self.existing_pages()?,
        };
        let base = self.span.base;
        let overlays = self.overlays();
        ranges.extend(overlays.iter().map(|o| o.span.base - base..o.span.end() - base));
        drop(overlays);
        Ok(united(ranges))
    }

    fn existing_pages(&self) -> io::Result<Vec<Range<u64>>> {
        let mut ranges = Vec::new();
        let (start, size) = (self.reservation.address(), self.reservation.size());
        PageMap::open()?.for_runs(
            start,
            size,
            |entry| entry.exists(),
            |address, len| {
                let at = (address - start) as u64;
                ranges.push(at..at + len as u64);
            },
        )?;
        Ok(ranges)
    }
}

/// The ranges of a file that are not holes, in whole pages.
pub(crate) fn data_in(file: &std::fs::File) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(ranges),
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?;
        ranges.push(start / PAGE * PAGE..at.next_multiple_of(PAGE));
    }
}

/// The same ranges in ascending order, with those joined that touch each other.
pub(crate) fn united(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut apart: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    ranges.into_iter().for_each(|range| append(&mut apart, range));
    apart
}

/// Appends a range that does not begin before the last one, joined with it if they touch.
pub(crate) fn append(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use super::*;
    use crate::layout::Span;

    const SPAN: Span = Span { base: 0x8000_0000, size: 8 << 20 };

    #[test]
    fn ranges_are_joined_where_they_touch() {
        assert_eq!(united(vec![8..9, 0..2, 2..4, 3..6, 5..6]), [0..6, 8..9]);
        assert!(united(Vec::new()).is_empty());
    }

    #[test]
    fn memory_is_occupied_where_it_was_written_or_a_file_is_mapped() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&[7; 8192], 0).unwrap();
        for ram in [GuestRam::new(SPAN, false).unwrap(), GuestRam::shared(SPAN, false).unwrap()] {
            assert!(ram.occupied().unwrap().is_empty());
            ram.write(SPAN.base + 0x10_0000 - 1, &[1, 2]).unwrap();
            ram.place_file(SPAN.base + 0x20_0000, &file, 0, 8192).unwrap();
            let occupied = ram.occupied().unwrap();
            // Where the host uses transparent huge pages more exists.
            for at in [0x10_0000 - 1, 0x10_0000, 0x20_0000, 0x20_1fff] {
                assert!(occupied.iter().any(|range| range.contains(&at)), "{at:#x}: {occupied:x?}");
            }
            let total: u64 = occupied.iter().map(|range| range.end - range.start).sum();
            assert!(total < SPAN.size, "{occupied:x?}");
        }
    }

    #[test]
    fn saved_memory_has_the_files_contents_again_after_the_guest_has_returned_it() {
        use rvmm_devices::virtio::DmaMemory;
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&[7; 8192], 0).unwrap();
        let read = |ram: &GuestRam| {
            let mut byte = [0];
            ram.read(SPAN.base + 4096, &mut byte).unwrap();
            byte[0]
        };
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.place_saved(SPAN.base, &file, 0, 8192).unwrap();
        ram.write(SPAN.base + 4096, &[9]).unwrap();
        ram.release(SPAN.base, SPAN.size);
        assert_eq!(read(&ram), 7);
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.place_file(SPAN.base, &file, 0, 8192).unwrap();
        ram.write(SPAN.base + 4096, &[9]).unwrap();
        ram.release(SPAN.base, SPAN.size);
        assert_eq!(read(&ram), 9);
    }
}
