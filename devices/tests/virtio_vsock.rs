//! The socket device with its driver and with programs of the host, over real Unix sockets.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rvmm_devices::testing::{create, skip, turn, wiring};
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, RAM_SIZE, Rig, WRITE};
use rvmm_devices::{NoHost, Wiring};
use vm_memory::{Bytes, GuestAddress};

const RX: u32 = 0;
const TX: u32 = 1;
const HEADER: usize = 44;
/// Size of a receive buffer in bytes, header included, as in Linux.
const RX_BUFFER: u32 = 4096;
const HOST: u64 = 2;
const GUEST: u64 = 3;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A packet with the fields that the tests use.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    src: (u64, u32),
    dst: (u64, u32),
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    payload: Vec<u8>,
}

impl Packet {
    fn new(op: u16, guest_port: u32, host_port: u32) -> Self {
        Self {
            src: (GUEST, guest_port),
            dst: (HOST, host_port),
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src.0.to_le_bytes());
        bytes.extend(self.dst.0.to_le_bytes());
        bytes.extend(self.src.1.to_le_bytes());
        bytes.extend(self.dst.1.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for field in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            src: (u64_at(0), u32_at(16)),
            dst: (u64_at(8), u32_at(20)),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            payload: bytes[HEADER..].to_vec(),
        }
    }
}

/// A guest with a driver, and a folder with the host's sockets.
struct Guest {
    rig: Rig,
    folder: tempfile::TempDir,
    send_at: u64,
    receive_at: u64,
}

impl Guest {
    fn without_buffers() -> Self {
        Self::with("")
    }

    /// A guest without receive buffers, and a device with these additional options.
    fn with(further: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = format!("vsock,path={}{further}", folder.path().join("s").display());
        let mut rig = Rig::build(|wiring| create(&text, wiring).unwrap());
        rig.start(1);
        let (send_at, receive_at) = (rig.allocate(1 << 20), rig.allocate(1 << 17));
        Self { rig, folder, send_at, receive_at }
    }

    fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.supply(16);
        guest
    }

    /// Makes receive buffers available.
    fn supply(&mut self, count: u16) {
        let table = self.rig.rings(RX)[0];
        for index in 0..count {
            let at = self.receive_at + u64::from(index) * u64::from(RX_BUFFER);
            self.rig.set_descriptor(table, index, (at, RX_BUFFER, WRITE, 0));
            self.rig.make_available(RX, index);
        }
        self.rig.kick(RX);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A host program that listens for the guest's connections to `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("s_{port}"))).unwrap()
    }

    /// A host program that connects to the guest.
    fn call(&mut self, line: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("s")).unwrap();
        stream.write_all(line).unwrap();
        self.rig.run();
        stream
    }

    /// Sends bytes as one packet; false if the device did not accept it.
    fn send_bytes(&mut self, bytes: &[u8]) -> bool {
        let table = self.rig.rings(TX)[0];
        self.rig.memory.write_slice(bytes, GuestAddress(self.send_at)).unwrap();
        self.rig.set_descriptor(table, 0, (self.send_at, bytes.len() as u32, 0, 0));
        self.rig.make_available(TX, 0);
        self.rig.kick(TX);
        self.rig.take_used(TX).is_some()
    }

    fn send(&mut self, packet: &Packet) {
        assert!(self.send_bytes(&packet.bytes()));
    }

    /// Sends bytes over a stream.
    fn write(&mut self, ports: (u32, u32), payload: &[u8]) {
        let mut packet = Packet::new(RW, ports.0, ports.1);
        packet.len = payload.len() as u32;
        packet.payload = payload.to_vec();
        self.send(&packet);
    }

    fn send_op(&mut self, op: u16, ports: (u32, u32)) {
        self.send(&Packet::new(op, ports.0, ports.1));
    }

    /// The next packet from the device; makes its buffer available again.
    fn receive(&mut self) -> Option<Packet> {
        let (head, len) = self.rig.take_used(RX)?;
        let at = self.receive_at + u64::from(head) * u64::from(RX_BUFFER);
        let mut bytes = vec![0; len as usize];
        self.rig.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        self.rig.make_available(RX, head);
        self.rig.kick(RX);
        let packet = Packet::parse(&bytes);
        assert_eq!((packet.src.0, packet.dst.0), (HOST, GUEST));
        assert_eq!(packet.len as usize, packet.payload.len());
        Some(packet)
    }

    /// The operation of the next packet.
    fn op(&mut self) -> Option<u16> {
        self.receive().map(|packet| packet.op)
    }

    /// All pending bytes of all streams, and the number of packets.
    fn read(&mut self) -> (Vec<u8>, usize) {
        let (mut all, mut packets) = (Vec::new(), 0);
        loop {
            self.rig.run();
            let Some(packet) = self.receive() else { return (all, packets) };
            packets += usize::from(packet.op == RW);
            all.extend(packet.payload);
        }
    }

    /// A stream from the guest's port 1000 to the host's `port`.
    fn connect(&mut self, listener: &UnixListener, port: u32) -> UnixStream {
        self.send_op(REQUEST, (1000, port));
        assert_eq!(self.op(), Some(RESPONSE));
        listener.accept().unwrap().0
    }
}

