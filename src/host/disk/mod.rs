//! Disks in files and block devices: raw bytes, or qcow2 images.
//!
//! | file | content |
//! |---|---|
//! | `open.rs` | checks and opens the file of a path |
//! | `lock.rs` | locks: one writer or many readers, also among other programs |
//! | `job.rs` | the system calls of one request |
//! | `flush.rs` | flushes, several at once |
//! | `engine.rs` | interface of the engines, which make system calls asynchronously |
//! | `uring.rs`, `worker.rs` | the engines: io_uring, and a thread |
//! | `qcow2/` | images, accessed on the thread |
//!
//! Guest RAM is passed to the kernel by address. The disk keeps it mapped, and waits for every call before it releases it.
//! The size is read again at every flush, and when a read ends early: that is how a file that was extended becomes a larger
//! disk.
#![expect(unsafe_code, reason = "buffers are handed to the engine by address")]

use std::os::fd::RawFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use log::{info, warn};
use rvmm_devices::HostError;
use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::blk::{
    DiskBackend, DiskCache, DiskDone, DiskFormat, DiskOp, DiskPlan, DiskRequest,
};

mod engine;
mod flush;
mod job;
mod lock;
mod open;
mod qcow2;
mod uring;
mod worker;

#[cfg(test)]
mod tests;

use engine::{Call, CallKind, Engine, Outcome};
use flush::Flushes;
use job::{Job, Progress};
pub(super) use lock::DiskLock;
use open::{Files, whole_sectors};
use qcow2::Image;
pub(crate) use qcow2::{create_overlay, disk_size};
use worker::Worker;

/// ID of the flush, which is no slot number.
const SYNC: u32 = u32::MAX;

/// ID of the write-back of an image's tables, which is no slot number either.
const WRITE_BACK: u32 = u32::MAX - 1;

/// Limit of the bytes between two polls that are copied in this thread, if the disk is in memory; the rest is left to the
/// engine, however large the guest's requests are.
const INLINE: u64 = 4 << 20;

/// Limit of rounds of follow-up calls in one poll, so that other devices get their turn.
const MOST_ROUNDS: u32 = 4;

/// An open disk.
///
/// Fields are dropped in this order: no call is in flight when files and memory are released.
pub(super) struct Disk {
    engine: Box<dyn Engine>,
    /// By slot.
    jobs: Vec<Job>,
    flushes: Flushes,
    done: Vec<DiskDone>,
    /// Slots given up while a call was in flight, whose end is to be reported.
    abandoned: Vec<u32>,
    /// Outcomes of calls that were made in this thread.
    outcomes: Vec<Outcome>,
    /// The outcome of a write-back.
    written_back: Option<std::io::Result<()>>,
    /// Bytes of them since the last poll; none if the disk is not in memory.
    inline: Option<u64>,
    has_pushed: bool,
    has_warned: bool,
    size: u64,
    /// The file's size is the disk's.
    is_raw: bool,
    is_unsafe: bool,
    name: String,
    files: Files,
    memory: Arc<dyn DmaMemory>,
}

/// Opens a disk, with io_uring if the kernel has it.
pub(super) fn open(plan: &DiskPlan, memory: Arc<dyn DmaMemory>) -> Result<Disk, HostError> {
    if plan.format != DiskFormat::Raw {
        return Disk::open_image(plan, memory);
    }
    Disk::open(plan, memory, engine::choose(plan)?)
}

impl Disk {
    fn open(
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
        engine: Box<dyn Engine>,
    ) -> Result<Self, HostError> {
        let files = Files::open(plan)?;
        let size = files.first_size(&plan.path)?;
        // io_uring would pass each call to one of its workers: tmpfs does not set FMODE_NOWAIT.
        let inline = files.is_in_memory().then_some(0);
        let mut disk = Self::new(plan, memory, engine, files, size);
        disk.inline = inline;
        Ok(disk)
    }

    fn open_image(plan: &DiskPlan, memory: Arc<dyn DmaMemory>) -> Result<Self, HostError> {
        let mut files = Files::open(plan)?;
        let image = Image::open(plan, &files)?;
        let size = image.size();
        // The image respects the alignment.
        files.forget_direct();
        let engine = Worker::with(image).map_err(|source| engine::no_thread(plan, source))?;
        let mut disk = Self::new(plan, memory, Box::new(engine), files, size);
        disk.is_raw = false;
        Ok(disk)
    }

