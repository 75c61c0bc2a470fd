//! The side that takes a guest over.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::address::Address;
use super::arriving::{Arriving, Verdict};
use super::channel::Channel;
use super::message::{FORMAT, Hello, Kind, State, pages, zeroes};
use super::process::{Process, Watch};
use super::source::{broken, expect, refusal_text, refuse, send_json};
use crate::error::Error;
use crate::layout::{RAM_BASE, Span};
use crate::memory::{GuestRam, PAGE};
use crate::snapshot::SavedMachine;

/// Time that a process whose socket is closed has to end.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Time for which the source may let the target wait for its first words.
const GREETING: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 60 });

/// A machine that is about to come.
pub struct Incoming {
    channel: Channel,
    hello: Hello,
    source: Option<Watch>,
    /// Memory that comes later, and whether the guest is this side's.
    arriving: Option<(Arc<Arriving>, Verdict)>,
}

/// A machine that was received.
pub(crate) struct Received {
    /// Everything but RAM.
    pub(crate) machine: SavedMachine,
    /// RAM with the guest's memory.
    pub(crate) ram: Arc<GuestRam>,
    /// The guest waits for a resume.
    pub(crate) is_paused: bool,
    /// The memory that comes later.
    pub(crate) arriving: Option<Arc<Arriving>>,
}

impl Incoming {
    /// Waits for a source, and for the machine that it announces; calls `ready` with the address when a source can connect.
    ///
    /// # Errors
    /// The address cannot be used; or who connects is no source that this program understands.
    pub fn accept(address: &Address, ready: impl FnOnce(&str)) -> Result<Self, Error> {
        Self::of(address.accept(ready)?)
    }

    /// The machine that comes over a connection.
    ///
    /// # Errors
    /// As for [`Incoming::accept`].
    pub fn of(socket: OwnedFd) -> Result<Self, Error> {
        let mut channel = Channel::new(socket).map_err(broken)?;
        channel.set_patience(Some(GREETING)).map_err(broken)?;
        let bytes = expect(&mut channel, Kind::Hello)?;
        let read = serde_json::from_slice::<Hello>(bytes).map_err(|error| error.to_string());
        let read = read.and_then(|hello| hello.preamble.check(&FORMAT).map(|()| hello));
        let hello = read.map_err(|reason| {
            let error = Error::Snapshot(format!("Cannot take over the machine: {reason}"));
            let _ = refuse(&mut channel, &error.to_string());
            error
        })?;
        let source = hello.process.watch();
        // From here on the source takes its time: it may wait for its own disk.
        channel.set_patience(None).map_err(broken)?;
        Ok(Self { channel, hello, source, arriving: None })
    }

