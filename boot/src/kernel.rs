//! A kernel file: detected by its magic, kept open, described as segments.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::compressed::{self, Compression, Unpacked};
use crate::error::{BootError, FileName, Role};
use crate::source::{Segment, open_regular, unusable};
use crate::{elf, foreign, image};

/// Number of bytes at the start of a file that determine its format.
pub(crate) const HEAD_LEN: usize = 36 << 10;

/// The format of a kernel, with the addresses in its header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// A Linux RISC-V `Image` (Documentation/arch/riscv/boot-image-header.rst). Its one segment's address
    /// is relative to the start of RAM and equals `text_offset`; the guest starts at its first byte.
    Image {
        /// Distance in bytes from the start of RAM; a multiple of 2 MiB.
        text_offset: u64,
        /// Size of the kernel in memory in bytes as given by the header, BSS included (0: unknown).
        image_size: u64,
    },
    /// An ELF file. Its segments' addresses are guest-physical.
    Elf {
        /// The guest-physical address of the first instruction, which is in one of the segments' contents; `None` if the
        /// file gives no such address and has no contents at its lowest one.
        entry: Option<u64>,
        /// The file's entry field, unchanged: it may be virtual or outside of all segments.
        e_entry: u64,
    },
}

/// A kernel that can boot: its file is open, its headers are checked, its contents are not copied
/// (unless it was compressed).
#[derive(Clone, Debug)]
pub struct Kernel {
    name: FileName,
    format: Format,
    compression: Option<Compression>,
    left_out: u64,
    segments: Vec<Segment>,
}

impl Kernel {
    /// Opens a kernel file of any format that can boot: a RISC-V `Image`, an `Image` inside gzip or zstd,
    /// or a 64-bit little-endian RISC-V ELF file with physical addresses. `limit` is the maximum size in bytes of
    /// a decompressed kernel; the size of guest memory is the natural choice.
    ///
    /// # Errors
    /// Any other file is refused after at most a few reads, with one line that describes it and gives advice:
    /// [`BootError::Open`], [`BootError::Read`], [`BootError::Unusable`], [`BootError::Unpack`].
    pub fn open(path: &Path, limit: u64) -> Result<Self, BootError> {
        let (file, len) = open_regular(path, Role::Kernel)?;
        if len == 0 {
            return Err(unusable(path, Role::Kernel, foreign::describe(&[], 0)));
        }
        let cannot_read = |source| BootError::Read { path: path.into(), source };
        let head = read_head(&file).map_err(cannot_read)?;
        let file = KernelFile { path, file: Arc::new(file), len, head };
        if let Some(compression) = Compression::of(&file.head) {
            let Unpacked { format, segment, left_out } =
                compressed::unpack(&file, compression, limit)?;
            let kernel = file.kernel(format, vec![segment]);
            return Ok(Self { compression: Some(compression), left_out, ..kernel });
        }
        if image::is_image(&file.head) {
            let (format, segment) = image::open(&file)?;
            return Ok(file.kernel(format, vec![segment]));
        }
        if elf::is_elf(&file.head) {
            let (format, segments) = elf::open(&file)?;
            return Ok(file.kernel(format, segments));
        }
        Err(file.unusable(foreign::describe(&file.head, file.len)))
    }

    /// The name of the file, safe to print.
    #[must_use]
    pub fn name(&self) -> &FileName {
        &self.name
    }

    /// The format of the kernel.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// The compression of the file, if any.
    #[must_use]
    pub fn compression(&self) -> Option<Compression> {
        self.compression
    }

    /// Bytes of the file after its compressed contents, which are ignored; 0 if there are none, or if they are zero
    /// padding.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Its pieces: one for an `Image`, one per loadable segment for an ELF file, sorted by address.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

impl fmt::Display for Kernel {
    /// `/boot/Image (Image inside gzip)`, for the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match self.format {
            Format::Image { .. } => "Image",
            Format::Elf { .. } => "ELF",
        };
        match self.compression {
            Some(compression) => write!(f, "{} ({format} inside {compression})", self.name),
            None => write!(f, "{} ({format})", self.name),
        }
    }
}

/// A regular file that is being opened as a [`Kernel`].
pub(crate) struct KernelFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) file: Arc<File>,
    /// The length of the file in bytes when it was opened.
    pub(crate) len: u64,
    /// Its first [`HEAD_LEN`] bytes, or all of them.
    pub(crate) head: Vec<u8>,
}

impl KernelFile<'_> {
    /// The error for a file that is not a kernel: a description of it, then advice in parentheses.
    pub(crate) fn unusable(&self, reason: String) -> BootError {
        unusable(self.path, Role::Kernel, reason)
    }

    /// A kernel that is not compressed.
    fn kernel(&self, format: Format, segments: Vec<Segment>) -> Kernel {
        Kernel { name: self.path.into(), format, compression: None, left_out: 0, segments }
    }
}

/// Reads the first [`HEAD_LEN`] bytes, or as many as there are.
pub(crate) fn read_head(file: &File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD_LEN];
    let mut filled = 0;
    while let Some(rest) = head.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(filled);
    Ok(head)
}
