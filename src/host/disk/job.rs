//! The system calls of one request: the next call, and the meaning of its outcome. The same for every engine.
//!
//! A call may be short; the rest follows. `O_DIRECT` requires aligned addresses and lengths: unaligned buffers go through a
//! bounded bounce buffer, and unaligned ranges of the disk through the page cache. Zeroes that the file system cannot make
//! (fallocate(2)) are written, a bounded piece at a time.
#![expect(unsafe_code, reason = "lists of buffers are made of addresses in guest RAM")]

use std::io;

use rustix::io::Errno;
use rvmm_devices::virtio::blk::{DiskOp, DiskRequest};
use rvmm_devices::virtio::{DmaMemory, Segment, pieces};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::engine::{Buffers, Call, CallKind};
use super::open::Files;

/// Limit of the bytes of one call: a reset waits for calls, not for requests, which may be as large as guest RAM.
const MOST_BYTES: u64 = 2 << 20;

/// Limit of the bytes of an iovec; larger buffers are split. A multiple of every alignment.
const MOST_PART: usize = 1 << 20;

/// Size of a bounce buffer. Every request in flight may have one.
const BOUNCE: u64 = 128 << 10;

/// Alignment of bounce buffers: a page, which is more than any disk needs.
const PAGE: usize = 4096;

/// Source of zeroes that are written.
static ZEROES: [u8; PAGE] = [0; PAGE];

/// Limit of the pages of zeroes in one call.
const ZERO_PAGES: u64 = 256;

/// Limit of retries after EINTR and EAGAIN.
const MOST_TRIES: u32 = 100;

/// A request and its progress.
pub(super) struct Job {
    stage: Stage,
    op: DiskOp,
    /// The rest of the range.
    offset: u64,
    left: u64,
    /// All buffers of the request in guest RAM, and the bytes of them that are done.
    data: Vec<Segment>,
    moved: u32,
    /// The rest of the buffers.
    iovecs: Vec<libc::iovec>,
    bounce: Vec<u8>,
    /// The call in flight uses the bounce buffer.
    is_bounced: bool,
    tries: u32,
    is_given_up: bool,
}

// SAFETY: the addresses in `iovecs` are those of guest RAM and of a static, which are the same in every thread; they are not
// dereferenced here.
unsafe impl Send for Job {}

/// The region of guest RAM that was looked up last: the buffers of a request are mostly in one.
#[derive(Default)]
struct Ram<'a> {
    region: Option<&'a GuestRegionMmap>,
}

impl<'a> Ram<'a> {
    /// Host virtual address of `len` bytes at `addr`; none if they are not all in one region.
    fn find(
        &mut self,
        memory: &'a GuestMemoryMmap,
        addr: GuestAddress,
        len: usize,
    ) -> Option<*mut u8> {
        let inside = |region: &GuestRegionMmap| {
            let offset = addr.0.checked_sub(region.start_addr().0)?;
            let end = offset.checked_add(len as u64)?;
            let offset = usize::try_from(offset).ok()?;
            (end <= region.len()).then(|| region.as_ptr().wrapping_add(offset))
        };
        if let Some(found) = self.region.and_then(inside) {
            return Some(found);
        }
        self.region = memory.find_region(addr);
        self.region.and_then(inside)
    }
}

/// The stage of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    Transfer,
    /// fallocate(2), FALLOC_FL_PUNCH_HOLE
    Punch,
    /// fallocate(2), FALLOC_FL_ZERO_RANGE
    ZeroRange,
    /// Zeroes are written.
    Zeroes,
    /// fdatasync(2) after a durable request.
    Sync,
}

/// The state of a request after an outcome.
#[derive(Debug)]
pub(super) enum Progress {
    /// There is another call to make.
    More,
    /// The request has ended.
    Done(io::Result<()>),
}

impl Job {
    pub(super) fn idle() -> Self {
        Self {
            stage: Stage::Idle,
            op: DiskOp::Flush,
            offset: 0,
            left: 0,
            data: Vec::new(),
            moved: 0,
            iovecs: Vec::new(),
            bounce: Vec::new(),
            is_bounced: false,
            tries: 0,
            is_given_up: false,
        }
    }

