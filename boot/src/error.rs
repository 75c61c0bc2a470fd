//! Errors before a guest runs: one enum, each message one line with advice.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::region::Region;

/// The reason why a guest cannot be built from the user's files and numbers.
///
/// Every message is one line: what happened, to what, and (in parentheses) what to do. The cause, if
/// there is one, is the error's `source()` and is not repeated in the message.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file could not be opened.
    #[error("Cannot open {path}")]
    Open {
        /// The file.
        path: FileName,
        /// The operating system's error.
        source: io::Error,
    },
    /// The file was open, but reading it failed.
    #[error("Cannot read {path}")]
    Read {
        /// The file.
        path: FileName,
        /// The operating system's error.
        source: io::Error,
    },
    /// The file is unsuitable for its option: wrong kind of file, wrong format, or damaged.
    #[error("Cannot use {path} as {role}: {reason}")]
    Unusable {
        /// The file.
        path: FileName,
        /// Its purpose.
        role: Role,
        /// A description of the file, then advice in parentheses.
        reason: String,
    },
    /// The compressed data inside a kernel file is damaged.
    #[error("Cannot unpack {path}: its {format} data is damaged (copy or build the file again)")]
    Unpack {
        /// The file.
        path: FileName,
        /// The name of the compression format.
        format: &'static str,
        /// The decoder's error.
        source: io::Error,
    },
    /// A file became shorter or unreadable between being opened and being copied into guest memory.
    #[error("Cannot read a kernel or initrd file any more (was it changed while rvmm started?)")]
    Changed {
        /// The operating system's error.
        source: io::Error,
    },
    /// Linux would not use the kernel command line unchanged.
    #[error("Cannot use this kernel command line: {reason}")]
    Cmdline {
        /// The fault, then advice in parentheses.
        reason: String,
    },
    /// A name, a path or a size that the cpio format cannot hold.
    #[error("Cannot put {name} into the initramfs: {reason}")]
    Cpio {
        /// The path inside the archive.
        name: FileName,
        /// The fault.
        reason: &'static str,
    },
    /// Guest memory is too small for the kernel, the initrd and the device tree.
    #[error(
        "Cannot fit {what} into {} of guest memory (give at least --mem {})",
        Size(*available),
        Size(*needed)
    )]
    TooLittleMemory {
        /// The pieces to place, in words.
        what: String,
        /// Size of guest memory in bytes.
        available: u64,
        /// Sufficient size of guest memory in bytes; a multiple of 2 MiB.
        needed: u64,
    },
    /// The memory in a device tree supplied by the user is too small.
    #[error(
        "Cannot fit {what} into {named}, the memory in the device tree (change its memory nodes)"
    )]
    TreeMemoryTooSmall {
        /// The pieces to place, in words.
        what: String,
        /// The ranges of memory, in words.
        named: String,
    },
    /// Two pieces that both have fixed addresses share memory.
    #[error(
        "Cannot load {first} at {first_at} and {second} at {second_at}: they overlap (move one)"
    )]
    Overlap {
        /// The piece with the lower address.
        first: String,
        /// Its addresses.
        first_at: Region,
        /// The piece with the higher address.
        second: String,
        /// Its addresses.
        second_at: Region,
    },
    /// A piece with a fixed address is not in guest memory.
    #[error(
        "Cannot load {what} at {at}: guest memory is {ram} (choose an address inside it{})",
        more.map_or(String::new(), |more| format!(", or give --mem {}", Size(more)))
    )]
    OutsideRam {
        /// The piece.
        what: String,
        /// Its addresses.
        at: Region,
        /// The ranges of guest memory, in words.
        ram: String,
        /// Size of guest memory in bytes with which the address is valid, if there is one; a multiple of 2 MiB.
        more: Option<u64>,
    },
    /// The guest would start at an address without contents.
    #[error("Cannot start the guest at {entry:#x}: {reason}")]
    Entry {
        /// The guest-physical address of the first instruction.
        entry: u64,
        /// The fault, then advice in parentheses.
        reason: String,
    },
    /// The caller's request is invalid: a bug of the program, not a mistake of its user.
    #[error("Cannot lay out the guest: {0}")]
    Layout(String),
    /// The description of the board cannot be written as a device tree.
    #[error("Cannot describe the board: {0}")]
    Board(String),
    /// The device tree writer refused a name or a value.
    #[error("Cannot write the device tree at {at}")]
    Tree {
        /// The path of the node or property.
        at: String,
        /// The writer's error.
        source: vm_fdt::Error,
    },
}

/// The purpose of a file; completes the sentence "Cannot use FILE as ...".
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// `--kernel`.
    Kernel,
    /// `--initrd`.
    Initrd,
    /// `--dtb`.
    DeviceTree,
    /// `--load`, or a file inside the built-in initramfs.
    Data,
    /// The init of the built-in initramfs.
    Init,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "a kernel",
            Self::Initrd => "an initrd",
            Self::DeviceTree => "a device tree",
            Self::Data => "data",
            Self::Init => "the guest's init",
        })
    }
}

/// A path that is safe to print: control characters are escaped, so that a hostile name can neither
/// break the line nor control the terminal.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileName(PathBuf);

impl FileName {
    /// The path itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl<P: Into<PathBuf>> From<P> for FileName {
    fn from(path: P) -> Self {
        Self(path.into())
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        printable(&self.0.to_string_lossy(), f)
    }
}

/// Writes `text` with every control character escaped.
fn printable(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for c in text.chars() {
        if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
    }
    Ok(())
}

/// A number of bytes, printed in the largest unit that needs no fraction: `512M`, `1G`, `1234`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
        match units.iter().find(|(unit, _)| self.0 >= *unit && self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}
