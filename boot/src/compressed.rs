//! An `Image` inside gzip (RFC 1952) or zstd (RFC 8878), unpacked within bounds.
//!
//! A compressed file is a program somebody else wrote, so nothing of it is believed: the first bytes that
//! come out have to be an `Image` header, no more may come out than that header (and the caller's limit)
//! allows, and input that yields no output is given up on early. Only the first gzip member or zstd frame
//! counts; what follows it (a size, a padding) is not looked at.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::rc::Rc;

use flate2::bufread::GzDecoder;
use ruzstd::decoding::{DEFAULT_MAX_WINDOW_SIZE, FrameDecoder, StreamingDecoder};

use crate::error::{BootError, Size};
use crate::image::{self, Header};
use crate::kernel::{Format, HEAD_LEN, KernelFile};
use crate::source::{Segment, Source};
use crate::{elf, foreign};

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
        match head {
            [0x1f, 0x8b, 0x08, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
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

/// Unpacks the `Image` in `file`, which may take at most `limit` bytes.
pub(crate) fn unpack(
    file: &KernelFile<'_>,
    compression: Compression,
    limit: u64,
) -> Result<(Format, Segment), BootError> {
    let damaged =
        |source| BootError::Unpack { path: file.path.into(), format: compression.name(), source };
    if file.len > limit {
        return Err(file.unusable(too_large(limit)));
    }
    let mut unpacker = Unpacker::new(&file.file, compression, limit).map_err(damaged)?;
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
    header.segment(Source::Bytes(unpacker.bytes)).map_err(|reason| file.unusable(reason))
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
    allowance: Rc<Cell<u64>>,
    /// Input that may be read ahead of the output.
    slack: u64,
    bytes: Vec<u8>,
}

impl<'a> Unpacker<'a> {
    /// Output is asked for in pieces of this many bytes.
    const CHUNK: u64 = 256 << 10;

    /// Starts to unpack the file, which has to be at its beginning.
    fn new(file: &'a File, compression: Compression, limit: u64) -> io::Result<Self> {
        let window = DEFAULT_MAX_WINDOW_SIZE.min(limit);
        let slack = match compression {
            Compression::Gzip => 4 * Self::CHUNK,
            // The decoder gives nothing away before its window is full.
            Compression::Zstd => 4 * Self::CHUNK + window,
        };
        let allowance = Rc::new(Cell::new(slack));
        let metered = Metered { inner: file, allowance: allowance.clone() };
        let input = BufReader::with_capacity(64 << 10, metered);
        let decoder = match compression {
            Compression::Gzip => Decoder::Gzip(Box::new(GzDecoder::new(input))),
            Compression::Zstd => StreamingDecoder::new_with_max_window_size(input, window)
                .map(|decoder| Decoder::Zstd(Box::new(decoder)))
                .map_err(io::Error::other)?,
        };
        Ok(Self { decoder, allowance, slack, bytes: Vec::new() })
    }

    /// Unpacks until there are `most` bytes, or all of them.
    fn fill(&mut self, most: u64) -> io::Result<()> {
        loop {
            let wanted = most.saturating_sub(self.bytes.len() as u64).min(Self::CHUNK);
            let got = (&mut self.decoder).take(wanted).read_to_end(&mut self.bytes)? as u64;
            if got == 0 {
                return Ok(());
            }
            // Neither format makes its contents much larger than they are.
            self.allowance
                .set(self.allowance.get().saturating_add(2 * got).min(self.slack + 2 * got));
        }
    }
}

/// Either decoder; both check the checksum, if there is one, before they say that this was all.
enum Decoder<'a> {
    Gzip(Box<GzDecoder<BufReader<Metered<'a>>>>),
    Zstd(Box<StreamingDecoder<BufReader<Metered<'a>>, FrameDecoder>>),
}

impl Read for Decoder<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let zstd = match self {
            Self::Gzip(gzip) => return gzip.read(buf),
            Self::Zstd(zstd) => zstd,
        };
        let got = zstd.read(buf)?;
        let written = zstd.decoder.get_checksum_from_data();
        if got == 0 && !buf.is_empty() && written.is_some() {
            let computed = zstd.decoder.get_calculated_checksum();
            if written != computed {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its checksum is wrong"));
            }
        }
        Ok(got)
    }
}

/// A file that may be read only as far as there is an allowance for.
struct Metered<'a> {
    inner: &'a File,
    /// Bytes that may still be read.
    allowance: Rc<Cell<u64>>,
}

impl Read for Metered<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buf)?;
        let left = self.allowance.get().checked_sub(got as u64);
        let left = left.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "it goes on and on without any contents")
        })?;
        self.allowance.set(left);
        Ok(got)
    }
}