    /// Takes a request that is not a flush. False if its data is not all RAM, or if the previous one has not ended, whose call
    /// may be in flight.
    pub(super) fn begin(&mut self, request: &DiskRequest<'_>, memory: &dyn DmaMemory) -> bool {
        if !self.is_idle() {
            return false;
        }
        let DiskRequest { op, offset, len, data, .. } = *request;
        self.stage = match op {
            DiskOp::Read | DiskOp::Write { .. } => Stage::Transfer,
            DiskOp::Discard | DiskOp::WriteZeroes { may_unmap: true, .. } => Stage::Punch,
            DiskOp::WriteZeroes { may_unmap: false, .. } => Stage::ZeroRange,
            DiskOp::Flush => Stage::Sync,
        };
        (self.op, self.offset, self.left) = (op, offset, len);
        (self.moved, self.tries, self.is_given_up, self.is_bounced) = (0, 0, false, false);
        self.data.clear();
        self.data.extend_from_slice(data);
        self.iovecs.clear();
        let mut ram = Ram::default();
        for Segment { addr, len } in data {
            let len = *len as usize;
            let Some(first) = ram.find(memory.view(), *addr, len) else {
                self.stage = Stage::Idle;
                return false;
            };
            for from in (0..len).step_by(MOST_PART) {
                let iov_base = first.wrapping_add(from).cast();
                self.iovecs.push(libc::iovec { iov_base, iov_len: MOST_PART.min(len - from) });
            }
        }
        true
    }