fn is_at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_))
}

fn heard(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_configuration_has_the_guests_cid() {
    let mut guest = Guest::new();
    assert_eq!([8, 0x100, 0x104].map(|register| guest.rig.read(register)), [19, 3, 0]);
    assert_eq!(guest.rig.offered() & 0xff_ffff, 1, "streams and nothing else");
}

#[test]
fn reserved_addresses_and_a_missing_path_are_refused() {
    for text in ["vsock", "vsock,path=", "vsock,path=/x,cid=2", "vsock,path=/x,cid=4294967295"] {
        assert!(create(text, wiring()).is_err(), "{text}");
    }
    // The largest one is refused only because there are no sockets here.
    let wiring = Wiring { host: Arc::new(NoHost), ..wiring() };
    let error = create("vsock,path=/x,cid=4294967294", wiring).err().unwrap();
    assert!(format!("{error:?}").contains("this host has no sockets"), "{error:?}");
}

#[test]
fn a_guest_connects_to_a_program_of_the_host() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    guest.send_op(REQUEST, (1000, 52));
    let answer = guest.receive().unwrap();
    assert_eq!((answer.op, answer.src.1, answer.dst.1), (RESPONSE, 52, 1000));
    assert_eq!((answer.kind, answer.buf_alloc, answer.fwd_cnt), (1, 64 << 10, 0));
    let mut program = listener.accept().unwrap().0;

    guest.write((1000, 52), b"hello");
    assert_eq!(heard(&mut program, 5), b"hello");
    program.write_all(b"and back").unwrap();
    guest.rig.run();
    let packet = guest.receive().unwrap();
    assert_eq!((packet.op, packet.payload.as_slice()), (RW, b"and back".as_slice()));
    assert_eq!(packet.fwd_cnt, 5, "every packet tells what was taken");

    guest.send(&Packet { flags: 3, ..Packet::new(SHUTDOWN, 1000, 52) });
    assert_eq!(guest.op(), Some(RST), "all is delivered, and the stream is over");
    assert!(is_at_end(&mut program));
    guest.write((1000, 52), b"late");
    assert_eq!(guest.op(), Some(RST));
}

#[test]
fn a_program_of_the_host_connects_to_the_guest() {
    let mut guest = Guest::new();
    let mut program = guest.call(b"CONNECT 80\nearly");
    let request = guest.receive().unwrap();
    assert_eq!((request.op, request.dst.1), (REQUEST, 80));
    let ports = (80, request.src.1);
    assert_eq!(guest.op(), None, "nothing before the guest answers");
    guest.send_op(RESPONSE, ports);
    let line = format!("OK {}\n", ports.1);
    assert_eq!(heard(&mut program, line.len()), line.as_bytes());
    assert_eq!(guest.read(), (b"early".to_vec(), 1));
    guest.write(ports, b"answer");
    assert_eq!(heard(&mut program, 6), b"answer");

    // The next one has another port.
    guest.call(b"CONNECT 80\n");
    assert_ne!(guest.receive().unwrap().src.1, ports.1);
}

#[test]
fn a_guest_that_refuses_a_connection_ends_it() {
    let mut guest = Guest::new();
    let mut program = guest.call(b"CONNECT 81\n");
    let request = guest.receive().unwrap();
    guest.send_op(RST, (81, request.src.1));
    assert!(is_at_end(&mut program));
    assert_eq!(guest.op(), None, "an RST is not answered");
}

