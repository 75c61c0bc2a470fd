//! One stream between the guest and a Unix socket of the host (virtio 1.3, sections 5.10.6.3 to 5.10.6.6).
//!
//! Both directions count bytes modulo 2^32. What the guest sends is held in a buffer of [`BUFFER`] bytes until the socket
//! takes it; a guest that sends more than that breaks its stream. What the socket has is read only when the guest has room
//! for it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::credit::Credit;
use super::packet::{Header, STREAM, op, shutdown};
use super::socket::{is_hung_up, write};
use crate::device::{Interest, Source};

/// Bytes of a stream that rvmm holds for a socket that does not take them (`buf_alloc`).
pub(super) const BUFFER: u32 = 64 << 10;

/// How long until somebody looks again whether a reader is still there, which epoll does not tell.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Whether the stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Fate {
    GoesOn,
    /// The stream is over, and the guest is told so by an RST.
    Over,
    /// The stream is over, and the guest knows it.
    Forgotten,
}

/// A packet for the guest, apart from its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Packet {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) len: u32,
}

/// How far a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The host asks, and the guest does not know it yet.
    Asking,
    /// The guest has been asked.
    Asked,
    /// Bytes flow.
    Open,
}

/// Control packets that the guest still has to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Owed {
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
    /// It stands in the list of those that have something for the guest.
    pub(super) is_listed: bool,
    /// When something has to be done about it, if nothing happens before.
    pub(super) deadline: Option<Instant>,
    /// How long the guest may take to answer a request, and a socket to take the rest of a stream that is over.
    patience: Duration,

    stage: Stage,
    owed: Owed,
    /// The socket had something to read when it was last looked at.
    is_readable: bool,
    /// The host sends no more; `shutdown` flags that it has told the guest.
    host_shutdown: u32,
    guest_shutdown: u32,

    /// What the guest can take, and that it was asked to tell when it can take more.
    credit: Credit,
    has_asked_for_credit: bool,

    /// Bytes from the guest that the socket has not taken.
    buffer: VecDeque<u8>,
    /// Bytes received from the guest, those of them that the socket has taken, and what the guest knows of that.
    received: u32,
    forwarded: u32,
    told: u32,
}

impl Connection {
    /// A stream that the guest has asked for by `request`, and gets.
    pub(super) fn accepted(stream: UnixStream, request: &Header, patience: Duration) -> Self {
        let mut new = Self::new(stream, request.dst_port, request.src_port, patience);
        new.stage = Stage::Open;
        new.owed.response = true;
        new.credit.buffer = request.buf_alloc;
        new
    }

    /// A stream that the host asks the guest for.
    pub(super) fn asking(
        stream: UnixStream,
        host_port: u32,
        guest_port: u32,
        now: Instant,
        patience: Duration,
    ) -> Self {
        let mut new = Self::new(stream, host_port, guest_port, patience);
        new.deadline = Some(now + patience);
        new
    }

