//! The host's end of a disk, as the device sees it: operations in, completions out, nothing waited for.

use std::os::fd::RawFd;
use std::time::Duration;

use crate::virtio::Segment;

/// What a host opens a disk for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// The file or block device.
    pub path: String,
    /// The guest only reads; the host's kernel is told so too.
    pub is_read_only: bool,
    /// What stands between the guest and the disk.
    pub cache: DiskCache,
    /// How the disk lies in the file.
    pub format: DiskFormat,
}

/// How a disk lies in its file. Said by the user, never found out from what the file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// The file's bytes are the disk's.
    #[default]
    Raw,
    /// A qcow2 image, version 2 or 3.
    Qcow2 {
        /// The image may name a backing file, which is opened as the image says.
        has_backing: bool,
    },
}

/// What stands between the guest and the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskCache {
    /// The host's page cache; a flush reaches the disk.
    #[default]
    Writeback,
    /// Nothing: reads and writes pass the page cache by (`O_DIRECT`); a flush reaches the disk.
    None,
    /// The host's page cache; a flush does nothing. A crash of the host may cost the guest its file systems.
    Unsafe,
}

/// What is done to a range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// From the disk to guest RAM.
    Read,
    /// From guest RAM to the disk; `is_durable`: done when it would survive a crash of the host.
    Write {
        /// Done when it would survive a crash of the host.
        is_durable: bool,
    },
    /// All that was completed before survives a crash of the host when this is done. Range and data are empty.
    Flush,
    /// The range is not needed any more; what it reads as afterwards is not said. No data.
    Discard,
    /// The range reads as zeroes afterwards. No data.
    WriteZeroes {
        /// The host may give the range's space back.
        may_unmap: bool,
        /// Done when it would survive a crash of the host.
        is_durable: bool,
    },
}

/// One operation. Its range was checked to lie inside the disk as it was when it was last looked at.
#[derive(Debug, Clone, Copy)]
pub struct DiskRequest<'a> {
    /// The device's name for it, free again once its completion was collected; small numbers.
    pub slot: u32,
    /// What to do.
    pub op: DiskOp,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How many bytes of the disk.
    pub len: u64,
    /// Guest RAM of together `len` bytes to read from or write to; empty where the operation has no data.
    pub data: &'a [Segment],
}

/// An operation has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskDone {
    /// Whose it was.
    pub slot: u32,
    /// All of it was done. What the host said otherwise is in the host's log.
    pub is_ok: bool,
}

/// An open disk. Nothing here blocks, except [`abandon`](Self::abandon) for a bounded time, and [`drain`](Self::drain).
pub trait DiskBackend: Send {
    /// Bytes: a multiple of 512, at least 512. May change after a [`poll`](Self::poll), when somebody resized the disk.
    fn size(&self) -> u64;

    /// Names the file, the same however the user spelt its path; the guest gets a digest of it.
    fn file_name(&self) -> &[u8];

    /// Takes an operation in. It may begin now, and begins with the next [`poll`](Self::poll) at the latest.
    fn start(&mut self, request: DiskRequest<'_>);

    /// Sets everything going that was started, and adds to `done` what has ended.
    fn poll(&mut self, done: &mut Vec<DiskDone>);

    /// Whether the host did not take all that was started, which nothing announces: to be polled again a little later.
    fn is_behind(&self) -> bool;

    /// Gives the operations of these slots up: waits until none of them touches guest RAM any more, and never reports them.
    /// The others go on.
    fn drain(&mut self, slots: &[u32]);

    /// As [`drain`](Self::drain), but waits for `patience` at most. Gives those of the slots whose operations may still touch
    /// guest RAM then: [`poll`](Self::poll) reports each of them when it does no longer, and they are taken until then.
    fn abandon(&mut self, slots: &[u32], patience: Duration) -> Vec<u32> {
        let _ = patience;
        self.drain(slots);
        Vec::new()
    }

    /// The descriptor that is readable when [`poll`](Self::poll) may find something ended.
    fn fd(&self) -> RawFd;
}
