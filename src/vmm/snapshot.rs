//! Saves a machine in a folder: a task of the client's own thread, so that the controller serves others meanwhile.
//!
//! ```text
//!             live: all pages, then those written meanwhile, until few are left
//! track ----> pause ----> what is left, state ----> resume ----> wait for the disk ----> rename
//! ```
//!
//! Writes to memory are tracked for a live snapshot while it is saved, and for differences from the first of them on, until a snapshot is
//! saved that is none: it costs the guest a fault for each page that it writes after each snapshot.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use super::Handle;
use super::command::CommandError;
use crate::error::Error;
use crate::machine::MachineMemory;
use crate::snapshot::{Parent, SnapshotReport, SnapshotRequest, SnapshotWriter};

/// Bytes of memory that are left for the pause of a live snapshot.
const FEW: u64 = 2 << 20;

/// Maximum number of rounds over the memory while the guest runs: one that writes faster than the disk is paused for longer.
const MOST_ROUNDS: usize = 8;

impl Handle {
    /// Saves the machine, which is paused meanwhile: for as long as all its memory is written, or, if the snapshot is `live`, the rest of it.
    /// Waits while another client saves it.
    ///
    /// # Errors
    /// The machine does not run, a part of its state is out of reach, or the folder cannot be written. The machine goes on, and what was in
    /// the folder is still there.
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Error> {
        let _turn = self.turn_to_save();
        let memory = self.track(request.diff || request.live).map_err(unsaved)?;
        let result = self.save_to(request, &memory);
        if !request.diff {
            // An error means that the machine has ended.
            let _ = self.track(false);
        }
        result
    }

    fn save_to(
        &self,
        request: &SnapshotRequest,
        memory: &MachineMemory,
    ) -> Result<SnapshotReport, Error> {
        let folder: &Path = &request.folder;
        let (base, begun) = self.begin_difference().map_err(unsaved)?;
        let base = base.filter(|_| request.diff);
        let parent = base.as_ref().map(|base| base.folder.clone());
        let mut writer = match SnapshotWriter::create(folder, memory.size(), base.clone()) {
            Ok(writer) => writer,
            Err(error) => {
                // Nothing was taken yet: the next difference is one to the same base.
                let _ = base.map(|base| self.set_base(base, begun));
                return Err(error);
            }
        };
        let failed = |source| Error::File { verb: "save to", path: folder.into(), source };
        let left = match (request.live, parent.is_some()) {
            (true, is_difference) => {
                copy_live(&mut writer, memory, is_difference).map_err(failed)?
            }
            (false, true) => Left::Written(Vec::new()),
            (false, false) => Left::All,
        };
        let began = Instant::now();
        let saved = self.save().map_err(unsaved)?;
        let read = |at: u64, bytes: &mut [u8]| saved.memory.read(at, bytes);
        let rest = left.ranges(memory, request.diff).map_err(failed)?;
        let added = match saved.memory.resting() {
            Some(ram) => writer.add_resting(&rest, ram),
            None => writer.add_pages(&rest, &read),
        };
        added.map_err(failed)?;
        let written = writer.written();
        let complete = writer.finish_memory(&read).map_err(failed)?;
        let machine = saved.machine.clone();
        // The guest need not wait for the disk.
        let pause = Some(saved).filter(|_| request.stop);
        let paused_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let base: Parent = complete.finish(machine, folder)?;
        if request.stop {
            // An error means that it has ended already, or that it ends: then it does not run on either.
            let _ = self.depart();
        }
        drop(pause);
        if request.diff {
            // An error means that the machine has ended.
            let _ = self.set_base(base, begun);
        }
        Ok(SnapshotReport { folder: request.folder.clone(), parent, memory: written, paused_ns })
    }
}

/// What is left to be written when the machine is paused.
enum Left {
    /// All memory.
    All,
    /// These ranges, and those that were written since.
    Written(Vec<Range<u64>>),
}

impl Left {
    /// The ranges, now that the machine is paused. Later writes belong to the next difference if writes are `tracked`.
    fn ranges(self, memory: &MachineMemory, tracked: bool) -> io::Result<Vec<Range<u64>>> {
        match self {
            Self::All => {
                if tracked {
                    memory.take_dirty()?;
                }
                memory.occupied()
            }
            Self::Written(mut ranges) => {
                ranges.extend(memory.take_dirty()?);
                Ok(ranges)
            }
        }
    }
}

/// Writes memory while the guest runs: all of it, or what was written since the base; then what was written meanwhile, until that is little
/// or does not become less.
fn copy_live(
    writer: &mut SnapshotWriter,
    memory: &MachineMemory,
    is_difference: bool,
) -> io::Result<Left> {
    let read = |at: u64, bytes: &mut [u8]| memory.read(at, bytes);
    let written = memory.take_dirty()?;
    let mut next = if is_difference { written } else { memory.occupied()? };
    for _ in 0..MOST_ROUNDS {
        writer.add_pages(&next, &read)?;
        let before = total(&next);
        next = memory.take_dirty()?;
        if total(&next) <= FEW || total(&next) > before / 2 {
            break;
        }
    }
    Ok(Left::Written(next))
}

pub(super) fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

pub(super) fn unsaved(error: CommandError) -> Error {
    match error {
        CommandError::State(error) => *error,
        other => Error::Config(other.to_string()),
    }
}
