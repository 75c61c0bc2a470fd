//! A cpio archive in the newc format, as Linux unpacks it into its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! An entry is a header of 110 bytes (a magic and thirteen numbers of eight hexadecimal digits), the name with
//! a NUL, and the data, each padded to a multiple of four. Linux silently skips entries that it cannot
//! create, such as files in folders that do not exist; such entries are refused here.

use std::collections::BTreeSet;

use crate::error::BootError;
use crate::initrd::Initrd;
use crate::source::Source;

/// Linux skips names and link targets that are longer, the NUL included (`PATH_MAX`).
const PATH_MAX: usize = 4096;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Writes an initramfs: folders, files, symbolic links and device nodes, in the order given.
///
/// Paths are relative to the root (`dev/console`); folders have to be added before their contents.
/// Everything belongs to root, and nothing depends on the clock: the same calls give the same bytes.
#[derive(Debug, Default)]
pub struct Cpio {
    pieces: Vec<Source>,
    /// The bytes of `pieces` together.
    pieces_len: u64,
    /// The bytes after `pieces`.
    tail: Vec<u8>,
    folders: BTreeSet<String>,
    names: BTreeSet<String>,
}

/// The kinds of device node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Node {
    /// A character device.
    Char,
    /// A block device.
    Block,
}

/// The header fields that depend on the kind of entry.
#[derive(Default)]
struct Entry {
    mode: u32,
    links: u32,
    len: u32,
    device: (u32, u32),
}

impl Cpio {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder. `mode` holds the permission bits (0o7777).
    ///
    /// # Errors
    /// [`BootError::Cpio`] for a path or a mode that the format or Linux does not support.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<&mut Self, BootError> {
        let entry = Entry { mode: FOLDER | permissions(path, mode)?, links: 2, ..Entry::default() };
        self.entry(path, &entry)?;
        self.folders.insert(path.into());
        Ok(self)
    }

    /// Adds a file with the bytes of `data`, which are read only when the archive is used.
    ///
    /// # Errors
    /// As [`Cpio::dir`], and for a file of 4 GiB or more.
    pub fn file(&mut self, path: &str, mode: u32, data: Source) -> Result<&mut Self, BootError> {
        let len = u32::try_from(data.len()).map_err(|_| refuse(path, "it is 4 GiB or larger"))?;
        let mode = FILE | permissions(path, mode)?;
        self.entry(path, &Entry { mode, links: 1, len, ..Entry::default() })?;
        match data {
            Source::Bytes(bytes) => self.tail.extend_from_slice(&bytes),
            Source::File { .. } => {
                let before = Source::Bytes(std::mem::take(&mut self.tail));
                self.pieces_len += before.len() + data.len();
                self.pieces.extend([before, data]);
            }
        }
        self.pad();
        Ok(self)
    }

    /// Adds a symbolic link that points at `target`.
    ///
    /// # Errors
    /// As [`Cpio::dir`].
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, BootError> {
        if target.is_empty() || target.len() >= PATH_MAX || target.contains('\0') {
            return Err(refuse(
                path,
                "its target is empty, longer than 4095 bytes, or holds a NUL",
            ));
        }
        // Shorter than PATH_MAX.
        let len = u32::try_from(target.len()).unwrap_or(0);
        self.entry(path, &Entry { mode: LINK | 0o777, links: 1, len, ..Entry::default() })?;
        self.tail.extend_from_slice(target.as_bytes());
        self.pad();
        Ok(self)
    }

    /// Adds a device node with the (major, minor) numbers `device`.
    ///
    /// # Errors
    /// As [`Cpio::dir`].
    pub fn node(
        &mut self,
        path: &str,
        mode: u32,
        kind: Node,
        device: (u32, u32),
    ) -> Result<&mut Self, BootError> {
        let kind = match kind {
            Node::Char => 0o020_000,
            Node::Block => 0o060_000,
        };
        let mode = kind | permissions(path, mode)?;
        self.entry(path, &Entry { mode, links: 1, len: 0, device })
    }

    /// Ends the archive and returns it as an initrd whose files are not yet read; `name` is for messages.
    #[must_use]
    pub fn into_initrd(mut self, name: &str) -> Initrd {
        self.header(TRAILER, &Entry { links: 1, ..Entry::default() });
        self.pieces.push(Source::Bytes(self.tail));
        Initrd::from_sources(name, self.pieces)
    }

    /// Ends the archive and returns all its bytes.
    ///
    /// # Errors
    /// [`BootError::Changed`] when a file can no longer be read.
    pub fn finish(self) -> Result<Vec<u8>, BootError> {
        let initrd = self.into_initrd("initramfs");
        let mut archive = Vec::new();
        for source in initrd.sources() {
            let start = archive.len();
            // Every piece is shorter than 4 GiB.
            let len = usize::try_from(source.len()).unwrap_or(usize::MAX);
            archive.resize(start.saturating_add(len), 0);
            source.read_exact_at(0, archive.get_mut(start..).unwrap_or_default())?;
        }
        Ok(archive)
    }

    /// Checks the path and writes the header of an entry.
    fn entry(&mut self, path: &str, entry: &Entry) -> Result<&mut Self, BootError> {
        if path.len() >= PATH_MAX || path.contains('\0') {
            return Err(refuse(path, "its path is longer than 4095 bytes or holds a NUL"));
        }
        let odd = |part: &str| matches!(part, "" | "." | "..");
        if path.split('/').any(odd) || path == TRAILER {
            return Err(refuse(path, "its path is not a plain relative path"));
        }
        if path.rsplit_once('/').is_some_and(|(folder, _)| !self.folders.contains(folder)) {
            return Err(refuse(path, "the folder it is in was not added before it"));
        }
        if !self.names.insert(path.into()) {
            return Err(refuse(path, "there already is an entry of this name"));
        }
        self.header(path, entry);
        Ok(self)
    }

    fn header(&mut self, name: &str, entry: &Entry) {
        // Names are shorter than PATH_MAX, and there are fewer of them than 4 billion.
        let ino = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        let name_len = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let Entry { mode, links, len, device: (major, minor) } = *entry;
        let numbers = [ino, mode, 0, 0, links, 0, len, 0, 0, major, minor, name_len, 0];
        self.tail.extend_from_slice(b"070701");
        for number in numbers {
            self.tail.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.tail.extend_from_slice(name.as_bytes());
        self.tail.push(0);
        self.pad();
    }

    /// Pads to a multiple of four bytes from the start of the archive.
    fn pad(&mut self) {
        while !(self.pieces_len + self.tail.len() as u64).is_multiple_of(4) {
            self.tail.push(0);
        }
    }
}

/// The permission bits of an entry.
fn permissions(path: &str, mode: u32) -> Result<u32, BootError> {
    if mode <= 0o7777 { Ok(mode) } else { Err(refuse(path, "its mode is not of the form 0o7777")) }
}

fn refuse(path: &str, reason: &'static str) -> BootError {
    BootError::Cpio { name: path.into(), reason }
}