#[test]
fn connections_wait_until_the_guest_has_a_driver() {
    let mut guest = Guest::new();
    guest.rig.write(0x70, 0);
    guest.rig.run();
    let mut program = guest.call(b"CONNECT 5\n");
    guest.rig.start(1);
    guest.supply(16);
    let request = guest.receive().unwrap();
    assert_eq!((request.op, request.dst.1), (REQUEST, 5));
    guest.send_op(RESPONSE, (5, request.src.1));
    assert_eq!(heard(&mut program, 2), b"OK");
}

#[test]
fn a_port_without_a_listener_is_refused() {
    let mut guest = Guest::new();
    std::fs::create_dir(guest.path("s_2")).unwrap();
    std::fs::write(guest.path("s_3"), "a file").unwrap();
    drop(guest.listen(4));
    for port in [1, 2, 3, 4, u32::MAX] {
        guest.send_op(REQUEST, (9, port));
        let refusal = guest.receive().unwrap();
        assert_eq!((refusal.op, refusal.src.1, refusal.dst.1), (RST, port, 9));
    }
}

#[test]
fn packets_of_unknown_streams_are_answered_by_an_rst() {
    let mut guest = Guest::new();
    let _listener = guest.listen(52);
    for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, u16::MAX] {
        guest.send_op(op, (1000, 52));
        assert_eq!(guest.op(), Some(RST), "operation {op} for no stream");
    }
    for kind in [0, 2, 3, u16::MAX] {
        guest.send(&Packet { kind, ..Packet::new(REQUEST, 1000, 52) });
        let refusal = guest.receive().unwrap();
        assert_eq!((refusal.op, refusal.kind), (RST, kind));
    }
    guest.send_op(RST, (1000, 52));
    assert_eq!(guest.op(), None, "an RST is not answered");
}

#[test]
fn packets_from_or_to_other_addresses_are_dropped() {
    let mut guest = Guest::new();
    let _listener = guest.listen(52);
    for (src, dst) in
        [(0, 2), (1, 2), (2, 2), (4, 2), (u64::MAX, 2), (3, 0), (3, 3), (3 | 1 << 32, 2)]
    {
        let sent = Packet::new(REQUEST, 1000, 52);
        guest.send(&Packet { src: (src, 1000), dst: (dst, 52), ..sent });
        assert_eq!(guest.op(), None, "{src} to {dst}");
    }
}

#[test]
fn a_header_may_be_split_but_not_be_short() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let bytes = Packet::new(REQUEST, 1000, 52).bytes();
    let (front, back) = bytes.split_at(17);
    let pieces = [Buffer::Read(front), Buffer::Read(b""), Buffer::Read(back)];
    guest.rig.ask(TX, &pieces).unwrap();
    assert_eq!(guest.op(), Some(RESPONSE));
    drop(listener.accept().unwrap());
    guest.send_op(RST, (1000, 52));
    guest.read();
    for len in [0, 1, 43] {
        let bytes = Packet::new(REQUEST, 1001, 52).bytes();
        guest.rig.ask(TX, &[Buffer::Read(&bytes[..len]), Buffer::Write(64)]).unwrap();
        assert_eq!(guest.op(), None, "{len} bytes");
    }
}

