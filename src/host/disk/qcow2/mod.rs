//! Disks in qcow2 images, through the crate imago: makes an engine's calls on the image instead of the file.
//!
//! | file | content |
//! |---|---|
//! | `header.rs` | the header, with limits |
//! | `tables.rs` | consistency check of the tables, before the image is written |
//! | `chain.rs` | backing files: finding and opening them |
//! | `store.rs` | the storage that imago reads and writes |
//! | `create.rs` | a new image over another disk |
//!
//! imago is synchronous here: calls are made by the disk's thread one after the other, and data goes through a buffer of rvmm's,
//! so that a guest that changes its memory meanwhile changes no table. Tables that imago has changed and caches are written at
//! each flush and at the end. Left out: resizing images, snapshots in images.

use std::io;

use imago::FormatAccess;
use log::warn;
use rvmm_devices::HostError;
use rvmm_devices::virtio::blk::DiskPlan;
use vm_memory::VolatileSlice;

use super::engine::{Buffers, Call, CallKind, Executor};
use super::open::{Files, whole_sectors};

mod chain;
mod create;
mod header;
mod store;
mod tables;

#[cfg(test)]
mod tests;

pub(crate) use create::{create_overlay, disk_size};
use store::Store;

/// Size of the buffer.
const PIECE: usize = 256 << 10;

/// An open image.
///
/// Fields are dropped in this order: the backing files stay locked as long as the image is open.
pub(super) struct Image {
    image: FormatAccess<Store>,
    _below: Vec<Files>,
    is_written: bool,
    name: String,
    /// The buffer, empty until it is needed.
    piece: Vec<u8>,
}

impl Image {
    /// Opens the image that the plan names, whose file is `files`.
    pub(super) fn open(plan: &DiskPlan, files: &Files) -> Result<Self, HostError> {
        let (image, below) = chain::open(plan, files)?;
        Ok(Self {
            image,
            _below: below,
            is_written: !plan.is_read_only,
            name: plan.path.to_string(),
            piece: Vec::new(),
        })
    }

    /// Size of the disk in bytes, in whole sectors.
    pub(super) fn size(&self) -> u64 {
        whole_sectors(self.image.size())
    }

    fn sync(&self) -> io::Result<u32> {
        if self.is_written {
            self.write_back()?;
            self.image.sync()?;
        }
        Ok(0)
    }

    /// Writes the tables that are only in memory.
    fn write_back(&self) -> io::Result<()> {
        if self.is_written { self.image.flush() } else { Ok(()) }
    }

    /// Moves `len` bytes between the image and a list of buffers, a piece at a time.
    ///
    /// # Safety
    /// As for [`Executor::execute`].
    unsafe fn transfer(&mut self, call: Call, list: Buffers, is_read: bool) -> io::Result<()> {
        self.piece.resize(PIECE, 0);
        let mut done = 0;
        while done < call.len {
            let more = (call.len - done).min(PIECE as u64);
            let (at, piece) = (call.offset.saturating_add(done), usize::try_from(more));
            let piece = piece.ok().and_then(|more| self.piece.get_mut(..more));
            let piece = piece.unwrap_or_default();
            if is_read {
                self.image.read(&mut *piece, at)?;
                // SAFETY: the caller guarantees that the list and its buffers are valid.
                unsafe { copy(piece, list, done, is_read) };
            } else {
                // SAFETY: as above.
                unsafe { copy(piece, list, done, is_read) };
                self.image.write(&*piece, at)?;
            }
            done += more;
        }
        Ok(())
    }
}

/// Copies between `piece` and the buffers of a list, starting at byte `skip` of the list.
///
/// # Safety
/// The list and its buffers are valid, and only a guest changes them.
unsafe fn copy(mut piece: &mut [u8], list: Buffers, skip: u64, to_list: bool) {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    for number in 0..list.count as usize {
        // SAFETY: the caller guarantees that the list has `count` entries.
        let part = unsafe { list.first.add(number).read() };
        let from = skip.min(part.iov_len);
        skip -= from;
        let len = (part.iov_len - from).min(piece.len());
        let Some((now, after)) = std::mem::take(&mut piece).split_at_mut_checked(len) else {
            return;
        };
        // SAFETY: the caller guarantees that the buffer is valid; `from + len` bytes are inside it.
        let buffer = unsafe { VolatileSlice::new(part.iov_base.cast::<u8>().add(from), len) };
        if to_list {
            buffer.copy_from(now);
        } else {
            buffer.copy_to(now);
        }
        piece = after;
    }
}

impl Executor for Image {
    unsafe fn execute(&mut self, call: Call) -> io::Result<u32> {
        let moved = u32::try_from(call.len).unwrap_or(u32::MAX);
        match call.kind {
            CallKind::Read(to) => {
                // SAFETY: guaranteed by the caller.
                unsafe { self.transfer(call, to, true) }.map(|()| moved)
            }
            CallKind::Write { from, is_durable } => {
                // SAFETY: guaranteed by the caller.
                unsafe { self.transfer(call, from, false) }?;
                if is_durable { self.sync().map(|_| moved) } else { Ok(moved) }
            }
            CallKind::Sync => self.sync(),
            CallKind::WriteBack => self.write_back().map(|()| 0),
            CallKind::Allocate { mode } => {
                let result = if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 {
                    self.image.write_zeroes(call.offset, call.len)
                } else {
                    self.image.discard_to_zero(call.offset, call.len)
                };
                // Version 2 of the format has no zero clusters: the job then falls back to writing zeroes.
                result.map(|()| 0).map_err(|error| match error.kind() {
                    io::ErrorKind::Unsupported => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
                    _ => error,
                })
            }
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = self.write_back() {
            let name = &self.name;
            warn!(
                "Cannot write the tables of disk {name}: {error} (repair it: qemu-img check -r all)"
            );
        }
    }
}
