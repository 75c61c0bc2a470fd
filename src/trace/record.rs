//! The record of an exit: eight words, written by the hart, which has to be fast, and read by the writer.

use std::sync::Arc;

use super::ring::{Producer, Ring, WORDS, Words};
use crate::vcpu::Flow;
use crate::vcpu::exit::{Exit, Fault, SystemEvent};
use crate::vcpu::record::{Recorder, Ticks};

/// The kind of an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum ExitKind {
    MmioRead,
    MmioWrite,
    Sbi,
    Csr,
    System,
    Debug,
    Interrupted,
    Fault,
    Unknown,
}

impl ExitKind {
    pub(super) const ALL: [Self; 9] = [
        Self::MmioRead,
        Self::MmioWrite,
        Self::Sbi,
        Self::Csr,
        Self::System,
        Self::Debug,
        Self::Interrupted,
        Self::Fault,
        Self::Unknown,
    ];

    /// Its name in a file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::MmioRead => "mmio-read",
            Self::MmioWrite => "mmio-write",
            Self::Sbi => "sbi",
            Self::Csr => "csr",
            Self::System => "system",
            Self::Debug => "debug",
            Self::Interrupted => "interrupted",
            Self::Fault => "fault",
            Self::Unknown => "unknown",
        }
    }
}

/// Names of the outcome of an exit in a file, by the number in the record.
const OUTCOMES: [&str; 6] = ["resume", "retry", "yield", "suspend", "resolve", "stop"];

/// A decoded record. The meaning of `a` to `d` depends on the kind: see [`HartRecorder::note`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// The times at which the hart left the guest and entered it again, in ticks.
    pub(super) left: u64,
    pub(super) entered: u64,
    pub(super) kind: ExitKind,
    /// Bytes of an access.
    pub(super) width: u8,
    pub(super) outcome: &'static str,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) c: u64,
    pub(super) d: u64,
    pub(super) pc: Option<u64>,
}

impl Record {
    /// Decodes a record; `None` for words that no recorder writes.
    pub(super) fn read(words: &Words) -> Option<Self> {
        let [left, entered, meta, a, b, c, d, pc] = *words;
        let [kind, width, outcome, has_pc, ..] = meta.to_le_bytes();
        Some(Self {
            left,
            entered,
            kind: *ExitKind::ALL.get(usize::from(kind))?,
            width,
            outcome: OUTCOMES.get(usize::from(outcome))?,
            a,
            b,
            c,
            d,
            pc: (has_pc == 1).then_some(pc),
        })
    }
}

/// Records the exits of one hart into its ring. A record is complete when the hart enters the guest again, or ends.
#[derive(Debug)]
pub struct HartRecorder {
    producer: Producer,
    now: fn() -> u64,
    every_pc: bool,
    words: Words,
    is_open: bool,
}

/// Positions in the third word.
const WIDTH: u32 = 8;
const OUTCOME: u32 = 16;
const HAS_PC: u64 = 1 << 24;

impl HartRecorder {
    pub(super) fn new(ring: Arc<Ring>, ticks: Ticks, every_pc: bool) -> Self {
        let producer = Producer::new(ring);
        Self { producer, now: ticks.now, every_pc, words: [0; WORDS], is_open: false }
    }

    #[inline]
    fn note(&mut self, kind: ExitKind, width: usize, outcome: u64, what: [u64; 4]) {
        let left = self.words[0];
        let meta = kind as u64 | (width as u64) << WIDTH | outcome << OUTCOME;
        let [a, b, c, d] = what;
        self.words = [left, 0, meta, a, b, c, d, 0];
        self.is_open = true;
    }

    #[cold]
    #[inline(never)]
    fn note_rare(&mut self, exit: &Exit<'_>, outcome: u64) {
        let (kind, what) = match exit {
            Exit::Csr(access) => {
                (ExitKind::Csr, [access.csr, access.new_value, access.write_mask, *access.ret])
            }
            Exit::System(SystemEvent::Shutdown(reason)) => (ExitKind::System, [0, *reason, 0, 0]),
            Exit::System(SystemEvent::Reset(reason)) => (ExitKind::System, [1, *reason, 0, 0]),
            Exit::System(SystemEvent::Other(number)) => {
                (ExitKind::System, [2, (*number).into(), 0, 0])
            }
            Exit::Debug => (ExitKind::Debug, [0; 4]),
            Exit::Interrupted => (ExitKind::Interrupted, [0; 4]),
            Exit::Fault(fault) => (ExitKind::Fault, words_of(*fault)),
            Exit::Unknown(number) => (ExitKind::Unknown, [(*number).into(), 0, 0, 0]),
            // The others are recorded in the fast path.
            Exit::MmioRead { .. } | Exit::MmioWrite { .. } | Exit::Sbi(_) => return,
        };
        self.note(kind, 0, outcome, what);
    }

    #[inline]
    fn close(&mut self) {
        if self.is_open {
            self.words[1] = (self.now)();
            self.producer.push(&self.words);
            self.is_open = false;
        }
    }
}

impl Recorder for HartRecorder {
    #[inline]
    fn entering(&mut self) {
        self.close();
    }

    #[inline]
    fn left(&mut self) {
        self.words[0] = (self.now)();
    }

    #[inline]
    fn answered(&mut self, exit: &Exit<'_>, flow: &Flow) {
        let outcome = number_of(flow);
        match exit {
            Exit::MmioRead { addr, data } => {
                self.note(ExitKind::MmioRead, data.len(), outcome, [*addr, value(data), 0, 0]);
            }
            Exit::MmioWrite { addr, data } => {
                self.note(ExitKind::MmioWrite, data.len(), outcome, [*addr, value(data), 0, 0]);
            }
            Exit::Sbi(call) => {
                let what = [call.extension, call.function, call.args[0], call.ret[0]];
                self.note(ExitKind::Sbi, 0, outcome, what);
            }
            rare => self.note_rare(rare, outcome),
        }
    }

    #[inline]
    fn wants_pc(&self, flow: &Flow) -> bool {
        // Here other registers are read anyway, and one more call hardly matters.
        self.every_pc || matches!(flow, Flow::Resolve(_) | Flow::Stop(_) | Flow::Suspend)
    }

    fn at(&mut self, pc: u64) {
        self.words[2] |= HAS_PC;
        self.words[7] = pc;
    }
}

impl Drop for HartRecorder {
    /// Completes the last exit, after which the guest was not entered again.
    fn drop(&mut self) {
        self.close();
    }
}

/// A little-endian value of at most eight bytes.
#[inline]
fn value(data: &[u8]) -> u64 {
    match *data {
        [a] => a.into(),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
        _ => data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)),
    }
}

#[inline]
fn number_of(flow: &Flow) -> u64 {
    match flow {
        Flow::Resume => 0,
        Flow::Retry => 1,
        Flow::Yield => 2,
        Flow::Suspend => 3,
        Flow::Resolve(_) => 4,
        Flow::Stop(_) => 5,
    }
}

fn words_of(fault: Fault) -> [u64; 4] {
    match fault {
        Fault::Unemulated => [0; 4],
        Fault::Misaligned => [1, 0, 0, 0],
        Fault::Memory => [2, 0, 0, 0],
        Fault::Entry { reason, cpu } => [3, reason, cpu.into(), 0],
        Fault::Host(errno) => [4, u64::from(errno.unsigned_abs()), 0, 0],
    }
}
