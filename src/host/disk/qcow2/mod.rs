//! Disks in qcow2 images, through the crate imago: calls that are made of the image instead of the file.
//!
//! | file | what |
//! |---|---|
//! | `header.rs` | the header, bounded |
//! | `tables.rs` | whether the image's tables agree, before it is written |
//! | `chain.rs` | backing files: which, and how they are opened |
//! | `store.rs` | what imago reads and writes |
//!
//! imago is synchronous here and knows nothing of guests: calls come from the disk's thread one after the other, and go
//! through a buffer of our own, so that a guest that changes its memory meanwhile changes no table. What imago holds back
//! (tables that have changed) is written at each flush and at the end. Left out: making and resizing images, snapshots.

use std::io;

use imago::FormatAccess;
use log::warn;
use rvmm_devices::HostError;
use rvmm_devices::virtio::blk::DiskPlan;
use vm_memory::VolatileSlice;

use super::engine::{Buffers, Call, Maker, What};
use super::open::{Files, whole_sectors};

mod chain;
mod header;
mod store;
mod tables;

#[cfg(test)]
mod tests;

use store::Store;

/// Bytes that are moved at once.
const PIECE: usize = 256 << 10;

/// An open image.
///
/// Fields are dropped in this order: what the image stands on stays locked as long as it.
pub(super) struct Image {
    image: FormatAccess<Store>,
    _below: Vec<Files>,
    is_written: bool,
    name: String,
    /// Empty until it is needed.
    piece: Vec<u8>,
}

impl Image {
    /// Opens the image that the plan names and that lies in `files`.
    pub(super) fn open(plan: &DiskPlan, files: &Files) -> Result<Self, HostError> {
        let (image, below) = chain::open(plan, files)?;
        Ok(Self {
            image,
            _below: below,
            is_written: !plan.is_read_only,
            name: plan.path.clone(),
            piece: Vec::new(),
        })
    }

    /// Bytes of the disk: whole sectors.
    pub(super) fn size(&self) -> u64 {
        whole_sectors(self.image.size())
    }

    fn sync(&self) -> io::Result<u32> {
        if self.is_written {
            self.image.flush()?;
            self.image.sync()?;
        }
        Ok(0)
    }

    /// Moves `len` bytes between the image and a list of buffers, a piece at a time.
    ///
    /// # Safety
    /// As for [`Maker::make`].
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
                // SAFETY: the caller answers for the list and its buffers.
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

/// Copies between `piece` and the buffers of a list, from the byte number `skip` on.
///
/// # Safety
/// The list and its buffers are there, and nobody but a guest changes them.
unsafe fn copy(mut piece: &mut [u8], list: Buffers, skip: u64, to_list: bool) {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    for number in 0..list.count as usize {
        // SAFETY: the caller answers for the list having `count` entries.
        let part = unsafe { list.first.add(number).read() };
        let from = skip.min(part.iov_len);
        skip -= from;
        let len = (part.iov_len - from).min(piece.len());
        let Some((now, after)) = std::mem::take(&mut piece).split_at_mut_checked(len) else {
            return;
        };
        // SAFETY: the caller answers for the buffer; `from + len` bytes do not reach over its end.
        let buffer = unsafe { VolatileSlice::new(part.iov_base.cast::<u8>().add(from), len) };
        if to_list {
            buffer.copy_from(now);
        } else {
            buffer.copy_to(now);
        }
        piece = after;
    }
}

impl Maker for Image {
    unsafe fn make(&mut self, call: Call) -> io::Result<u32> {
        let moved = u32::try_from(call.len).unwrap_or(u32::MAX);
        match call.what {
            What::Read(to) => {
                // SAFETY: the caller's promise.
                unsafe { self.transfer(call, to, true) }.map(|()| moved)
            }
            What::Write { from, is_durable } => {
                // SAFETY: the caller's promise.
                unsafe { self.transfer(call, from, false) }?;
                if is_durable { self.sync().map(|_| moved) } else { Ok(moved) }
            }
            What::Sync => self.sync(),
            What::Allocate { mode } => {
                let result = if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 {
                    self.image.write_zeroes(call.offset, call.len)
                } else {
                    self.image.discard_to_zero(call.offset, call.len)
                };
                // Version 2 of the format has no zeroes: the job knows what to do then.
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
        let flushed = if self.is_written { self.image.flush() } else { Ok(()) };
        if let Err(error) = flushed {
            let name = &self.name;
            warn!(
                "Cannot write the tables of disk {name}: {error} (repair it: qemu-img check -r all)"
            );
        }
    }
}