    pub(super) fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }

    pub(super) fn end(&mut self) {
        self.stage = Stage::Idle;
        // Freed: it is large and rarely needed.
        self.bounce = Vec::new();
    }

    pub(super) fn give_up(&mut self) {
        self.is_given_up = true;
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.is_given_up
    }

    /// Name of the operation, for the log.
    pub(super) fn verb(&self) -> &'static str {
        match self.op {
            DiskOp::Read => "read",
            DiskOp::Write { .. } => "write",
            DiskOp::Flush => "flush",
            DiskOp::Discard | DiskOp::WriteZeroes { .. } => "clear",
        }
    }

    /// The range that is not done yet.
    pub(super) fn range(&self) -> (u64, u64) {
        (self.offset, self.left)
    }

    fn is_durable(&self) -> bool {
        matches!(
            self.op,
            DiskOp::Write { is_durable: true } | DiskOp::WriteZeroes { is_durable: true, .. }
        )
    }

    /// The next call. Its buffers stay valid until its outcome is passed to [`advance`](Self::advance).
    pub(super) fn next(&mut self, files: &Files, memory: &dyn DmaMemory) -> Call {
        let keep_size = libc::FALLOC_FL_KEEP_SIZE;
        let call = |kind, fd| Call { kind, fd, offset: self.offset, len: self.left };
        match self.stage {
            Stage::Transfer => self.transfer(files, memory),
            Stage::Zeroes => self.zeroes(files),
            Stage::Punch => call(
                CallKind::Allocate { mode: libc::FALLOC_FL_PUNCH_HOLE | keep_size },
                files.main(),
            ),
            Stage::ZeroRange => call(
                CallKind::Allocate { mode: libc::FALLOC_FL_ZERO_RANGE | keep_size },
                files.main(),
            ),
            Stage::Sync | Stage::Idle => call(CallKind::Sync, files.main()),
        }
    }

    fn transfer(&mut self, files: &Files, memory: &dyn DmaMemory) -> Call {
        let (parts, mut len) = self.first_parts();
        let mut fd = files.main();
        self.is_bounced = false;
        if let Some(align) = files.direct() {
            let fits = |part: &libc::iovec| align.fits(part.iov_base.addr(), part.iov_len);
            if !self.offset.is_multiple_of(align.offset) || !self.left.is_multiple_of(align.offset)
            {
                fd = files.buffered();
            } else if !len.is_multiple_of(align.offset) || !self.iovecs.iter().take(parts).all(fits)
            {
                len = self.left.min(BOUNCE);
                self.fill_bounce(len, memory);
            }
        }
        let buffers = if self.is_bounced { self.bounced(len) } else { self.first(parts) };
        let kind = match self.op {
            DiskOp::Read => CallKind::Read(buffers),
            _ => CallKind::Write { from: buffers, is_durable: self.is_durable() },
        };
        Call { kind, fd, offset: self.offset, len }
    }

    /// Number of buffers of the list for the next call, and their bytes.
    fn first_parts(&self) -> (usize, u64) {
        let (mut parts, mut bytes) = (0, 0);
        for part in &self.iovecs {
            let more = bytes + part.iov_len as u64;
            if more > MOST_BYTES {
                break;
            }
            (parts, bytes) = (parts + 1, more);
        }
        (parts, bytes)
    }

    fn first(&self, parts: usize) -> Buffers {
        Buffers { first: self.iovecs.as_ptr(), count: u32::try_from(parts).unwrap_or(0) }
    }

    /// The bounce buffer, inserted at the start of the list until the outcome is known.
    fn bounced(&mut self, len: u64) -> Buffers {
        let iov_base = self.bounce_part(len).as_mut_ptr().cast();
        let iov_len = usize::try_from(len).unwrap_or(0);
        self.iovecs.insert(0, libc::iovec { iov_base, iov_len });
        self.first(1)
    }

    /// The first `len` aligned bytes of the bounce buffer.
    fn bounce_part(&mut self, len: u64) -> &mut [u8] {
        let from = self.bounce.as_ptr().align_offset(PAGE);
        let end = usize::try_from(len).map_or(from, |len| from.saturating_add(len));
        self.bounce.get_mut(from..end).unwrap_or_default()
    }

    fn fill_bounce(&mut self, len: u64, memory: &dyn DmaMemory) {
        self.is_bounced = true;
        let room = usize::try_from(len.min(BOUNCE)).unwrap_or(0) + PAGE;
        if self.bounce.len() < room {
            self.bounce = vec![0; room];
        }
        if self.op != DiskOp::Read {
            self.copy(len, memory);
        }
    }

    /// Copies `len` bytes between the bounce buffer and the next bytes in guest RAM, in the direction of the request.
    fn copy(&mut self, len: u64, memory: &dyn DmaMemory) {
        let data = std::mem::take(&mut self.data);
        let (moved, is_read) = (self.moved, self.op == DiskOp::Read);
        let mut rest = self.bounce_part(len);
        for piece in pieces(&data, moved, rest.len()) {
            let Some((part, after)) = rest.split_at_mut_checked(piece.len as usize) else { break };
            // `begin` has checked that it is all RAM, and RAM is never removed.
            let _ = match is_read {
                true => memory.view().write_slice(part, piece.addr),
                false => memory.view().read_slice(part, piece.addr),
            };
            rest = after;
        }
        self.data = data;
    }

    fn zeroes(&mut self, files: &Files) -> Call {
        let len = self.left.min(ZERO_PAGES * PAGE as u64);
        self.iovecs.clear();
        let mut left = usize::try_from(len).unwrap_or(0);
        while left > 0 {
            let iov_len = left.min(PAGE);
            // Only the source of writes.
            let iov_base = ZEROES.as_ptr().cast_mut().cast();
            self.iovecs.push(libc::iovec { iov_base, iov_len });
            left -= iov_len;
        }
        let kind =
            CallKind::Write { from: self.first(self.iovecs.len()), is_durable: self.is_durable() };
        Call { kind, fd: files.buffered(), offset: self.offset, len }
    }

    /// Takes the outcome of the last call.
    pub(super) fn advance(&mut self, result: io::Result<u32>, memory: &dyn DmaMemory) -> Progress {
        if self.is_bounced {
            self.iovecs.remove(0);
        }
        match result {
            Ok(moved) => self.moved(moved.into(), memory),
            Err(error) => self.failed(error),
        }
    }

    fn moved(&mut self, moved: u64, memory: &dyn DmaMemory) -> Progress {
        match self.stage {
            Stage::Transfer | Stage::Zeroes => {}
            Stage::Punch | Stage::ZeroRange if self.is_durable() => {
                self.stage = Stage::Sync;
                return Progress::More;
            }
            _ => return Progress::Done(Ok(())),
        }
        let moved = moved.min(self.left);
        if moved == 0 {
            let kind = match self.op {
                DiskOp::Read => io::ErrorKind::UnexpectedEof,
                _ => io::ErrorKind::WriteZero,
            };
            return Progress::Done(Err(kind.into()));
        }
        if self.is_bounced && self.op == DiskOp::Read {
            self.copy(moved, memory);
        }
        self.skip(usize::try_from(moved).unwrap_or(usize::MAX));
        self.moved = self.moved.saturating_add(u32::try_from(moved).unwrap_or(u32::MAX));
        self.offset = self.offset.saturating_add(moved);
        self.left -= moved;
        if self.left == 0 { Progress::Done(Ok(())) } else { Progress::More }
    }

    fn failed(&mut self, error: io::Error) -> Progress {
        let errno = Errno::from_io_error(&error);
        if matches!(errno, Some(Errno::INTR | Errno::AGAIN)) && self.tries < MOST_TRIES {
            self.tries += 1;
            return Progress::More;
        }
        let is_unsupported =
            matches!(errno, Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV));
        self.stage = match self.stage {
            // A discard is advice.
            Stage::Punch if is_unsupported && self.op == DiskOp::Discard => {
                return Progress::Done(Ok(()));
            }
            Stage::Punch if is_unsupported => Stage::ZeroRange,
            Stage::ZeroRange if is_unsupported => Stage::Zeroes,
            _ => return Progress::Done(Err(error)),
        };
        Progress::More
    }

    /// Removes the first `bytes` from the list of buffers.
    fn skip(&mut self, mut bytes: usize) {
        let mut whole = 0;
        for part in &mut self.iovecs {
            if bytes < part.iov_len {
                part.iov_base = part.iov_base.wrapping_byte_add(bytes);
                part.iov_len -= bytes;
                break;
            }
            bytes -= part.iov_len;
            whole += 1;
        }
        self.iovecs.drain(..whole);
    }
}