    fn new(stream: UnixStream, host_port: u32, guest_port: u32, patience: Duration) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            is_listed: false,
            deadline: None,
            patience,
            stage: Stage::Asking,
            owed: Owed::default(),
            is_readable: false,
            host_shutdown: 0,
            guest_shutdown: 0,
            credit: Credit::default(),
            has_asked_for_credit: false,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
        }
    }

    /// What to wait for on the socket: nothing where the guest has to move first.
    pub(super) fn source(&self, token: u32) -> Option<Source> {
        let reads = self.stage == Stage::Open
            && !self.is_readable
            && self.host_shutdown & shutdown::SEND == 0
            && self.guest_shutdown & shutdown::RECEIVE == 0
            && self.credit.room() > 0;
        let interest = Interest::of(reads, !self.buffer.is_empty())?;
        Some(Source { fd: self.stream.as_raw_fd(), token, interest })
    }

    /// The guest knows of the stream, or will as soon as it looks.
    pub(super) fn is_known(&self) -> bool {
        self.stage != Stage::Asking
    }

    /// Whether there is something for the guest that can be sent now.
    pub(super) fn has_packet(&self) -> bool {
        self.stage == Stage::Asking || self.owed != Owed::default() || self.can_send()
    }

    fn can_send(&self) -> bool {
        self.is_readable && self.stage == Stage::Open && self.credit.room() > 0
    }

    /// The socket may be readable or writable.
    pub(super) fn ready(&mut self, now: Instant) -> Fate {
        self.is_readable = self.stage == Stage::Open
            && self.host_shutdown & shutdown::SEND == 0
            && self.guest_shutdown & shutdown::RECEIVE == 0;
        self.flush(now)
    }

    /// A packet of the guest's, with what is behind its header.
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8], now: Instant) -> Fate {
        if !self.credit.update(header) {
            return Fate::Over;
        }
        self.has_asked_for_credit &= self.credit.room() == 0;
        match (header.op, self.stage) {
            (op::RST, _) => Fate::Forgotten,
            (op::RESPONSE, Stage::Asked) => self.open(),
            (op::RW, Stage::Open) => self.take_bytes(payload, now),
            (op::SHUTDOWN, Stage::Open) => self.take_shutdown(header.flags, now),
            (op::CREDIT_UPDATE, Stage::Open) => Fate::GoesOn,
            (op::CREDIT_REQUEST, Stage::Open) => {
                self.owed.credit_update = true;
                Fate::GoesOn
            }
            // Also a second request for the same stream.
            _ => Fate::Over,
        }
    }

    /// The guest has taken the host's call: the caller is told under which port.
    fn open(&mut self) -> Fate {
        self.stage = Stage::Open;
        self.deadline = None;
        let line = format!("OK {}\n", self.host_port);
        // Nothing was sent before: where so little does not fit, nobody is there.
        match self.write(line.as_bytes()) {
            Ok(written) if written == line.len() => Fate::GoesOn,
            _ => Fate::Over,
        }
    }

    fn take_bytes(&mut self, payload: &[u8], now: Instant) -> Fate {
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let held = self.received.wrapping_sub(self.forwarded);
        if self.guest_shutdown & shutdown::SEND != 0 || len > BUFFER.saturating_sub(held) {
            return Fate::Over;
        }
        self.received = self.received.wrapping_add(len);
        if !self.buffer.is_empty() {
            self.buffer.extend(payload);
            return Fate::GoesOn;
        }
        let written = match self.write(payload) {
            Ok(written) => written,
            Err(_) => return Fate::Over,
        };
        self.buffer.extend(payload.get(written..).unwrap_or_default());
        self.forward(written);
        self.finish(now)
    }

    fn take_shutdown(&mut self, flags: u32, now: Instant) -> Fate {
        self.guest_shutdown |= flags & shutdown::BOTH;
        if self.guest_shutdown & shutdown::RECEIVE != 0 {
            self.is_readable = false;
        }
        if self.guest_shutdown == shutdown::BOTH {
            self.deadline = Some(now + self.patience);
        }
        self.finish(now)
    }

    /// Writes what waits for the socket.
    fn flush(&mut self, now: Instant) -> Fate {
        while let (front @ [_, ..], _) = self.buffer.as_slices() {
            match write(&self.stream, front) {
                Ok(0) => break,
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forward(written);
                }
                Err(_) => return Fate::Over,
            }
        }
        if self.buffer.is_empty() {
            // A stream that was held up once does not keep the room for ever.
            self.buffer = VecDeque::new();
        }
        self.finish(now)
    }

    /// Draws the consequences of a SHUTDOWN once the socket has everything.
    fn finish(&mut self, now: Instant) -> Fate {
        if !self.buffer.is_empty() || self.guest_shutdown & shutdown::SEND == 0 {
            return Fate::GoesOn;
        }
        if self.guest_shutdown == shutdown::BOTH {
            return Fate::Over;
        }
        // The reader sees the end; where it is gone, reading tells.
        let _ = self.stream.shutdown(Shutdown::Write);
        if self.host_shutdown & shutdown::SEND != 0 {
            // Both ends have said all they had to say.
            self.owed.shutdown |= shutdown::BOTH & !self.host_shutdown;
            self.host_shutdown = shutdown::BOTH;
            self.deadline = Some(now + self.patience);
        }
        Fate::GoesOn
    }

    /// Counts bytes that the socket has taken, and lets the guest know when that is worth a packet.
    fn forward(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(bytes);
        self.owed.credit_update |= self.forwarded.wrapping_sub(self.told) >= BUFFER / 2;
    }

    /// The next packet for the guest, its bytes in `room` (at least 1).
    pub(super) fn next_packet(&mut self, room: &mut [u8], now: Instant) -> Option<Packet> {
        let control = |op| Some(Packet { op, ..Packet::default() });
        if self.stage == Stage::Asking {
            self.stage = Stage::Asked;
            return control(op::REQUEST);
        }
        if std::mem::take(&mut self.owed.response) {
            return control(op::RESPONSE);
        }
        if self.can_send() {
            let len = self.read(room, now);
            if len > 0 {
                self.credit.send(len);
                if self.credit.room() == 0
                    && !std::mem::replace(&mut self.has_asked_for_credit, true)
                {
                    self.owed.credit_request = true;
                }
                return Some(Packet { op: op::RW, flags: 0, len });
            }
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return control(op::CREDIT_REQUEST);
        }
        if self.owed.shutdown != 0 {
            let flags = std::mem::take(&mut self.owed.shutdown);
            return Some(Packet { op: op::SHUTDOWN, flags, len: 0 });
        }
        std::mem::take(&mut self.owed.credit_update)
            .then_some(Packet { op: op::CREDIT_UPDATE, ..Packet::default() })
    }

    /// Reads into `room` what the guest can take, and notes the end.
    fn read(&mut self, room: &mut [u8], now: Instant) -> u32 {
        let most = room.len().min(usize::try_from(self.credit.room()).unwrap_or(usize::MAX));
        let room = room.get_mut(..most).unwrap_or_default();
        match recv(&self.stream, &mut *room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.end_of_input(now),
            Ok((count, _)) => {
                // Less than asked for: nothing is left, and epoll tells when there is more.
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

    /// The socket's other end sends no more; it may still read.
    fn end_of_input(&mut self, now: Instant) {
        self.is_readable = false;
        let is_over = is_hung_up(&self.stream) || self.guest_shutdown & shutdown::SEND != 0;
        let flags = if is_over { shutdown::BOTH } else { shutdown::SEND };
        self.owed.shutdown |= flags & !self.host_shutdown;
        self.host_shutdown |= flags;
        // The guest's RST is waited for, or somebody has to look whether the reader is still there.
        self.deadline = Some(now + LOOK_AGAIN);
    }

    /// The deadline is over.
    pub(super) fn expired(&mut self, now: Instant) -> Fate {
        self.deadline = None;
        let only_reads = self.stage == Stage::Open && self.host_shutdown == shutdown::SEND;
        if !only_reads || self.guest_shutdown == shutdown::BOTH {
            return Fate::Over;
        }
        if is_hung_up(&self.stream) {
            self.end_of_input(now);
        }
        self.deadline = Some(now + LOOK_AGAIN);
        Fate::GoesOn
    }

    /// What the guest is told about this end with every packet: room, and bytes taken.
    pub(super) fn own_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.owed.credit_update = false;
        (BUFFER, self.forwarded)
    }

    /// Header fields that all packets of this stream have.
    pub(super) fn address(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: super::packet::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: STREAM,
            ..Header::default()
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

    /// A stream that has moved nearly 4 GiB in both directions.
    fn far_on() -> (Connection, UnixStream) {
        let (program, stream) = UnixStream::pair().unwrap();
        let request = Header { op: op::REQUEST, buf_alloc: 1000, ..Header::default() };
        let mut connection = Connection::accepted(stream, &request, Duration::from_secs(30));
        let start = u32::MAX - 99;
        (connection.credit.sent, connection.credit.taken) = (start, start);
        (connection.received, connection.forwarded, connection.told) = (start, start, start);
        connection.owed = Owed::default();
        (connection, program)
    }

    fn credit(fwd_cnt: u32) -> Header {
        Header { op: op::CREDIT_UPDATE, buf_alloc: 1000, fwd_cnt, ..Header::default() }
    }

    #[test]
    fn counts_wrap_around_in_both_directions() {
        let (mut connection, program) = far_on();
        let now = Instant::now();
        assert_eq!(connection.credit.room(), 1000);
        (&program).write_all(&[1; 300]).unwrap();
        assert_eq!(connection.ready(now), Fate::GoesOn);
        let packet = connection.next_packet(&mut [0; 4096], now).unwrap();
        assert_eq!((packet.op, packet.len, connection.credit.sent), (op::RW, 300, 200));
        assert_eq!(connection.credit.room(), 700);
        assert_eq!(connection.receive(&credit(150), &[], now), Fate::GoesOn);
        assert_eq!(connection.credit.room(), 950);
        // Old news from before the wrap.
        assert_eq!(connection.receive(&credit(u32::MAX - 50), &[], now), Fate::GoesOn);
        assert_eq!((connection.credit.room(), connection.credit.taken), (950, 150));

        let bytes = Header { op: op::RW, ..credit(200) };
        assert_eq!(connection.receive(&bytes, &[2; 500], now), Fate::GoesOn);
        assert_eq!((connection.received, connection.own_credit()), (400, (BUFFER, 400)));
        assert_eq!(connection.receive(&credit(201), &[], now), Fate::Over);
    }

    #[test]
    fn a_reader_that_leaves_later_is_noticed_by_looking() {
        let (mut connection, program) = far_on();
        let now = Instant::now();
        program.shutdown(Shutdown::Write).unwrap();
        assert_eq!(connection.ready(now), Fate::GoesOn);
        let packet = connection.next_packet(&mut [0; 64], now).unwrap();
        assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, shutdown::SEND));
        assert_eq!(connection.expired(now + LOOK_AGAIN), Fate::GoesOn);
        assert!(connection.deadline.is_some() && !connection.has_packet());
        drop(program);
        assert_eq!(connection.expired(now + 2 * LOOK_AGAIN), Fate::GoesOn);
        let packet = connection.next_packet(&mut [0; 64], now).unwrap();
        assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, shutdown::RECEIVE));
        assert_eq!(connection.expired(now + 3 * LOOK_AGAIN), Fate::Over);
    }
}
