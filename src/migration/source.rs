//! The side that gives its guest away.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::Serialize;

use super::channel::Channel;
use super::message::{FORMAT, Hello, Kind, MOST_PAGES, State, want};
use super::process::{Process, Watch};
use crate::error::Error;
use crate::memory::{PAGE, append, united};
use crate::snapshot::{PAGE_WORDS, Preamble, ReadRam, SavedMachine, is_zero, words};

/// Time for which the target may let the source wait: it builds a machine at most.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 60 });

/// Time that a process whose socket is closed has to end.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that are read at once.
const STEP: u64 = MOST_PAGES * PAGE;
const STEP_BYTES: usize = 64 * 4096;

const _: () = assert!(STEP_BYTES as u64 == STEP);

/// The connection to the target.
#[derive(Debug)]
pub(crate) struct Source {
    channel: Channel,
    target: Option<Watch>,
    /// The other end of the socket is the target's itself, not that of a program in between.
    is_direct: bool,
    /// The pages that the target has with other bytes than zeroes.
    sent: PageSet,
    /// What comes after the guest.
    left: Vec<Range<u64>>,
    words: Vec<u64>,
}

/// What became of the guest after the source has let it go.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It runs at the target.
    Gone,
    /// It does not run at the target, and never did, for this reason.
    Stays(String),
    /// Nobody knows: the connection broke at the last moment, and the target may be on another host.
    Unknown(String),
}

