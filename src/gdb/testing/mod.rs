//! A client and harts for tests and for a fuzzer, whose bytes become packets of a client: whatever those are, the next client is
//! served, and finds a stopped guest without breakpoints in its memory.
//!
//! | file | what is in it |
//! |---|---|
//! | `client.rs` | a client of the protocol's packets, and a guest of minimal harts for it |
//! | `hart.rs` | a hart that runs a few instructions out of guest memory |
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    unreachable_pub,
    reason = "a test fails by panicking, and fuzz/ uses the public items"
)]
#![cfg_attr(fuzzing, allow(dead_code, missing_docs, reason = "tests use all of it"))]

pub(in crate::gdb) mod client;
pub(in crate::gdb) mod hart;

use client::{CODE, Client, TestGuest, TestServer, framed};

use crate::vcpu::stop::StopReason;

/// Beginnings of packets of the protocol, obsolete ones included.
pub(super) const HEADS: [&str; 49] = [
    "g",
    "G",
    "p",
    "P",
    "m",
    "M",
    "X",
    "Z0,",
    "z0,",
    "Z1,",
    "Z2,",
    "Hg",
    "Hc",
    "T",
    "?",
    "c",
    "s",
    "C05",
    "S05",
    "vCont;c",
    "vCont;s:1",
    "vCont;s:2",
    "vCont;s:1;c",
    "vCont;s:2;c:1",
    "vCont;c:",
    "vCont;s:",
    "vCont;r",
    "vCont;t",
    "vCont?",
    "vKill;1",
    "k",
    "D",
    "D;1",
    "!",
    "R00",
    "i",
    "bc",
    "bs",
    "qSupported:",
    "qXfer:features:read:target.xml:",
    "qfThreadInfo",
    "qsThreadInfo",
    "qThreadExtraInfo,",
    "qRcmd,",
    "qAttached",
    "qC",
    "QStartNoAckMode",
    "vFile:open:",
    "x",
];

/// Continuations that are valid for this guest.
const TAILS: [&str; 15] = [
    "80010000",
    "80010004",
    "80010006",
    "80011000",
    "801ffffe",
    "ffffffffffffffff",
    "20",
    "1c5",
    "146",
    "691",
    "=",
    ":",
    ";",
    ",4",
    "0400010080000000",
];

/// The guest under a fuzzer: code that counts, and code that waits, also after a step over its `wfi`.
const PROGRAMS: [&[u32]; 2] = [
    &[0x0000_0013, 0x0015_0513, 0x0001_0001, 0xff9f_f06f],
    &[0x0000_0013, 0x1050_0073, 0xffdf_f06f],
];

/// Bytes from here on end a packet and send it; those from 0x80 to here stand for entries of [`HEADS`] and [`TAILS`].
const SEND: u8 = 0xf0;
/// The same, without a frame.
const SEND_RAW: u8 = 0xfa;
const INTERRUPT: u8 = 0xfc;
/// Takes the next byte literally.
const LITERAL: u8 = 0xfd;
/// Resets the guest; the one byte above closes the connection.
const RESTART: u8 = 0xfe;

/// Maximum number of actions per input: each takes a millisecond or so.
const MAX_ACTIONS: usize = 50;

/// Runs one or more sessions of a client whose packets are made of `bytes`.
///
/// # Panics
/// The server misbehaves.
pub fn run_packets(bytes: &[u8]) {
    let (fixture, guest) = (TestServer::new(true), TestGuest::new(&PROGRAMS));
    fixture.begin(&guest);
    let mut run = PacketRun {
        fixture,
        code: code(&guest),
        guest,
        gdb: None,
        packet: Vec::new(),
        is_in_step: true,
        has_written: false,
    };
    let (mut bytes, mut actions) = (bytes.iter().copied(), 0);
    while let Some(byte) = bytes.next() {
        match byte {
            LITERAL => run.packet.extend(bytes.next()),
            0..0x80 => run.packet.push(byte),
            0x80..SEND => {
                let at = usize::from(byte - 0x80) % (HEADS.len() + TAILS.len());
                let word = HEADS.get(at).unwrap_or_else(|| &TAILS[at - HEADS.len()]);
                run.packet.extend(word.as_bytes());
            }
            _ => {
                run.act(byte);
                actions += 1;
            }
        }
        if actions == MAX_ACTIONS || run.guest.control.reason().is_some() {
            break;
        }
    }
    run.end();
}

