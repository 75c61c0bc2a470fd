//! Memory that the guest only reads: bytes of rvmm's own, a file, or the host's physical memory.

use std::fs::File;
use std::io;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Size of a page.
const PAGE_SIZE: usize = 4096;

/// Whole pages of this process's memory, unmapped on drop: it must outlive its memory slot.
#[derive(Debug)]
pub(crate) struct Rom {
    region: MmapRegion,
}

impl Rom {
    /// One page with these bytes at its start, at most 4096, followed by zeroes.
    pub(crate) fn page(bytes: &[u8]) -> io::Result<Self> {
        let region = MmapRegion::new(PAGE_SIZE).map_err(io::Error::other)?;
        let slice = region.as_volatile_slice();
        whole(&slice, bytes.len())?;
        slice.write_slice(bytes, 0).map_err(io::Error::other)?;
        Ok(Self { region })
    }

    /// `size` bytes of `file` from `offset` on, both multiples of 4096. Pages beyond the end of a regular file cannot be
    /// read: the machine stops if the guest tries.
    pub(crate) fn of(file: File, offset: u64, size: u64) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let file = FileOffset::new(file, offset);
        let prot = ProtFlags::READ.bits().cast_signed();
        // Shared, since a private mapping of the host's physical memory would be a copy of it.
        let flags = MapFlags::SHARED.bits().cast_signed();
        let region =
            MmapRegion::build(Some(file), size, prot, flags).map_err(|error| match error {
                vm_memory::mmap::MmapRegionError::Mmap(error) => error,
                other => io::Error::other(other),
            })?;
        Ok(Self { region })
    }

    pub(crate) fn size(&self) -> usize {
        self.region.size()
    }

    /// Host virtual address of the first byte.
    pub(crate) fn host_address(&self) -> u64 {
        self.region.as_ptr().addr() as u64
    }

    /// Copies from `offset` on. Only for memory that cannot be lost: not for a file that might be truncated.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) -> io::Result<()> {
        self.region.as_volatile_slice().read_slice(data, offset).map_err(io::Error::other)
    }
}

fn whole<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, len: usize) -> io::Result<()> {
    if len > slice.len() { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::PAGE;
    use super::*;

    #[test]
    fn a_page_holds_its_bytes_and_zeroes_behind_them() {
        let rom = Rom::page(b"abc").unwrap();
        let mut data = [0xee; 5];
        rom.read(0, &mut data).unwrap();
        assert_eq!(&data, b"abc\0\0");
        assert!(rom.host_address().is_multiple_of(PAGE) && rom.size() == PAGE_SIZE);
        assert!(rom.read(PAGE_SIZE - 2, &mut data).is_err());
        assert!(Rom::page(&[0; 4097]).is_err());
    }

    #[test]
    fn pages_of_a_file_are_read_from_where_they_were_asked_for() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[[1; 4096], [2; 4096]].concat()).unwrap();
        let rom = Rom::of(file, PAGE, PAGE).unwrap();
        let mut data = [0; 2];
        rom.read(4094, &mut data).unwrap();
        assert_eq!(data, [2, 2]);
    }
}
