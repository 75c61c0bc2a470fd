//! The pages of guest RAM that this process has written since a moment, for saves that contain only what has changed. KVM's log of
//! dirty pages has the guest's own writes, but not those of devices, firmware and debugger, nor pages that are returned to the host.
//!
//! A writer writes its bytes and then sets the bits of their pages (release); a reader takes bits (acquire) and then reads the pages.
//! A reader that gets a bit gets the bytes; one that is too early for the bit finds it the next time. So no write is lost, as
//! long as writers set bits that are set already, too: a reader may have taken such a bit, and read the page, just before.
//!
//! The switch has no such order, because it is to cost nothing while it is off: a write at the time of its change may be recorded or
//! not. So recording begins while the harts are out of the guest and the devices are paused.

use std::ops::Range;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rvmm_devices::virtio::WriteLog;

use super::{GuestRam, PAGE};

/// Pages in a word.
const BITS: u64 = 64;

/// The record of written pages.
#[derive(Debug, Default)]
pub(super) struct WrittenPages {
    is_on: AtomicBool,
    /// A bit for each page from the start of RAM on; no words while nothing is recorded.
    words: RwLock<Arc<[AtomicU64]>>,
}

impl WrittenPages {
    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Relaxed)
    }

    fn words(&self) -> RwLockReadGuard<'_, Arc<[AtomicU64]>> {
        self.words.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches the record of this number of pages on or off.
    fn switch(&self, on: bool, pages: u64) {
        let mut words = self.words.write().unwrap_or_else(PoisonError::into_inner);
        if on != self.is_on() {
            let count = if on { pages.div_ceil(BITS) } else { 0 };
            *words = (0..count).map(|_| AtomicU64::new(0)).collect();
            self.is_on.store(on, Relaxed);
        }
    }

    /// Takes all bits.
    fn take(&self) -> Vec<u64> {
        let take = |word: &AtomicU64| match word.load(Relaxed) {
            // Most are: they stay in the caches of all CPUs.
            0 => 0,
            _ => word.swap(0, Acquire),
        };
        self.words().iter().map(take).collect()
    }

    /// Sets the bits of pages that were written.
    fn note(&self, pages: Range<u64>) {
        let words = self.words();
        let mut page = pages.start;
        while page < pages.end {
            let (index, bit) = (page / BITS, page % BITS);
            let count = (BITS - bit).min(pages.end - page);
            let word = usize::try_from(index).ok().and_then(|index| words.get(index));
            // None if recording was switched off meanwhile.
            let _ = word.map(|word| word.fetch_or(u64::MAX >> (BITS - count) << bit, Release));
            page += count;
        }
    }
}

impl GuestRam {
    /// Begins to record which pages this process writes, with none, or stops it and forgets them. Recording begins while the harts are
    /// out of the guest and the devices are paused; it may end at any time. Nothing changes if it is on, or off, already.
    ///
    /// Writes of other programs are not recorded. The kernel's vhost records its own in the log that it got when its queues started.
    pub fn record_writes(&self, on: bool) {
        self.written.switch(on, self.span.size.div_ceil(PAGE));
    }

    /// The pages that were written since the last call, or since recording began: a bit for each 4096 bytes, 64 in a word, from the
    /// lowest address on. Nothing is lost if others write meanwhile: a page whose bytes a reader misses is in the next result.
    /// Empty while nothing is recorded.
    #[must_use]
    pub fn take_written(&self) -> Vec<u64> {
        self.written.take()
    }

    /// The record, for the kernel's vhost, which sets bits in it; `None` while nothing is recorded.
    pub(super) fn log(&self) -> Option<WriteLog> {
        let words = self.written.is_on().then(|| Arc::clone(&self.written.words()))?;
        Some(WriteLog { start: self.span.base, words })
    }

