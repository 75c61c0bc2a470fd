//! A disk in memory, for tests: it can be slow, fail, stop halfway, complete out of order, and change its size.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DiskBackend, DiskDone, DiskOp, DiskPlan, DiskRequest};
use crate::virtio::{DmaMemory, Segment};

/// A disk in memory. A clone is a handle to the same disk.
#[derive(Debug, Clone)]
pub struct MemoryDisk(Arc<Mutex<MemoryDiskState>>);

#[derive(Debug)]
struct MemoryDiskState {
    bytes: Vec<u8>,
    /// Operations wait until they are released.
    is_held: bool,
    /// Started operations cannot be abandoned.
    is_stuck: bool,
    /// Number of polls at which nothing is accepted.
    refusals: u32,
    is_behind: bool,
    /// Bytes of each operation that are moved before it fails.
    fails_after: Option<usize>,
    started: Vec<Started>,
    /// Released one by one.
    released: Vec<Started>,
    journal: Vec<String>,
    plan: Option<DiskPlan>,
    event: EventFd,
}

/// An operation in flight.
#[derive(Debug)]
struct Started {
    slot: u32,
    op: DiskOp,
    offset: u64,
    len: u64,
    data: Vec<Segment>,
}

/// The backend that a device gets.
struct End {
    disk: MemoryDisk,
    name: Vec<u8>,
    memory: Arc<dyn DmaMemory>,
    event: RawFd,
}

impl MemoryDisk {
    /// Creates a disk of `sectors` sectors of zeroes.
    ///
    /// # Errors
    /// The system has no event descriptors left.
    pub fn new(sectors: usize) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(MemoryDiskState {
            bytes: vec![0; sectors * 512],
            is_held: false,
            is_stuck: false,
            refusals: 0,
            is_behind: false,
            fails_after: None,
            started: Vec::new(),
            released: Vec::new(),
            journal: Vec::new(),
            plan: None,
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))))
    }

    fn state(&self) -> MutexGuard<'_, MemoryDiskState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The contents of the disk.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Changes the contents and the size of the disk.
    pub fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.state().bytes);
    }

    /// Takes the operations since the last call, in order: `write 512+1024`, `flush`, `drain [0, 1]`.
    #[must_use]
    pub fn journal(&self) -> Vec<String> {
        std::mem::take(&mut self.state().journal)
    }

    /// The parameters with which it was opened.
    #[must_use]
    pub fn plan(&self) -> Option<DiskPlan> {
        self.state().plan.clone()
    }

    /// Makes operations wait for [`release`](Self::release).
    pub fn hold(&self) {
        self.state().is_held = true;
    }

    /// Makes operations wait for [`release`](Self::release); until then they cannot be abandoned.
    pub fn get_stuck(&self) {
        let mut state = self.state();
        (state.is_held, state.is_stuck) = (true, true);
    }

    /// Accepts nothing at the next `polls` polls, and signals no event afterwards.
    pub fn refuse(&self, polls: u32) {
        self.state().refusals = polls;
    }

    /// Releases all operations, and holds no further ones.
    pub fn release(&self) {
        {
            let mut state = self.state();
            (state.is_held, state.is_stuck) = (false, false);
        }
        self.announce();
    }

    /// Releases the `index`th of the waiting operations; false if there are fewer.
    pub fn release_one(&self, index: usize) -> bool {
        let mut state = self.state();
        let is_there = index < state.started.len();
        if is_there {
            let started = state.started.remove(index);
            state.released.push(started);
        }
        drop(state);
        self.announce();
        is_there
    }

    /// Number of waiting operations.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.state().started.len()
    }

    /// Makes every operation fail after this many bytes; `None` ends that.
    pub fn fail_after(&self, bytes: Option<usize>) {
        self.state().fails_after = bytes;
    }

    /// Opens a backend, which accesses guest RAM through `memory`.
    #[must_use]
    pub fn open(&self, plan: &DiskPlan, memory: Arc<dyn DmaMemory>) -> Box<dyn DiskBackend> {
        let mut state = self.state();
        state.plan = Some(plan.clone());
        let name = plan.path.as_bytes().to_vec();
        Box::new(End { disk: self.clone(), name, memory, event: state.event.as_raw_fd() })
    }

    fn announce(&self) {
        // An error means that it is readable already.
        let _ = self.state().event.write(1);
    }
}