    fn new(
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
        engine: Box<dyn Engine>,
        files: Files,
        size: u64,
    ) -> Self {
        info!("Disk {}: {size} bytes, through {}", plan.path, engine.name());
        Self {
            engine,
            jobs: Vec::new(),
            flushes: Flushes::default(),
            done: Vec::new(),
            abandoned: Vec::new(),
            outcomes: Vec::new(),
            written_back: None,
            inline: None,
            has_pushed: false,
            has_warned: false,
            size,
            is_raw: true,
            is_unsafe: plan.cache == DiskCache::Unsafe,
            name: plan.path.to_string(),
            files,
            memory,
        }
    }

    /// The lock of its file, as long as the disk is open. Files below an image are only read, and stay locked for that.
    pub(super) fn lock(&self) -> Weak<DiskLock> {
        self.files.lock()
    }

    fn update_size(&mut self) {
        if !self.is_raw {
            return;
        }
        let now = self.files.bytes().map(whole_sectors).unwrap_or(self.size);
        if now != self.size && now > 0 {
            info!("Disk {} now has {now} bytes", self.name);
            self.size = now;
        }
    }

    fn push(&mut self, id: u32, call: Call) {
        // SAFETY: the files are closed and the memory is released after the engine, whose calls `Drop` waits for; a job does not
        // change its list of buffers before it gets the outcome.
        unsafe { self.engine.push(id, call) };
        self.has_pushed = true;
    }

    /// Makes the first call of a request in this thread, if it is a copy in memory; else pushes it. `reap` takes the outcome,
    /// and follow-up calls go to the engine.
    fn push_first(&mut self, id: u32, call: Call) {
        let is_copy = !matches!(call.kind, CallKind::Allocate { .. });
        let bytes = self.inline.filter(|_| is_copy).map(|bytes| bytes.saturating_add(call.len));
        let Some(bytes) = bytes.filter(|bytes| *bytes <= INLINE) else {
            return self.push(id, call);
        };
        self.inline = Some(bytes);
        // SAFETY: the files are open and the memory is held while this runs, and the job waits for its outcome.
        self.outcomes.push((id, unsafe { worker::execute(call) }));
    }

    fn push_next(&mut self, slot: u32) {
        let Some(job) = self.jobs.get_mut(slot as usize) else { return };
        let call = job.next(&self.files, self.memory.as_ref());
        self.push(slot, call);
    }

    fn start_flush(&mut self) -> Call {
        self.flushes.begin();
        Call { kind: CallKind::Sync, fd: self.files.main(), offset: 0, len: 0 }
    }

    /// Takes the outcomes that are available, and continues or completes their requests.
    fn reap(&mut self) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        self.engine.reap(&mut outcomes);
        for (id, result) in outcomes.drain(..) {
            match id {
                SYNC => self.flushed(result),
                WRITE_BACK => self.written_back = Some(result.map(|_| ())),
                slot => self.advance(slot, result),
            }
        }
        self.outcomes = outcomes;
    }

    fn advance(&mut self, slot: u32, result: std::io::Result<u32>) {
        let Some(job) = self.jobs.get_mut(slot as usize) else { return };
        if job.is_given_up() {
            job.end();
            if let Some(at) = self.abandoned.iter().position(|abandoned| *abandoned == slot) {
                self.abandoned.swap_remove(at);
                self.done.push(DiskDone { slot, is_ok: false });
            }
            return;
        }
        match job.advance(result, self.memory.as_ref()) {
            Progress::More => self.push_next(slot),
            Progress::Done(result) => {
                let (verb, (offset, left)) = (job.verb(), job.range());
                job.end();
                if let Err(error) = &result {
                    self.complain(&format!("{verb} {left} bytes at {offset} of"), error);
                    self.update_size();
                }
                self.done.push(DiskDone { slot, is_ok: result.is_ok() });
            }
        }
    }

    fn flushed(&mut self, result: std::io::Result<u32>) {
        if let (Err(error), true) = (&result, self.flushes.serves()) {
            self.complain("flush", error);
        }
        if self.flushes.end(result.is_ok(), &mut self.done) {
            let call = self.start_flush();
            self.push(SYNC, call);
        }
    }

    /// Logs the first error only: a guest that continues after errors does not fill the log.
    fn complain(&mut self, what: &str, error: &std::io::Error) {
        if !std::mem::replace(&mut self.has_warned, true) {
            let name = &self.name;
            warn!(
                "Cannot {what} disk {name}: {error} (reported to the guest; further errors are not logged)"
            );
        }
    }

    /// Gives requests up and waits for those with a call in flight, at most for `patience` if it is given. Returns those still
    /// in flight.
    fn give_up(&mut self, slots: &[u32], patience: Option<Duration>) -> Vec<u32> {
        let start = Instant::now();
        let is_meant = |slot: &u32| slots.contains(slot);
        self.flushes.forget(slots);
        for slot in slots {
            let Some(job) = self.jobs.get_mut(*slot as usize) else { continue };
            job.give_up();
            if !job.is_idle() && self.engine.withdraw(*slot) {
                job.end();
            }
        }
        let is_busy =
            |jobs: &[Job], slot: &u32| jobs.get(*slot as usize).is_some_and(|job| !job.is_idle());
        while slots.iter().any(|slot| is_busy(&self.jobs, slot)) {
            let left = patience.map(|patience| patience.saturating_sub(start.elapsed()));
            if self.outcomes.is_empty() {
                self.engine.wait(left);
            }
            self.reap();
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
        }
        self.done.retain(|done| !is_meant(&done.slot));
        slots.iter().copied().filter(|slot| is_busy(&self.jobs, slot)).collect()
    }
}

