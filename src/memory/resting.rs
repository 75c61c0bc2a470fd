//! Pages of guest RAM that nobody changes, read where they are: for a save, which would copy each of them otherwise.
//!
//! The words are read volatile. Should somebody change them nevertheless, the result is one of the values that they had.
#![expect(unsafe_code, reason = "words and ranges of guest RAM by address")]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::{GuestRam, PAGE};

/// Words of a page.
const WORDS: usize = 512;

const _: () = assert!(WORDS as u64 * 8 == PAGE);

/// A page of RAM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RestingPage<'a> {
    first: *const u64,
    ram: PhantomData<&'a GuestRam>,
}

impl RestingPage<'_> {
    /// A word of the page; the index counts from the start again after 512.
    pub(crate) fn word(self, index: usize) -> u64 {
        // SAFETY: the page is inside RAM, which is mapped as long as it is borrowed, and starts at a multiple of 4096.
        unsafe { self.first.add(index % WORDS).read_volatile() }
    }
}

impl GuestRam {
    /// The page at an offset from the start of RAM; `None` if there is none, or the offset is none of a page.
    pub(crate) fn page_at(&self, offset: u64) -> Option<RestingPage<'_>> {
        let is_page = offset.is_multiple_of(PAGE) && self.has(&(offset..offset.checked_add(PAGE)?));
        let address = self.reservation.address().checked_add(usize::try_from(offset).ok()?)?;
        is_page.then_some(RestingPage {
            first: std::ptr::with_exposed_provenance(address),
            ram: PhantomData,
        })
    }

    /// Writes a range of offsets into a file, at the same offsets.
    ///
    /// # Errors
    /// The range is not inside RAM, a page of it is lost, or the file cannot be written.
    pub(crate) fn write_to(&self, range: &Range<u64>, file: &File) -> io::Result<()> {
        if !self.has(range) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.reservation.address();
        let mut at = range.start;
        while at < range.end {
            let offset = usize::try_from(at).map_err(io::Error::other)?;
            let len = usize::try_from(range.end - at).map_err(io::Error::other)?;
            let place = libc::off_t::try_from(at).map_err(io::Error::other)?;
            let from = std::ptr::with_exposed_provenance(start.saturating_add(offset));
            // SAFETY: the range is inside RAM, which is mapped as long as it is borrowed; the kernel only reads it.
            let written = unsafe { libc::pwrite(file.as_raw_fd(), from, len, place) };
            match u64::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => at += written,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        self.still_there().map_err(|error| io::Error::other(self.explain(error)))
    }

    /// True if a range of offsets is inside RAM.
    fn has(&self, range: &Range<u64>) -> bool {
        range.start <= range.end && range.end <= self.span.size
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::layout::Span;

    const SPAN: Span = Span { base: 0x8000_0000, size: 4 * PAGE };

    #[test]
    fn pages_are_read_and_written_where_they_are() {
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.write(SPAN.base + PAGE + 8, &7_u64.to_le_bytes()).unwrap();
        ram.write(SPAN.base + 2 * PAGE, &[9; 4096]).unwrap();
        let page = ram.page_at(PAGE).unwrap();
        assert_eq!((page.word(0), page.word(1), page.word(511), page.word(513)), (0, 7, 0, 7));
        let file = tempfile::tempfile().unwrap();
        ram.write_to(&(PAGE..3 * PAGE), &file).unwrap();
        let mut bytes = [1; 8192];
        file.read_exact_at(&mut bytes, PAGE).unwrap();
        assert_eq!(
            (&bytes[..16], bytes[4096], bytes[8191]),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0][..], 9, 9)
        );
        assert_eq!(file.metadata().unwrap().len(), 3 * PAGE);
    }

    #[test]
    fn what_is_outside_of_ram_is_refused() {
        let ram = GuestRam::new(SPAN, false).unwrap();
        for offset in [1, 4 * PAGE, u64::MAX, u64::MAX - 4095] {
            assert!(ram.page_at(offset).is_none(), "{offset}");
        }
        let file = tempfile::tempfile().unwrap();
        for range in [3 * PAGE..5 * PAGE, u64::MAX - 4095..u64::MAX] {
            assert!(ram.write_to(&range, &file).is_err(), "{range:?}");
        }
        assert!(ram.write_to(&(0..0), &file).is_ok());
        let read_only = File::open("/dev/null").unwrap();
        assert!(ram.write_to(&(0..PAGE), &read_only).is_err());
    }
}
