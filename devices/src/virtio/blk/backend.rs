//! The interface to the host's end of a disk: asynchronous operations and their completions.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::FilePath;
use crate::virtio::Segment;

/// The parameters with which a host opens a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// The file or block device.
    pub path: FilePath,
    /// The guest only reads; the file is opened read-only, too.
    pub is_read_only: bool,
    /// The cache mode.
    pub cache: DiskCache,
    /// The format of the disk in the file.
    pub format: DiskFormat,
}

/// The format of a disk in its file. Set by the user, never probed from the contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// The file's bytes are the disk's.
    #[default]
    Raw,
    /// A qcow2 image, version 2 or 3.
    Qcow2 {
        /// The image may name a backing file, which is opened with the name in the image.
        has_backing: bool,
    },
}

/// The cache mode of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// The host's page cache; a flush reaches the disk.
    #[default]
    Writeback,
    /// No cache: reads and writes bypass the page cache (`O_DIRECT`); a flush reaches the disk.
    None,
    /// The host's page cache; a flush does nothing. A crash of the host may corrupt the guest's file systems.
    Unsafe,
}

/// An operation on a range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// From the disk to guest RAM.
    Read,
    /// From guest RAM to the disk.
    Write {
        /// Completes only when the data survives a crash of the host.
        is_durable: bool,
    },
    /// Makes all writes completed before survive a crash of the host. Range and data are empty.
    Flush,
    /// The range is not needed any more; its contents are undefined afterwards. No data.
    Discard,
    /// The range reads as zeroes afterwards. No data.
    WriteZeroes {
        /// The host may deallocate the range.
        may_unmap: bool,
        /// Completes only when the zeroes survive a crash of the host.
        is_durable: bool,
    },
}

/// One operation. Its range is inside the disk, by the size that was last read.
#[derive(Debug, Clone, Copy)]
pub struct DiskRequest<'a> {
    /// The device's identifier for it, free again once its completion was polled; a small number.
    pub slot: u32,
    /// The operation.
    pub op: DiskOp,
    /// Offset on the disk, in bytes.
    pub offset: u64,
    /// Length on the disk, in bytes.
    pub len: u64,
    /// Guest RAM to read from or write to, `len` bytes in total; empty for operations without data.
    pub data: &'a [Segment],
}

/// A completed operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskDone {
    /// The slot of the operation.
    pub slot: u32,
    /// All of it was done. Errors are in the host's log.
    pub is_ok: bool,
}

/// An open disk. Nothing here blocks, except [`abandon`](Self::abandon) for a bounded time, and [`drain`](Self::drain).
pub trait DiskBackend: Send {
    /// Size in bytes: a multiple of 512, at least 512. May change after a [`poll`](Self::poll), when the disk was resized.
    fn size(&self) -> u64;

    /// Identity of the file, independent of the spelling of its path; the guest gets a digest of it.
    fn file_name(&self) -> &[u8];

    /// Queues an operation. It begins now, or with the next [`poll`](Self::poll) at the latest.
    fn start(&mut self, request: DiskRequest<'_>);

    /// Submits all queued operations, and adds completed ones to `done`.
    fn poll(&mut self, done: &mut Vec<DiskDone>);

    /// True if the host did not accept all operations; no event follows, so poll again a little later.
    fn is_behind(&self) -> bool;

    /// Abandons the operations of these slots: waits until none of them touches guest RAM any more, and never reports them.
    /// Other operations continue.
    fn drain(&mut self, slots: &[u32]);

    /// As [`drain`](Self::drain), but waits for `patience` at most. Returns the slots whose operations may still touch guest RAM
    /// then: each stays in use until [`poll`](Self::poll) reports it.
    fn abandon(&mut self, slots: &[u32], patience: Duration) -> Vec<u32> {
        let _ = patience;
        self.drain(slots);
        Vec::new()
    }

    /// Writes what this process still holds of completed writes, such as tables of an image, so that another program finds all of them in
    /// the file. No operation is in flight.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write_back(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Descriptor that is readable when [`poll`](Self::poll) may find completed operations.
    fn fd(&self) -> RawFd;
}
