//! The kernel's page map of this process: which pages of a mapping exist (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::PAGE;

/// Entries that are read at once: few, since they are on the stack.
const BATCH: usize = 512;

/// Bits of an entry: present, swapped out, a file's page or one of shared memory.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// The page map.
pub(super) struct PageMap(File);

/// An entry: one page of 4096 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageEntry(u64);

impl PageEntry {
    /// True if the page exists, in memory or in swap space; in a mapping of a file it may exist in the file only.
    pub(super) fn exists(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// True if the page is this process's own copy.
    pub(super) fn is_private(self) -> bool {
        self.exists() && self.0 & OF_A_FILE == 0
    }
}

impl PageMap {
    /// Opens the page map.
    ///
    /// # Errors
    /// There is none: `/proc` is not mounted.
    pub(super) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Calls `each` with the address and the length of every run of pages that are all `wanted`, of the `len` bytes at `address`, both
    /// multiples of 4096.
    ///
    /// # Errors
    /// The map cannot be read; runs before were reported.
    pub(super) fn for_runs(
        &self,
        address: usize,
        len: usize,
        wanted: impl Fn(PageEntry) -> bool,
        mut each: impl FnMut(usize, usize),
    ) -> io::Result<()> {
        let page = usize::try_from(PAGE).map_err(io::Error::other)?;
        let mut entries = [0; BATCH * 8];
        let is_wanted = |entry: &[u8; 8]| wanted(PageEntry(u64::from_ne_bytes(*entry)));
        for start in (address..address.saturating_add(len)).step_by(BATCH * page) {
            let count = BATCH.min((address + len - start) / page);
            let entries = entries.get_mut(..count * 8).unwrap_or_default();
            self.0.read_exact_at(entries, (start / page * 8) as u64)?;
            let (entries, _) = entries.as_chunks::<8>();
            let mut at = start;
            for run in entries.chunk_by(|a, b| is_wanted(a) == is_wanted(b)) {
                if run.first().is_some_and(is_wanted) {
                    each(at, run.len() * page);
                }
                at += run.len() * page;
            }
        }
        Ok(())
    }
}