    /// Notes the pages of a range, as far as it is RAM.
    pub(super) fn note_pages(&self, addr: u64, len: u64) {
        let start = addr.max(self.span.base);
        let end = addr.saturating_add(len).min(self.span.end());
        if start < end {
            let base = self.span.base;
            self.written.note((start - base) / PAGE..(end - base).div_ceil(PAGE));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::thread;

    use rvmm_devices::virtio::DmaMemory;

    use super::*;
    use crate::layout::Span;

    const SPAN: Span = Span { base: 0x8000_0000, size: 130 * PAGE };
    const NONE: [u64; 0] = [];

    fn ram() -> GuestRam {
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.record_writes(true);
        ram
    }

    /// The numbers of the pages that are taken.
    fn taken(ram: &GuestRam) -> Vec<u64> {
        let words = ram.take_written();
        assert_eq!(words.len() as u64, (ram.span.size / PAGE).div_ceil(64));
        let bits = |(first, word): (u64, u64)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
        };
        (0..).step_by(64).zip(words).flat_map(bits).collect()
    }

    fn index(page: u64) -> usize {
        usize::try_from(page).unwrap()
    }

    #[test]
    fn the_pages_of_a_write_are_recorded_once() {
        let ram = ram();
        assert_eq!(taken(&ram), NONE);
        ram.write(SPAN.base + 4095, &[1]).unwrap();
        ram.write(SPAN.base + 62 * PAGE + 4095, &vec![1; 3 * 4096]).unwrap();
        ram.write(SPAN.end() - 1, &[1]).unwrap();
        ram.write(SPAN.base + 9 * PAGE, &[]).unwrap();
        ram.read(SPAN.base + 20 * PAGE, &mut [0; 5000]).unwrap();
        assert_eq!(taken(&ram), [0, 62, 63, 64, 65, 129]);
        assert_eq!(taken(&ram), NONE);
        ram.note_written(SPAN.base, SPAN.size);
        assert_eq!(taken(&ram), (0..130).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_outside_of_ram_is_ignored() {
        let ram = ram();
        for (addr, len) in [
            (0, 0),
            (0, SPAN.base),
            (SPAN.base, 0),
            (SPAN.base - 1, 1),
            (SPAN.end(), 1),
            (SPAN.end(), u64::MAX),
            (u64::MAX, u64::MAX),
            (u64::MAX, 0),
        ] {
            ram.note_written(addr, len);
            assert_eq!(taken(&ram), NONE, "{addr:#x} {len:#x}");
        }
        ram.note_written(SPAN.base - PAGE, PAGE + 1);
        ram.note_written(SPAN.end() - 1, u64::MAX);
        assert_eq!(taken(&ram), [0, 129]);
        assert!(ram.write(SPAN.end() - 1, &[1; 2]).is_err());
        assert_eq!(taken(&ram), NONE);
    }

    #[test]
    fn nothing_is_recorded_while_it_is_off_and_it_begins_empty() {
        let ram = GuestRam::new(SPAN, false).unwrap();
        assert!(!ram.records_writes() && ram.take_written().is_empty());
        ram.write(SPAN.base, &[1]).unwrap();
        ram.record_writes(true);
        assert!(ram.records_writes());
        assert_eq!(taken(&ram), NONE);
        ram.write(SPAN.base, &[1]).unwrap();
        // It is on already.
        ram.record_writes(true);
        assert_eq!(taken(&ram), [0]);
        ram.write(SPAN.base, &[1]).unwrap();
        ram.record_writes(false);
        assert!(!ram.records_writes() && ram.take_written().is_empty());
        ram.write(SPAN.base, &[1]).unwrap();
        ram.record_writes(true);
        assert_eq!(taken(&ram), NONE);
    }

    #[test]
    fn returned_and_cleared_pages_and_mapped_files_are_recorded_too() {
        let ram = ram();
        ram.release(SPAN.base + PAGE + 1, 3 * PAGE);
        assert_eq!(taken(&ram), [2, 3]);
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&[7; 8192], 0).unwrap();
        ram.place_file(SPAN.base + 8 * PAGE, &file, 0, 8000).unwrap();
        assert_eq!(taken(&ram), [8, 9]);
        // The pages of the file stay: one of them is mapped, the other copied.
        ram.release(SPAN.base + 7 * PAGE, 2 * PAGE);
        assert_eq!(taken(&ram), [7]);
        ram.place_saved(SPAN.base + 20 * PAGE, &file, 0, 8192).unwrap();
        assert_eq!(taken(&ram), [20, 21]);
        ram.release(SPAN.base + 19 * PAGE, 2 * PAGE);
        assert_eq!(taken(&ram), [19, 20]);
        ram.clear().unwrap();
        assert_eq!(taken(&ram), (0..130).collect::<Vec<_>>());
    }

    /// Two writers go through RAM, each with bytes of its own in every page, while a reader copies the pages that it takes. In the end
    /// the copies are RAM.
    #[test]
    fn no_write_is_lost_while_another_thread_takes_the_pages() {
        const PAGES: u64 = 4096;
        let ram = GuestRam::new(Span { base: SPAN.base, size: PAGES * PAGE }, false).unwrap();
        ram.record_writes(true);
        let read = |page: u64| {
            let mut bytes = [0; 2];
            ram.read(SPAN.base + page * PAGE, &mut bytes).unwrap();
            bytes
        };
        let mut copies = vec![[0; 2]; index(PAGES)];
        for round in 1..=40 {
            thread::scope(|scope| {
                let ram = &ram;
                let writer = |number: u64| {
                    scope.spawn(move || {
                        for page in 0..PAGES {
                            ram.write(SPAN.base + page * PAGE + number, &[round]).unwrap();
                        }
                    })
                };
                let writers = [0, 1].map(writer);
                let mut is_over = false;
                while !is_over {
                    is_over = writers.iter().all(thread::ScopedJoinHandle::is_finished);
                    for page in taken(ram) {
                        copies[index(page)] = read(page);
                    }
                }
            });
            let stale = (0..PAGES).find(|page| copies[index(*page)] != read(*page));
            assert_eq!(stale, None, "round {round}");
            assert_eq!(copies[0], [round; 2]);
        }
    }

    #[test]
    fn pages_that_several_threads_note_at_once_are_all_taken() {
        const PAGES: u64 = 1 << 16;
        let pages = WrittenPages::default();
        pages.switch(true, PAGES);
        let mut taken = vec![0; index(PAGES / BITS)];
        for round in 0..30 {
            thread::scope(|scope| {
                let pages = &pages;
                let writer = |first: u64| {
                    let own = (first..PAGES).step_by(2);
                    scope.spawn(move || own.for_each(|page| pages.note(page..page + 1)))
                };
                let writers = [0, 1].map(writer);
                let mut is_over = false;
                while !is_over {
                    is_over = writers.iter().all(thread::ScopedJoinHandle::is_finished);
                    for (all, word) in taken.iter_mut().zip(pages.take()) {
                        assert_eq!(*all & word, 0, "a page is taken twice");
                        *all |= word;
                    }
                }
            });
            assert_eq!(taken.iter().position(|word| *word != u64::MAX), None, "round {round}");
            taken.fill(0);
        }
    }

    #[test]
    fn recording_may_end_while_others_write() {
        let ram = ram();
        thread::scope(|scope| {
            scope.spawn(|| (0..20_000).for_each(|_| ram.note_written(SPAN.base, SPAN.size)));
            for round in 0..2_000 {
                ram.record_writes(round % 2 == 1);
                let words = ram.take_written();
                assert!(words.is_empty() || words.len() == 3);
            }
        });
    }
}
