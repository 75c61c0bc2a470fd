//! The folder of a snapshot: written whole or not at all, and checked before it is used.
//!
//! A new folder is written beside its place, under the name `.NAME.partial-PID`, synchronised and renamed; an old snapshot is exchanged
//! with it. So whatever happens meanwhile, the old one stays. What a killed program leaves is removed by the next one that saves there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use super::stamp::Stamp;
use super::{CHECKSUM, MEMORY, STAMP, STATE, checksum};
use crate::error::Error;

/// A folder that is being written; removed on drop, unless it was committed.
#[derive(Debug)]
pub(super) struct PartialFolder {
    /// The final place.
    place: PathBuf,
    path: PathBuf,
    /// Locked: an unlocked partial folder is one of a dead program.
    folder: File,
    memory: File,
    is_committed: bool,
}

impl PartialFolder {
    /// Begins a snapshot at `place`, where there is nothing, or an older snapshot.
    ///
    /// # Errors
    /// There is something else, or the folder cannot be created.
    pub(super) fn create(place: &Path) -> Result<Self, Error> {
        let place = std::path::absolute(place).map_err(|e| failed("find", place, e))?;
        let name = place.file_name().ok_or_else(|| {
            Error::Config(format!("Cannot save to {}: it is no name of a folder", place.display()))
        })?;
        let parent = place.parent().unwrap_or(&place).to_path_buf();
        if place.symlink_metadata().is_ok() && !place.join(STATE).is_file() {
            return Err(Error::Config(format!(
                "Cannot save to {}: it exists and is no snapshot (give a new name)",
                place.display()
            )));
        }
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".partial-");
        remove_abandoned(&parent, &prefix);
        let mut own = prefix;
        own.push(std::process::id().to_string());
        let path = parent.join(own);
        let create = || -> io::Result<(File, File)> {
            // Whoever can read it has the guest's memory.
            fs::DirBuilder::new().mode(0o700).create(&path)?;
            let folder = File::open(&path)?;
            flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
            let mut options = OpenOptions::new();
            let memory = options.read(true).write(true).create_new(true).open(path.join(MEMORY))?;
            Ok((folder, memory))
        };
        match create() {
            Ok((folder, memory)) => Ok(Self { place, path, folder, memory, is_committed: false }),
            Err(error) => {
                let _ = fs::remove_dir_all(&path);
                Err(failed("create", &path, error))
            }
        }
    }

    /// The file of guest RAM, empty at first.
    pub(super) fn memory(&self) -> &File {
        &self.memory
    }

    /// Completes the snapshot with its state. Returns the checksum of the state.
    ///
    /// # Errors
    /// A file cannot be written or synchronised. What was at the place before is still there.
    pub(super) fn commit(mut self, state: &[u8]) -> Result<String, Error> {
        let sum = checksum_line(state);
        self.write(state, &sum).map_err(|e| failed("write", &self.path, e))?;
        self.put_in_place()?;
        self.is_committed = true;
        let parent = self.place.parent().unwrap_or(&self.place);
        File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| failed("synchronise", parent, e))?;
        Ok(sum.trim_end().to_owned())
    }

    fn write(&self, state: &[u8], sum: &str) -> io::Result<()> {
        self.memory.sync_all()?;
        for (name, bytes) in [(STATE, state), (CHECKSUM, sum.as_bytes())] {
            let mut file = File::create_new(self.path.join(name))?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
        // Only a hint that saves time; without it the memory is read and checked.
        if let Some(stamp) = Stamp::of_settled(&self.memory)? {
            fs::write(self.path.join(STAMP), stamp.text())?;
        }
        self.folder.sync_all()
    }

    /// Renames the folder to its place.
    fn put_in_place(&self) -> Result<(), Error> {
        let rename = |flags| renameat_with(CWD, &self.path, CWD, &self.place, flags);
        self.put_in_place_by(rename)
    }

    /// The same with this system call. File systems like NFS and 9p have no flags: a folder that is not empty is not replaced there.
    fn put_in_place_by(
        &self,
        rename: impl Fn(RenameFlags) -> rustix::io::Result<()>,
    ) -> Result<(), Error> {
        let has_no_flags = |error| matches!(error, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP);
        let renamed = match rename(RenameFlags::NOREPLACE) {
            Err(error) if has_no_flags(error) => rename(RenameFlags::empty()),
            other => other,
        };
        match renamed {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST | Errno::NOTEMPTY) => {}
            Err(error) => return Err(failed("rename", &self.path, error.into())),
        }
        match rename(RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(error) if has_no_flags(error) => {
                return Err(Error::Config(format!(
                    "Cannot replace the snapshot {}: its file system cannot exchange two folders (give a new name, or remove it first)",
                    self.place.display()
                )));
            }
            Err(error) => return Err(failed("replace", &self.place, error.into())),
        }
        // The old snapshot has the other name now. What cannot be removed is removed by the next save.
        let _ = fs::remove_dir_all(&self.path);
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.is_committed {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes partial folders of programs that have died.
fn remove_abandoned(parent: &Path, prefix: &std::ffi::OsStr) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let starts = entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes());
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !starts || !is_folder {
            continue;
        }
        let lock =
            |folder: &File| flock(folder.as_fd(), FlockOperation::NonBlockingLockExclusive).is_ok();
        if File::open(entry.path()).is_ok_and(|folder| lock(&folder)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The contents of the file `checksum` for a state.
pub(crate) fn checksum_line(state: &[u8]) -> String {
    format!("{:016x}  {STATE}\n", checksum::of_bytes(state))
}

/// An error of saving.
fn failed(verb: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File { verb, path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_cannot_exchange_folders_keeps_the_old_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("saved");
        let begin = |text: &str| {
            let new = PartialFolder::create(&place).unwrap();
            new.write(text.as_bytes(), &checksum_line(text.as_bytes())).unwrap();
            new
        };
        let without_flags = |new: &PartialFolder| {
            let (from, to) = (new.path.clone(), new.place.clone());
            move |flags: RenameFlags| match flags.is_empty() {
                true => renameat_with(CWD, &from, CWD, &to, flags),
                false => Err(Errno::INVAL),
            }
        };
        let mut first = begin("first");
        first.put_in_place_by(without_flags(&first)).unwrap();
        first.is_committed = true;
        let second = begin("second");
        let error = second.put_in_place_by(without_flags(&second)).unwrap_err().to_string();
        assert!(error.contains("exchange two folders (give a new name"), "{error}");
        drop(second);
        assert_eq!(fs::read(place.join(STATE)).unwrap(), b"first");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        // Where it can, the second one is there, and nothing else.
        PartialFolder::create(&place).unwrap().commit(b"fourth").unwrap();
        assert_eq!(fs::read(place.join(STATE)).unwrap(), b"fourth");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
