//! A request of the driver, taken apart and judged before anything is done (virtio 1.3, section 5.2.6).
//!
//! The header is copied once and may lie in any number of buffers; the status is the last byte that the device may write;
//! what is between them is data. Left out: secure erase, lifetime and zones, whose features are not offered.

use crate::virtio::Chain;

use super::backend::DiskOp;
use vm_memory::GuestMemoryMmap;

/// Bytes of a sector, in which the protocol counts whatever the disk's blocks are.
pub(super) const SECTOR: u64 = 512;

/// Bytes of the header: type, a reserved word, sector.
pub(super) const HEADER: u32 = 16;

/// Bytes of the identity that GET_ID asks for.
pub(super) const ID_BYTES: usize = 20;

/// Sectors that one DISCARD may name: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Sectors that one WRITE_ZEROES may name: 16 MiB, because the host may have to write them.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 15;

/// Bytes of a DISCARD's or WRITE_ZEROES' segment: sector, number of sectors, flags.
const SEGMENT: u32 = 16;

mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The bit of a segment's flags: the host may give the space back.
const UNMAP: u32 = 1;

/// The byte that ends every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// What a request is judged against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of the disk.
    pub(super) capacity: u64,
    pub(super) is_read_only: bool,
    /// Writes are done when they are durable.
    pub(super) is_write_through: bool,
}

/// What is to be done about a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There is no room for a status: the chain goes back as it came.
    Refuse,
    /// It is answered at once.
    Answer(Status),
    /// It asks for the disk's identity.
    Identity,
    /// The disk has to do something.
    Do { op: DiskOp, offset: u64, len: u64 },
}

/// The bytes that the device may write before the status.
pub(super) fn room(chain: &Chain) -> u32 {
    chain.writable_bytes().saturating_sub(1)
}

/// Judges a chain.
pub(super) fn judge(chain: &Chain, memory: &GuestMemoryMmap, limits: &Limits) -> Verdict {
    if chain.writable_bytes() == 0 {
        return Verdict::Refuse;
    }
    let mut header = [0; HEADER as usize];
    if chain.read_at(memory, 0, &mut header) != header.len() {
        return Verdict::Answer(Status::IoErr);
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    // The header was read, so there are that many bytes.
    let sent = chain.readable_bytes().saturating_sub(HEADER);
    let is_durable = limits.is_write_through;
    let verdict = match u32::from_le_bytes([k0, k1, k2, k3]) {
        kind::IN => transfer(DiskOp::Read, sector, room(chain), limits),
        kind::OUT if limits.is_read_only => Err(Status::IoErr),
        kind::OUT => transfer(DiskOp::Write { is_durable }, sector, sent, limits),
        kind::FLUSH => Ok(Verdict::Do { op: DiskOp::Flush, offset: 0, len: 0 }),
        kind::GET_ID => Ok(Verdict::Identity),
        kind::DISCARD | kind::WRITE_ZEROES if limits.is_read_only => Err(Status::IoErr),
        kind::DISCARD => segment(chain, memory, limits, MAX_DISCARD_SECTORS, |flags| {
            (flags == 0).then_some(DiskOp::Discard)
        }),
        kind::WRITE_ZEROES => segment(chain, memory, limits, MAX_ZEROES_SECTORS, |flags| {
            let op = DiskOp::WriteZeroes { may_unmap: flags & UNMAP != 0, is_durable };
            (flags & !UNMAP == 0).then_some(op)
        }),
        _ => Err(Status::Unsupp),
    };
    verdict.unwrap_or_else(Verdict::Answer)
}

fn transfer(op: DiskOp, sector: u64, len: u32, limits: &Limits) -> Result<Verdict, Status> {
    let len = u64::from(len);
    if !len.is_multiple_of(SECTOR) {
        return Err(Status::IoErr);
    }
    range(op, sector, len, limits)
}

/// The one segment of a DISCARD or WRITE_ZEROES; `op` says what its flags make of it.
fn segment(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    limits: &Limits,
    most: u32,
    op: impl Fn(u32) -> Option<DiskOp>,
) -> Result<Verdict, Status> {
    let mut raw = [0; SEGMENT as usize];
    let sent = chain.readable_bytes().saturating_sub(HEADER);
    if sent != SEGMENT || chain.read_at(memory, HEADER, &mut raw) != raw.len() {
        return Err(Status::IoErr);
    }
    let raw = u128::from_le_bytes(raw);
    // Truncations pick the fields out of the 16 bytes.
    #[expect(clippy::cast_possible_truncation, reason = "fields of a segment")]
    let (sector, count, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
    let op = op(flags).ok_or(Status::Unsupp)?;
    if count > most {
        return Err(Status::IoErr);
    }
    range(op, sector, u64::from(count) * SECTOR, limits)
}

fn range(op: DiskOp, sector: u64, len: u64, limits: &Limits) -> Result<Verdict, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
    let end = offset.checked_add(len).ok_or(Status::IoErr)?;
    if len == 0 || end > limits.capacity {
        return Err(Status::IoErr);
    }
    Ok(Verdict::Do { op, offset, len })
}