#[test]
fn a_packet_longer_than_its_buffers_is_dropped() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut program = guest.connect(&listener, 52);
    program.set_nonblocking(true).unwrap();
    for len in [6, 65_537, 1 << 31, u32::MAX] {
        let payload = b"hello".to_vec();
        guest.send(&Packet { len, payload, ..Packet::new(RW, 1000, 52) });
        assert_eq!(program.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock, "{len}");
    }
    // A complete payload of 65,537 bytes is too long as well.
    let payload = vec![0; 65_537];
    guest.send(&Packet { len: 65_537, payload, ..Packet::new(RW, 1000, 52) });
    assert_eq!(program.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    // The payload's buffer crosses the end of RAM, or wraps around.
    let table = guest.rig.rings(TX)[0];
    for (addr, len) in [(RAM + RAM_SIZE - 10, 100), (u64::MAX - 10, 100), (0, 100)] {
        let header = Packet { len, ..Packet::new(RW, 1000, 52) }.bytes();
        guest.rig.memory.write_slice(&header, GuestAddress(guest.send_at)).unwrap();
        guest.rig.set_descriptor(table, 0, (guest.send_at, HEADER as u32, NEXT, 1));
        guest.rig.set_descriptor(table, 1, (addr, len, 0, 0));
        guest.rig.make_available(TX, 0);
        guest.rig.kick(TX);
        assert_eq!(guest.rig.take_used(TX), Some((0, 0)));
    }
    assert_eq!(program.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    guest.write((1000, 52), b"still here");
    program.set_nonblocking(false).unwrap();
    assert_eq!(heard(&mut program, 10), b"still here");
}

#[test]
fn a_program_that_does_not_read_blocks_the_guest_and_exceeding_the_credit_ends_the_stream() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut idle = guest.connect(&listener, 52);
    guest.send_op(REQUEST, (2000, 52));
    assert_eq!(guest.op(), Some(RESPONSE));
    let mut other = listener.accept().unwrap().0;

    // Until the socket is full and no more credit is given.
    let (chunk, mut sent, mut confirmed) = (vec![7; 16 << 10], 0_u32, 0);
    while sent - confirmed + chunk.len() as u32 <= 64 << 10 {
        guest.write((1000, 52), &chunk);
        sent += chunk.len() as u32;
        while let Some(packet) = guest.receive() {
            assert_eq!(packet.op, CREDIT_UPDATE);
            confirmed = packet.fwd_cnt;
        }
        if sent - confirmed + chunk.len() as u32 > 64 << 10 {
            guest.send_op(CREDIT_REQUEST, (1000, 52));
            let answer = guest.receive().unwrap();
            assert_eq!((answer.op, answer.buf_alloc), (CREDIT_UPDATE, 64 << 10));
            confirmed = answer.fwd_cnt;
        }
    }
    assert!(turn(guest.rig.device.as_mut(), 0).unwrap() == 0, "the loop sleeps meanwhile");

    // The remaining buffer may be filled completely, but not exceeded by one byte.
    let rest = (64 << 10) - (sent - confirmed);
    guest.write((1000, 52), &vec![7; rest as usize]);
    assert_eq!(guest.op(), None);
    let total = u64::from(sent) + u64::from(rest);
    guest.write((1000, 52), b"!");
    assert_eq!(guest.op(), Some(RST));
    let mut taken = Vec::new();
    idle.read_to_end(&mut taken).unwrap();
    assert!(taken.len() as u64 <= total && taken.iter().all(|byte| *byte == 7));
    guest.write((2000, 52), b"unharmed");
    assert_eq!(heard(&mut other, 8), b"unharmed");
}

#[test]
fn buffered_bytes_are_sent_in_order_and_credited() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut program = guest.connect(&listener, 52);
    let (mut sent, mut confirmed, mut taken) = (Vec::new(), 0_usize, Vec::new());
    while sent.len() < 2 << 20 {
        let room = (64 << 10) - (sent.len() - confirmed);
        if room == 0 {
            let mut part = vec![0; 100_000];
            let count = program.read(&mut part).unwrap();
            taken.extend_from_slice(&part[..count]);
            guest.rig.run();
        } else {
            let part: Vec<u8> = (0..room.min(5000)).map(|i| ((sent.len() + i) / 7) as u8).collect();
            guest.write((1000, 52), &part);
            sent.extend(part);
        }
        while let Some(packet) = guest.receive() {
            assert_eq!(packet.op, CREDIT_UPDATE);
            confirmed = packet.fwd_cnt as usize;
        }
    }
    guest.send(&Packet { flags: 2, ..Packet::new(SHUTDOWN, 1000, 52) });
    program.set_nonblocking(true).unwrap();
    loop {
        let mut part = vec![0; 100_000];
        match program.read(&mut part) {
            Ok(0) => break,
            Ok(count) => taken.extend_from_slice(&part[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.rig.run();
    }
    assert!(taken == sent, "{} of {} bytes", taken.len(), sent.len());
}

#[test]
fn a_guest_gets_no_more_than_its_credit() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    guest.send(&Packet { buf_alloc: 100, ..Packet::new(REQUEST, 1000, 52) });
    assert_eq!(guest.op(), Some(RESPONSE));
    let mut program = listener.accept().unwrap().0;
    program.write_all(&[1; 250]).unwrap();
    guest.rig.run();
    assert_eq!(guest.receive().unwrap().payload.len(), 100);
    assert_eq!(guest.op(), Some(CREDIT_REQUEST));
    assert_eq!(guest.op(), None);
    let credit =
        |fwd_cnt, buf_alloc| Packet { fwd_cnt, buf_alloc, ..Packet::new(CREDIT_UPDATE, 1000, 52) };
    // A buffer size smaller than the bytes in it means no space.
    guest.send(&credit(40, 50));
    assert_eq!(guest.op(), None);
    guest.send(&credit(100, 60));
    assert_eq!(guest.receive().unwrap().payload.len(), 60);
    assert_eq!(guest.op(), Some(CREDIT_REQUEST));
    // An older count than the last changes nothing.
    guest.send(&credit(70, 60));
    assert_eq!(guest.op(), None);
    guest.send(&credit(160, u32::MAX));
    assert_eq!(guest.receive().unwrap().payload.len(), 90);
    guest.send(&credit(251, u32::MAX));
    assert_eq!(guest.op(), Some(RST), "more than was sent");
    assert!(is_at_end(&mut program));
}

#[test]
fn bytes_of_the_host_arrive_in_large_packets() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut program = guest.connect(&listener, 52);
    // As many as fit into the socket byte by byte, and then as many as fit at once.
    (0..200).for_each(|_| program.write_all(b"x").unwrap());
    assert_eq!(guest.read(), (vec![b'x'; 200], 1));
    program.write_all(&[b'y'; 20_000]).unwrap();
    let (bytes, packets) = guest.read();
    let least = 20_000_usize.div_ceil(RX_BUFFER as usize - HEADER);
    assert_eq!((bytes.len(), packets), (20_000, least));
}

