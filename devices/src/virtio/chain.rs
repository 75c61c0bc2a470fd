//! Parsing and validation of a descriptor chain before a device gets it (virtio 1.3, sections 2.7.4 to 2.7.8).
//!
//! Every field is read once. The result is a list of segments of RAM: first the device-readable ones, then the
//! device-writable ones. Any other chain is refused as a whole.

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::DmaMemory;

/// A descriptor's bytes in memory.
type Raw = [u8; 16];

/// Size in bytes of a descriptor.
const DESCRIPTOR: u64 = size_of::<Raw>() as u64;

/// Number of descriptors of an indirect table that are read at once: drivers fill such tables in order.
const BLOCK: usize = 32;

mod flag {
    /// `VIRTQ_DESC_F_NEXT`
    pub(super) const NEXT: u16 = 1;
    /// `VIRTQ_DESC_F_WRITE`
    pub(super) const WRITE: u16 = 2;
    /// `VIRTQ_DESC_F_INDIRECT`
    pub(super) const INDIRECT: u16 = 4;
}

/// A range of guest RAM within one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub addr: GuestAddress,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// The reason for which a chain is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// `next` is not an index into the table.
    #[error("a descriptor's next is outside its table")]
    Next,
    /// More descriptors than the queue has; also the result of a loop.
    #[error("a chain is longer than its queue")]
    TooLong,
    /// An indirect table that is not allowed, is nested, or whose length is not a multiple of a descriptor's.
    #[error("an indirect table is not allowed there or has an invalid length")]
    Indirect,
    /// A table or a buffer is not entirely in RAM.
    #[error("a descriptor or a buffer is outside RAM")]
    NotRam,
    /// A device-readable buffer follows a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More than 2^32 - 1 bytes.
    #[error("a chain is larger than 4 GiB")]
    TooLarge,
}

/// A request that the driver has made available: the head of a chain and its buffers.
///
/// [`Work::complete`](super::Work::complete) returns it to the driver, exactly once.
#[derive(Debug)]
#[must_use = "a chain that is not completed is lost to the driver"]
pub struct Chain {
    pub(super) queue: u16,
    pub(super) head: u16,
    /// The index in the available ring that it was taken from.
    pub(super) position: u16,
    /// The queue's epoch when the chain was taken.
    pub(super) epoch: u32,
    pub(super) segments: Vec<Segment>,
    pub(super) readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
}

/// A chain that a device has taken and not returned, as it is in a saved state. Its buffers are those in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedChain {
    pub(super) queue: u16,
    pub(super) head: u16,
    pub(super) position: u16,
}

impl Chain {
    /// The chain for a saved state.
    #[must_use]
    pub fn saved(&self) -> SavedChain {
        SavedChain { queue: self.queue, head: self.head, position: self.position }
    }

    /// The queue that it was taken from.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// The device-readable buffers, in order, without empty ones.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// The device-writable buffers, in order, without empty ones.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Number of device-readable bytes.
    #[must_use]
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Number of device-writable bytes.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Copies the readable bytes from `offset` on to `into`, as many as there are, and returns their number.
    pub fn read_at(&self, memory: &GuestMemoryMmap, offset: u32, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in pieces(self.readable(), offset, into.len()) {
            let Some(part) = into.get_mut(done..done + piece.len as usize) else { break };
            if memory.read_slice(part, piece.addr).is_err() {
                break;
            }
            done += part.len();
        }
        done
    }

    /// Copies `from` to the writable bytes from `offset` on, as many as there is room for, and returns their number.
    pub fn write_at(&self, memory: &GuestMemoryMmap, offset: u32, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in pieces(self.writable(), offset, from.len()) {
            let Some(part) = from.get(done..done + piece.len as usize) else { break };
            if memory.write_slice(part, piece.addr).is_err() {
                break;
            }
            done += part.len();
        }
        done
    }

    /// Notes `count` writable bytes from `offset` on as written, if writes are recorded.
    pub fn note_written(&self, memory: &dyn DmaMemory, offset: u32, count: u32) {
        if count == 0 || !memory.records_writes() {
            return;
        }
        for piece in pieces(self.writable(), offset, count as usize) {
            memory.note_written(piece.addr.0, piece.len.into());
        }
    }
}

/// Iterates over the parts of `segments` with the `count` bytes from `offset` on; fewer if there are not as many.
pub fn pieces(
    segments: &[Segment],
    offset: u32,
    count: usize,
) -> impl Iterator<Item = Segment> + '_ {
    let mut skip = offset;
    let mut left = u32::try_from(count).unwrap_or(u32::MAX);
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len);
        skip -= skipped;
        let len = (segment.len - skipped).min(left);
        left -= len;
        // The segment lies in RAM, so its addresses do not wrap.
        let addr = segment.addr.0.wrapping_add(skipped.into());
        (len > 0).then_some(Segment { addr: GuestAddress(addr), len })
    })
}

/// The descriptor table of a queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tables {
    /// Its address.
    pub(super) descriptors: u64,
    /// Number of entries of the table, and maximum number of descriptors in a chain.
    pub(super) size: u16,
    /// True if indirect tables were negotiated.
    pub(super) indirect: bool,
}

