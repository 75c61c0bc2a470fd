//! The Linux RISC-V `Image` header, Documentation/arch/riscv/boot-image-header.rst.
//!
//! The header is 64 bytes at the start of the file. Its magic is the second one ("RSC\x05" at 0x38); the
//! first is deprecated and ignored. `image_size` includes the BSS, which is not in the file, so it and not
//! the length of the file is the kernel's size in memory. Kernels with an EFI stub have a PE header as well;
//! it is read for the two facts that the `Image` header lacks: if the kernel is 64-bit, and the minimum
//! length of the file.

use crate::error::BootError;
use crate::kernel::{Format, KernelFile};
use crate::source::{Segment, Source, le_u16, le_u32, le_u64};

/// The length of the header in bytes.
pub const HEADER_LEN: usize = 64;

/// RISC-V Linux has to be loaded at a multiple of this (2 MiB, one PMD) from the start of RAM.
pub const ALIGN: u64 = 2 << 20;

/// Upper bound of the size of a kernel and of its offset from the start of RAM.
pub(crate) const ABSURD: u64 = 1 << 40;

/// PE machine number of 32-bit RISC-V (PE format, "Machine Types").
const PE_RISCV32: u16 = 0x5032;

/// True if a file that starts with `head` has the magic of a RISC-V `Image` ("RSC\x05" at 0x38).
#[must_use]
pub fn is_image(head: &[u8]) -> bool {
    head.get(0x38..0x3c) == Some(b"RSC\x05")
}

/// The fields of an `Image` header that are used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ImageHeader {
    /// Distance in bytes from the start of RAM at which the image has to be loaded.
    pub(crate) text_offset: u64,
    /// Size of the kernel in memory in bytes, BSS included; 0 if unknown.
    pub(crate) image_size: u64,
    /// Minimum length of the file in bytes.
    file_len: u64,
}

impl ImageHeader {
    /// Reads the header from the first bytes of a file for which [`is_image`] holds.
    ///
    /// # Errors
    /// The fault, then advice in parentheses.
    pub(crate) fn parse(head: &[u8]) -> Result<Self, String> {
        let field =
            |at| le_u64(head, at).ok_or("it is cut short inside its header (copy it again)");
        let (text_offset, image_size, flags) = (field(0x08)?, field(0x10)?, field(0x18)?);
        if flags & 1 != 0 {
            return Err("it is a big-endian RISC-V kernel (give a little-endian one)".into());
        }
        if text_offset >= ABSURD || !text_offset.is_multiple_of(ALIGN) {
            return Err(format!(
                "its header asks for the load offset {text_offset:#x}, which is not a multiple of 2 MiB \
                 below 1 TiB (the file is damaged: copy or build it again)"
            ));
        }
        if image_size >= ABSURD {
            return Err(format!(
                "its header claims {image_size:#x} bytes of memory \
                 (the file is damaged: copy or build it again)"
            ));
        }
        let pe = Pe::parse(head);
        if pe.is_some_and(|pe| pe.machine == PE_RISCV32) {
            return Err("it is a 32-bit RISC-V kernel (give an Image built for riscv64)".into());
        }
        let file_len = pe.map_or(HEADER_LEN as u64, |pe| pe.file_len);
        Ok(Self { text_offset, image_size, file_len })
    }

    /// Creates the segment of an image whose contents are `source`. A file that is longer than its header's
    /// `image_size` is nevertheless loaded completely.
    ///
    /// # Errors
    /// As [`ImageHeader::parse`]: the image is truncated.
    pub(crate) fn segment(&self, source: Source) -> Result<(Format, Segment), String> {
        let len = source.len();
        if len < self.file_len {
            return Err(format!(
                "it is cut short: {len} of at least {} bytes (copy or build it again)",
                self.file_len
            ));
        }
        let Self { text_offset, image_size, .. } = *self;
        let segment = Segment { address: text_offset, source, mem_len: image_size.max(len) };
        Ok((Format::Image { text_offset, image_size }, segment))
    }
}

/// Creates the segment of an uncompressed image: the whole file.
pub(crate) fn open(file: &KernelFile<'_>) -> Result<(Format, Segment), BootError> {
    let source = Source::File { file: file.file.clone(), offset: 0, len: file.len };
    ImageHeader::parse(&file.head)
        .and_then(|header| header.segment(source))
        .map_err(|reason| file.unusable(reason))
}

/// The fields of a PE header that are used (PE format, "COFF File Header", "Section Table").
#[derive(Clone, Copy)]
struct Pe {
    machine: u16,
    /// The end of the last section's data in the file.
    file_len: u64,
}

impl Pe {
    /// Reads the PE header of a kernel with an EFI stub; `None` if `head` has none.
    fn parse(head: &[u8]) -> Option<Self> {
        let start = usize::try_from(le_u32(head, 0x3c)?).ok()?;
        let pe = head.starts_with(b"MZ").then(|| head.get(start..)).flatten()?;
        let pe = pe.strip_prefix(b"PE\0\0")?;
        let sections = pe.get(20 + usize::from(le_u16(pe, 16)?)..)?.chunks_exact(40);
        let ends = sections.take(usize::from(le_u16(pe, 2)?)).filter_map(|section| {
            Some(u64::from(le_u32(section, 16)?) + u64::from(le_u32(section, 20)?))
        });
        Some(Self { machine: le_u16(pe, 0)?, file_len: ends.max().unwrap_or(0) })
    }
}
