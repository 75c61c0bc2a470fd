//! Parsing and validation of the driver's requests (virtio 1.3, section 5.2.6).
//!
//! The header is copied once and may be spread over any number of buffers; the status is the last byte that the device may write;
//! the data is between them. Left out: secure erase, lifetime and zones, whose features are not offered.

use crate::virtio::Chain;

use super::backend::DiskOp;
use vm_memory::GuestMemoryMmap;

/// Bytes of a sector, the unit of the protocol whatever the disk's block size is.
pub(super) const SECTOR: u64 = 512;

/// Bytes of the header: type, a reserved word, sector.
pub(super) const HEADER: u32 = 16;

/// Bytes of the serial number that GET_ID reads.
pub(super) const ID_BYTES: usize = 20;

/// Maximum number of sectors of one DISCARD: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Maximum number of sectors of one WRITE_ZEROES: 16 MiB, because the host may have to write them.
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

/// The `unmap` flag of a segment: the host may deallocate it.
const UNMAP: u32 = 1;

/// The byte that ends every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// The state of the device that a request is validated against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Size of the disk in bytes.
    pub(super) capacity: u64,
    pub(super) is_read_only: bool,
    /// Writes complete only when they are durable.
    pub(super) is_write_through: bool,
}

/// A parsed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Has no room for a status: the chain is returned unchanged.
    Refuse,
    /// Completes at once, with this status.
    Complete(Status),
    /// Reads the serial number.
    GetId,
    /// An operation for the backend.
    Disk { op: DiskOp, offset: u64, len: u64 },
}

/// Bytes that the device may write before the status.
pub(super) fn room(chain: &Chain) -> u32 {
    chain.writable_bytes().saturating_sub(1)
}

/// Parses and validates a chain.
pub(super) fn parse(chain: &Chain, memory: &GuestMemoryMmap, limits: &Limits) -> Request {
    if chain.writable_bytes() == 0 {
        return Request::Refuse;
    }
    let mut header = [0; HEADER as usize];
    if chain.read_at(memory, 0, &mut header) != header.len() {
        return Request::Complete(Status::IoErr);
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    // The header was read, so there are at least that many bytes.
    let sent = chain.readable_bytes().saturating_sub(HEADER);
    let is_durable = limits.is_write_through;
    let request = match u32::from_le_bytes([k0, k1, k2, k3]) {
        kind::IN => transfer(DiskOp::Read, sector, room(chain), limits),
        kind::OUT if limits.is_read_only => Err(Status::IoErr),
        kind::OUT => transfer(DiskOp::Write { is_durable }, sector, sent, limits),
        kind::FLUSH => Ok(Request::Disk { op: DiskOp::Flush, offset: 0, len: 0 }),
        kind::GET_ID => Ok(Request::GetId),
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
    request.unwrap_or_else(Request::Complete)
}

fn transfer(op: DiskOp, sector: u64, len: u32, limits: &Limits) -> Result<Request, Status> {
    let len = u64::from(len);
    if !len.is_multiple_of(SECTOR) {
        return Err(Status::IoErr);
    }
    range(op, sector, len, limits)
}

/// Parses the only segment of a DISCARD or WRITE_ZEROES; `op` maps its flags to an operation.
fn segment(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    limits: &Limits,
    most: u32,
    op: impl Fn(u32) -> Option<DiskOp>,
) -> Result<Request, Status> {
    let mut raw = [0; SEGMENT as usize];
    let sent = chain.readable_bytes().saturating_sub(HEADER);
    if sent != SEGMENT || chain.read_at(memory, HEADER, &mut raw) != raw.len() {
        return Err(Status::IoErr);
    }
    let raw = u128::from_le_bytes(raw);
    // The casts truncate to the fields of the 16 bytes.
    #[expect(clippy::cast_possible_truncation, reason = "fields of a segment")]
    let (sector, count, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
    let op = op(flags).ok_or(Status::Unsupp)?;
    if count > most {
        return Err(Status::IoErr);
    }
    range(op, sector, u64::from(count) * SECTOR, limits)
}

fn range(op: DiskOp, sector: u64, len: u64, limits: &Limits) -> Result<Request, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
    let end = offset.checked_add(len).ok_or(Status::IoErr)?;
    if len == 0 || end > limits.capacity {
        return Err(Status::IoErr);
    }
    Ok(Request::Disk { op, offset, len })
}
