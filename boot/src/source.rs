//! Sources of bytes: part of an open file, which can be mapped, or memory; and how files are opened.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::error::{BootError, FileName, Role};

/// Contents to be mapped or copied into guest memory.
#[derive(Clone, Debug)]
pub enum Source {
    /// `len` bytes of an open regular file from `offset` on. The file is kept open so that the caller can
    /// map it (privately, copy on write) instead of reading it; it may change while the guest runs.
    File {
        /// The file, open for reading.
        file: Arc<File>,
        /// The file offset of the first byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Bytes in memory.
    Bytes(Vec<u8>),
}

impl Source {
    /// Opens a regular file of any content that is not empty; for [`crate::Cpio::file`].
    ///
    /// # Errors
    /// [`BootError::Open`], or [`BootError::Unusable`] for an empty file and for everything that is not a
    /// regular file.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        Self::open_as(path, Role::Data)
    }

    /// As [`Source::open`], with the purpose of the file for messages.
    pub(crate) fn open_as(path: &Path, role: Role) -> Result<Self, BootError> {
        let (file, len) = open_regular(path, role)?;
        if len == 0 {
            return Err(unusable(path, role, "it is empty (give a file with contents)".into()));
        }
        Ok(Self::File { file: Arc::new(file), offset: 0, len })
    }

    /// The number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::File { len, .. } => *len,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// True if there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes from `offset` (relative to the source) on.
    ///
    /// # Errors
    /// [`BootError::Changed`] if the file has become shorter than it was when it was opened, or if
    /// `offset + buf.len()` is past [`Source::len`].
    pub fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BootError> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len());
        if end.is_none() {
            return Err(BootError::Changed { source: io::ErrorKind::UnexpectedEof.into() });
        }
        match self {
            Self::File { file, offset: start, .. } => file
                .read_exact_at(buf, start.saturating_add(offset))
                .map_err(|source| BootError::Changed { source }),
            Self::Bytes(bytes) => {
                let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
                for (to, from) in buf.iter_mut().zip(rest.unwrap_or_default()) {
                    *to = *from;
                }
                Ok(())
            }
        }
    }
}

/// A piece of a kernel and its place in memory.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its address: relative to the start of RAM for an `Image`, guest-physical for an ELF file (see
    /// [`crate::kernel::Format`]).
    pub address: u64,
    /// Its contents.
    pub source: Source,
    /// Size in memory in bytes, at least `source.len()`; the rest (BSS) is zero when the guest starts.
    pub mem_len: u64,
}

/// Opens a regular file for reading and returns it with its length in bytes. Never blocks: a FIFO without a
/// writer is refused, not waited for, and a device is not opened.
///
/// # Errors
/// [`BootError::Open`] when the operating system refuses, [`BootError::Unusable`] when it is a folder, a
/// FIFO, a socket or a device.
pub(crate) fn open_regular(path: &Path, role: Role) -> Result<(File, u64), BootError> {
    let cannot_open = |source| BootError::Open { path: path.into(), source };
    check_regular(path, role, &fs::metadata(path).map_err(cannot_open)?)?;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(cannot_open)?;
    // Again on the open file, which can no longer be replaced.
    let metadata = file.metadata().map_err(cannot_open)?;
    check_regular(path, role, &metadata)?;
    Ok((file, metadata.len()))
}

fn check_regular(path: &Path, role: Role, metadata: &fs::Metadata) -> Result<(), BootError> {
    let kind = metadata.file_type();
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "a socket"
    };
    Err(unusable(path, role, format!("it is {what} (give a regular file)")))
}

/// The error for a file that is unsuitable for its option.
pub(crate) fn unusable(path: &Path, role: Role, reason: String) -> BootError {
    BootError::Unusable { path: FileName::from(path), role, reason }
}

/// The little-endian number of 2 bytes at `at`, if `bytes` are long enough.
pub(crate) fn le_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

/// The little-endian number of 4 bytes at `at`, if `bytes` are long enough.
pub(crate) fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

/// The little-endian number of 8 bytes at `at`, if `bytes` are long enough.
pub(crate) fn le_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}
