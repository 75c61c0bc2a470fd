//! Guest RAM: one private mapping between guard pages, with the user's files mapped into it copy-on-write. If another
//! program needs access, it is a memfd instead (memfd_create(2)), and the user's files are copied into it.
//!
//! A file may change or shrink while the guest runs: pages that the guest has not written then change, too, and
//! pages beyond the new end are lost. A lost page reads as zero for rvmm and stops the machine
//! ([`crate::vcpu::stop::StopReason::MemoryLost`]); it never ends the process (see `lost.rs`).
//!
//! Instead of files another program may have the contents: it serves the guest's page faults (`paging.rs`).
//!
//! Huge pages of the host's pool are reserved at the start. One that the balloon has returned may be in use by another program when
//! the guest needs it again, and a cgroup's limit does not affect reservations: both stop the machine, too, as a failure of the host.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::virtio::{DmaMemory, WriteLog};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::error::Error;
use crate::layout::Span;

mod lost;
mod occupied;
mod pagemap;
mod paging;
mod populate;
mod program;
mod reserve;
mod resting;
mod rom;
mod userfault;
mod written;

use lost::Watch;
pub(crate) use occupied::{append, data_in, united};
use paging::Paging;
pub use program::discard_program_pages;
use reserve::Reservation;
pub(crate) use rom::Rom;
pub(crate) use userfault::{Placed, Userfault};
use written::WrittenPages;

/// Size of a page of guest and host (RISC-V's base page; rvmm uses no smaller unit on the host).
pub const PAGE: u64 = 4096;

/// Size of a huge page of the host's pool.
const HUGE_PAGE: u64 = 2 << 20;

/// The guest's RAM and rvmm's access to it. All addresses are guest-physical.
#[derive(Debug)]
pub struct GuestRam {
    /// Unmapped last: `view` and `watch` point into it.
    view: GuestMemoryMmap,
    watch: Watch,
    files: Mutex<Vec<Overlay>>,
    written: WrittenPages,
    /// Set while another program serves its faults.
    paging: Mutex<Option<Paging>>,
    span: Span,
    reservation: Reservation,
}

/// A file whose pages are guest memory until the guest writes them.
#[derive(Debug)]
struct Overlay {
    file: Arc<File>,
    /// The range of guest memory.
    span: Span,
    /// The file must be at least this long for every mapped page to exist.
    needed: u64,
    /// What a page becomes again that the guest has returned.
    returned: Returned,
}

/// What the contents of a page of a mapped file are after the guest has returned it to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Returned {
    /// As before: such a page stays.
    Kept,
    /// The file's, which the guest had in its memory at some time.
    Files,
}

/// The reason why guest memory could not be accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RamError {
    /// Part of the range is not RAM.
    #[error("The range is not inside guest RAM")]
    NotRam,
    /// The memory was backed by a file that shrank or cannot be read, or the host has no huge page for it.
    #[error(
        "The file behind guest memory shrank or cannot be read, or the host has no huge page for it"
    )]
    Lost,
}

/// The reason for the stop of a machine if the host does not provide a huge page of its RAM.
const NO_HUGE_PAGE: &str = "no huge page is left for guest RAM: another program uses those that the balloon has returned, or a limit is reached (see HugePages_Free in /proc/meminfo and hugetlb.2MB.max of the cgroup; reserve more with sysctl vm.nr_hugepages, or omit --hugepages or the balloon)";

impl GuestRam {
    /// Allocates `span.size` bytes (a multiple of 4 KiB, with huge pages of 2 MiB) of zeroed memory for the guest at `span.base`. The
    /// host provides pages at their first access, transparent huge pages if it can.
    ///
    /// # Errors
    /// The host cannot reserve the address space, or with `hugepages` has not enough free huge pages.
    pub fn new(span: Span, hugepages: bool) -> Result<Self, Error> {
        Self::reserve(span, hugepages, false)
    }

    /// The same in a memfd, which the regions of [`DmaMemory::view`] refer to and which may be passed to other programs. Its size
    /// is sealed.
    ///
    /// # Errors
    /// As for [`GuestRam::new`].
    pub fn shared(span: Span, hugepages: bool) -> Result<Self, Error> {
        Self::reserve(span, hugepages, true)
    }

    fn reserve(span: Span, hugepages: bool, shared: bool) -> Result<Self, Error> {
        Self::over(span, Reservation::new(span.size, hugepages, shared)?)
    }

    fn over(span: Span, reservation: Reservation) -> Result<Self, Error> {
        let region = reservation.region()?;
        let watch = Watch::new(reservation.address(), reservation.size(), reservation.page())?;
        Self::assemble(span, reservation, region, watch)
    }

