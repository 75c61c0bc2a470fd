//! A client of the host that has connected and sends the port that it wants: `CONNECT <port>` and a newline.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, recv};

use crate::device::{Interest, Source};

/// Maximum length of the line in bytes, with its newline; the longest regular one has 19.
const MAX_LINE: usize = 32;

/// A client whose line is not complete yet.
#[derive(Debug)]
pub(super) struct HostClient {
    pub(super) stream: UnixStream,
    pub(super) deadline: Instant,
    line: Vec<u8>,
}

/// The line of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestLine {
    /// Not complete yet.
    Incomplete,
    /// Asks for this port.
    Port(u32),
    /// Anything else, or the client has disconnected.
    Invalid,
}

impl HostClient {
    pub(super) fn new(stream: UnixStream, deadline: Instant) -> Self {
        Self { stream, deadline, line: Vec::new() }
    }

    pub(super) fn source(&self, token: u32) -> Source {
        Source { fd: self.stream.as_raw_fd(), token, interest: Interest::Read }
    }

    /// Reads the line, and nothing behind it: that belongs to the stream.
    pub(super) fn read_line(&mut self) -> RequestLine {
        let mut ahead = [0; MAX_LINE];
        let ahead = ahead.get_mut(..MAX_LINE - self.line.len()).unwrap_or_default();
        let peek = recv(&self.stream, &mut *ahead, RecvFlags::DONTWAIT | RecvFlags::PEEK);
        let count = match peek.map_err(io::Error::from) {
            Ok((count, _)) if count > 0 => count,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return RequestLine::Incomplete;
            }
            _ => return RequestLine::Invalid,
        };
        let seen = ahead.get(..count).unwrap_or_default();
        let newline = seen.iter().position(|byte| *byte == b'\n');
        let take = newline.map_or(count, |at| at + 1);
        let taken =
            recv(&self.stream, ahead.get_mut(..take).unwrap_or_default(), RecvFlags::DONTWAIT);
        if !taken.is_ok_and(|(taken, _)| taken == take) {
            return RequestLine::Invalid;
        }
        self.line.extend(ahead.get(..take).unwrap_or_default());
        match (newline, port(&self.line)) {
            (Some(_), Some(port)) => RequestLine::Port(port),
            (None, _) if self.line.len() < MAX_LINE => RequestLine::Incomplete,
            _ => RequestLine::Invalid,
        }
    }
}

/// Parses the port of a complete line; the word is case-insensitive, as in Firecracker.
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

    fn read(pieces: &[&[u8]]) -> (RequestLine, HostClient) {
        let (mut program, stream) = UnixStream::pair().unwrap();
        let mut client = HostClient::new(stream, Instant::now());
        let mut line = RequestLine::Incomplete;
        for piece in pieces {
            program.write_all(piece).unwrap();
            line = client.read_line();
        }
        (line, client)
    }

    #[test]
    fn a_line_names_a_port_and_leaves_the_rest_to_the_stream() {
        let (line, mut client) = read(&[b"CONN", b"ECT 52", b"\nhello"]);
        assert_eq!(line, RequestLine::Port(52));
        let mut rest = [0; 5];
        client.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
        assert_eq!(read(&[b"connect 4294967295\n"]).0, RequestLine::Port(u32::MAX));
        assert_eq!(read(&[b"CONNECT 1\r\n"]).0, RequestLine::Port(1));
    }

    #[test]
    fn a_line_of_another_kind_is_invalid() {
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
            assert_eq!(
                read(&[line]).0,
                RequestLine::Invalid,
                "{:?}",
                String::from_utf8_lossy(line)
            );
        }
    }

    #[test]
    fn thirty_two_bytes_without_an_end_are_enough() {
        assert_eq!(read(&[b"CONNECT 0000000000000000000000"]).0, RequestLine::Incomplete);
        assert_eq!(read(&[b"CONNECT 0000000000000000000000", b"00000"]).0, RequestLine::Invalid);
        let (line, client) = read(&[&[b'x'; 4096]]);
        assert_eq!((line, client.line.len()), (RequestLine::Invalid, MAX_LINE));
    }

    #[test]
    fn a_client_that_disconnects_has_sent_no_line() {
        let (program, stream) = UnixStream::pair().unwrap();
        let mut client = HostClient::new(stream, Instant::now());
        assert_eq!(client.read_line(), RequestLine::Incomplete);
        drop(program);
        assert_eq!(client.read_line(), RequestLine::Invalid);
    }
}