/// The memory that a fuzzer's packets access.
fn code(guest: &TestGuest) -> Vec<u8> {
    guest.memory(CODE - 0x1000, 0x4000)
}

struct PacketRun {
    fixture: TestServer,
    guest: TestGuest,
    /// The original contents of that memory.
    code: Vec<u8>,
    gdb: Option<Client>,
    packet: Vec<u8>,
    /// True if each packet so far had exactly one reply. Otherwise the number of outstanding replies is unknown, and none is waited for.
    is_in_step: bool,
    has_written: bool,
}

impl PacketRun {
    fn act(&mut self, byte: u8) {
        let packet = std::mem::take(&mut self.packet);
        match byte {
            SEND..SEND_RAW => self.send(&packet),
            SEND_RAW..INTERRUPT => {
                self.is_in_step = false;
                self.has_written |= packet.iter().any(|byte| matches!(byte, b'M' | b'X'));
                self.client().raw(&packet);
            }
            INTERRUPT => self.client().raw(&[3]),
            RESTART => self.restart(),
            _ => self.hang_up(),
        }
    }

    fn client(&mut self) -> &mut Client {
        let socket = &self.fixture.socket;
        self.gdb.get_or_insert_with(|| Client::new(socket))
    }

    /// Sends a packet, and waits for its reply if it has exactly one.
    fn send(&mut self, packet: &[u8]) {
        // The bytes after such a mark are outside of the packet, or another packet.
        self.is_in_step &= !packet.iter().any(|byte| matches!(byte, b'#' | b'$'));
        let is_write = |first: &u8| matches!(first, b'M' | b'X');
        self.has_written |= !self.is_in_step || packet.first().is_some_and(is_write);
        self.client().raw(&framed(packet));
        if !self.is_in_step {
            return;
        }
        if !self.client().has_more() {
            // The guest may run forever. A stopped guest ignores the interrupt.
            self.client().raw(&[3]);
        }
        while !self.client().has_more() {
            // The reply is the end of the machine, which its own thread reports.
            if self.guest.control.reason().is_some() {
                return;
            }
        }
        if self.client().reply().is_none() {
            self.gdb = None;
        }
    }

    fn hang_up(&mut self) {
        if let Some(gdb) = self.gdb.take() {
            gdb.hang_up();
        }
        self.is_in_step = true;
    }

    /// Resets the guest, under the debugger if one is connected.
    fn restart(&mut self) {
        let next = TestGuest::new(&PROGRAMS);
        self.code = code(&next);
        let guest = std::mem::replace(&mut self.guest, next);
        // It may already have ended by itself.
        guest.control.stop(StopReason::Reset);
        let _ = guest.end();
        self.fixture.server.over();
        self.fixture.begin(&self.guest);
    }

    fn end(mut self) {
        self.hang_up();
        self.check();
        let Self { fixture, guest, .. } = self;
        guest.control.stop(StopReason::PowerOff);
        let _ = guest.end();
        fixture.server.over();
        fixture.server.end(0);
    }

    /// Checks that the next debugger finds an unchanged guest, unless the machine has ended.
    fn check(&self) {
        let mut gdb = Client::new(&self.fixture.socket);
        gdb.send("?");
        let Some(reply) = gdb.reply() else {
            assert!(
                self.guest.control.reason().is_some(),
                "a debugger is disconnected for no reason"
            );
            return;
        };
        assert!(reply.starts_with("T05thread:"), "{reply}");
        assert!(self.guest.context.is_empty());
        assert!(self.has_written || code(&self.guest) == self.code, "a breakpoint is left");
        gdb.send("D");
        gdb.hang_up();
    }
}
