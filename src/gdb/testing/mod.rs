//! A debugger and harts for tests, and what a fuzzer makes of them: bytes become packets of a client, and whatever those are, the
//! next client is served, finds a guest that stands still, and no breakpoint in its memory.
//!
//! | file | what is in it |
//! |---|---|
//! | `client.rs` | a debugger that speaks packets, and a machine of tiny harts for it |
//! | `hart.rs` | a hart that runs a few instructions out of guest memory |
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    unreachable_pub,
    reason = "a test fails by panicking, and fuzz/ reaches what is public"
)]
#![cfg_attr(fuzzing, allow(dead_code, missing_docs, reason = "tests use all of it"))]

pub(in crate::gdb) mod client;
pub(in crate::gdb) mod hart;

use client::{CODE, Client, Life, Place, framed};

use crate::vcpu::stop::StopReason;

/// How packets begin that mean something, or did once.
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

/// How they may go on here.
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

/// The guest of a fuzzer's debugger: code that counts, and code that waits, also where a step takes it past its `wfi`.
const PROGRAMS: [&[u32]; 2] = [
    &[0x0000_0013, 0x0015_0513, 0x0001_0001, 0xff9f_f06f],
    &[0x0000_0013, 0x1050_0073, 0xffdf_f06f],
];

/// Bytes from this on end a packet and send it; those between here and 0x80 are words.
const SEND: u8 = 0xf0;
/// Without a frame.
const SEND_RAW: u8 = 0xfa;
const INTERRUPT: u8 = 0xfc;
const NEXT_AS_IT_IS: u8 = 0xfd;
/// And the one that is left hangs up.
const RESTART: u8 = 0xfe;

/// Actions of one run at most: each takes a millisecond or so.
const ACTIONS: usize = 50;

/// A session or several, of a client whose bytes these are.
///
/// # Panics
/// The server does what it must not.
pub fn run_packets(bytes: &[u8]) {
    let (place, life) = (Place::new(true), Life::new(&PROGRAMS));
    place.begin(&life);
    let mut run = PacketRun {
        place,
        code: code(&life),
        life,
        gdb: None,
        packet: Vec::new(),
        is_in_step: true,
        has_written: false,
    };
    let (mut bytes, mut actions) = (bytes.iter().copied(), 0);
    while let Some(byte) = bytes.next() {
        match byte {
            NEXT_AS_IT_IS => run.packet.extend(bytes.next()),
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
        if actions == ACTIONS || run.life.control.reason().is_some() {
            break;
        }
    }
    run.end();
}

/// The memory that packets of a fuzzer's are about.
fn code(life: &Life) -> Vec<u8> {
    life.memory(CODE - 0x1000, 0x4000)
}

struct PacketRun {
    place: Place,
    life: Life,
    /// What memory is like without a debugger.
    code: Vec<u8>,
    gdb: Option<Client>,
    packet: Vec<u8>,
    /// Whether each packet so far had its one answer. Otherwise nobody knows what is still to come, and nobody waits for it.
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
        let socket = &self.place.socket;
        self.gdb.get_or_insert_with(|| Client::new(socket))
    }

    /// Sends a packet, and waits for its answer where it has exactly one.
    fn send(&mut self, packet: &[u8]) {
        // What follows is outside of the packet, or a packet of its own.
        self.is_in_step &= !packet.iter().any(|byte| matches!(byte, b'#' | b'$'));
        let is_write = |first: &u8| matches!(first, b'M' | b'X');
        self.has_written |= !self.is_in_step || packet.first().is_some_and(is_write);
        self.client().raw(&framed(packet));
        if !self.is_in_step {
            return;
        }
        if !self.client().has_more() {
            // The guest may run, and for ever. Where it stands still, nothing comes of this.
            self.client().raw(&[3]);
        }
        while !self.client().has_more() {
            // The answer is the machine's end, which the machine's own thread tells.
            if self.life.control.reason().is_some() {
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

    /// The guest restarts, under the debugger if one is there.
    fn restart(&mut self) {
        let next = Life::new(&PROGRAMS);
        self.code = code(&next);
        let life = std::mem::replace(&mut self.life, next);
        // It may have ended by itself just before.
        life.control.stop(StopReason::Reset);
        let _ = life.end();
        self.place.server.over();
        self.place.begin(&self.life);
    }

    fn end(mut self) {
        self.hang_up();
        self.check();
        let Self { place, life, .. } = self;
        life.control.stop(StopReason::PowerOff);
        let _ = life.end();
        place.server.over();
        place.server.end(0);
    }

    /// Whether the next debugger finds everything as if there had been none; unless the machine has ended.
    fn check(&self) {
        let mut gdb = Client::new(&self.place.socket);
        gdb.send("?");
        let Some(answer) = gdb.reply() else {
            assert!(self.life.control.reason().is_some(), "a debugger is sent away for no reason");
            return;
        };
        assert!(answer.starts_with("T05thread:"), "{answer}");
        assert!(self.life.context.is_empty());
        assert!(self.has_written || code(&self.life) == self.code, "a breakpoint is left");
        gdb.send("D");
        gdb.hang_up();
    }
}
