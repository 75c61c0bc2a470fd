//! Guest RAM whose contents another program has, a pager: it serves the faults of absent pages (`userfault.rs`).
//!
//! The machine registers its RAM, all of which is absent then, and gives the descriptor away. A thread that accesses guest memory within
//! KVM_RUN does not notice signals while it waits for a page.
//!
//! If the pager is gone, absent pages must not become zeroes, which the guest and its devices would take for its memory. They become
//! lost pages (`lost.rs`): poisoned ones (UFFDIO_POISON, Linux 6.6), on older kernels those of an empty file over all of RAM.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

use super::GuestRam;
use super::pagemap::PageMap;
use super::userfault::{PageRange, Userfault};
use crate::error::Error;

/// RAM whose contents another program has.
#[derive(Debug)]
pub(super) struct Paging {
    faults: Arc<Userfault>,
    /// Nobody fills an absent page any more, and there is none: they were made lost ones.
    is_given_up: bool,
}

impl GuestRam {
    /// Leaves the contents of RAM to another program, which gets the result: all pages are absent until it fills them. Nothing accesses
    /// RAM meanwhile, and no file is mapped over it.
    ///
    /// # Errors
    /// [`Error::Config`] for RAM in huge pages or RAM that other programs map; [`Error::Host`] if the kernel or the user's rights do not
    /// allow it.
    pub(crate) fn leave_to_pager(&self) -> Result<Arc<Userfault>, Error> {
        self.leave_ranges(std::slice::from_ref(&(0..self.span.size)))
    }

    /// The same with ranges of offsets only, whose contents are dropped. Who accesses another absent page waits, too.
    ///
    /// # Errors
    /// As for [`GuestRam::leave_to_pager`].
    pub(crate) fn leave_ranges(&self, ranges: &[Range<u64>]) -> Result<Arc<Userfault>, Error> {
        let refused = |what: &str| {
            Err(Error::Config(format!(
                "Cannot let another program serve the guest's memory: {what}"
            )))
        };
        if self.reservation.is_huge() {
            return refused("it is in huge pages (the machine was started with --hugepages)");
        }
        if self.reservation.is_shared() {
            return refused("the program of a device maps it, too");
        }
        let faults = Arc::new(Userfault::create()?);
        for range in ranges {
            self.reservation.discard(range.start, range.end.saturating_sub(range.start));
        }
        let registered = faults.register(self.pages());
        registered.map_err(|error| Error::Host {
            what: "Cannot register guest RAM with userfaultfd(2)".into(),
            source: error.into(),
        })?;
        *self.paging() = Some(Paging { faults: Arc::clone(&faults), is_given_up: false });
        Ok(faults)
    }

    /// True if another program has contents of RAM.
    pub(super) fn is_paged(&self) -> bool {
        self.paging().is_some()
    }

    /// Gives up the pages of RAM that the other program has not filled: an access to one is as one to a page of a file that has shrunk.
    /// Who waits for one goes on. Pages that are there stay, if the kernel has UFFDIO_POISON.
    pub(crate) fn lose_absent(&self) {
        let mut paging = self.paging();
        let Some(Paging { faults, is_given_up }) = paging.as_mut() else { return };
        *is_given_up = true;
        let lost = self.absent().into_iter().try_for_each(|range| faults.poison(range));
        if let Err(error) = lost {
            log::debug!("UFFDIO_POISON fails: {error}");
            self.lose_all(faults);
        }
    }

    /// True once absent pages would never be filled: none may be returned to the host. So it stays until the result is dropped.
    pub(super) fn keeps_pages(&self) -> (bool, MutexGuard<'_, Option<Paging>>) {
        let paging = self.paging();
        (paging.as_ref().is_some_and(|paging| paging.is_given_up), paging)
    }

    /// The ranges without pages; all of RAM if the kernel does not tell.
    fn absent(&self) -> Vec<PageRange> {
        let (start, size) = (self.reservation.address(), self.reservation.size());
        let mut ranges = Vec::new();
        let each = |address, len| {
            ranges.push(PageRange { start: address as u64, len: len as u64 });
        };
        let found = PageMap::open()
            .and_then(|map| map.for_runs(start, size, |entry| !entry.exists(), each));
        if found.is_ok() { ranges } else { vec![self.pages()] }
    }

    fn lose_all(&self, faults: &Userfault) {
        let empty = memfd_create("lost-ram", MemfdFlags::CLOEXEC).map(File::from);
        let lost = empty.map_err(io::Error::from).and_then(|file| {
            self.reservation.overlay(0, &file, 0, self.span.size).map_err(io::Error::other)
        });
        match lost {
            // Otherwise who waits would find zeroes: it waits until the process ends.
            Err(error) => log::error!("Cannot give up the guest's memory: {error}"),
            Ok(()) => faults.wake(self.pages()),
        }
    }

