//! The address space of guest RAM: reserved as a whole, with guard pages on both sides.
#![expect(unsafe_code, reason = "guest RAM is mapped by address, and files are mapped over it")]

use std::ffi::c_void;
use std::fs::File;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::error::Error;

/// Huge pages of the host's pool are 2 MiB; transparent ones too.
const HUGE: usize = 2 << 20;

/// RAM of a guest in this process's address space; unmapped on drop.
#[derive(Debug)]
pub(super) struct Reservation {
    /// The whole reservation, guards included.
    whole: *mut c_void,
    whole_size: usize,
    /// RAM itself, 2 MiB aligned.
    ram: *mut c_void,
    size: usize,
    huge: bool,
    /// The memfd of RAM, if other programs may map it.
    file: Option<Arc<File>>,
}

// SAFETY: the pointers are plain addresses of a mapping that exists as long as the value; this type never dereferences
// them, and accesses through them are volatile copies of vm-memory.
unsafe impl Send for Reservation {}
// SAFETY: as above; `&self` gives out only the address and the size.
unsafe impl Sync for Reservation {}

impl Reservation {
    pub(super) fn new(size: u64, huge: bool, shared: bool) -> Result<Self, Error> {
        // Without NORESERVE, mmap fails now if there are not enough huge pages, where a later access would raise SIGBUS. Pages
        // that a balloon has returned, or that a cgroup does not allow, may still fail later.
        let reserve = if huge { MapFlags::empty() } else { MapFlags::NORESERVE };
        Self::map(size, huge, shared, reserve)
    }

    /// Huge pages that are not reserved, so that the host may have none.
    #[cfg(test)]
    pub(super) fn of_absent_pages(size: u64, shared: bool) -> Result<Self, Error> {
        Self::map(size, true, shared, MapFlags::NORESERVE)
    }

    fn map(size: u64, huge: bool, shared: bool, reserve: MapFlags) -> Result<Self, Error> {
        let refuse = |source: Option<Errno>| Error::Memory {
            what: too_much(size, huge),
            source: source.map(Into::into),
        };
        let size = usize::try_from(size).map_err(|_| refuse(None))?;
        let whole_size = size.checked_add(3 * HUGE).ok_or_else(|| refuse(None))?;
        let none = ProtFlags::empty();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice does not affect existing ones.
        let whole = unsafe { mmap_anonymous(ptr::null_mut(), whole_size, none, flags) };
        let whole = whole.map_err(|e| refuse(Some(e)))?;
        // At least 2 MiB of guard remain below and above.
        let lead = HUGE + (whole.addr().next_multiple_of(HUGE) - whole.addr());
        let ram = whole.wrapping_byte_add(lead);
        let mut this = Self { whole, whole_size, ram, size, huge, file: None };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        if shared {
            let file = memory_file(size, huge).map_err(|e| refuse(Some(e)))?;
            let flags = MapFlags::SHARED | MapFlags::FIXED | reserve;
            // SAFETY: the range is inside `whole`, which belongs to this value and is not in use yet.
            unsafe { mmap(ram, size, prot, flags, &file, 0) }.map_err(|e| refuse(Some(e)))?;
            this.file = Some(Arc::new(file));
            return Ok(this);
        }
        let mut flags = MapFlags::PRIVATE | MapFlags::FIXED | reserve;
        if huge {
            flags |= MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        // SAFETY: the range is inside `whole`, which belongs to this value and is not in use yet.
        unsafe { mmap_anonymous(ram, size, prot, flags) }.map_err(|e| refuse(Some(e)))?;
        Ok(this)
    }

    pub(super) fn region(&self) -> Result<MmapRegion, Error> {
        let prot = (ProtFlags::READ | ProtFlags::WRITE).bits().cast_signed();
        let sharing = if self.file.is_some() { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let mut builder = MmapRegionBuilder::new(self.size)
            .with_mmap_prot(prot)
            .with_mmap_flags(sharing.bits().cast_signed());
        if let Some(file) = &self.file {
            builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), 0));
        }
        // SAFETY: `ram..ram + size` is mapped readable and writable, and stays so until `self` is dropped; GuestRam
        // drops every region before.
        let region = unsafe { builder.with_raw_mmap_pointer(self.ram.cast()) }.build();
        region
            .map_err(|e| Error::Memory { what: format!("Cannot use guest RAM: {e}"), source: None })
    }

    pub(super) fn address(&self) -> usize {
        self.ram.addr()
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn is_huge(&self) -> bool {
        self.huge
    }

    /// Size of a page of RAM.
    pub(super) fn page(&self) -> usize {
        if self.huge { HUGE } else { 4096 }
    }

    /// Offset of the first page of RAM that is not present: not accessed yet, or returned.
    pub(super) fn first_absent(&self) -> Option<u64> {
        let mut pages = (0..self.size).step_by(self.page());
        pages.find(|at| self.is_absent(*at)).map(|at| at as u64)
    }

    /// Offsets of all pages of RAM that are present.
    pub(super) fn present(&self) -> impl Iterator<Item = u64> {
        let pages = (0..self.size).step_by(self.page());
        pages.filter(|at| !self.is_absent(*at)).map(|at| at as u64)
    }

    /// True if the page at this offset of RAM is known not to be present.
    fn is_absent(&self, at: usize) -> bool {
        let mut is_there = 0_u8;
        let page = self.ram.wrapping_byte_add(at.min(self.size));
        // SAFETY: the page is inside the RAM mapping or the guard behind it, and for one page of the smallest size one byte is
        // written.
        let result = unsafe { libc::mincore(page, 4096, &raw mut is_there) };
        result == 0 && is_there & 1 == 0
    }

    pub(super) fn is_shared(&self) -> bool {
        self.file.is_some()
    }

    /// The memfd of shared RAM.
    pub(super) fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }

    /// Maps `len` bytes of `file` from `offset` over RAM at `at`, all multiples of the page size.
    pub(super) fn overlay(&self, at: u64, file: &File, offset: u64, len: u64) -> Result<(), Error> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.size as u64);
        let (Ok(at), Ok(len), true) = (usize::try_from(at), usize::try_from(len), fits) else {
            return Err(Error::Memory {
                what: "Cannot map a file outside guest RAM".into(),
                source: None,
            });
        };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the target is inside the RAM mapping (checked above), into which there are no references: all
        // accesses are volatile copies.
        unsafe { mmap(self.ram.wrapping_byte_add(at), len, prot, flags, file, offset) }.map_err(
            |e| Error::Memory {
                what: "Cannot map a file into guest memory".into(),
                source: Some(e.into()),
            },
        )?;
        Ok(())
    }
}