    fn assemble(
        span: Span,
        reservation: Reservation,
        region: MmapRegion,
        watch: Watch,
    ) -> Result<Self, Error> {
        let view = GuestRegionMmap::new(region, GuestAddress(span.base))
            .and_then(|region| GuestMemoryMmap::from_regions(vec![region]).ok());
        let view = view.ok_or_else(|| Error::Memory {
            what: format!("Cannot place {} bytes of RAM at {:#x}", span.size, span.base),
            source: None,
        })?;
        let (files, written) = (Mutex::default(), WrittenPages::default());
        Ok(Self { view, watch, files, written, paging: Mutex::default(), span, reservation })
    }

    /// The range of RAM.
    #[must_use]
    pub fn span(&self) -> Span {
        self.span
    }

    /// True if RAM is in huge pages of the host's pool.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.reservation.is_huge()
    }

    /// Host virtual address of the start of RAM.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.reservation.address() as u64
    }

    /// True if all of `len` bytes at `addr` are RAM.
    #[must_use]
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        addr >= self.span.base && addr.checked_add(len).is_some_and(|end| end <= self.span.end())
    }

    /// Copies from RAM.
    ///
    /// # Errors
    /// [`RamError::NotRam`], with nothing copied; [`RamError::Lost`] if a page is lost (it reads as zero).
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), RamError> {
        self.check(addr, buf.len())?;
        self.view.read_slice(buf, GuestAddress(addr)).map_err(|_| RamError::NotRam)?;
        self.still_there()
    }

    /// Copies into RAM.
    ///
    /// # Errors
    /// As [`GuestRam::read`].
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), RamError> {
        self.check(addr, bytes.len())?;
        self.view.write_slice(bytes, GuestAddress(addr)).map_err(|_| RamError::NotRam)?;
        self.note_written(addr, bytes.len() as u64);
        self.still_there()
    }

    /// Places `len` bytes of `file` from `offset` at `addr`: whole pages are mapped copy-on-write if their alignment allows it,
    /// the rest is copied.
    ///
    /// # Errors
    /// The range is not RAM, or the file cannot be read.
    pub fn place_file(
        &self,
        addr: u64,
        file: &Arc<File>,
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        self.place(addr, file, offset, len, Returned::Kept)
    }

    /// The same with a saved guest's memory. Pages that the guest returns later have the file's contents again.
    ///
    /// # Errors
    /// As for [`GuestRam::place_file`].
    pub fn place_saved(
        &self,
        addr: u64,
        file: &Arc<File>,
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        self.place(addr, file, offset, len, Returned::Files)
    }

    fn place(
        &self,
        addr: u64,
        file: &Arc<File>,
        offset: u64,
        len: u64,
        returned: Returned,
    ) -> Result<(), Error> {
        if !self.contains(addr, len) {
            return Err(Error::Memory {
                what: format!("Cannot place {len} bytes at {addr:#x}: not inside guest RAM"),
                source: None,
            });
        }
        let lead = addr.next_multiple_of(PAGE).saturating_sub(addr).min(len);
        let pages = (len - lead) / PAGE * PAGE;
        // Other programs that map shared memory would not see a file mapped over it here.
        let is_plain = !self.reservation.is_huge() && !self.reservation.is_shared();
        let mappable = is_plain && (offset + lead).is_multiple_of(PAGE);
        let mapped = if mappable { pages } else { 0 };
        self.copy_file(addr, file, offset, lead)?;
        if mapped > 0 {
            self.reservation.overlay(addr + lead - self.span.base, file, offset + lead, mapped)?;
            let span = Span { base: addr + lead, size: mapped };
            let needed = offset + lead + mapped;
            let overlay = Overlay { file: Arc::clone(file), span, needed, returned };
            self.overlays().push(overlay);
            self.note_written(span.base, span.size);
        }
        let done = lead + mapped;
        self.copy_file(addr + done, file, offset + done, len - done)
    }

    /// Makes RAM what it was at first: it reads as zero, and no file is mapped over it. Nothing accesses it meanwhile.
    ///
    /// # Errors
    /// The host cannot replace a mapped file.
    pub fn clear(&self) -> Result<(), Error> {
        // No other program fills what is returned to the host here.
        self.end_paging()?;
        for Overlay { span, .. } in self.overlays().drain(..) {
            self.reservation.uncover(span.base - self.span.base, span.size)?;
        }
        if !self.reservation.is_huge() {
            self.reservation.discard(0, self.span.size);
            self.note_written(self.span.base, self.span.size);
            return Ok(());
        }
        // Huge pages that are returned are no longer reserved: another program could take them.
        let zeroes = vec![0; self.reservation.page()];
        for at in self.reservation.present() {
            self.write(self.span.base + at, &zeroes)
                .map_err(|e| Error::Memory { what: self.explain(e), source: None })?;
        }
        Ok(())
    }

    fn copy_file(&self, addr: u64, file: &File, offset: u64, len: u64) -> Result<(), Error> {
        use std::os::unix::fs::FileExt;
        let mut chunk = vec![0; usize::try_from(len.min(1 << 20)).unwrap_or(1 << 20)];
        let mut done = 0;
        while done < len {
            let want = usize::try_from((len - done).min(1 << 20)).unwrap_or(1 << 20);
            let part = chunk.get_mut(..want).unwrap_or_default();
            file.read_exact_at(part, offset + done).map_err(|source| Error::Memory {
                what: "Cannot read a file into guest memory (it may have been truncated)".into(),
                source: Some(source),
            })?;
            self.write(addr + done, part)
                .map_err(|e| Error::Memory { what: self.explain(e), source: None })?;
            done += want as u64;
        }
        Ok(())
    }

    /// A message about RAM that could not be accessed, as a sentence.
    #[must_use]
    pub fn explain(&self, error: RamError) -> String {
        match (error, self.failure()) {
            (RamError::Lost, Some(failure)) => format!("Guest RAM is not available: {failure}"),
            _ => error.to_string(),
        }
    }

    /// True if a page of RAM is lost because the file behind it shrank or cannot be read, or if the host has no huge page for
    /// it. Checks all files, so it is only to be called after a failed access.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        let shrank = |o: &Overlay| o.file.metadata().map_or(true, |m| m.size() < o.needed);
        self.watch.fired() || self.overlays().iter().any(shrank) || self.lacks_page()
    }

    /// The host's failure, if a loss of RAM cannot be due to a file: RAM in huge pages has no mapped files.
    #[must_use]
    pub fn failure(&self) -> Option<&'static str> {
        self.reservation.is_huge().then_some(NO_HUGE_PAGE)
    }

    /// True if RAM is in huge pages and an access to the first absent one fails.
    fn lacks_page(&self) -> bool {
        let absent = self.reservation.is_huge().then(|| self.reservation.first_absent());
        absent.flatten().is_some_and(|at| {
            self.read(self.span.base.saturating_add(at), &mut [0]) == Err(RamError::Lost)
        })
    }

    fn overlays(&self) -> MutexGuard<'_, Vec<Overlay>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, addr: u64, len: usize) -> Result<(), RamError> {
        if self.contains(addr, len as u64) { Ok(()) } else { Err(RamError::NotRam) }
    }

    fn still_there(&self) -> Result<(), RamError> {
        if self.watch.fired() { Err(RamError::Lost) } else { Ok(()) }
    }
}

