//! What a machine continues from: a snapshot in files, or another machine that has sent its memory.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::build::Board;
use super::host_error;
use crate::error::Error;
use crate::memory::GuestRam;
use crate::migration::Arriving;
use crate::pager::{PagerLink, Prefetch};
use crate::snapshot::{SavedMachine, Snapshot};

/// How a machine continues.
pub(crate) struct Continuation {
    /// What it continues from.
    pub(crate) origin: Origin,
    /// The guest's time goes on as if it had run meanwhile.
    pub(crate) follows_wall_clock: bool,
    /// The socket of the program that has the memory.
    pub(crate) pager: Option<PathBuf>,
    /// The memory's file is read ahead of the guest.
    pub(crate) prefetches: bool,
}

/// What a machine continues from.
pub(crate) enum Origin {
    /// A snapshot, from which others may continue, too.
    Snapshot(Box<Snapshot>),
    /// A machine that gives up its guest.
    Migration(Box<Migrated>),
}

/// A machine that was received.
pub(crate) struct Migrated {
    /// Everything but RAM.
    pub(crate) machine: SavedMachine,
    /// RAM, with the guest's memory in it.
    pub(crate) ram: Arc<GuestRam>,
    /// The memory that is to come.
    pub(crate) arriving: Option<Arc<Arriving>>,
}

/// What fills the memory of a machine while it runs. Ends when it is dropped.
pub(super) enum Filling {
    /// A thread that reads the snapshot's file.
    Prefetch(#[expect(dead_code, reason = "it is only dropped")] Prefetch),
    /// Another program.
    Pager(#[expect(dead_code, reason = "it is only dropped")] PagerLink),
    /// The machine that it comes from.
    Arriving(#[expect(dead_code, reason = "it is only dropped")] Arc<Arriving>),
}

impl Origin {
    /// What was saved, but for RAM.
    pub(crate) fn machine(&self) -> &SavedMachine {
        match self {
            Self::Snapshot(snapshot) => snapshot.machine(),
            Self::Migration(migrated) => &migrated.machine,
        }
    }

    /// An error of what was saved.
    pub(crate) fn refused(&self, what: impl Display) -> Error {
        match self {
            Self::Snapshot(snapshot) => snapshot.refused(what),
            Self::Migration(_) => Error::Snapshot(format!("Cannot take over the machine: {what}")),
        }
    }

    /// The memory for the board; `None` if it is to have new one, for [`Continuation::fill`].
    pub(super) fn ram(&self) -> Option<&Arc<GuestRam>> {
        match self {
            Self::Snapshot(_) => None,
            Self::Migration(migrated) => Some(&migrated.ram),
        }
    }

    /// True if other machines may continue from the same state.
    pub(super) fn may_be_copied(&self) -> bool {
        matches!(self, Self::Snapshot(_))
    }
}

impl Continuation {
    /// Fills the board's RAM, or lets it be filled while the guest runs.
    ///
    /// # Errors
    /// The memory cannot be mapped or left to the pager, or the host lacks memory.
    pub(super) fn fill(&self, board: &Board) -> Result<Option<Filling>, Error> {
        let snapshot = match &self.origin {
            Origin::Snapshot(snapshot) => snapshot,
            Origin::Migration(migrated) => {
                let arriving = migrated.arriving.clone();
                return Ok(arriving.map(|arriving| {
                    arriving.attach(&board.control);
                    Filling::Arriving(arriving)
                }));
            }
        };
        if let Some(path) = &self.pager {
            let link = PagerLink::connect(path, &board.ram, &board.control)?;
            return Ok(Some(Filling::Pager(link)));
        }
        snapshot.fill(&board.ram)?;
        let prefetch = self.prefetches.then(|| Prefetch::start(&board.ram)).transpose();
        let prefetch = prefetch.map_err(|e| host_error("start the thread that reads ahead", e))?;
        Ok(prefetch.map(Filling::Prefetch))
    }

    /// Ticks by which the guest's time goes on at once.
    pub(super) fn ticks_missed(&self, timebase_hz: u64) -> u64 {
        if !self.follows_wall_clock {
            return 0;
        }
        let elapsed = now_ns().saturating_sub(self.origin.machine().saved_at_ns);
        let ticks = u128::from(elapsed) * u128::from(timebase_hz) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

/// Nanoseconds since 1970 (UTC).
pub(super) fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