#[test]
fn a_guest_has_1023_streams_at_most() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if limit.maximum.is_some_and(|most| most < 5000) {
        return skip(&format!("{limit:?} are too few descriptors for both ends of 1023 streams"));
    }
    let most = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, most).unwrap();
    let mut guest = Guest::new();
    let (mut responses, mut refusals, mut programs) = (0, 0, Vec::new());
    let listener = guest.listen(52);
    for port in 0..3000 {
        guest.send(&Packet { buf_alloc: 0, ..Packet::new(REQUEST, port, 52) });
        match guest.op() {
            Some(RESPONSE) => {
                responses += 1;
                programs.push(listener.accept().unwrap());
            }
            Some(RST) => refusals += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((responses, refusals), (1023, 3000 - 1023));
    // Further connections of the host wait until a stream is free.
    let mut caller = guest.call(b"CONNECT 7\n");
    assert_eq!(guest.op(), None);
    guest.send_op(RST, (0, 52));
    guest.rig.run();
    let request = guest.receive().unwrap();
    assert_eq!((request.op, request.dst.1), (REQUEST, 7));
    guest.send_op(RESPONSE, (7, request.src.1));
    assert_eq!(heard(&mut caller, 2), b"OK");
}

#[test]
fn a_connection_that_the_guest_never_answers_times_out() {
    let mut guest = Guest::with(",timeout=1");
    guest.supply(16);
    let mut program = guest.call(b"CONNECT 80\n");
    let mut silent = guest.call(b"CONN");
    let request = guest.receive().unwrap();
    while guest.rig.take_used(RX).is_none() {
        assert!(turn(guest.rig.device.as_mut(), 10_000).unwrap() > 0, "nobody watches the time");
    }
    assert!(is_at_end(&mut program));
    while !is_closed(&silent) {
        assert!(turn(guest.rig.device.as_mut(), 10_000).unwrap() > 0, "nobody watches the time");
    }
    assert!(is_at_end(&mut silent));
    guest.send_op(RESPONSE, (80, request.src.1));
    guest.rig.run();
    assert_eq!(guest.op(), Some(RST), "too late");
}

#[test]
fn a_starting_guest_has_a_longer_time_out() {
    let mut guest = Guest::new();
    let program = guest.call(b"CONNECT 80\n");
    let silent = guest.call(b"CON");
    let start = Instant::now();
    let early = Duration::from_secs(3);
    while let Some(left) = early.checked_sub(start.elapsed()) {
        turn(guest.rig.device.as_mut(), left.as_millis() as i32).unwrap();
    }
    // If the machine was busy for longer than the device waits, this cannot be observed.
    if start.elapsed() < Duration::from_secs(25) {
        assert!(!is_closed(&program) && !is_closed(&silent));
    }
}

fn is_closed(stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let is_open =
        matches!((&*stream).read(&mut [0; 1]), Err(e) if e.kind() == ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
    !is_open
}

#[test]
fn a_second_request_or_a_response_ends_the_stream() {
    for op in [REQUEST, RESPONSE, 0, 99] {
        let mut guest = Guest::new();
        let listener = guest.listen(52);
        let mut program = guest.connect(&listener, 52);
        guest.send_op(op, (1000, 52));
        assert_eq!(guest.op(), Some(RST), "{op}");
        assert!(is_at_end(&mut program));
    }
}

#[test]
fn bytes_before_the_answer_or_after_the_end_end_the_stream() {
    let mut guest = Guest::new();
    let mut program = guest.call(b"CONNECT 80\n");
    let host_port = guest.receive().unwrap().src.1;
    guest.write((80, host_port), b"too early");
    assert_eq!(guest.op(), Some(RST));
    assert!(is_at_end(&mut program));

    let listener = guest.listen(52);
    let mut program = guest.connect(&listener, 52);
    guest.send(&Packet { flags: 2, ..Packet::new(SHUTDOWN, 1000, 52) });
    guest.write((1000, 52), b"too late");
    assert_eq!(guest.op(), Some(RST));
    assert!(is_at_end(&mut program));
}

#[test]
fn each_side_may_shut_down_sending_and_still_receive() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut program = guest.connect(&listener, 52);
    program.write_all(b"question").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    guest.rig.run();
    assert_eq!(guest.receive().unwrap().payload, b"question");
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 2));
    guest.write((1000, 52), b"answer");
    assert_eq!(heard(&mut program, 6), b"answer");
    guest.send(&Packet { flags: 3, ..Packet::new(SHUTDOWN, 1000, 52) });
    assert_eq!(guest.op(), Some(RST));
    assert!(is_at_end(&mut program));

    let mut program = guest.connect(&listener, 52);
    guest.send(&Packet { flags: 2, ..Packet::new(SHUTDOWN, 1000, 52) });
    assert!(is_at_end(&mut program));
    program.write_all(b"answer").unwrap();
    assert_eq!(guest.read().0, b"answer");
    program.shutdown(Shutdown::Write).unwrap();
    guest.rig.run();
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3), "both have said everything");
}