    /// The name of the machine at the source.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.hello.name
    }

    /// Receives the machine: its memory first, while the guest runs at the source.
    ///
    /// # Errors
    /// The host lacks memory; the source keeps the machine, ends, or sends what is none.
    pub(crate) fn receive(&mut self) -> Result<Received, Error> {
        let ram = self.welcome().inspect_err(|error| self.refuse(error))?;
        loop {
            match self.receive_next(&ram) {
                Ok(None) => {}
                Ok(Some(State { machine, is_paused, left })) => {
                    let arriving = self.await_left(&ram, &left);
                    let arriving = arriving.inspect_err(|error| self.refuse(error))?;
                    return Ok(Received { machine, ram, is_paused, arriving });
                }
                Err(error) => {
                    self.refuse(&error);
                    return Err(error);
                }
            }
        }
    }

    /// Allocates the memory, and lets the source begin.
    fn welcome(&mut self) -> Result<Arc<GuestRam>, Error> {
        let Hello { mem, hugepages, .. } = self.hello;
        if mem == 0 || !mem.is_multiple_of(PAGE) || RAM_BASE.checked_add(mem).is_none() {
            return Err(invalid("the size of its memory"));
        }
        let ram = GuestRam::new(Span { base: RAM_BASE, size: mem }, hugepages)?;
        let this = Process::this().map_err(|source| Error::Host {
            what: "Cannot identify this process (mount /proc)".into(),
            source,
        })?;
        send_json(&mut self.channel, Kind::Welcome, &this).map_err(broken)?;
        Ok(Arc::new(ram))
    }

    /// Receives a message; returns the state once it comes.
    fn receive_next(&mut self, ram: &GuestRam) -> Result<Option<State>, Error> {
        let write = |at: u64, bytes: &[u8]| {
            let written = ram.write(RAM_BASE.saturating_add(at), bytes);
            written.map_err(|error| Error::Memory { what: ram.explain(error), source: None })
        };
        match self.channel.receive().map_err(broken)? {
            (Kind::Pages, bytes) => {
                let (at, bytes) = pages(bytes).ok_or_else(|| invalid("pages"))?;
                write(at, bytes)?;
            }
            (Kind::Zeroes, bytes) => {
                let (at, len) = zeroes(bytes).ok_or_else(|| invalid("zero pages"))?;
                let end = at.checked_add(len).filter(|end| *end <= ram.span().size);
                let end = end.ok_or_else(|| invalid("zero pages"))?;
                for at in (at..end).step_by(4096) {
                    let len = usize::try_from((end - at).min(PAGE)).unwrap_or(0);
                    write(at, [0; 4096].get(..len).unwrap_or_default())?;
                }
            }
            (Kind::Round, _) => {
                self.channel.send(Kind::Received, 0, |_| Ok(())).map_err(broken)?;
            }
            (Kind::State, bytes) => {
                let state: State = serde_json::from_slice(bytes)
                    .map_err(|error| invalid(&format!("its state: {error}")))?;
                if state.machine.config.mem != ram.span().size {
                    return Err(invalid("its memory has another size than it had at first"));
                }
                return Ok(Some(state));
            }
            (Kind::Refused, bytes) => {
                let reason = String::from_utf8_lossy(bytes).into_owned();
                return Err(Error::Config(format!("The machine stays where it is: {reason}")));
            }
            (kind, _) => return Err(invalid(&format!("{kind:?} at this point"))),
        }
        Ok(None)
    }

    /// Lets the parts of RAM that are left come later.
    fn await_left(
        &mut self,
        ram: &Arc<GuestRam>,
        left: &[(u64, u64)],
    ) -> Result<Option<Arc<Arriving>>, Error> {
        if left.is_empty() {
            return Ok(None);
        }
        let is_page = |number: u64| number.is_multiple_of(PAGE);
        let range = |(at, len): &(u64, u64)| {
            let end = at.checked_add(*len).filter(|end| *end <= ram.span().size)?;
            (is_page(*at) && is_page(*len)).then_some(*at..end)
        };
        let ranges: Option<Vec<_>> = left.iter().map(range).collect();
        let ranges = ranges.ok_or_else(|| invalid("the memory that is left"))?;
        let (arriving, verdict) = Arriving::start(ram, &ranges, &self.channel)?;
        let arriving = Arc::new(arriving);
        self.arriving = Some((Arc::clone(&arriving), verdict));
        Ok(Some(arriving))
    }

    /// Tells the source that the machine cannot run here.
    pub(crate) fn refuse(&mut self, error: &Error) {
        let text = crate::error::chain(error);
        // Without a connection the source learns it from the end of this process.
        let _ = match &self.arriving {
            None => refuse(&mut self.channel, &text),
            Some((arriving, _)) => arriving.send(Kind::Refused, refusal_text(&text)),
        };
    }

    /// Tells the source that the machine is built, and waits until the guest is this side's. It is to run at once.
    ///
    /// # Errors
    /// The source keeps it.
    pub(crate) fn take_over(mut self) -> Result<(), Error> {
        let given = match self.arriving.take() {
            None => {
                self.channel.send(Kind::Ready, 0, |_| Ok(())).map_err(broken)?;
                expect(&mut self.channel, Kind::Go).map(|_| ())
            }
            Some((arriving, verdict)) => {
                arriving.send(Kind::Ready, &[]).map_err(broken)?;
                let given = verdict.recv().unwrap_or_else(|_| {
                    Err(broken(io::Error::other("the thread that takes pages in has ended")))
                });
                // The guest is here now, whether the source hears it or not.
                return given.map(|()| _ = arriving.send(Kind::Running, &[]));
            }
        };
        match given {
            Ok(()) => {
                // As above.
                let _ = self.channel.send(Kind::Running, 0, |_| Ok(()));
                Ok(())
            }
            Err(Error::Config(reason)) => Err(Error::Config(reason)),
            Err(error) => {
                // The source keeps the guest, and says so, or it has been killed. Then it is complete here, and nowhere else.
                let has_ended = |source: &Watch| source.ends_within(END_PATIENCE);
                let is_eof = matches!(&error, Error::Host { source, .. } if matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset));
                if is_eof && self.source.as_ref().is_some_and(has_ended) {
                    log::warn!("The source of the migration was killed: its guest goes on here");
                    return Ok(());
                }
                Err(error)
            }
        }
    }
}

fn invalid(what: &str) -> Error {
    Error::Snapshot(format!("Cannot take over the machine: the source sends invalid data ({what})"))
}
