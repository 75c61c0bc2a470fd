//! One stream between the guest and a Unix socket of the host (virtio 1.3, sections 5.10.6.3 to 5.10.6.6).
//!
//! Both directions count bytes modulo 2^32. Bytes from the guest are held in a buffer of [`BUFFER`] bytes until the socket
//! accepts them; a guest that sends more than that loses its stream. The socket is read only when the guest has credit.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::credit::Credit;
use super::packet::{PacketHeader, STREAM, op, shutdown};
use super::socket::{is_hung_up, write};
use crate::device::{Interest, Source};

/// Bytes of a stream that rvmm holds for a socket that does not accept them (`buf_alloc`).
pub(super) const BUFFER: u32 = 64 << 10;

/// Interval for checking if the socket's reader has hung up, which epoll does not report here.
const HANG_UP_CHECK: Duration = Duration::from_secs(2);

/// The state of a stream after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Outcome {
    Continue,
    /// The stream has ended, and the guest gets an RST.
    Reset,
    /// The stream has ended, and the guest knows it.
    Closed,
}

/// A packet for the guest, apart from its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Packet {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) len: u32,
}

/// The state of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The host's REQUEST is not sent to the guest yet.
    Requesting,
    /// The REQUEST is sent; the guest has not replied.
    Requested,
    /// Established.
    Open,
}

/// Control packets that are pending for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Pending {
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// Flags of a SHUTDOWN.
    shutdown: u32,
}

/// A stream.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    /// It is in the list of streams with packets for the guest.
    pub(super) is_listed: bool,
    /// Time of the next call of [`expired`](Self::expired), if any.
    pub(super) deadline: Option<Instant>,
    /// Time limit for the guest's reply to a REQUEST, and for the socket to accept the rest of a closed stream.
    timeout: Duration,

    stage: Stage,
    pending: Pending,
    /// The socket had bytes to read at the last check.
    is_readable: bool,
    /// `shutdown` flags of the host and of the guest.
    host_shutdown: u32,
    guest_shutdown: u32,

    credit: Credit,
    /// A CREDIT_REQUEST is outstanding.
    has_asked_for_credit: bool,

    /// Bytes from the guest that the socket has not accepted.
    buffer: VecDeque<u8>,
    /// Bytes received from the guest, bytes that the socket has accepted, and the count of those last reported to the guest.
    received: u32,
    forwarded: u32,
    reported: u32,
}

impl Connection {
    /// Creates a stream that the guest has asked for by `request`.
    pub(super) fn accepted(stream: UnixStream, request: &PacketHeader, timeout: Duration) -> Self {
        let mut new = Self::new(stream, request.dst_port, request.src_port, timeout);
        new.stage = Stage::Open;
        new.pending.response = true;
        new.credit.buffer = request.buf_alloc;
        new
    }

    /// Creates a stream that the host requests from the guest.
    pub(super) fn requesting(
        stream: UnixStream,
        host_port: u32,
        guest_port: u32,
        now: Instant,
        timeout: Duration,
    ) -> Self {
        let mut new = Self::new(stream, host_port, guest_port, timeout);
        new.deadline = Some(now + timeout);
        new
    }