#[test]
fn a_program_that_closes_ends_the_stream_after_its_last_bytes() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let mut program = guest.connect(&listener, 52);
    program.write_all(b"last words").unwrap();
    drop(program);
    guest.rig.run();
    assert_eq!(guest.receive().unwrap().payload, b"last words");
    let end = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));
    guest.send_op(RST, (1000, 52));
    assert_eq!(guest.op(), None);

    // A guest that sends nothing is waited for only for a limited time.
    drop(guest.connect(&listener, 52));
    guest.rig.run();
    assert_eq!(guest.op(), Some(SHUTDOWN));
    while guest.rig.take_used(RX).is_none() {
        assert!(turn(guest.rig.device.as_mut(), 10_000).unwrap() > 0, "nobody watches the time");
    }
    guest.write((1000, 52), b"anybody?");
    assert_eq!(guest.op(), Some(RST));
}

#[test]
fn clients_with_invalid_requests_are_disconnected() {
    let mut guest = Guest::new();
    for line in [&b"GET / HTTP/1.1\r\n"[..], &[b'x'; 33], b"CONNECT 99999999999\n", b"\0\0\0\n"] {
        for _ in 0..50 {
            let mut program = guest.call(line);
            assert!(is_at_end(&mut program));
        }
    }
    assert_eq!(guest.op(), None);
}

#[test]
fn a_guest_that_takes_no_replies_is_not_served() {
    let mut guest = Guest::without_buffers();
    let mut answered = 0;
    let mut taken = 0;
    // Each packet needs a reply, and none can be sent.
    while guest.send_bytes(&Packet::new(RW, taken, 1).bytes()) {
        taken += 1;
        assert!(taken < 10_000, "the answers are kept without limit");
    }
    assert_eq!(taken, 256);
    guest.supply(16);
    while let Some(packet) = guest.receive() {
        assert_eq!((packet.op, packet.dst.1), (RST, answered));
        answered += 1;
    }
    assert_eq!(answered, taken + 1, "the one that waited was taken, too");
    assert!(guest.rig.take_used(TX).is_some());
}

