//! An `Image` inside gzip (RFC 1952) or zstd (RFC 8878), unpacked within bounds.
//!
//! A compressed file is a program somebody else wrote, so nothing of it is believed: the first bytes that
//! come out have to be an `Image` header, and no more may come out than that header and the caller's limit
//! allow. Only the first gzip member or zstd frame counts; what follows it (a size, a padding) is not looked
//! at.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};

use flate2::bufread::GzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, DEFAULT_MAX_WINDOW_SIZE, FrameDecoder};

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
    bytes: Vec<u8>,
}

impl<'a> Unpacker<'a> {
    /// Starts to unpack the file, which has to be at its beginning.
    fn new(file: &'a File, compression: Compression, limit: u64) -> io::Result<Self> {
        let input = BufReader::with_capacity(64 << 10, file);
        let decoder = match compression {
            Compression::Gzip => Decoder::Gzip(Box::new(GzDecoder::new(input))),
            Compression::Zstd => Decoder::Zstd(Box::new(Zstd::new(input, limit)?)),
        };
        Ok(Self { decoder, bytes: Vec::new() })
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
}

/// Either decoder; both check the checksum, if there is one, before they say that this was all.
enum Decoder<'a> {
    Gzip(Box<GzDecoder<BufReader<&'a File>>>),
    Zstd(Box<Zstd<'a>>),
}

/// One zstd frame.
struct Zstd<'a> {
    input: BufReader<&'a File>,
    frame: FrameDecoder,
    /// More blocks than this are not worth their contents.
    most_blocks: u64,
}

impl<'a> Zstd<'a> {
    fn new(mut input: BufReader<&'a File>, limit: u64) -> io::Result<Self> {
        let mut frame = FrameDecoder::new();
        frame.set_max_window_size(DEFAULT_MAX_WINDOW_SIZE.min(limit));
        frame.init(&mut input).map_err(io::Error::other)?;
        // Blocks hold up to 128 KiB; but a hole in a sparse file is an endless row of empty ones.
        Ok(Self { input, frame, most_blocks: (1 << 10) + (limit >> 10) })
    }
}

impl Read for Zstd<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        while self.frame.can_collect() == 0 && !self.frame.is_finished() {
            let one = BlockDecodingStrategy::UptoBlocks(1);
            self.frame.decode_blocks(&mut self.input, one).map_err(io::Error::other)?;
            if self.frame.blocks_decoded() as u64 > self.most_blocks {
                return Err(invalid("it goes on and on without any contents"));
            }
        }
        let got = self.frame.read(buf)?;
        let written = self.frame.get_checksum_from_data();
        let at_end = got == 0 && !buf.is_empty();
        if at_end && written.is_some() && written != self.frame.get_calculated_checksum() {
            return Err(invalid("its checksum is wrong"));
        }
        Ok(got)
    }
}
