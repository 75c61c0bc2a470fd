//! An `Image` inside gzip (RFC 1952) or zstd (RFC 8878), decompressed within bounds.
//!
//! A compressed file is untrusted: its first decompressed bytes have to be an `Image` header, and its
//! contents may not be larger than that header and the caller's limit allow. All gzip members and all zstd
//! frames are decompressed, as `gzip -dc` and `zstd -dc` do: multi-threaded compressors write several, and
//! so does appending one file to another. Other data after the last one (a size, padding) is left out;
//! [`crate::Kernel::left_out`] returns its length.

mod gzip;
mod zstd;

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;

use self::gzip::Gzip;
use self::zstd::Zstd;
use crate::error::{BootError, Size};
use crate::image::{self, ImageHeader};
use crate::kernel::{Format, HEAD_LEN, KernelFile};
use crate::source::{Segment, Source};
use crate::{elf, foreign};

/// Maximum number of bytes after the contents that are checked for being padding.
const MOST_PADDING: u64 = 1 << 20;

/// A supported compression format of a kernel file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Compression {
    /// gzip, RFC 1952 (`Image.gz`).
    Gzip,
    /// Zstandard, RFC 8878 (`Image.zst`).
    Zstd,
}

impl Compression {
    /// The supported compression format whose magic the first bytes of a file have, if any.
    #[must_use]
    pub fn of(head: &[u8]) -> Option<Self> {
        if gzip::is_member(head) {
            return Some(Self::Gzip);
        }
        (zstd::is_frame(head) || zstd::is_skippable_frame(head)).then_some(Self::Zstd)
    }

    /// Name of the format, which is also the name of its program: `gzip`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The contents of a compressed file.
pub(crate) struct Unpacked {
    pub(crate) format: Format,
    pub(crate) segment: Segment,
    /// Bytes of the file after its last member or frame; 0 if they are zero padding.
    pub(crate) left_out: u64,
}

/// Decompresses the `Image` in `file`, which may have at most `limit` bytes.
pub(crate) fn unpack(
    file: &KernelFile<'_>,
    compression: Compression,
    limit: u64,
) -> Result<Unpacked, BootError> {
    let damaged =
        |source| BootError::Unpack { path: file.path.into(), format: compression.name(), source };
    if file.len > limit {
        return Err(file.unusable(too_large(limit)));
    }
    let mut unpacker = Unpacker::new(&file.file, compression, limit);
    unpacker.fill(HEAD_LEN as u64).map_err(damaged)?;
    let header = image_header(&unpacker.bytes, compression).map_err(|what| file.unusable(what))?;
    let most = if header.image_size == 0 { limit } else { header.image_size.min(limit) };
    unpacker.fill(most.saturating_add(1)).map_err(damaged)?;
    if unpacker.bytes.len() as u64 > most {
        let reason = match header.image_size {
            size if size != 0 && size <= limit => {
                "it unpacks to more than its header says (copy or build it again)".into()
            }
            _ => too_large(limit),
        };
        return Err(file.unusable(reason));
    }
    let left_out = unpacker.left_out(file).map_err(damaged)?;
    let segment = header.segment(Source::Bytes(unpacker.bytes));
    let (format, segment) = segment.map_err(|reason| file.unusable(reason))?;
    Ok(Unpacked { format, segment, left_out })
}

fn too_large(limit: u64) -> String {
    format!("it unpacks to more than {} (give the guest more memory with --mem)", Size(limit))
}

/// The header of the `Image` whose first bytes are `head`; the error describes the file that it is instead.
fn image_header(head: &[u8], compression: Compression) -> Result<ImageHeader, String> {
    if image::is_image(head) {
        return ImageHeader::parse(head);
    }
    if elf::is_elf(head) {
        return Err(format!(
            "it is an ELF file inside {compression} (unpack it first: {compression} -dc FILE > ELF)"
        ));
    }
    let inside = foreign::describe(head, head.len() as u64);
    Err(format!("it is a {compression} file without an Image inside; what is inside: {inside}"))
}

/// A decoder and its output so far.
struct Unpacker<'a> {
    decoder: Decoder<'a>,
    bytes: Vec<u8>,
}

/// Either decoder, over all members or frames. Both verify every checksum in the file.
enum Decoder<'a> {
    Gzip(Box<Gzip<'a>>),
    Zstd(Box<Zstd<'a>>),
}

impl<'a> Unpacker<'a> {
    /// Starts decompressing the file, whose position has to be 0.
    fn new(file: &'a File, compression: Compression, limit: u64) -> Self {
        let input = BufReader::with_capacity(64 << 10, file);
        let budget = Budget::for_contents(limit);
        let decoder = match compression {
            Compression::Gzip => Decoder::Gzip(Box::new(Gzip::new(input, budget))),
            Compression::Zstd => Decoder::Zstd(Box::new(Zstd::new(input, budget))),
        };
        Self { decoder, bytes: Vec::new() }
    }

    /// Decompresses until there are `most` bytes, or all of them.
    fn fill(&mut self, most: u64) -> io::Result<()> {
        let missing = most.saturating_sub(self.bytes.len() as u64);
        let mut decoder: &mut dyn Read = match &mut self.decoder {
            Decoder::Gzip(gzip) => gzip,
            Decoder::Zstd(zstd) => zstd,
        };
        (&mut decoder).take(missing).read_to_end(&mut self.bytes).map(drop)
    }

    /// Returns [`Unpacked::left_out`], once all is decompressed.
    fn left_out(&mut self, file: &KernelFile<'_>) -> io::Result<u64> {
        let end = match &mut self.decoder {
            Decoder::Gzip(gzip) => gzip.end(),
            Decoder::Zstd(zstd) => zstd.end()?,
        };
        let mut rest = &*file.file;
        rest.seek(io::SeekFrom::Start(end))?;
        let mut padding = BufReader::new(rest.take(MOST_PADDING)).bytes();
        let is_padding =
            padding.try_fold(true, |zeros, byte| Ok::<_, io::Error>(zeros && byte? == 0))?;
        Ok(if is_padding { 0 } else { file.len.saturating_sub(end) })
    }
}

/// The next four bytes of the input, without consuming them; zeros if the file has fewer.
fn peek(input: &mut BufReader<&File>) -> io::Result<[u8; 4]> {
    let mut next = [0; 4];
    let at = input.stream_position()?;
    match input.get_ref().read_exact_at(&mut next, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok([0; 4]),
        result => result.map(|()| next),
    }
}

/// Maximum number of members or blocks of a file: a hostile one may have millions of empty ones.
struct Budget(u64);

impl Budget {
    /// The budget for contents of at most `limit` bytes. A gzip member or a zstd block usually has 64 KiB or more.
    fn for_contents(limit: u64) -> Self {
        Self((1 << 10) + (limit >> 10))
    }

    fn spend_one(&mut self) -> io::Result<()> {
        self.0 = self.0.checked_sub(1).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "it has too many empty members or blocks")
        })?;
        Ok(())
    }
}