#[test]
fn streams_wait_for_buffers_without_keeping_the_loop_awake() {
    let mut guest = Guest::without_buffers();
    let listener = guest.listen(52);
    guest.send_op(REQUEST, (1000, 52));
    let mut program = listener.accept().unwrap().0;
    program.write_all(&[5; 10_000]).unwrap();
    guest.rig.run();
    // Connecting, resetting and connecting again leaves no stale entries in the send queue.
    for _ in 0..1000 {
        guest.send_op(REQUEST, (2000, 52));
        guest.send_op(RST, (2000, 52));
        drop(listener.accept().unwrap());
    }
    assert_eq!(turn(guest.rig.device.as_mut(), 0).unwrap(), 0);
    guest.supply(16);
    assert_eq!(guest.op(), Some(RESPONSE));
    assert_eq!(guest.read().0.len(), 10_000);
}

#[test]
fn receive_buffers_that_cannot_hold_a_packet_come_back() {
    let mut guest = Guest::without_buffers();
    let _listener = guest.listen(52);
    let table = guest.rig.rings(RX)[0];
    for (index, len, flags) in [(0, 43, WRITE), (1, 44, WRITE), (2, 100, 0)] {
        guest.rig.set_descriptor(table, index, (guest.receive_at, len, flags, 0));
        guest.rig.make_available(RX, index);
    }
    guest.send_op(REQUEST, (1000, 52));
    let used: Vec<_> = std::iter::from_fn(|| guest.rig.take_used(RX)).collect();
    assert_eq!(used, [(0, 0), (1, 0), (2, 0)]);
    guest.supply(4);
    assert_eq!(guest.op(), Some(RESPONSE));
}

#[test]
fn a_reset_ends_all_streams_and_the_device_works_again() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    for _ in 0..20 {
        let mut program = guest.connect(&listener, 52);
        let mut caller = guest.call(b"CONNECT 80\n");
        let mut silent = guest.call(b"CON");
        assert_eq!(guest.op(), Some(REQUEST));
        guest.rig.write(0x70, 0);
        for stream in [&mut program, &mut caller, &mut silent] {
            assert!(is_at_end(stream));
        }
        guest.rig.start(1);
        guest.supply(16);
    }
    let mut program = guest.connect(&listener, 52);
    guest.write((1000, 52), b"new life");
    assert_eq!(heard(&mut program, 8), b"new life");
}

#[test]
fn a_reset_by_a_hart_wakes_the_loop() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    let _program = guest.connect(&listener, 52);
    assert_eq!(turn(guest.rig.device.as_mut(), 0).unwrap(), 0, "the loop sleeps");
    guest.rig.write(0x70, 0);
    assert!(turn(guest.rig.device.as_mut(), 10_000).unwrap() > 0, "the loop sleeps on");
    assert_eq!(turn(guest.rig.device.as_mut(), 0).unwrap(), 0);
}

#[test]
fn the_socket_file_is_deleted_with_the_device() {
    let guest = Guest::new();
    let Guest { rig, folder, .. } = guest;
    assert!(folder.path().join("s").exists());
    drop(rig);
    assert!(!folder.path().join("s").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_packets_makes_the_device_panic_or_spin(
        packets in prop::collection::vec(
            (0_u16..10, 0_u32..3, prop_oneof![0_u32..300, any::<u32>()], any::<u32>(), any::<u32>(), 0_u32..5, any::<bool>()),
            1..80,
        )
    ) {
        let mut guest = Guest::new();
        let listener = guest.listen(1);
        listener.set_nonblocking(true).unwrap();
        let mut programs = Vec::new();
        for (op, port, len, buf_alloc, fwd_cnt, flags, lies) in packets {
            let payload = vec![9; (len % 4096) as usize];
            let len = if lies { len } else { payload.len() as u32 };
            let fwd_cnt = if fwd_cnt % 2 == 0 { fwd_cnt } else { 0 };
            guest.send(&Packet { len, payload, buf_alloc, fwd_cnt, flags, ..Packet::new(op, port, 1) });
            if let Ok((mut program, _)) = listener.accept() {
                let _ = program.write_all(&[3; 5000]);
                programs.push(program);
            }
            if flags == 4 {
                programs.pop();
            }
            guest.read();
        }
        prop_assert_eq!(guest.rig.status(), 15);
    }
}
