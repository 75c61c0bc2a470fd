//! Moves a running machine to another process: a task of the client's own thread, as saving it is.
//!
//! Memory is sent in rounds while the guest runs: all of it, then what was written meanwhile. When the rest fits into the time for which
//! the guest may stand still it is paused, and the rest and the state follow. A guest that writes faster than the connection is slowed
//! down; or the rest is sent after the guest (post-copy), which runs at the target already and waits for pages that are not there.
//! `migration` has the protocol, and the rules by which one side at most runs the guest.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use super::handle::Saved;
use super::snapshot::{total, unsaved};
use super::throttle::Throttle;
use super::{Handle, Paused, RestoreOptions, Vmm, host_error};
use crate::error::{Error, chain};
use crate::inspect::{Query, Reply};
use crate::machine::{MachineMemory, Migrated, Origin, Parts};
use crate::migration::{
    Incoming, MigrationProgress, MigrationReport, MigrationRequest, Outcome, Received, Source,
};

/// Bytes of memory that are few, however slow the connection is.
const FEW: u64 = 256 << 10;

/// Time that the target has to close the disks that it has opened.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Maximum number of rounds.
const MOST_ROUNDS: u32 = 60;

impl Handle {
    /// Moves the machine to the process at the other end of a connected stream socket, which waits there ([`Incoming`]); it ends here
    /// then. `progress` is called after each round, and gives up with false. Waits while another client saves the machine.
    ///
    /// # Errors
    /// The machine goes on here: the other side refuses it or has ended, a part of its state is out of reach, its guest writes too fast.
    /// If it is unknown whether the other side has taken the guest it stays paused: the message says so.
    pub fn migrate(
        &self,
        request: &MigrationRequest,
        socket: OwnedFd,
        progress: &mut dyn FnMut(&MigrationProgress) -> bool,
    ) -> Result<MigrationReport, Error> {
        let _turn = self.turn_to_save();
        let memory = self.track(true).map_err(unsaved)?;
        // What is written from now on is sent, and missing in a difference.
        let begun = self.begin_difference().map_err(unsaved);
        let result = begun.and_then(|_| {
            let name = match self.inspect(Query::Stat).map_err(unsaved)? {
                Reply::Stat(stat) => stat.name,
                _ => String::new(),
            };
            let source = Source::greet(socket, &name, memory.size(), memory.is_huge())?;
            Departure { handle: self, memory, source, request, progress }.depart()
        });
        if result.is_err() {
            // An error means that the machine has ended.
            let _ = self.track(false);
        }
        result
    }
}

/// A machine that is about to move.
struct Departure<'a> {
    handle: &'a Handle,
    memory: MachineMemory,
    source: Source,
    request: &'a MigrationRequest,
    progress: &'a mut dyn FnMut(&MigrationProgress) -> bool,
}

/// What is left of the memory, and the number of rounds before.
struct Rest {
    ranges: Vec<Range<u64>>,
    rounds: u32,
}