    fn new(stream: UnixStream, host_port: u32, guest_port: u32, timeout: Duration) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            is_listed: false,
            deadline: None,
            timeout,
            stage: Stage::Requesting,
            pending: Pending::default(),
            is_readable: false,
            host_shutdown: 0,
            guest_shutdown: 0,
            credit: Credit::default(),
            has_asked_for_credit: false,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            reported: 0,
        }
    }

    /// The socket's events to watch; `None` while the stream waits for the guest.
    pub(super) fn source(&self, token: u32) -> Option<Source> {
        let reads = self.stage == Stage::Open
            && !self.is_readable
            && self.host_shutdown & shutdown::SEND == 0
            && self.guest_shutdown & shutdown::RECEIVE == 0
            && self.credit.room() > 0;
        let interest = Interest::of(reads, !self.buffer.is_empty())?;
        Some(Source { fd: self.stream.as_raw_fd(), token, interest })
    }

    /// True if the guest knows of the stream: it has sent or been sent a REQUEST.
    pub(super) fn is_known(&self) -> bool {
        self.stage != Stage::Requesting
    }

    /// True if there is a packet for the guest that can be sent now.
    pub(super) fn has_packet(&self) -> bool {
        self.stage == Stage::Requesting || self.pending != Pending::default() || self.can_send()
    }

    fn can_send(&self) -> bool {
        self.is_readable && self.stage == Stage::Open && self.credit.room() > 0
    }

    /// Takes an event: the socket may be readable or writable.
    pub(super) fn ready(&mut self, now: Instant) -> Outcome {
        self.is_readable = self.stage == Stage::Open
            && self.host_shutdown & shutdown::SEND == 0
            && self.guest_shutdown & shutdown::RECEIVE == 0;
        self.flush(now)
    }

    /// Takes a packet of the guest, with its payload.
    pub(super) fn receive(
        &mut self,
        header: &PacketHeader,
        payload: &[u8],
        now: Instant,
    ) -> Outcome {
        if !self.credit.update(header) {
            return Outcome::Reset;
        }
        self.has_asked_for_credit &= self.credit.room() == 0;
        match (header.op, self.stage) {
            (op::RST, _) => Outcome::Closed,
            (op::RESPONSE, Stage::Requested) => self.open(),
            (op::RW, Stage::Open) => self.take_bytes(payload, now),
            (op::SHUTDOWN, Stage::Open) => self.take_shutdown(header.flags, now),
            (op::CREDIT_UPDATE, Stage::Open) => Outcome::Continue,
            (op::CREDIT_REQUEST, Stage::Open) => {
                self.pending.credit_update = true;
                Outcome::Continue
            }
            // Also a second request for the same stream.
            _ => Outcome::Reset,
        }
    }

    /// Takes the guest's RESPONSE, and writes the host's port to the client.
    fn open(&mut self) -> Outcome {
        self.stage = Stage::Open;
        self.deadline = None;
        let line = format!("OK {}\n", self.host_port);
        // Nothing was written before: if so little does not fit, the client is gone.
        match self.write(line.as_bytes()) {
            Ok(written) if written == line.len() => Outcome::Continue,
            _ => Outcome::Reset,
        }
    }

    fn take_bytes(&mut self, payload: &[u8], now: Instant) -> Outcome {
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let held = self.received.wrapping_sub(self.forwarded);
        if self.guest_shutdown & shutdown::SEND != 0 || len > BUFFER.saturating_sub(held) {
            return Outcome::Reset;
        }
        self.received = self.received.wrapping_add(len);
        if !self.buffer.is_empty() {
            self.buffer.extend(payload);
            return Outcome::Continue;
        }
        let written = match self.write(payload) {
            Ok(written) => written,
            Err(_) => return Outcome::Reset,
        };
        self.buffer.extend(payload.get(written..).unwrap_or_default());
        self.forward(written);
        self.finish(now)
    }

    fn take_shutdown(&mut self, flags: u32, now: Instant) -> Outcome {
        self.guest_shutdown |= flags & shutdown::BOTH;
        if self.guest_shutdown & shutdown::RECEIVE != 0 {
            self.is_readable = false;
        }
        if self.guest_shutdown == shutdown::BOTH {
            self.deadline = Some(now + self.timeout);
        }
        self.finish(now)
    }

    /// Writes buffered bytes to the socket.
    fn flush(&mut self, now: Instant) -> Outcome {
        while let (front @ [_, ..], _) = self.buffer.as_slices() {
            match write(&self.stream, front) {
                Ok(0) => break,
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forward(written);
                }
                Err(_) => return Outcome::Reset,
            }
        }
        if self.buffer.is_empty() {
            // Frees the allocation of a stream that was held up.
            self.buffer = VecDeque::new();
        }
        self.finish(now)
    }

    /// Completes the guest's SHUTDOWN once the socket has accepted everything.
    fn finish(&mut self, now: Instant) -> Outcome {
        if !self.buffer.is_empty() || self.guest_shutdown & shutdown::SEND == 0 {
            return Outcome::Continue;
        }
        if self.guest_shutdown == shutdown::BOTH {
            return Outcome::Reset;
        }
        // The reader gets end of file; if it is gone, reading reports it.
        let _ = self.stream.shutdown(Shutdown::Write);
        if self.host_shutdown & shutdown::SEND != 0 {
            // Both ends have finished sending.
            self.pending.shutdown |= shutdown::BOTH & !self.host_shutdown;
            self.host_shutdown = shutdown::BOTH;
            self.deadline = Some(now + self.timeout);
        }
        Outcome::Continue
    }

    /// Counts bytes that the socket has accepted, and has a CREDIT_UPDATE sent for half a buffer.
    fn forward(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(bytes);
        self.pending.credit_update |= self.forwarded.wrapping_sub(self.reported) >= BUFFER / 2;
    }

    /// Takes the next packet for the guest, its payload in `room` (at least 1 byte).
    pub(super) fn next_packet(&mut self, room: &mut [u8], now: Instant) -> Option<Packet> {
        let control = |op| Some(Packet { op, ..Packet::default() });
        if self.stage == Stage::Requesting {
            self.stage = Stage::Requested;
            return control(op::REQUEST);
        }
        if std::mem::take(&mut self.pending.response) {
            return control(op::RESPONSE);
        }
        if self.can_send() {
            let len = self.read(room, now);
            if len > 0 {
                self.credit.send(len);
                if self.credit.room() == 0
                    && !std::mem::replace(&mut self.has_asked_for_credit, true)
                {
                    self.pending.credit_request = true;
                }
                return Some(Packet { op: op::RW, flags: 0, len });
            }
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return control(op::CREDIT_REQUEST);
        }
        if self.pending.shutdown != 0 {
            let flags = std::mem::take(&mut self.pending.shutdown);
            return Some(Packet { op: op::SHUTDOWN, flags, len: 0 });
        }
        std::mem::take(&mut self.pending.credit_update)
            .then_some(Packet { op: op::CREDIT_UPDATE, ..Packet::default() })
    }

    /// Reads bytes into `room`, within the guest's credit, and notes end of file.
    fn read(&mut self, room: &mut [u8], now: Instant) -> u32 {
        let most = room.len().min(usize::try_from(self.credit.room()).unwrap_or(usize::MAX));
        let room = room.get_mut(..most).unwrap_or_default();
        match recv(&self.stream, &mut *room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.end_of_input(now),
            Ok((count, _)) => {
                // Less than requested: nothing is left, and epoll reports when there is more.
                self.is_readable = count == room.len();
                return u32::try_from(count).unwrap_or(u32::MAX);
            }
            Err(error) => {
                let error = io::Error::from(error);
                self.is_readable = false;
                if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
                    self.end_of_input(now);
                }
            }
        }
        0
    }

    /// Notes that the socket's peer sends no more; it may still read.
    fn end_of_input(&mut self, now: Instant) {
        self.is_readable = false;
        let is_over = is_hung_up(&self.stream) || self.guest_shutdown & shutdown::SEND != 0;
        let flags = if is_over { shutdown::BOTH } else { shutdown::SEND };
        self.pending.shutdown |= flags & !self.host_shutdown;
        self.host_shutdown |= flags;
        // The guest's RST is due, or the reader has to be checked.
        self.deadline = Some(now + HANG_UP_CHECK);
    }

    /// Takes the expiry of the deadline.
    pub(super) fn expired(&mut self, now: Instant) -> Outcome {
        self.deadline = None;
        let only_reads = self.stage == Stage::Open && self.host_shutdown == shutdown::SEND;
        if !only_reads || self.guest_shutdown == shutdown::BOTH {
            return Outcome::Reset;
        }
        if is_hung_up(&self.stream) {
            self.end_of_input(now);
        }
        self.deadline = Some(now + HANG_UP_CHECK);
        Outcome::Continue
    }

    /// The credit of this end for every packet: size of the buffer, and bytes forwarded.
    pub(super) fn own_credit(&mut self) -> (u32, u32) {
        self.reported = self.forwarded;
        self.pending.credit_update = false;
        (BUFFER, self.forwarded)
    }

    /// Header fields common to all packets of this stream.
    pub(super) fn address(&self, guest_cid: u64) -> PacketHeader {
        PacketHeader {
            src_cid: super::packet::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: STREAM,
            ..PacketHeader::default()
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        write(&self.stream, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A stream with nearly 4 GiB moved in both directions.
    fn far_on() -> (Connection, UnixStream) {
        let (program, stream) = UnixStream::pair().unwrap();
        let request = PacketHeader { op: op::REQUEST, buf_alloc: 1000, ..PacketHeader::default() };
        let mut connection = Connection::accepted(stream, &request, Duration::from_secs(30));
        let start = u32::MAX - 99;
        (connection.credit.sent, connection.credit.taken) = (start, start);
        (connection.received, connection.forwarded, connection.reported) = (start, start, start);
        connection.pending = Pending::default();
        (connection, program)
    }

    fn credit(fwd_cnt: u32) -> PacketHeader {
        PacketHeader { op: op::CREDIT_UPDATE, buf_alloc: 1000, fwd_cnt, ..PacketHeader::default() }
    }

    #[test]
    fn counts_wrap_around_in_both_directions() {
        let (mut connection, program) = far_on();
        let now = Instant::now();
        assert_eq!(connection.credit.room(), 1000);
        (&program).write_all(&[1; 300]).unwrap();
        assert_eq!(connection.ready(now), Outcome::Continue);
        let packet = connection.next_packet(&mut [0; 4096], now).unwrap();
        assert_eq!((packet.op, packet.len, connection.credit.sent), (op::RW, 300, 200));
        assert_eq!(connection.credit.room(), 700);
        assert_eq!(connection.receive(&credit(150), &[], now), Outcome::Continue);
        assert_eq!(connection.credit.room(), 950);
        // A stale count from before the wrap.
        assert_eq!(connection.receive(&credit(u32::MAX - 50), &[], now), Outcome::Continue);
        assert_eq!((connection.credit.room(), connection.credit.taken), (950, 150));

        let bytes = PacketHeader { op: op::RW, ..credit(200) };
        assert_eq!(connection.receive(&bytes, &[2; 500], now), Outcome::Continue);
        assert_eq!((connection.received, connection.own_credit()), (400, (BUFFER, 400)));
        assert_eq!(connection.receive(&credit(201), &[], now), Outcome::Reset);
    }

    #[test]
    fn a_reader_that_hangs_up_later_is_noticed_by_the_periodic_check() {
        let (mut connection, program) = far_on();
        let now = Instant::now();
        program.shutdown(Shutdown::Write).unwrap();
        assert_eq!(connection.ready(now), Outcome::Continue);
        let packet = connection.next_packet(&mut [0; 64], now).unwrap();
        assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, shutdown::SEND));
        assert_eq!(connection.expired(now + HANG_UP_CHECK), Outcome::Continue);
        assert!(connection.deadline.is_some() && !connection.has_packet());
        drop(program);
        assert_eq!(connection.expired(now + 2 * HANG_UP_CHECK), Outcome::Continue);
        let packet = connection.next_packet(&mut [0; 64], now).unwrap();
        assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, shutdown::RECEIVE));
        assert_eq!(connection.expired(now + 3 * HANG_UP_CHECK), Outcome::Reset);
    }
}
