//! A program of the host that has connected and says where to: `CONNECT <port>` and a newline.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, recv};

use crate::device::{Interest, Source};

/// Bytes of the line at most, with its newline: four times what the longest port needs.
const MAX_LINE: usize = 32;

/// A program that has not said yet where it wants to.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) stream: UnixStream,
    pub(super) deadline: Instant,
    line: Vec<u8>,
}

/// What was heard from a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// Not the whole line yet.
    More,
    /// The port that it wants.
    Port(u32),
    /// Anything else, or nothing any more.
    Nonsense,
}

impl Caller {
    pub(super) fn new(stream: UnixStream, deadline: Instant) -> Self {
        Self { stream, deadline, line: Vec::new() }
    }

    pub(super) fn source(&self, token: u32) -> Source {
        Source { fd: self.stream.as_raw_fd(), token, interest: Interest::Read }
    }

    /// Reads the line, and nothing of what comes behind it: that is the stream's.
    pub(super) fn listen(&mut self) -> Heard {
        let mut ahead = [0; MAX_LINE];
        let ahead = ahead.get_mut(..MAX_LINE - self.line.len()).unwrap_or_default();
        let peek = recv(&self.stream, &mut *ahead, RecvFlags::DONTWAIT | RecvFlags::PEEK);
        let count = match peek.map_err(io::Error::from) {
            Ok((count, _)) if count > 0 => count,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Heard::More;
            }
            _ => return Heard::Nonsense,
        };
        let seen = ahead.get(..count).unwrap_or_default();
        let newline = seen.iter().position(|byte| *byte == b'\n');
        let take = newline.map_or(count, |at| at + 1);
        let taken =
            recv(&self.stream, ahead.get_mut(..take).unwrap_or_default(), RecvFlags::DONTWAIT);
        if !taken.is_ok_and(|(taken, _)| taken == take) {
            return Heard::Nonsense;
        }
        self.line.extend(ahead.get(..take).unwrap_or_default());
        match (newline, port(&self.line)) {
            (Some(_), Some(port)) => Heard::Port(port),
            (None, _) if self.line.len() < MAX_LINE => Heard::More,
            _ => Heard::Nonsense,
        }
    }
}

/// The port in a whole line; the word's case does not matter, as in Firecracker.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    let is_whole = words.next().is_none() && port.bytes().all(|byte| byte.is_ascii_digit());
    (is_whole && word.eq_ignore_ascii_case("connect")).then(|| port.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn hear(pieces: &[&[u8]]) -> (Heard, Caller) {
        let (mut program, stream) = UnixStream::pair().unwrap();
        let mut caller = Caller::new(stream, Instant::now());
        let mut heard = Heard::More;
        for piece in pieces {
            program.write_all(piece).unwrap();
            heard = caller.listen();
        }
        (heard, caller)
    }

    #[test]
    fn a_line_names_a_port_and_leaves_the_rest_to_the_stream() {
        let (heard, mut caller) = hear(&[b"CONN", b"ECT 52", b"\nhello"]);
        assert_eq!(heard, Heard::Port(52));
        let mut rest = [0; 5];
        caller.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
        assert_eq!(hear(&[b"connect 4294967295\n"]).0, Heard::Port(u32::MAX));
        assert_eq!(hear(&[b"CONNECT 1\r\n"]).0, Heard::Port(1));
    }

    #[test]
    fn a_line_of_another_kind_is_nonsense() {
        let lines: [&[u8]; 10] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT x\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"HELLO 1\n",
            b"\xff\xfe 1\n",
            b"CONNECT 1                       \n",
        ];
        for line in lines {
            assert_eq!(hear(&[line]).0, Heard::Nonsense, "{:?}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn thirty_two_bytes_without_an_end_are_enough() {
        assert_eq!(hear(&[b"CONNECT 0000000000000000000000"]).0, Heard::More);
        assert_eq!(hear(&[b"CONNECT 0000000000000000000000", b"00000"]).0, Heard::Nonsense);
        let (heard, caller) = hear(&[&[b'x'; 4096]]);
        assert_eq!((heard, caller.line.len()), (Heard::Nonsense, MAX_LINE));
    }

    #[test]
    fn a_caller_that_leaves_has_said_nothing() {
        let (program, stream) = UnixStream::pair().unwrap();
        let mut caller = Caller::new(stream, Instant::now());
        assert_eq!(caller.listen(), Heard::More);
        drop(program);
        assert_eq!(caller.listen(), Heard::Nonsense);
    }
}