impl Source {
    /// Announces a machine of this name with `mem` bytes of RAM, and waits for the target's consent.
    ///
    /// # Errors
    /// The target refuses it, or is no rvmm of this version.
    pub(crate) fn greet(
        socket: OwnedFd,
        name: &str,
        mem: u64,
        hugepages: bool,
    ) -> Result<Self, Error> {
        let mut channel = Channel::new(socket).map_err(broken)?;
        channel.set_patience(Some(PATIENCE)).map_err(broken)?;
        let process = Process::this().map_err(|source| Error::Host {
            what: "Cannot identify this process (mount /proc)".into(),
            source,
        })?;
        let preamble = Preamble::of(&FORMAT);
        let hello = Hello { preamble, name: name.into(), mem, hugepages, process };
        send_json(&mut channel, Kind::Hello, &hello).map_err(broken)?;
        let welcome = expect(&mut channel, Kind::Welcome)?;
        let target: Process = serde_json::from_slice(welcome)
            .map_err(|error| broken(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        let is_direct = channel.peer_process().is_some_and(|pid| target.has_id(pid));
        let target = target.watch();
        Ok(Self {
            channel,
            target,
            is_direct,
            sent: PageSet::default(),
            left: Vec::new(),
            words: Vec::new(),
        })
    }

    /// Number of bytes sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.channel.sent()
    }

    /// Sends the pages in `ranges`, which `read` reads; zero pages only where the target has others. The guest may change them
    /// meanwhile, if they are sent again then.
    ///
    /// # Errors
    /// RAM cannot be read, or the connection is broken.
    pub(crate) fn send_pages(
        &mut self,
        ranges: &[Range<u64>],
        read: ReadRam<'_>,
    ) -> Result<(), Error> {
        for range in ranges {
            for at in range.clone().step_by(STEP_BYTES) {
                let end = range.end.min(at.saturating_add(STEP));
                self.send_batch(at..end, read, false).map_err(broken)?;
            }
        }
        Ok(())
    }

    fn send_batch(&mut self, batch: Range<u64>, read: ReadRam<'_>, all: bool) -> io::Result<()> {
        let len = usize::try_from(batch.end - batch.start).map_err(io::Error::other)?;
        let mut words = std::mem::take(&mut self.words);
        words.resize(len.div_ceil(8), 0);
        let sent = read(batch.start, words::bytes_mut(&mut words))
            .and_then(|()| self.send_words(batch.start, &words, all));
        self.words = words;
        sent
    }

    /// Sends copies of pages; zero pages only where the target has others, or `all`.
    fn send_words(&mut self, start: u64, words: &[u64], all: bool) -> io::Result<()> {
        let (mut full, mut zero) = (Vec::new(), Vec::new());
        for (at, page) in (start..).step_by(PAGE_WORDS * 8).zip(words.chunks(PAGE_WORDS)) {
            let is_zero = is_zero(page);
            let was_sent = self.sent.set(at / PAGE, !is_zero);
            if !is_zero {
                append(&mut full, at..at + PAGE);
            } else if was_sent || all {
                append(&mut zero, at..at + PAGE);
            }
        }
        for Range { start: at, end } in full {
            let index = |at: u64| usize::try_from((at - start) / 8).unwrap_or(usize::MAX);
            let bytes: &[u8] = words::bytes(words.get(index(at)..index(end)).unwrap_or_default());
            self.channel.send(Kind::Pages, 8 + bytes.len(), |payload| {
                if let Some((offset, pages)) = payload.split_at_mut_checked(8) {
                    offset.copy_from_slice(&at.to_le_bytes());
                    pages.copy_from_slice(bytes);
                }
                Ok(())
            })?;
        }
        for Range { start: at, end } in zero {
            let numbers = [at.to_le_bytes(), (end - at).to_le_bytes()].concat();
            self.channel.send(Kind::Zeroes, numbers.len(), |payload| {
                payload.copy_from_slice(&numbers);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Waits until the target has everything that was sent.
    ///
    /// # Errors
    /// The connection is broken, or the target refuses to go on.
    pub(crate) fn finish_round(&mut self) -> Result<(), Error> {
        self.channel.send(Kind::Round, 0, |_| Ok(())).map_err(broken)?;
        expect(&mut self.channel, Kind::Received).map(|_| ())
    }

    /// Sends everything but the memory, and waits until the target has built the machine. The memory is complete but for what is `left`,
    /// which `read` reads.
    ///
    /// # Errors
    /// The target cannot build it, or the connection is broken.
    pub(crate) fn hand_over(
        &mut self,
        machine: SavedMachine,
        is_paused: bool,
        left: Vec<Range<u64>>,
        read: ReadRam<'_>,
    ) -> Result<(), Error> {
        self.left = united(left);
        let left = self.left.iter().map(|range| (range.start, range.end - range.start)).collect();
        let state = State { machine, is_paused, left };
        send_json(&mut self.channel, Kind::State, &state).map_err(broken)?;
        self.serve_until(Kind::Ready, read)
    }

    /// Gives the guest to the target, which is ready.
    pub(crate) fn commit(&mut self, read: ReadRam<'_>) -> Outcome {
        let sent = self.channel.send(Kind::Go, 0, |_| Ok(()));
        let result = sent.map_err(broken).and_then(|()| self.serve_until(Kind::Running, read));
        let Err(error) = result else { return Outcome::Gone };
        let reason = crate::error::chain(&error);
        // What a process has written to a Unix socket can be read after its end: it has ended without taking the guest.
        let has_ended = |target: &Watch| target.ends_within(END_PATIENCE);
        if self.is_direct && self.target.as_ref().is_some_and(has_ended) {
            return Outcome::Stays(reason);
        }
        Outcome::Unknown(reason)
    }

    /// Sends what is left to the target, where the guest runs already; the pages first that somebody waits for. Returns when it has all.
    ///
    /// # Errors
    /// RAM cannot be read, or the connection is broken: the guest is lost.
    pub(crate) fn send_left(&mut self, read: ReadRam<'_>) -> Result<(), Error> {
        let left = std::mem::take(&mut self.left);
        if left.is_empty() {
            return Ok(());
        }
        for range in left {
            for at in range.clone().step_by(STEP_BYTES) {
                while self.channel.is_ready().map_err(broken)? {
                    if self.serve_one(Kind::Complete, read)? {
                        return Ok(());
                    }
                }
                let end = range.end.min(at.saturating_add(STEP));
                self.send_batch(at..end, read, true).map_err(broken)?;
            }
        }
        self.serve_until(Kind::Complete, read)
    }

    /// Serves the target's wishes until it sends a message of this kind.
    fn serve_until(&mut self, wanted: Kind, read: ReadRam<'_>) -> Result<(), Error> {
        while !self.serve_one(wanted, read)? {}
        Ok(())
    }

    /// Receives a message, and sends the page that it asks for. True for one of the `wanted` kind.
    fn serve_one(&mut self, wanted: Kind, read: ReadRam<'_>) -> Result<bool, Error> {
        let (kind, bytes) = self.channel.receive().map_err(broken)?;
        if kind == wanted {
            return Ok(true);
        }
        match (kind, want(bytes)) {
            (Kind::Refused, _) => Err(refusal(bytes)),
            (Kind::Want, Some(at)) => {
                let page = at / PAGE * PAGE;
                let end = page.checked_add(PAGE).ok_or_else(|| unexpected(kind, wanted))?;
                self.send_batch(page..end, read, true).map_err(broken)?;
                Ok(false)
            }
            _ => Err(unexpected(kind, wanted)),
        }
    }

    /// Tells the target that the guest stays here, before it was [given](Source::commit) to it.
    ///
    /// # Errors
    /// The connection is broken. The target learns that from its end.
    pub(crate) fn refuse(mut self, reason: &str) -> io::Result<()> {
        refuse(&mut self.channel, reason)
    }
}

/// Sends a refusal.
pub(super) fn refuse(channel: &mut Channel, reason: &str) -> io::Result<()> {
    let bytes = refusal_text(reason);
    channel.send(Kind::Refused, bytes.len(), |payload| {
        payload.copy_from_slice(bytes);
        Ok(())
    })
}

/// As much of a reason as a message has room for.
pub(super) fn refusal_text(reason: &str) -> &[u8] {
    let most = usize::try_from(Kind::Refused.most()).unwrap_or(0);
    reason.as_bytes().get(..most).unwrap_or(reason.as_bytes())
}

/// Sends a value as JSON.
pub(super) fn send_json(
    channel: &mut Channel,
    kind: Kind,
    value: &impl Serialize,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(value)?;
    channel.send(kind, bytes.len(), |payload| {
        payload.copy_from_slice(&bytes);
        Ok(())
    })
}

/// Receives a message that has to be of this kind, and returns its bytes.
pub(super) fn expect(channel: &mut Channel, wanted: Kind) -> Result<&[u8], Error> {
    match channel.receive() {
        Ok((kind, bytes)) if kind == wanted => Ok(bytes),
        Ok((Kind::Refused, bytes)) => Err(refusal(bytes)),
        Ok((kind, _)) => Err(unexpected(kind, wanted)),
        Err(error) => Err(broken(error)),
    }
}

/// The error of a side that refuses.
pub(super) fn refusal(bytes: &[u8]) -> Error {
    Error::Config(format!("The other side refuses: {}", String::from_utf8_lossy(bytes)))
}

fn unexpected(kind: Kind, wanted: Kind) -> Error {
    let what = format!("it sends {kind:?} instead of {wanted:?}");
    broken(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// An error of the connection.
pub(super) fn broken(source: io::Error) -> Error {
    let what = match source.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => {
            return Error::Host {
                what: "The other side of the migration has ended".into(),
                source,
            };
        }
        io::ErrorKind::WouldBlock => "The other side of the migration does not answer",
        io::ErrorKind::InvalidData => "Cannot understand the other side of the migration",
        _ => "The connection of the migration failed",
    };
    Error::Host { what: what.into(), source }
}

/// A set of page numbers, as far as they were named.
#[derive(Debug, Default)]
struct PageSet(Vec<u64>);

impl PageSet {
    /// Puts a page into the set, or takes it out. True if it was in it.
    fn set(&mut self, page: u64, is_in: bool) -> bool {
        let Ok(index) = usize::try_from(page / 64) else { return false };
        if self.0.len() <= index {
            if !is_in {
                return false;
            }
            self.0.resize(index + 1, 0);
        }
        let Some(word) = self.0.get_mut(index) else { return false };
        let (bit, was_in) = (1 << (page % 64), *word >> (page % 64) & 1 == 1);
        if is_in {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        was_in
    }
}
