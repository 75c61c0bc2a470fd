//! An `Image` inside gzip (RFC 1952) or zstd (RFC 8878), unpacked within bounds.
//!
//! A compressed file is a program somebody else wrote, so nothing of it is believed: the first bytes that
//! come out have to be an `Image` header, and no more may come out than that header and the caller's limit
//! allow. All gzip members and all zstd frames are unpacked, as `gzip -dc` and `zstd -dc` do: programs that
//! compress with several threads write several, and so does who appends a file to another. What follows the
//! last one and is none (a size, a padding) is left out, and [`crate::Kernel::left_out`] says how much that is.

mod gzip;
mod zstd;

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;

use self::gzip::Gzip;
use self::zstd::Zstd;
use crate::error::{BootError, Size};
use crate::image::{self, Header};
use crate::kernel::{Format, HEAD_LEN, KernelFile};
use crate::source::{Segment, Source};
use crate::{elf, foreign};

/// No more bytes than this are looked at to see whether what follows the contents is padding.
const MOST_PADDING: u64 = 1 << 20;

/// A compression format that a kernel may come in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Compression {
    /// gzip, RFC 1952 (`Image.gz`).
    Gzip,
    /// Zstandard, RFC 8878 (`Image.zst`).
    Zstd,
}

impl Compression {
    /// What the first bytes of a file say it is compressed with, as far as rvmm unpacks it.
    #[must_use]
    pub fn of(head: &[u8]) -> Option<Self> {
        if gzip::is_member(head) {
            return Some(Self::Gzip);
        }
        (zstd::is_frame(head) || zstd::is_skippable_frame(head)).then_some(Self::Zstd)
    }

    /// Its name, which is that of its program too: `gzip`.
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

/// What came out of a compressed file.
pub(crate) struct Unpacked {
    pub(crate) format: Format,
    pub(crate) segment: Segment,
    /// Bytes of the file behind its last member or frame; 0 where they begin with nothing but zeros.
    pub(crate) left_out: u64,
}

/// Unpacks the `Image` in `file`, which may take at most `limit` bytes.
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

/// The header of the `Image` whose first bytes are `head`, or what it is instead.
fn image_header(head: &[u8], compression: Compression) -> Result<Header, String> {
    if image::is_image(head) {
        return Header::parse(head);
    }
    if elf::is_elf(head) {
        return Err(format!(
            "it is an ELF file inside {compression} (unpack it first: {compression} -dc FILE > ELF)"
        ));
    }
    let inside = foreign::describe(head, head.len() as u64);
    Err(format!("it is a {compression} file without an Image inside; what is inside: {inside}"))
}

/// A decoder and what came out of it so far.
struct Unpacker<'a> {
    decoder: Decoder<'a>,
    bytes: Vec<u8>,
}

/// Either decoder, over all members or frames. Both check each checksum that there is.
enum Decoder<'a> {
    Gzip(Box<Gzip<'a>>),
    Zstd(Box<Zstd<'a>>),
}

impl<'a> Unpacker<'a> {
    /// Starts to unpack the file, which has to be at its beginning.
    fn new(file: &'a File, compression: Compression, limit: u64) -> Self {
        let input = BufReader::with_capacity(64 << 10, file);
        let budget = Budget::for_contents(limit);
        let decoder = match compression {
            Compression::Gzip => Decoder::Gzip(Box::new(Gzip::new(input, budget))),
            Compression::Zstd => Decoder::Zstd(Box::new(Zstd::new(input, budget))),
        };
        Self { decoder, bytes: Vec::new() }
    }

    /// Unpacks until there are `most` bytes, or all of them.
    fn fill(&mut self, most: u64) -> io::Result<()> {
        let missing = most.saturating_sub(self.bytes.len() as u64);
        let mut decoder: &mut dyn Read = match &mut self.decoder {
            Decoder::Gzip(gzip) => gzip,
            Decoder::Zstd(zstd) => zstd,
        };
        (&mut decoder).take(missing).read_to_end(&mut self.bytes).map(drop)
    }

    /// Once all is unpacked: see [`Unpacked::left_out`].
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

/// The next four bytes of a file that is read from its beginning on, without taking them; zeros where it has fewer.
fn peek(input: &mut BufReader<&File>) -> io::Result<[u8; 4]> {
    let mut next = [0; 4];
    let at = input.stream_position()?;
    match input.get_ref().read_exact_at(&mut next, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok([0; 4]),
        result => result.map(|()| next),
    }
}

/// How many members or blocks a file may have: in a hostile one they have no contents, and there are millions.
struct Budget(u64);

impl Budget {
    /// For contents of at most `limit` bytes. A gzip member, or a block of zstd, has some 64 KiB or more as a rule.
    fn for_contents(limit: u64) -> Self {
        Self((1 << 10) + (limit >> 10))
    }

    fn spend_one(&mut self) -> io::Result<()> {
        self.0 = self.0.checked_sub(1).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "it goes on and on without any contents")
        })?;
        Ok(())
    }
}
