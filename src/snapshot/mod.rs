//! Snapshots: a saved machine in a folder.
//!
//! | file of the folder | what is in it |
//! |---|---|
//! | `state.json` | everything but RAM: version, configuration, harts, interrupt controller, devices; and where RAM is |
//! | `memory` | guest RAM, each page at its offset in RAM, pages of zeroes as holes |
//! | `checksum` | the checksum of `state.json`, which has that of `memory` |
//! | `stamp` | identity and times of a `memory` that was checked; only saves time |
//!
//! `docs/snapshots.md` describes the format for readers of other programs.
//!
//! | file of this module | what is in it |
//! |---|---|
//! | `mod.rs` | [`Snapshot`]: one that exists; [`SnapshotWriter`]: one that is being saved |
//! | `request.rs` | what clients ask for |
//! | `state.rs`, `preamble.rs` | the types of `state.json`; what it begins with |
//! | `image.rs` | RAM in a file |
//! | `folder.rs`, `stamp.rs` | the folder, written whole or not at all; whether a file has changed |
//! | `checksum.rs`, `words.rs` | the checksum; memory as words and as bytes |

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::error::Error;
use crate::memory::GuestRam;

mod checksum;
mod folder;
mod image;
mod preamble;
mod request;
mod stamp;
mod state;
#[cfg(test)]
mod tests;
pub(crate) mod words;

pub(crate) use checksum::{
    PAGE_WORDS, is_zero, of_bytes as checksum, of_message as message_checksum,
};
use folder::PartialFolder;
pub(crate) use folder::checksum_line;
use image::ImageWriter;
pub use image::{MemoryImage, ReadRam};
pub(crate) use preamble::{Format, Preamble};
pub use request::{SnapshotReport, SnapshotRequest};
use stamp::Stamp;
pub use state::{DiskIdentity, Parent, SavedMachine};
use state::{FORMAT, SnapshotState};

const STATE: &str = "state.json";
const MEMORY: &str = "memory";
const CHECKSUM: &str = "checksum";
const STAMP: &str = "stamp";

/// Maximum size of a state in bytes. The largest machine's is a tenth of it.
const MOST_STATE: u64 = 256 << 20;

/// Maximum number of differences in a row.
const MOST_PARENTS: usize = 64;

/// A snapshot that was checked.
#[derive(Debug)]
pub struct Snapshot {
    folder: PathBuf,
    machine: SavedMachine,
    /// RAM: the whole snapshot, then the differences, each of which replaces pages of those before.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    file: Arc<File>,
    image: MemoryImage,
}

impl Snapshot {
    /// Opens and checks the snapshot in `folder`, and those that it is a difference to. RAM is only read if it is not known to be
    /// unchanged.
    ///
    /// # Errors
    /// [`Error::Snapshot`] with what is wrong: nothing of it is used then.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let (state, _) = read(folder)?;
        let SnapshotState { preamble: _, parent, memory, machine } = state;
        let mut layers = vec![Layer::open(folder, memory)?];
        let mut next = parent;
        while let Some(Parent { folder: older, checksum }) = next {
            if layers.len() > MOST_PARENTS {
                return Err(refused(
                    folder,
                    format!("it is a chain of more than {MOST_PARENTS} differences"),
                ));
            }
            let (state, found) = read(&older)?;
            if found != checksum {
                return Err(refused(
                    folder,
                    format!(
                        "the snapshot {older}, to which it is the difference, was replaced by another one"
                    ),
                ));
            }
            layers.push(Layer::open(&older, state.memory)?);
            next = state.parent;
        }
        layers.reverse();
        let size = machine.config.mem;
        if layers.iter().any(|layer| layer.image.size != size) {
            return Err(refused(folder, "its memory has another size than its machine".into()));
        }
        Ok(Self { folder: folder.into(), machine, layers })
    }

    /// Opens and checks the state in `folder` only: the memory comes from elsewhere, and its files need not be there.
    ///
    /// # Errors
    /// As for [`Snapshot::open`].
    pub fn open_state(folder: &Path) -> Result<Self, Error> {
        let (SnapshotState { preamble: _, parent: _, memory, machine }, _) = read(folder)?;
        if memory.size != machine.config.mem {
            return Err(refused(folder, "its memory has another size than its machine".into()));
        }
        Ok(Self { folder: folder.into(), machine, layers: Vec::new() })
    }

    /// The machine's state.
    #[must_use]
    pub fn machine(&self) -> &SavedMachine {
        &self.machine
    }

    /// An error of this snapshot.
    pub(crate) fn refused(&self, what: impl std::fmt::Display) -> Error {
        refused(&self.folder, what.to_string())
    }

    /// Maps the saved RAM into `ram`, copy on write: nothing is read yet.
    ///
    /// # Errors
    /// The file cannot be mapped, or the host lacks memory.
    pub fn fill(&self, ram: &GuestRam) -> Result<(), Error> {
        let base = ram.span().base;
        for Layer { file, image } in &self.layers {
            for (at, len) in &image.regions {
                ram.place_saved(base.saturating_add(*at), file, *at, *len)?;
            }
        }
        Ok(())
    }
}