/// A parsed descriptor.
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[expect(clippy::cast_possible_truncation, reason = "fields of a descriptor")]
    fn from_bytes(raw: Raw) -> Self {
        let raw = u128::from_le_bytes(raw);
        Self {
            addr: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        }
    }

    fn is(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The table of the current descriptor, and the descriptors of it read last.
struct Table {
    addr: u64,
    entries: u16,
    is_indirect: bool,
    /// Copies of the descriptors from `first` on.
    block: [Raw; BLOCK],
    first: u16,
    count: u16,
}

impl Table {
    fn new(addr: u64, entries: u16, is_indirect: bool) -> Self {
        let block = [Raw::default(); BLOCK];
        Self { addr, entries, is_indirect, block, first: 0, count: 0 }
    }

    /// The descriptor at `index`: a copy, which the driver cannot change any more.
    fn descriptor(
        &mut self,
        memory: &GuestMemoryMmap,
        index: u16,
    ) -> Result<Descriptor, ChainError> {
        if index >= self.entries {
            return Err(ChainError::Next);
        }
        let is_held = |at: u16| at < self.count;
        let at = match index.checked_sub(self.first).filter(|at| is_held(*at)) {
            Some(at) => at,
            None => self.read(memory, index).map(|()| 0)?,
        };
        let raw = self.block.get(usize::from(at)).ok_or(ChainError::Next)?;
        Ok(Descriptor::from_bytes(*raw))
    }

    /// Reads descriptors from `index` on: a block of an indirect table, but one of the queue's own table, in which chains are short.
    fn read(&mut self, memory: &GuestMemoryMmap, index: u16) -> Result<(), ChainError> {
        let most = if self.is_indirect { BLOCK } else { 1 };
        let count = usize::from(self.entries.saturating_sub(index)).min(most);
        let addr = u64::from(index)
            .checked_mul(DESCRIPTOR)
            .and_then(|offset| self.addr.checked_add(offset))
            .ok_or(ChainError::NotRam)?;
        let into = self.block.get_mut(..count).unwrap_or_default().as_flattened_mut();
        memory.read_slice(into, GuestAddress(addr)).map_err(|_| ChainError::NotRam)?;
        self.first = index;
        self.count = u16::try_from(count).unwrap_or(0);
        Ok(())
    }
}

/// Checks that buffers are in RAM; those of one chain are mostly in one region.
#[derive(Default)]
struct Ram {
    /// First address and length of the region found last.
    region: (u64, u64),
}

impl Ram {
    fn has(&mut self, memory: &GuestMemoryMmap, addr: GuestAddress, len: u32) -> bool {
        let is_inside = |(start, bytes): (u64, u64)| {
            let offset = addr.0.wrapping_sub(start);
            offset < bytes && u64::from(len) <= bytes - offset
        };
        if is_inside(self.region) {
            return true;
        }
        let Some(region) = memory.find_region(addr) else { return false };
        self.region = (region.start_addr().0, region.len());
        is_inside(self.region)
    }
}

impl Tables {
    /// Parses the chain of `head` (an index into the table) into `segments`.
    pub(super) fn walk(
        &self,
        memory: &GuestMemoryMmap,
        (queue, epoch): (u16, u32),
        head: u16,
        segments: Vec<Segment>,
    ) -> Result<Chain, (ChainError, Vec<Segment>)> {
        let mut chain = Chain {
            queue,
            head,
            position: 0,
            epoch,
            segments,
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
        };
        chain.segments.clear();
        match self.follow(memory, head, &mut chain) {
            Ok(()) => Ok(chain),
            Err(error) => Err((error, chain.segments)),
        }
    }

    fn follow(
        &self,
        memory: &GuestMemoryMmap,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), ChainError> {
        let mut table = Table::new(self.descriptors, self.size, false);
        let (mut ram, mut index) = (Ram::default(), head);
        // Counts descriptors with a buffer. In addition a chain may have the one that refers to an indirect table (2.7.5.3.1).
        let mut left = self.size;
        loop {
            let descriptor = table.descriptor(memory, index)?;
            if descriptor.is(flag::INDIRECT) {
                if table.is_indirect || !self.indirect || descriptor.is(flag::NEXT) {
                    return Err(ChainError::Indirect);
                }
                (table, index) =
                    (Table::new(descriptor.addr, self.entries(descriptor.len)?, true), 0);
                continue;
            }
            left = left.checked_sub(1).ok_or(ChainError::TooLong)?;
            chain.add(memory, &mut ram, descriptor)?;
            if !descriptor.is(flag::NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// Number of entries of an indirect table of `len` bytes.
    fn entries(&self, len: u32) -> Result<u16, ChainError> {
        let entries = u64::from(len) / DESCRIPTOR;
        if entries == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR) {
            return Err(ChainError::Indirect);
        }
        match u16::try_from(entries) {
            Ok(entries) if entries <= self.size => Ok(entries),
            _ => Err(ChainError::TooLong),
        }
    }
}

impl Chain {
    fn add(
        &mut self,
        memory: &GuestMemoryMmap,
        ram: &mut Ram,
        descriptor: Descriptor,
    ) -> Result<(), ChainError> {
        let Descriptor { addr, len, .. } = descriptor;
        let total = if descriptor.is(flag::WRITE) {
            &mut self.writable_bytes
        } else if self.segments.len() == self.readable {
            &mut self.readable_bytes
        } else {
            return Err(ChainError::Order);
        };
        if len == 0 {
            return Ok(());
        }
        *total = total.checked_add(len).ok_or(ChainError::TooLarge)?;
        let addr = GuestAddress(addr);
        if !ram.has(memory, addr, len) {
            return Err(ChainError::NotRam);
        }
        self.segments.push(Segment { addr, len });
        if !descriptor.is(flag::WRITE) {
            self.readable = self.segments.len();
        }
        Ok(())
    }
}