impl Departure<'_> {
    fn depart(mut self) -> Result<MigrationReport, Error> {
        let result = self.send_memory();
        let rest = match result {
            Ok(rest) => rest,
            Err(error) => return Err(self.give_up(error)),
        };
        let began = Instant::now();
        let saved = match self.handle.save().map_err(unsaved) {
            Ok(saved) => saved,
            Err(error) => return Err(self.give_up(error)),
        };
        if let Err(error) = self.hand_over(&saved, rest.ranges) {
            return Err(self.stay(saved, error));
        }
        let memory = &saved.memory;
        let read = |at: u64, bytes: &mut [u8]| memory.read(at, bytes);
        match self.source.commit(&read) {
            Outcome::Gone => {
                let downtime_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                let lost = self.source.send_left(&read).err();
                let sent = self.source.sent();
                // An error means that the machine has ended already.
                let _ = self.handle.depart();
                drop(saved);
                lost.map_or(Ok(MigrationReport { rounds: rest.rounds, sent, downtime_ns }), |error| {
                    Err(Error::Config(format!(
                        "{}. Its guest was there already, without all of its memory, which is lost",
                        chain(&error)
                    )))
                })
            }
            Outcome::Stays(reason) => Err(back(self.handle, saved, Error::Config(reason))),
            Outcome::Unknown(reason) => {
                saved.into_pause().keep();
                Err(Error::Config(format!(
                    "{reason}. The machine is paused here, since its guest may run there already: if it does not, continue it with rvmm resume, else stop it"
                )))
            }
        }
    }

    /// Sends the memory in rounds, until little is left.
    fn send_memory(&mut self) -> Result<Rest, Error> {
        let unread = |error| host_error("read the guest's memory", error);
        let mut throttle = Throttle::new(self.handle.control().clone());
        self.memory.take_dirty().map_err(unread)?;
        let mut next = self.memory.occupied().map_err(unread)?;
        // Half of the time is for the state, and for building the machine.
        let time = Duration::from_millis(self.request.downtime_ms.into()) / 2;
        for round in 1..=MOST_ROUNDS {
            let began = Instant::now();
            let memory = &self.memory;
            self.source.send_pages(&next, &|at, bytes| memory.read(at, bytes))?;
            self.source.finish_round()?;
            let (before, took) = (total(&next), began.elapsed());
            next = self.memory.take_dirty().map_err(unread)?;
            let left = total(&next);
            let per_second = rate(before, took);
            let state = MigrationProgress {
                round,
                sent: self.source.sent(),
                left,
                per_second,
                throttle: throttle.percent(),
            };
            if !(self.progress)(&state) {
                return Err(Error::Config("The migration was given up".into()));
            }
            if self.request.postcopy
                || left <= FEW
                || Duration::from_secs(left) / share(per_second) <= time
            {
                return Ok(Rest { ranges: next, rounds: round });
            }
            if left > before / 4 * 3 {
                throttle.increase();
            }
        }
        Err(Error::Config(format!(
            "Cannot migrate the machine: its guest writes its memory faster than the connection takes it, also when it is slowed down; {} MiB are left after {MOST_ROUNDS} rounds (allow it to stand still for longer: --downtime)",
            total(&next) >> 20
        )))
    }

    /// Sends the rest to the target, which builds the machine. The disks are lent to it.
    fn hand_over(&mut self, saved: &Saved, mut rest: Vec<Range<u64>>) -> Result<(), Error> {
        let unread = |error| host_error("read the guest's memory", error);
        rest.extend(saved.memory.take_dirty().map_err(unread)?);
        let read = |at: u64, bytes: &mut [u8]| saved.memory.read(at, bytes);
        let left = if self.request.postcopy && total(&rest) > FEW {
            rest
        } else {
            self.source.send_pages(&rest, &read)?;
            Vec::new()
        };
        self.handle.lend_disks().map_err(unsaved)?;
        self.source.hand_over(saved.machine.clone(), saved.is_paused, left, &read)
    }

    /// Keeps the guest, which runs.
    fn give_up(self, error: Error) -> Error {
        // Without a connection the target learns it from its end.
        let _ = self.source.refuse(&chain(&error));
        error
    }

    /// Keeps the guest, which is paused, and has it run again.
    fn stay(self, saved: Saved, error: Error) -> Error {
        let handle = self.handle;
        let error = self.give_up(error);
        back(handle, saved, error)
    }
}

/// Takes back what was lent to the target, which may be about to end, and lets the guest run.
fn back(handle: &Handle, saved: Saved, error: Error) -> Error {
    let began = Instant::now();
    let mut taken = handle.take_disks_back();
    while taken.is_err() && began.elapsed() < END_PATIENCE {
        thread::sleep(Duration::from_millis(5));
        taken = handle.take_disks_back();
    }
    match taken {
        Ok(()) => error,
        Err(lost) => {
            Paused::keep(saved.into_pause());
            Error::Config(format!(
                "{}. The machine stays paused: {lost} (rvmm resume continues it)",
                chain(&error)
            ))
        }
    }
}

/// Bytes a second.
fn rate(bytes: u64, took: Duration) -> u64 {
    let per_second = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
    u64::try_from(per_second).unwrap_or(u64::MAX)
}

/// A rate as a divisor.
fn share(per_second: u64) -> u32 {
    u32::try_from(per_second).unwrap_or(u32::MAX).max(1)
}

impl Vmm {
    /// Receives a machine from another process, and builds it, with other ends of the host where the options say so. It has taken the guest
    /// over when this returns: it is to be run or started at once.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for a machine that does not fit this host, the others as for [`Vmm::restore`]; the source keeps its guest and ends.
    pub fn receive(
        mut incoming: Incoming,
        options: RestoreOptions,
        parts: Parts,
    ) -> Result<Self, Error> {
        let Received { machine, ram, is_paused, arriving } = incoming.receive()?;
        let is_paused = is_paused || options.paused;
        let origin = Origin::Migration(Box::new(Migrated { machine, ram, arriving }));
        let built = options
            .apply(origin)
            .and_then(|(config, from)| Self::continue_from(config, from, parts));
        match built {
            Ok(vmm) => {
                incoming.take_over()?;
                Ok(Self { is_paused, ..vmm })
            }
            Err(error) => {
                incoming.refuse(&error);
                Err(error)
            }
        }
    }
}