    /// Ends the service of a RAM that is complete: it keeps its pages, and absent ones are zeroes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn keep_all(&self) -> io::Result<()> {
        match self.paging().take() {
            Some(Paging { faults, .. }) => Ok(faults.unregister(self.pages())?),
            None => Ok(()),
        }
    }

    /// From now on absent pages are zeroes, and the other program cannot fill them any more.
    pub(super) fn end_paging(&self) -> Result<(), Error> {
        // A new mapping in the place of RAM is not registered.
        if self.paging().take().is_some() {
            self.reservation.uncover(0, self.span.size)
        } else {
            Ok(())
        }
    }

    fn pages(&self) -> PageRange {
        PageRange { start: self.host_address(), len: self.span.size }
    }

    fn paging(&self) -> MutexGuard<'_, Option<Paging>> {
        self.paging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use rvmm_devices::testing::skip;
    use rvmm_devices::virtio::DmaMemory;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::{Placed, RamError};
    use super::*;
    use crate::layout::Span;

    const SPAN: Span = Span { base: 0x8000_0000, size: 2 << 20 };

    /// RAM that nobody serves yet. Reports a skip where the user may not.
    fn paged() -> Option<(GuestRam, Arc<Userfault>)> {
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.write(SPAN.base, b"gone once it is left to a pager").unwrap();
        match ram.leave_to_pager() {
            Ok(faults) => Some((ram, faults)),
            Err(error) => {
                skip(&error.to_string());
                None
            }
        }
    }

    /// Waits for a fault, and returns the address from the start of RAM.
    fn next_fault(ram: &GuestRam, faults: &Userfault) -> u64 {
        loop {
            if let [address] = faults.faults().unwrap()[..] {
                return address - ram.host_address();
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn who_reads_a_page_waits_until_it_is_filled() {
        let Some((ram, faults)) = paged() else { return };
        assert!(ram.occupied().unwrap().iter().eq([&(0..SPAN.size)]));
        let mut bytes = [1; 8];
        thread::scope(|scope| {
            scope.spawn(|| ram.read(SPAN.base + 4096, &mut bytes).unwrap());
            assert_eq!(next_fault(&ram, &faults), 4096);
            let page = ram.host_address() + 4096;
            assert_eq!(faults.copy(page, &[7; 4096]).unwrap(), Placed::New);
            assert_eq!(faults.copy(page, &[8; 4096]).unwrap(), Placed::Before);
            assert_eq!(faults.zero(page).unwrap(), Placed::Before);
        });
        assert_eq!(bytes, [7; 8]);
        // What the balloon returns is absent again.
        ram.release(SPAN.base + 4096, 4096);
        assert_eq!(faults.zero(ram.host_address() + 4096).unwrap(), Placed::New);
        ram.read(SPAN.base + 4096, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        // Outside of RAM.
        assert_eq!(faults.zero(ram.host_address() + SPAN.size).unwrap(), Placed::Gone);
    }

    #[test]
    fn absent_pages_that_are_given_up_are_lost_and_no_zeroes() {
        for replaces_all in [false, true] {
            let Some((ram, faults)) = paged() else { return };
            faults.copy(ram.host_address(), &[7; 4096]).unwrap();
            faults.copy(ram.host_address() + 3 * 4096, &[7; 8192]).unwrap();
            thread::scope(|scope| {
                let waits = scope.spawn(|| ram.read(SPAN.base + 8192, &mut [0; 4096]));
                assert_eq!(next_fault(&ram, &faults), 8192);
                if replaces_all {
                    ram.lose_all(&faults)
                } else {
                    ram.lose_absent()
                }
                assert_eq!(waits.join().unwrap(), Err(RamError::Lost));
            });
            assert!(ram.is_lost());
            // A system call fails, too.
            let file = File::from(memfd_create("to", MemfdFlags::CLOEXEC).unwrap());
            let place = GuestAddress(SPAN.base + 5 * 4096);
            let view = ram.view();
            assert!(view.write_all_volatile_to(place, &mut &file, 4096).is_err());
            // A pager that comes too late may still fill poisoned pages: it has the right contents.
            let late = faults.copy(ram.host_address() + 9 * 4096, &[8; 4096]).unwrap();
            assert_eq!(late, if replaces_all { Placed::Gone } else { Placed::New });
            if !replaces_all {
                // The balloon returns it, which would have somebody wait for it for ever.
                ram.release(SPAN.base + 3 * 4096, 4096);
                let mut bytes = [0; 4096];
                let _ = ram.read(SPAN.base + 3 * 4096, &mut bytes);
                assert_eq!(bytes, [7; 4096]);
            }
        }
    }

    #[test]
    fn cleared_memory_is_zero_and_the_pager_cannot_fill_it() {
        for is_lost in [false, true] {
            let Some((ram, faults)) = paged() else { return };
            faults.copy(ram.host_address(), &[7; 4096]).unwrap();
            if is_lost {
                ram.lose_absent();
            }
            ram.clear().unwrap();
            let mut all = vec![1; 2 << 20];
            ram.read(SPAN.base, &mut all).unwrap();
            assert!(all.iter().all(|byte| *byte == 0));
            ram.release(SPAN.base, SPAN.size);
            assert_eq!(faults.copy(ram.host_address(), &[7; 4096]).unwrap(), Placed::Gone);
        }
    }

    #[test]
    fn memory_that_other_programs_map_or_in_huge_pages_is_not_left_to_a_pager() {
        let shared = GuestRam::shared(SPAN, false).unwrap();
        assert!(shared.leave_to_pager().unwrap_err().to_string().contains("maps it, too"));
        let huge = GuestRam::over(
            SPAN,
            super::super::Reservation::of_absent_pages(SPAN.size, false).unwrap(),
        );
        let refusal = huge.unwrap().leave_to_pager().unwrap_err();
        assert!(refusal.to_string().contains("--hugepages"), "{refusal}");
    }
}