impl Reservation {
    /// Puts anonymous memory in the place of a file that was mapped over `len` bytes of RAM at `at`, both multiples of the page size.
    pub(super) fn uncover(&self, at: u64, len: u64) -> Result<(), Error> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.size as u64);
        let (Ok(at), Ok(len), true) = (usize::try_from(at), usize::try_from(len), fits) else {
            return Err(Error::Memory {
                what: "Cannot clear more than guest RAM".into(),
                source: None,
            });
        };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the target is inside the RAM mapping (checked above), into which there are no references: all
        // accesses are volatile copies.
        let mapped = unsafe { mmap_anonymous(self.ram.wrapping_byte_add(at), len, prot, flags) };
        mapped.map(|_| ()).map_err(|error| Error::Memory {
            what: "Cannot clear guest memory".into(),
            source: Some(error.into()),
        })
    }

    /// Has the host read the pages of `len` bytes of RAM at `at`, both multiples of the page size, from the files that are mapped there,
    /// and enter them in the page tables as if each had been read: no page is copied.
    pub(super) fn populate(&self, at: u64, len: u64) -> Result<(), Errno> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.size as u64);
        let (Ok(at), Ok(len), true) = (usize::try_from(at), usize::try_from(len), fits) else {
            return Err(Errno::INVAL);
        };
        // SAFETY: the range is inside the RAM mapping (checked above), whose contents do not change.
        unsafe { madvise(self.ram.wrapping_byte_add(at), len, Advice::LinuxPopulateRead) }
    }

    /// Returns the pages of `len` bytes of RAM at `at` to the host, both multiples of the page size and without mapped files: they
    /// read as zero from then on. Ignores a range that is not all RAM.
    pub(super) fn discard(&self, at: u64, len: u64) {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.size as u64);
        let (Ok(at), Ok(len), true) = (usize::try_from(at), usize::try_from(len), fits) else {
            return;
        };
        if let Some(file) = &self.file {
            // The memory consists of the file's pages, which other programs may map, too. On failure they stay.
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(file, how, at as u64, len as u64);
            return;
        }
        // SAFETY: the range is inside the RAM mapping (checked above), into which there are no references: all accesses
        // are volatile copies, and the kernel unmaps the pages from the guest, too. On failure they stay.
        let _ = unsafe { madvise(self.ram.wrapping_byte_add(at), len, Advice::LinuxDontNeed) };
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: `whole` belongs to this value alone and nothing that points into it outlives GuestRam. On failure the
        // mapping stays, which is harmless.
        let _ = unsafe { munmap(self.whole, self.whole_size) };
    }
}

/// Creates a memfd. Its size is sealed: a program that has it cannot truncate the guest's memory.
fn memory_file(size: usize, huge: bool) -> Result<File, Errno> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = memfd_create("guest-ram", flags)?;
    ftruncate(&file, size as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

fn too_much(size: u64, huge: bool) -> String {
    let mib = size >> 20;
    if huge {
        let pages = size.div_ceil(HUGE as u64);
        return format!(
            "Cannot allocate {mib} MiB of guest RAM in huge pages (reserve them: echo {pages} > \
             /proc/sys/vm/nr_hugepages, or omit --hugepages)"
        );
    }
    format!("Cannot allocate {mib} MiB of guest RAM (lower --mem, or raise the limit: ulimit -v)")
}