impl DmaMemory for GuestRam {
    fn view(&self) -> &GuestMemoryMmap {
        &self.view
    }

    fn records_writes(&self) -> bool {
        self.written.is_on()
    }

    fn note_written(&self, addr: u64, len: u64) {
        if self.records_writes() {
            self.note_pages(addr, len);
        }
    }

    fn write_log(&self) -> Option<WriteLog> {
        self.log()
    }

    /// Pages of a kernel's file are kept: after MADV_DONTNEED they would have the file's contents again, and anonymous pages in their
    /// place would need a mapping each, whose number is limited. They are few, and the host can reclaim those that the guest has
    /// not written. Those of a saved guest's memory are most of a restored guest's: they get the contents of its file again.
    fn release(&self, addr: u64, len: u64) {
        let (keeps_pages, _guard) = self.keeps_pages();
        if keeps_pages {
            return;
        }
        let step = if self.reservation.is_huge() { HUGE_PAGE } else { PAGE };
        let end = addr.saturating_add(len).min(self.span.end()) / step * step;
        let Some(mut at) = addr.max(self.span.base).checked_next_multiple_of(step) else { return };
        let is_kept = |overlay: &&Overlay| overlay.returned == Returned::Kept;
        let files: Vec<Span> =
            self.overlays().iter().filter(is_kept).map(|overlay| overlay.span).collect();
        while at < end {
            // Up to the next file, or to the end of the file at `at`.
            let ahead = files.iter().filter(|file| file.end() > at);
            match ahead.min_by_key(|file| file.base) {
                Some(file) if file.base <= at => at = file.end().next_multiple_of(step),
                next => {
                    let stop = next.map_or(end, |file| file.base.min(end) / step * step);
                    if stop <= at {
                        at += step;
                        continue;
                    }
                    self.reservation.discard(at - self.span.base, stop - at);
                    self.note_written(at, stop - at);
                    at = stop;
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
#[cfg(test)]
pub(crate) use tests::without_huge_pages;
