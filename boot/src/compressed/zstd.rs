//! All frames of a zstd file, one after the other; skippable ones are skipped (RFC 8878, section 3.1).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::{Budget, peek};

/// The largest window that `zstd -dc` accepts by default; `zstd --ultra -22` uses it when it compresses a pipe.
/// A decoder keeps at most that much in memory, and no more than the size of the contents.
const MAX_WINDOW: u64 = 128 << 20;

/// True if `bytes` are the start of a zstd frame.
pub(super) fn is_frame(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
}

/// True if `bytes` are the start of a skippable frame (RFC 8878, section 3.1.2): pzstd writes one before each frame.
pub(super) fn is_skippable_frame(bytes: &[u8]) -> bool {
    matches!(bytes, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// The contents of all frames.
pub(super) struct Zstd<'a> {
    input: BufReader<&'a File>,
    frame: FrameDecoder,
    budget: Budget,
}

impl<'a> Zstd<'a> {
    /// Starts at the beginning of `input`.
    pub(super) fn new(input: BufReader<&'a File>, budget: Budget) -> Self {
        let mut frame = FrameDecoder::new();
        frame.set_max_window_size(MAX_WINDOW);
        Self { input, frame, budget }
    }

    /// File offset of the end of the last frame, once all is read.
    pub(super) fn end(&mut self) -> io::Result<u64> {
        self.input.stream_position()
    }

    /// Starts the next frame that has contents; false if there is none.
    fn next_frame(&mut self) -> io::Result<bool> {
        let mut next = peek(&mut self.input)?;
        while is_skippable_frame(&next) {
            self.skip_frame()?;
            next = peek(&mut self.input)?;
        }
        if is_frame(&next) {
            self.frame.reset(&mut self.input).map_err(io::Error::other)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Skips a skippable frame: its magic number, its length, and as many bytes.
    fn skip_frame(&mut self) -> io::Result<()> {
        self.budget.spend_one()?;
        let mut header = [0; 8];
        self.input.read_exact(&mut header)?;
        let [_, _, _, _, len @ ..] = header;
        let len = u32::from_le_bytes(len);
        self.input.seek_relative(len.into())?;
        let end = self.input.stream_position()?;
        let file_len = self.input.get_ref().metadata()?.len();
        if end > file_len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Verifies the checksum of the frame that has just been read completely.
    fn check(&self) -> io::Result<()> {
        match self.frame.get_checksum_from_data() {
            Some(sum) if self.frame.get_calculated_checksum() != Some(sum) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "its checksum is wrong"))
            }
            _ => Ok(()),
        }
    }
}

impl Read for Zstd<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            while self.frame.can_collect() == 0 && !self.frame.is_finished() {
                // Blocks hold up to 128 KiB; but a hole in a sparse file decodes as a long series of empty ones.
                self.budget.spend_one()?;
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.frame.decode_blocks(&mut self.input, one).map_err(io::Error::other)?;
            }
            let got = self.frame.read(buf)?;
            if got > 0 {
                return Ok(got);
            }
            self.check()?;
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}
