//! The socket to a peer: requests with their descriptors out, replies in, without blocking.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::PeerError;
use super::message::{HEADER, MAX_PAYLOAD, Message, MessageHeader, Reply};

/// Maximum number of messages queued for a peer that does not read: more than the start of any device needs.
const MAX_QUEUED: usize = 4096;

pub(super) struct Link {
    stream: UnixStream,
    outgoing: VecDeque<Message>,
    /// Bytes of the first message that are sent already.
    sent: usize,
    incoming: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Link {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, outgoing: VecDeque::new(), sent: 0, incoming: Vec::new(), fd: None })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// True if messages are queued.
    pub(super) fn wants_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Queues a message, and sends as much as the peer accepts now.
    pub(super) fn send(&mut self, message: Message) -> Result<(), PeerError> {
        if self.outgoing.len() >= MAX_QUEUED {
            return Err(PeerError::Timeout);
        }
        self.outgoing.push_back(message);
        self.flush()
    }

    /// Sends as much as the peer accepts now.
    pub(super) fn flush(&mut self) -> Result<(), PeerError> {
        while let Some(message) = self.outgoing.front() {
            let rest = message.bytes.get(self.sent..).unwrap_or_default();
            let fds: Vec<RawFd> = match self.sent {
                0 => message.fds.iter().map(|fd| fd.as_raw_fd()).collect(),
                // They were sent with the first byte.
                _ => Vec::new(),
            };
            match self.stream.send_with_fds(&[rest], &fds) {
                Ok(count) => self.sent += count,
                Err(error) => match Errno::from_raw_os_error(error.errno()) {
                    Errno::INTR => continue,
                    Errno::AGAIN => return Ok(()),
                    error => return Err(lost(error)),
                },
            }
            if self.outgoing.front().is_some_and(|message| self.sent >= message.bytes.len()) {
                self.outgoing.pop_front();
                self.sent = 0;
            }
        }
        Ok(())
    }

    /// Receives the next reply, if it is complete.
    pub(super) fn receive(&mut self) -> Result<Option<Reply>, PeerError> {
        loop {
            let header = match self.incoming.first_chunk::<HEADER>() {
                Some(bytes) => Some(MessageHeader::parse(bytes)?),
                None => None,
            };
            let wanted = header.map_or(HEADER, |header| HEADER + header.size);
            if let (Some(header), true) = (header, self.incoming.len() == wanted) {
                let payload = self.incoming.split_off(HEADER);
                self.incoming.clear();
                let fd = self.fd.take();
                return Ok(Some(Reply { request: header.request, payload, fd }));
            }
            let mut buffer = [0; HEADER + MAX_PAYLOAD];
            let missing = wanted.saturating_sub(self.incoming.len());
            // Never more than this message: a descriptor belongs to the message that it is received with.
            let part = buffer.get_mut(..missing).unwrap_or_default();
            match self.read(part) {
                Ok(0) => return Err(PeerError::Closed),
                Ok(count) => self.incoming.extend(part.get(..count).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(lost(error)),
            }
        }
    }

    /// Reads bytes and keeps the first descriptor received with a message; the kernel and the buffer close all others.
    fn read(&mut self, part: &mut [u8]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut slices = [IoSliceMut::new(part)];
        let received = recvmsg(&self.stream, &mut slices, &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    // With too many descriptors, none is used.
                    let extra = self.fd.is_some() || received.flags.contains(ReturnFlags::CTRUNC);
                    self.fd = (!extra).then_some(fd);
                }
            }
        }
        Ok(received.bytes)
    }

    /// Waits until the socket is readable, or writable if messages are queued, until `deadline` at the latest.
    pub(super) fn wait(&self, deadline: Instant) -> Result<(), PeerError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(PeerError::Timeout);
        }
        let flags = if self.wants_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&self.stream, flags)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(lost(error)),
        }
    }
}

fn lost(error: Errno) -> PeerError {
    match error {
        Errno::CONNRESET | Errno::PIPE | Errno::NOTCONN => PeerError::Closed,
        other => PeerError::Socket(other.into()),
    }
}