impl DiskBackend for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn file_name(&self) -> &[u8] {
        self.files.name()
    }

    fn start(&mut self, mut request: DiskRequest<'_>) {
        let slot = request.slot;
        if self.is_unsafe {
            request.op = match request.op {
                DiskOp::Write { .. } => DiskOp::Write { is_durable: false },
                DiskOp::WriteZeroes { may_unmap, .. } => {
                    DiskOp::WriteZeroes { may_unmap, is_durable: false }
                }
                other => other,
            };
        }
        if request.op == DiskOp::Flush {
            self.update_size();
            if self.is_unsafe {
                self.done.push(DiskDone { slot, is_ok: true });
                return;
            }
            if self.flushes.add(slot) {
                let call = self.start_flush();
                self.push_first(SYNC, call);
            }
            return;
        }
        let index = slot as usize;
        while self.jobs.len() <= index {
            self.jobs.push(Job::idle());
        }
        let memory = self.memory.as_ref();
        let job = self.jobs.get_mut(index);
        let call =
            job.and_then(|job| job.begin(&request, memory).then(|| job.next(&self.files, memory)));
        if let Some(call) = call {
            self.push_first(slot, call);
        } else {
            self.done.push(DiskDone { slot, is_ok: false });
        }
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        self.inline = self.inline.map(|_| 0);
        // Also retries calls for which the ring had no room.
        self.engine.submit();
        for _ in 0..MOST_ROUNDS {
            self.has_pushed = false;
            self.reap();
            if !self.has_pushed {
                break;
            }
            self.engine.submit();
        }
        done.append(&mut self.done);
    }

    fn is_behind(&self) -> bool {
        self.engine.is_behind()
    }

    fn drain(&mut self, slots: &[u32]) {
        self.give_up(slots, None);
        // Other requests may have pushed follow-up calls.
        self.engine.submit();
    }

    fn abandon(&mut self, slots: &[u32], patience: Duration) -> Vec<u32> {
        let left = self.give_up(slots, Some(patience));
        self.abandoned.extend_from_slice(&left);
        self.engine.submit();
        left
    }

    fn write_back(&mut self) -> std::io::Result<()> {
        if self.is_raw {
            return Ok(());
        }
        self.push(
            WRITE_BACK,
            Call { kind: CallKind::WriteBack, fd: self.files.main(), offset: 0, len: 0 },
        );
        loop {
            self.engine.wait(None);
            self.reap();
            if let Some(result) = self.written_back.take() {
                return result;
            }
        }
    }

    fn fd(&self) -> RawFd {
        self.engine.fd()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let slots: Vec<u32> = (0..).zip(&self.jobs).map(|(slot, _)| slot).collect();
        self.give_up(&slots, None);
    }
}
