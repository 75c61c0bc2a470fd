//! What can go wrong before a guest runs: one enum, each message one line that says what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::region::Region;

/// Why the files or numbers a user gave cannot become a guest.
///
/// Every message is one line: what happened, to what, and (in parentheses) what to do. The cause, where
/// there is one, is the error's `source()` and is not repeated in the message.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file could not be opened at all.
    #[error("Cannot open {path}")]
    Open {
        /// The file.
        path: FileName,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file was open, but reading it failed.
    #[error("Cannot read {path}")]
    Read {
        /// The file.
        path: FileName,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not what its flag needs: wrong kind of file, wrong format, or damaged.
    #[error("Cannot use {path} as {role}: {reason}")]
    Unusable {
        /// The file.
        path: FileName,
        /// What it was given for.
        role: Role,
        /// What it is instead, then what to do in parentheses.
        reason: String,
    },
    /// The compressed data inside a kernel file is damaged.
    #[error("Cannot unpack {path}: its {format} data is damaged (copy or build the file again)")]
    Unpack {
        /// The file.
        path: FileName,
        /// The name of the compression format.
        format: &'static str,
        /// What the decoder said.
        source: io::Error,
    },
    /// A file grew shorter or failed between being opened and being copied into guest memory.
    #[error("Cannot read a kernel or initrd file any more (was it changed while rvmm started?)")]
    Changed {
        /// What the operating system said.
        source: io::Error,
    },
    /// The kernel command line cannot be handed to Linux as it is.
    #[error("Cannot use this kernel command line: {reason}")]
    Cmdline {
        /// What is wrong with it, then what to do in parentheses.
        reason: String,
    },
    /// A name, a path or a size that the cpio format cannot hold.
    #[error("Cannot put {name} into the initramfs: {reason}")]
    Cpio {
        /// The path inside the archive.
        name: FileName,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is less guest memory than the kernel, the initrd and the device tree take.
    #[error(
        "Cannot fit {what} into {} of guest memory (give at least --mem {})",
        Size(*available),
        Size(*needed)
    )]
    TooLittleMemory {
        /// What has to fit, in words.
        what: String,
        /// Bytes of guest memory there are.
        available: u64,
        /// Bytes of guest memory with which the same request works; a multiple of 2 MiB.
        needed: u64,
    },
    /// The memory that a user's own device tree names is too little.
    #[error(
        "Cannot fit {what} into {named}, the memory that the device tree names (name more there)"
    )]
    TooLittleNamed {
        /// What has to fit, in words.
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
        /// Where it would be.
        first_at: Region,
        /// The piece with the higher address.
        second: String,
        /// Where it would be.
        second_at: Region,
    },
    /// A piece with a fixed address does not lie in guest memory.
    #[error(
        "Cannot load {what} at {at}: guest memory is {ram} (choose an address inside it{})",
        more.map_or(String::new(), |more| format!(", or give --mem {}", Size(more)))
    )]
    OutsideRam {
        /// The piece.
        what: String,
        /// Where it would be.
        at: Region,
        /// The ranges of guest memory, in words.
        ram: String,
        /// Bytes of guest memory with which the address works, if any does; a multiple of 2 MiB.
        more: Option<u64>,
    },
    /// The guest would start at an address where there is nothing.
    #[error("Cannot start the guest at {entry:#x}: {reason}")]
    Entry {
        /// The guest-physical address of the first instruction.
        entry: u64,
        /// What is wrong with it, then what to do in parentheses.
        reason: String,
    },
    /// The caller asked for something that no board can be: a fault of the program, not of its user.
    #[error("Cannot lay out the guest: {0}")]
    Layout(String),
    /// The description of the board cannot be written down as a device tree.
    #[error("Cannot describe the board: {0}")]
    Board(String),
    /// The device tree writer refused a name or a value.
    #[error("Cannot write the device tree at {at}")]
    Tree {
        /// The node or property in question.
        at: String,
        /// What the writer said.
        source: vm_fdt::Error,
    },
}

/// What a file was given for; it completes the sentence "Cannot use FILE as ...".
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
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "a kernel",
            Self::Initrd => "an initrd",
            Self::DeviceTree => "a device tree",
            Self::Data => "data",
        })
    }
}

/// A path as it may be printed: control characters are escaped, so that a hostile name can neither
/// break the line nor reach the terminal.
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

/// A number of bytes in the largest unit that needs no fraction: `512M`, `1G`, `1234`.
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