impl Snapshot {
    /// Reads saved RAM at an offset from its start. False if it is all zeroes for certain.
    ///
    /// # Errors
    /// The file cannot be read, or the range leaves RAM.
    pub(crate) fn read_memory(&self, offset: u64, bytes: &mut [u8]) -> io::Result<bool> {
        let end = offset.checked_add(bytes.len() as u64);
        let end = end.filter(|end| *end <= self.machine.config.mem);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        bytes.fill(0);
        let mut has_data = false;
        // Each replaces what those before have.
        for Layer { file, image } in &self.layers {
            for (at, len) in &image.regions {
                let (from, to) = (offset.max(*at), end.min(at.saturating_add(*len)));
                if from < to {
                    let range = index(from - offset)..index(to - offset);
                    let part = bytes.get_mut(range).unwrap_or_default();
                    file.read_exact_at(part, from)?;
                    has_data = true;
                }
            }
        }
        Ok(has_data)
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl Layer {
    fn open(folder: &Path, image: MemoryImage) -> Result<Self, Error> {
        let refused = |what: String| refused(folder, what);
        if !image.is_valid() {
            return Err(refused("the regions of its memory are invalid".into()));
        }
        let path = folder.join(MEMORY);
        let unreadable =
            |error: io::Error| refused(format!("cannot read {}: {error}", path.display()));
        let file = open_file(&path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if metadata.len() != image.size {
            let len = metadata.len();
            return Err(refused(format!("its memory has {len} bytes instead of {}", image.size)));
        }
        let stamp = folder.join(STAMP);
        let now = Stamp::of(&file).map_err(unreadable)?.text();
        if read_text(&stamp).is_ok_and(|known| known == now) {
            return Ok(Self { file: Arc::new(file), image });
        }
        image.check(&file).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => {
                refused("its memory has changed (the checksum is another)".into())
            }
            _ => unreadable(error),
        })?;
        if let Ok(Some(checked)) = Stamp::of_settled(&file)
            && checked.text() == now
        {
            // Saves the next check. The folder may be read-only.
            let _ = replace(&stamp, &now);
        }
        Ok(Self { file: Arc::new(file), image })
    }
}

/// Opens a regular file. Others may never have anything to read: it does not wait for them.
fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no file")) }
}

/// Puts a new file in the place of one: an old one may be a link to something else, or a pipe.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let _ = fs::remove_file(path);
    File::create_new(path)?.write_all(text.as_bytes())
}

/// A short file as text.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_file(path)?.take(1024).read_to_string(&mut text)?;
    Ok(text)
}

/// Reads the state in a folder, and its checksum.
fn read(folder: &Path) -> Result<(SnapshotState, String), Error> {
    let refused = |what: String| refused(folder, what);
    let mut bytes = Vec::new();
    let read = open_file(&folder.join(STATE))
        .and_then(|file| file.take(MOST_STATE + 1).read_to_end(&mut bytes));
    read.map_err(|error| refused(format!("cannot read its {STATE}: {error}")))?;
    if bytes.len() as u64 > MOST_STATE {
        return Err(refused(format!("its {STATE} has more than {MOST_STATE} bytes")));
    }
    let sum = checksum_line(&bytes);
    let expected = read_text(&folder.join(CHECKSUM));
    let expected =
        expected.map_err(|error| refused(format!("cannot read its {CHECKSUM}: {error}")))?;
    if sum != expected {
        return Err(refused(format!("its {STATE} has changed (the checksum is another)")));
    }
    let invalid = |error: serde_json::Error| refused(format!("its {STATE} is invalid: {error}"));
    // First what says whether this program knows the rest.
    let preamble: Preamble = serde_json::from_slice(&bytes).map_err(invalid)?;
    preamble.check(&FORMAT).map_err(refused)?;
    let state = serde_json::from_slice(&bytes).map_err(invalid)?;
    Ok((state, sum.trim_end().to_owned()))
}

