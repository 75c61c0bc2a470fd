//! The parts of guest RAM that are pages of a saved guest's file, and reading them before the guest does.

use std::io;

use rustix::io::Errno;

use super::{GuestRam, PAGE, Returned};
use crate::layout::Span;

impl GuestRam {
    /// The ranges of RAM over which a saved guest's memory is mapped. Some may overlap.
    pub(crate) fn saved_ranges(&self) -> Vec<Span> {
        let overlays = self.overlays();
        overlays.iter().filter(|o| o.returned == Returned::Files).map(|o| o.span).collect()
    }

    /// Has the host read the pages of a range, multiples of 4096, from the files behind them. No page is copied, whether the guest runs or
    /// not.
    ///
    /// # Errors
    /// A page cannot be read: the file shrank, or the disk fails.
    pub(crate) fn populate(&self, range: Span) -> io::Result<()> {
        match self.reservation.populate(range.base.saturating_sub(self.span.base), range.size) {
            // Linux before 5.14 does not know this advice: each page is read.
            Err(Errno::INVAL) => self.read_pages(range),
            result => Ok(result?),
        }
    }

    fn read_pages(&self, range: Span) -> io::Result<()> {
        let step = usize::try_from(PAGE).unwrap_or(4096);
        (range.base..range.end()).step_by(step).try_for_each(|at| {
            self.read(at, &mut [0]).map_err(|error| io::Error::other(self.explain(error)))
        })
    }
}

#[cfg(test)]
impl GuestRam {
    /// Bytes of the pages that this process has in its page tables.
    pub(crate) fn present_bytes(&self) -> u64 {
        let (start, size) = (self.reservation.address(), self.reservation.size());
        let mut bytes = 0;
        let map = super::pagemap::PageMap::open().unwrap();
        map.for_runs(start, size, |page| page.exists(), |_, len| bytes += len as u64).unwrap();
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::sync::Arc;

    use super::super::pagemap::PageMap;
    use super::*;

    const SPAN: Span = Span { base: 0x8000_0000, size: 8 << 20 };
    const SAVED: Span = Span { base: SPAN.base + (1 << 20), size: 4 << 20 };

    fn saved() -> (GuestRam, Arc<File>) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 8 << 20]).unwrap();
        let (ram, file) = (GuestRam::new(SPAN, false).unwrap(), Arc::new(file));
        ram.place_saved(SAVED.base, &file, 1 << 20, SAVED.size).unwrap();
        (ram, file)
    }

    /// Bytes of the pages that exist, and of those that are private copies.
    fn pages(ram: &GuestRam) -> (usize, usize) {
        let map = PageMap::open().unwrap();
        let (start, size) = (ram.reservation.address(), ram.reservation.size());
        let (mut exist, mut private) = (0, 0);
        map.for_runs(start, size, |page| page.exists(), |_, len| exist += len).unwrap();
        map.for_runs(start, size, |page| page.is_private(), |_, len| private += len).unwrap();
        (exist, private)
    }

    #[test]
    fn all_pages_of_a_file_are_there_and_none_is_a_copy() {
        for reads_each in [false, true] {
            let (ram, _file) = saved();
            ram.write(SAVED.base, b"the guest's").unwrap();
            assert_eq!(ram.saved_ranges(), [SAVED]);
            let read = if reads_each { ram.read_pages(SAVED) } else { ram.populate(SAVED) };
            read.unwrap();
            assert_eq!(pages(&ram), (4 << 20, 4096));
            let mut bytes = [0; 11];
            ram.read(SAVED.base, &mut bytes).unwrap();
            assert_eq!(&bytes, b"the guest's");
        }
    }

    #[test]
    fn a_file_that_has_shrunk_is_an_error_and_outside_of_ram_is_nothing() {
        let (ram, file) = saved();
        file.set_len(2 << 20).unwrap();
        assert!(ram.populate(SAVED).is_err());
        assert!(ram.read_pages(SAVED).is_err());
        assert!(ram.populate(Span { base: SPAN.end(), size: 4096 }).is_err());
    }
}
