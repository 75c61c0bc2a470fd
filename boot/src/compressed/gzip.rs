//! All members of a gzip file, one after the other (RFC 1952, section 2.2).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};

use flate2::bufread::GzDecoder;

use super::{Budget, peek};

/// True if `bytes` are the start of a gzip member (method deflate, the only one there is).
pub(super) fn is_member(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x1f, 0x8b, 0x08])
}

/// The contents of all members.
pub(super) struct Gzip<'a> {
    /// The member that is being decompressed; `None` after the last.
    member: Option<GzDecoder<BufReader<&'a File>>>,
    budget: Budget,
    /// File offset of the end of the last member, in bytes.
    end: u64,
}

impl<'a> Gzip<'a> {
    /// Starts with the member at the beginning of `input`.
    pub(super) fn new(input: BufReader<&'a File>, budget: Budget) -> Self {
        Self { member: Some(GzDecoder::new(input)), budget, end: 0 }
    }

    /// File offset of the end of the last member, once all is read.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Starts the next member, if there is one.
    fn next_member(&mut self) -> io::Result<()> {
        let Some(mut input) = self.member.take().map(GzDecoder::into_inner) else { return Ok(()) };
        self.end = input.stream_position()?;
        if is_member(&peek(&mut input)?) {
            self.budget.spend_one()?;
            self.member = Some(GzDecoder::new(input));
        }
        Ok(())
    }
}

impl Read for Gzip<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let got = member.read(buf)?;
            if got > 0 || buf.is_empty() {
                return Ok(got);
            }
            self.next_member()?;
        }
        Ok(0)
    }
}
