//! The storage that imago reads and writes: a file that was opened, checked and locked by rvmm.
//!
//! imago's own storage opens files by name. This one cannot, so an image cannot make imago open a file, and
//! it distinguishes a truncated file from one that is short by design. Left out: resizing, which is not used.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{FallocateFlags, fallocate, fdatasync};

use super::super::open::{Align, Files};
use super::header::{MARKS, MARKS_AT};

/// Size of a write of zeroes, if the file system cannot make them.
const ZEROES: usize = 64 << 10;

/// An open file.
#[derive(Debug)]
pub(super) struct Store {
    file: File,
    name: String,
    /// Alignment, if the file has O_DIRECT.
    align: Option<Align>,
    /// End of the file, as far as rvmm knows: if the file ends before it, it was truncated.
    end: AtomicU64,
    is_block: bool,
    /// Reads return the header without the bits that prevent writing.
    hides_marks: bool,
    blocked: CommonStorageHelper,
}

impl Store {
    /// The same open file as the disk's, with its lock.
    pub(super) fn new(files: &Files, name: &str) -> io::Result<Self> {
        Ok(Self {
            file: files.share()?,
            name: name.to_owned(),
            align: files.direct(),
            end: AtomicU64::new(files.bytes()?),
            is_block: files.is_block(),
            hides_marks: false,
            blocked: CommonStorageHelper::default(),
        })
    }

    /// Clears the dirty and corrupt bits in what imago reads: imago opens no image with them, although it may be read.
    pub(super) fn hide_marks(&mut self) {
        self.hides_marks = true;
    }

    fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_file(&mut *bytes, at)?;
        let marks = MARKS_AT.checked_sub(at).and_then(|skip| usize::try_from(skip).ok());
        if let (true, Some(byte)) = (self.hides_marks, marks.and_then(|skip| bytes.get_mut(skip))) {
            *byte &= !MARKS;
        }
        Ok(())
    }

    fn read_file(&self, mut rest: &mut [u8], mut at: u64) -> io::Result<()> {
        while !rest.is_empty() {
            let read = match self.file.read_at(rest, at) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            at += read as u64;
            rest = rest.get_mut(read..).unwrap_or_default();
            let is_aligned = self.align.is_none_or(|align| at.is_multiple_of(align.offset));
            if read == 0 || !is_aligned {
                if at < self.end() && !rest.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                rest.fill(0);
                break;
            }
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)?;
        self.end.fetch_max(at.saturating_add(bytes.len() as u64), Ordering::Relaxed);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        if end > self.end() && !self.is_block {
            // The file is extended by zeroes.
            self.file.set_len(end)?;
            self.end.fetch_max(end, Ordering::Relaxed);
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, mode, offset, len).is_ok() {
            return Ok(());
        }
        // Alignment that suffices for every disk.
        let piece = imago::io_buffers::IoBuffer::new(ZEROES, 4096)?;
        let mut piece = piece;
        piece.as_mut().into_slice().fill(0);
        let mut at = offset;
        while at < end {
            let more = (end - at).min(ZEROES as u64);
            let zeroes = piece.as_ref().into_slice();
            self.write(zeroes.get(..usize::try_from(more).unwrap_or(0)).unwrap_or_default(), at)?;
            at += more;
        }
        Ok(())
    }
}

impl Display for Store {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Storage for Store {
    fn mem_align(&self) -> usize {
        self.align.map_or(1, |align| align.memory)
    }

    fn req_align(&self) -> usize {
        self.align.map_or(1, |align| usize::try_from(align.offset).unwrap_or(4096))
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.end())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut at = offset;
        for mut piece in bufv.into_inner() {
            self.read(&mut piece, at)?;
            at = at.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut at = offset;
        for piece in bufv.into_inner() {
            self.write(&piece, at)?;
            at = at.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.blocked
    }
}
