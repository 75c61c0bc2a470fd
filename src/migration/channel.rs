//! The connection between both sides: messages in frames, each with a checksum.
//!
//! | bytes | a frame, little-endian |
//! |---|---|
//! | 8 | `rvmmMIG1` |
//! | 4 | the kind of the message |
//! | 4 | number of bytes that follow the header, without padding |
//! | 8 | checksum of kind, number and bytes ([`message_checksum`]) |
//! | | the bytes, padded with zeroes to a multiple of 8 |

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use rustix::process::Pid;

use super::message::{Kind, MOST_PAYLOAD};
use crate::snapshot::{message_checksum, words};
use crate::sockets::peer_process;

/// What each frame begins with.
const MAGIC: [u8; 8] = *b"rvmmMIG1";

/// Words of the header.
const HEADER: usize = 3;

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A connection, which sends and receives frames.
#[derive(Debug)]
pub(super) struct Channel {
    /// Any stream socket: the calls of this type are those of all of them.
    stream: UnixStream,
    /// The last frame, in words for the checksum.
    frame: Vec<u64>,
    sent: u64,
}

impl Channel {
    /// Takes a connected stream socket.
    ///
    /// # Errors
    /// `InvalidInput` for another kind of descriptor.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        if socket_type(&socket).ok() != Some(SocketType::STREAM) {
            let what = "it is no connected stream socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(Self { stream: socket.into(), frame: Vec::new(), sent: 0 })
    }

    /// The same connection for another thread, which only sends or only receives.
    ///
    /// # Errors
    /// This process may have no more descriptors.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()?, frame: Vec::new(), sent: 0 })
    }

    /// Ends the connection, whoever has it.
    pub(super) fn close(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Both)
    }

    /// True if a message, or the end, can be received at once.
    pub(super) fn is_ready(&self) -> io::Result<bool> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&now))? > 0)
    }

    /// Limits the time that the peer may let a receiver or a sender wait; `None` for no limit.
    pub(super) fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(patience)?;
        self.stream.set_write_timeout(patience)
    }

    /// The process that has created the other end, where the kernel knows it: that of a Unix socket.
    pub(super) fn peer_process(&self) -> Option<Pid> {
        peer_process(&self.stream)
    }

    /// Number of bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends a frame of `len` bytes, which `fill` writes.
    ///
    /// # Errors
    /// Those of `fill`, with nothing sent; or the connection is broken, or the peer does not take the frame in time.
    pub(super) fn send(
        &mut self,
        kind: Kind,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let size = u32::try_from(len).ok().filter(|len| *len <= MOST_PAYLOAD);
        let size = size.ok_or_else(|| io::Error::other("a message is too long"))?;
        self.frame.resize(HEADER + len.div_ceil(8), 0);
        // The padding; what is before it is replaced.
        if let Some(last) = self.frame.last_mut() {
            *last = 0;
        }
        let (header, payload) = self.frame.split_at_mut(HEADER);
        fill(words::bytes_mut(payload).get_mut(..len).unwrap_or_default())?;
        let number = u64::from(size) << 32 | u64::from(kind.number());
        let words = [u64::from_le_bytes(MAGIC), number, message_checksum(number, payload)];
        header.iter_mut().zip(words).for_each(|(to, word)| *to = word);
        let bytes: &[u8] = words::bytes(&self.frame);
        self.stream.write_all(bytes)?;
        self.sent = self.sent.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Receives a frame: its kind and its bytes.
    ///
    /// # Errors
    /// `InvalidData` for something else than a frame, or one that was damaged; `UnexpectedEof` if the connection has ended; or the peer
    /// sends nothing in time.
    pub(super) fn receive(&mut self) -> io::Result<(Kind, &[u8])> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut header = [0; HEADER];
        self.stream.read_exact(words::bytes_mut(&mut header))?;
        let [magic, number, checksum] = header;
        if magic != u64::from_le_bytes(MAGIC) {
            return Err(invalid("it does not speak the protocol of this version of rvmm"));
        }
        let [kind, size] = [number & u64::from(u32::MAX), number >> 32];
        let kind = Kind::of(kind).ok_or_else(|| invalid("it sends an unknown message"))?;
        if size > u64::from(kind.most()) {
            return Err(invalid("it sends a message that is too long"));
        }
        let len = usize::try_from(size).map_err(io::Error::other)?;
        self.frame.resize(len.div_ceil(8), 0);
        self.stream.read_exact(words::bytes_mut(&mut self.frame))?;
        if message_checksum(number, &self.frame) != checksum {
            return Err(invalid("a message was damaged on its way"));
        }
        Ok((kind, words::bytes(&self.frame).get(..len).unwrap_or_default()))
    }
}