impl MemoryDiskState {
    /// Performs an operation; true if all of it was done.
    fn perform(&mut self, started: &Started, memory: &dyn DmaMemory) -> bool {
        let Started { op, offset, len, data, .. } = started;
        let name = match op {
            DiskOp::Read => "read",
            DiskOp::Write { is_durable: false } => "write",
            DiskOp::Write { is_durable: true } => "durable write",
            DiskOp::Flush => "flush",
            DiskOp::Discard => "discard",
            DiskOp::WriteZeroes { may_unmap: false, .. } => "zero",
            DiskOp::WriteZeroes { may_unmap: true, .. } => "unmap",
        };
        self.journal.push(match op {
            DiskOp::Flush => name.into(),
            _ => format!("{name} {offset}+{len}"),
        });
        let mut left = self.fails_after.unwrap_or(usize::MAX);
        let mut at = usize::try_from(*offset).unwrap_or(usize::MAX);
        let zeroes = usize::try_from(*len).unwrap_or(usize::MAX).min(left);
        if matches!(op, DiskOp::Discard | DiskOp::WriteZeroes { .. }) {
            let end = at.saturating_add(zeroes);
            self.bytes.get_mut(at..end).unwrap_or_default().fill(0);
        }
        for Segment { addr, len } in data {
            let part = usize::try_from(*len).unwrap_or(usize::MAX).min(left);
            let Some(bytes) = self.bytes.get_mut(at..at.saturating_add(part)) else { return false };
            let moved = match op {
                DiskOp::Read => memory.view().write_slice(bytes, *addr),
                _ => memory.view().read_slice(bytes, *addr),
            };
            if moved.is_err() {
                return false;
            }
            at += part;
            left -= part;
        }
        self.fails_after.is_none()
    }
}

impl DiskBackend for End {
    fn size(&self) -> u64 {
        self.disk.state().bytes.len() as u64
    }

    fn file_name(&self) -> &[u8] {
        &self.name
    }

    fn start(&mut self, request: DiskRequest<'_>) {
        let DiskRequest { slot, op, offset, len, data } = request;
        self.disk.state().started.push(Started { slot, op, offset, len, data: data.to_vec() });
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        let mut state = self.disk.state();
        // Fails if nothing was signalled.
        let _ = state.event.read();
        state.is_behind = state.refusals > 0 && !state.started.is_empty();
        if state.is_behind {
            state.refusals -= 1;
            return;
        }
        let mut ready = std::mem::take(&mut state.released);
        if !state.is_held {
            ready.append(&mut state.started);
        }
        for started in ready {
            let is_ok = state.perform(&started, self.memory.as_ref());
            done.push(DiskDone { slot: started.slot, is_ok });
        }
    }

    fn is_behind(&self) -> bool {
        self.disk.state().is_behind
    }

    fn drain(&mut self, slots: &[u32]) {
        let mut state = self.disk.state();
        state.journal.push(format!("drain {slots:?}"));
        state.started.retain(|started| !slots.contains(&started.slot));
        state.released.retain(|started| !slots.contains(&started.slot));
    }

    fn abandon(&mut self, slots: &[u32], _patience: Duration) -> Vec<u32> {
        if self.disk.state().is_stuck {
            let state = self.disk.state();
            state.started.iter().map(|s| s.slot).filter(|slot| slots.contains(slot)).collect()
        } else {
            self.drain(slots);
            Vec::new()
        }
    }

    fn fd(&self) -> RawFd {
        self.event
    }
}
