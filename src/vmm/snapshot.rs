//! Saves a machine in a folder: a task of the client's own thread, so that the controller serves others meanwhile.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Handle;
use super::command::CommandError;
use crate::error::Error;
use crate::snapshot::{SnapshotReport, SnapshotRequest, SnapshotWriter};

impl Handle {
    /// Saves the machine, which is paused for as long as its memory is written.
    ///
    /// # Errors
    /// The machine does not run, a part of its state is out of reach, or the folder cannot be written. The machine goes on, and what was in
    /// the folder is still there.
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Error> {
        let folder: &Path = &request.folder;
        let mut writer = SnapshotWriter::create(folder, None)?;
        let began = Instant::now();
        let saved = self.save().map_err(unsaved)?;
        let memory = &saved.memory;
        let written = memory.occupied().and_then(|ranges| {
            writer.write_memory(memory.size(), ranges, &|at, bytes| memory.read(at, bytes))
        });
        let bytes = written.map_err(|source| Error::File {
            verb: "save to",
            path: PathBuf::from(folder),
            source,
        })?;
        let machine = saved.machine.clone();
        // The guest need not wait for the disk.
        let pause = Some(saved).filter(|_| request.stop);
        let paused_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        writer.finish(machine, folder)?;
        if request.stop {
            self.stop();
        }
        drop(pause);
        Ok(SnapshotReport { folder: request.folder.clone(), memory: bytes, paused_ns })
    }
}

fn unsaved(error: CommandError) -> Error {
    match error {
        CommandError::State(error) => *error,
        other => Error::Config(other.to_string()),
    }
}
