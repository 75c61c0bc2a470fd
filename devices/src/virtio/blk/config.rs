//! The configuration space of a disk (virtio 1.3, section 5.2.4). Left out: geometry and `size_max`, whose features are not
//! offered, and all fields after `write_zeroes_may_unmap`.

use super::request::{MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS, SECTOR};

/// Offsets of the fields.
mod field {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const WRITEBACK: usize = 32;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    pub(super) const END: usize = 60;
}

/// The configuration space, as the driver reads it.
#[derive(Debug, Clone)]
pub(super) struct ConfigSpace([u8; field::END]);

impl ConfigSpace {
    /// Creates that of a disk of `capacity` bytes with `queues` queues and at most `seg_max` data buffers in a request.
    pub(super) fn new(capacity: u64, queues: u16, seg_max: u32) -> Self {
        let mut config = Self([0; field::END]);
        config.set_capacity(capacity);
        config.put(field::SEG_MAX, &seg_max.to_le_bytes());
        config.put(field::BLK_SIZE, &512_u32.to_le_bytes());
        config.put(field::WRITEBACK, &[1]);
        config.put(field::NUM_QUEUES, &queues.to_le_bytes());
        config.put(field::MAX_DISCARD_SECTORS, &MAX_DISCARD_SECTORS.to_le_bytes());
        config.put(field::MAX_DISCARD_SEG, &1_u32.to_le_bytes());
        config.put(field::DISCARD_SECTOR_ALIGNMENT, &1_u32.to_le_bytes());
        config.put(field::MAX_WRITE_ZEROES_SECTORS, &MAX_ZEROES_SECTORS.to_le_bytes());
        config.put(field::MAX_WRITE_ZEROES_SEG, &1_u32.to_le_bytes());
        config.put(field::WRITE_ZEROES_MAY_UNMAP, &[1]);
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Size of the disk in bytes.
    pub(super) fn capacity(&self) -> u64 {
        let sectors = self.0.first_chunk().map_or(0, |raw| u64::from_le_bytes(*raw));
        sectors.saturating_mul(SECTOR)
    }

    pub(super) fn set_capacity(&mut self, bytes: u64) {
        self.put(field::CAPACITY, &(bytes / SECTOR).to_le_bytes());
    }

    /// True if completed writes need not be durable before a flush.
    pub(super) fn is_writeback(&self) -> bool {
        self.0.get(field::WRITEBACK) == Some(&1)
    }

    pub(super) fn set_writeback(&mut self, on: bool) {
        self.put(field::WRITEBACK, &[u8::from(on)]);
    }

    /// Takes a write of the driver: only `writeback` is writable, with 0 or 1.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        let value = field::WRITEBACK.checked_sub(offset).and_then(|at| data.get(at));
        if let Some(value @ (0 | 1)) = value {
            self.set_writeback(*value == 1);
        }
    }
}