/// A snapshot that is being saved. Without [`CompleteMemory::finish`] nothing of it stays.
#[derive(Debug)]
pub struct SnapshotWriter {
    folder: PartialFolder,
    parent: Option<Parent>,
    image: ImageWriter,
}

impl SnapshotWriter {
    /// Begins a snapshot in `folder` of a machine with `size` bytes of RAM. The folder does not exist yet or is a snapshot, which is
    /// replaced. If there is a `parent`, the new snapshot is the difference to it.
    ///
    /// # Errors
    /// `folder` is something else, or the parent, or cannot be created.
    pub fn create(folder: &Path, size: u64, parent: Option<Parent>) -> Result<Self, Error> {
        let same =
            |parent: &Parent| fs::canonicalize(folder).is_ok_and(|path| path == *parent.folder);
        if parent.as_ref().is_some_and(same) {
            return Err(Error::Config(format!(
                "Cannot replace the snapshot {} by a difference to itself (give a new name)",
                folder.display()
            )));
        }
        let partial = PartialFolder::create(folder)?;
        let image = partial.memory().try_clone();
        let image = image.and_then(|file| ImageWriter::new(file, size, parent.is_some()));
        let image =
            image.map_err(|source| Error::File { verb: "save to", path: folder.into(), source })?;
        Ok(Self { folder: partial, parent, image })
    }

    /// Writes pages of RAM, which `read` reads. Pages that were written before are replaced: so the guest may run meanwhile, as long as
    /// those that it changes are written again.
    ///
    /// # Errors
    /// RAM cannot be read, or the file not be written: the disk is full.
    pub fn add_pages(&mut self, ranges: &[Range<u64>], read: ReadRam<'_>) -> io::Result<()> {
        self.image.add(ranges, read)
    }

    /// The same with pages of RAM at rest, at offsets from its start, without a copy in between: faster.
    ///
    /// # Errors
    /// As for [`SnapshotWriter::add_pages`].
    pub fn add_resting(&mut self, ranges: &[Range<u64>], ram: &GuestRam) -> io::Result<()> {
        self.image.add_in_place(ranges, ram)
    }

    /// Number of bytes of RAM written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.image.written()
    }

    /// Completes the memory. The guest does not run any more.
    ///
    /// # Errors
    /// As for [`SnapshotWriter::add_pages`].
    pub fn finish_memory(self, read: ReadRam<'_>) -> io::Result<CompleteMemory> {
        let Self { folder, parent, image } = self;
        Ok(CompleteMemory { folder, parent, memory: image.finish(read)? })
    }
}

/// A snapshot whose memory is complete: the guest may run again.
#[derive(Debug)]
pub struct CompleteMemory {
    folder: PartialFolder,
    parent: Option<Parent>,
    memory: MemoryImage,
}

impl CompleteMemory {
    /// Completes the snapshot: once this has returned, it survives a power cut. Returns it as the parent of a difference.
    ///
    /// # Errors
    /// A file cannot be written or synchronised. What was in the folder before is still there.
    pub fn finish(self, machine: SavedMachine, folder: &Path) -> Result<Parent, Error> {
        let Self { folder: partial, parent, memory } = self;
        let preamble = Preamble::of(&FORMAT);
        let state = SnapshotState { preamble, parent, memory, machine };
        let bytes = serde_json::to_vec_pretty(&state)
            .map_err(|error| refused(folder, format!("its state cannot be written: {error}")))?;
        let checksum = partial.commit(&bytes)?;
        let folder = fs::canonicalize(folder).map_err(|source| Error::File {
            verb: "find",
            path: folder.into(),
            source,
        })?;
        Ok(Parent { folder: folder.into(), checksum })
    }
}

/// An error of the snapshot in `folder`.
fn refused(folder: &Path, what: String) -> Error {
    Error::Snapshot(format!("Cannot use the snapshot {}: {what}", folder.display()))
}
