//! Block device (virtio 1.3, section 5.2): a disk in a file or block device of the host.
//!
//! The format is an option, raw by default, and never probed from the file, so a guest cannot change it by writing to its disk.
//! Requests go to a [`DiskBackend`] and complete in any order; their number in flight is bounded. Left out: legacy geometry, secure
//! erase, lifetime, zones.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::bucket::Limiter;
use super::{Chain, DeviceType, DmaMemory, Segment, VirtioDevice, VirtioError, Work, pieces};
use crate::catalog::{BuildError, Built, Device, Model, Placement, Wiring};
use crate::config::{FilePath, ModelConfig, Slot};
use crate::device::{Interest, Source};
use crate::options::OptionError;

mod backend;
mod config;
mod feature;
mod lifecycle;
mod request;
mod settings;
pub mod testing;

pub use backend::{DiskBackend, DiskCache, DiskDone, DiskFormat, DiskOp, DiskPlan, DiskRequest};

use config::ConfigSpace;
use request::{HEADER, ID_BYTES, Limits, Request, Status, parse, room};
use settings::derived_id;
pub use settings::{BlkConfig, DiskQueues, DiskSerial, ImageFormat, RequestRate};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "blk",
    summary: "virtio block device: a disk in a file or block device",
    keys: settings::KEYS,
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// Entries of each queue: a mebibyte of scattered pages fits into one request.
const QUEUE_SIZE: u16 = 512;
/// Maximum number of data buffers in a request: header and status take two descriptors.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Maximum number of requests in the backend, of all queues together.
const MAX_IN_FLIGHT: u32 = 256;

/// Delay before a backend that did not accept everything is polled poll_timer.
const POLL_DELAY: Duration = Duration::from_millis(1);
/// The shortest time that a timer accepts.
const NOW: Duration = Duration::from_nanos(1);

const TOKEN_LIMIT: u32 = 0;
const TOKEN_DISK: u32 = 1;
const TOKEN_POLL: u32 = 2;

/// A disk.
struct Blk {
    // Constant.
    queue_sizes: Box<[u16]>,
    features: u64,
    is_read_only: bool,
    id: [u8; ID_BYTES],
    /// The user has set the serial number.
    has_chosen_id: bool,

    // Host side.
    disk: Box<dyn DiskBackend>,
    memory: Arc<dyn DmaMemory>,
    limiter: Limiter,
    /// Makes the I/O thread poll the backend: after a hart has reset a queue, and when the backend is behind.
    poll_timer: TimerFd,
    /// Requests in the backend, by slot: never by the descriptor's head, which the driver chooses.
    in_flight: Box<[Option<InFlight>]>,
    free: Vec<u32>,
    /// Abandoned requests that the backend has not finished, with their slots.
    abandoned: Vec<(u32, InFlight)>,
    /// Requests wait in a queue because no slot was free.
    is_starved: bool,
    /// Buffers, kept to reuse their allocations.
    done: Vec<DiskDone>,
    data: Vec<Segment>,

    // Guest-visible.
    state: DriverView,
}

/// A request in the backend.
struct InFlight {
    chain: Chain,
    /// Bytes of the chain's writable part that are filled on success, without the status.
    fills: u32,
}

impl InFlight {
    /// Notes what the backend may have written for a request that has not succeeded.
    fn note_written(&self, memory: &dyn DmaMemory) {
        self.chain.note_written(memory, 0, self.fills);
    }
}

/// State that the driver reads and writes.
struct DriverView {
    config: ConfigSpace,
    /// `VIRTIO_BLK_F_FLUSH` was negotiated.
    has_flush: bool,
}

impl ModelConfig for BlkConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        vec![&mut self.path]
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn check(&self) -> Result<(), OptionError> {
        self.check()
    }

    fn build(&self, wiring: Wiring) -> Built {
        let disk = wiring
            .host
            .disk(&self.plan(), Arc::clone(&wiring.memory))
            .map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
        let host = |what| move |source| BuildError::Host { model: MODEL.name, what, source };
        let (bytes, requests) = self.limits();
        let limiter = Limiter::new(bytes, requests).map_err(host("timer"))?;
        let poll_timer = TimerFd::new().map_err(|error| host("timer")(error.into()))?;
        Ok(Device::Virtio(Box::new(Blk::new(self, disk, wiring.memory, limiter, poll_timer))))
    }
}

impl Blk {
    fn new(
        user: &BlkConfig,
        disk: Box<dyn DiskBackend>,
        memory: Arc<dyn DmaMemory>,
        limiter: Limiter,
        poll_timer: TimerFd,
    ) -> Self {
        let is_read_only = user.ro;
        let access = if is_read_only { feature::RO } else { feature::WRITABLE };
        let queues = if user.queues() > 1 { feature::MQ } else { 0 };
        let config = ConfigSpace::new(disk.size(), user.queues(), SEG_MAX);
        Self {
            queue_sizes: vec![QUEUE_SIZE; user.queues().into()].into(),
            features: feature::ALWAYS | access | queues,
            is_read_only,
            has_chosen_id: user.serial.is_some(),
            id: user.id().unwrap_or_else(|| derived_id(disk.file_name())),
            disk,
            memory,
            limiter,
            poll_timer,
            in_flight: (0..MAX_IN_FLIGHT).map(|_| None).collect(),
            // The lowest slot is taken first.
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            abandoned: Vec::new(),
            is_starved: false,
            done: Vec::new(),
            data: Vec::new(),
            state: DriverView { config, has_flush: false },
        }
    }

    /// Takes the requests of a queue, as far as limits and slots allow.
    fn serve(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while !self.limiter.is_waiting() {
            let Some(slot) = self.free.last().copied() else {
                self.is_starved = true;
                break;
            };
            let Some(chain) = work.pop(queue)? else { break };
            let limits = Limits {
                capacity: self.state.config.capacity(),
                is_read_only: self.is_read_only,
                is_write_through: !self.state.has_flush || !self.state.config.is_writeback(),
            };
            match parse(&chain, work.memory(), &limits) {
                Request::Refuse => work.refuse(chain),
                Request::Complete(status) => complete(chain, status, 0, work),
                Request::GetId => {
                    let id = self.id.get(..room(&chain) as usize).unwrap_or(&self.id);
                    let filled = chain.write_at(work.memory(), 0, id);
                    let filled = u32::try_from(filled).unwrap_or(0);
                    complete(chain, Status::Ok, filled, work);
                }
                Request::Disk { op, offset, len } => {
                    let bytes =
                        if matches!(op, DiskOp::Read | DiskOp::Write { .. }) { len } else { 0 };
                    if self.limiter.allows(bytes) {
                        self.start(slot, chain, (op, offset, len));
                    } else {
                        work.put_back(chain);
                    }
                }
            }
        }
        Ok(())
    }

    fn serve_all(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.is_starved = false;
        let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX);
        (0..queues).try_for_each(|queue| self.serve(queue, work))
    }

    /// Starts a request in the backend; `slot` is the next free one.
    fn start(&mut self, slot: u32, chain: Chain, (op, offset, len): (DiskOp, u64, u64)) {
        self.data.clear();
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let mut fills = 0;
        match op {
            DiskOp::Read => {
                self.data.extend(pieces(chain.writable(), 0, bytes));
                fills = room(&chain);
            }
            DiskOp::Write { .. } => self.data.extend(pieces(chain.readable(), HEADER, bytes)),
            DiskOp::Flush | DiskOp::Discard | DiskOp::WriteZeroes { .. } => {}
        }
        self.free.pop();
        if let Some(place) = self.in_flight.get_mut(slot as usize) {
            *place = Some(InFlight { chain, fills });
        }
        self.disk.start(DiskRequest { slot, op, offset, len, data: &self.data });
    }

    /// Starts and completes requests, until there is nothing more to do now.
    fn run(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        loop {
            self.collect(work);
            if !self.is_starved || self.free.is_empty() || self.limiter.is_waiting() {
                return Ok(());
            }
            self.serve_all(work)?;
        }
    }

    /// Completes the requests that the backend has finished.
    fn collect(&mut self, work: &mut Work<'_>) {
        let mut done = std::mem::take(&mut self.done);
        self.disk.poll(&mut done);
        for DiskDone { slot, is_ok } in done.drain(..) {
            let Some(request) = self.release(slot) else {
                self.free_abandoned(slot);
                continue;
            };
            if is_ok {
                complete(request.chain, Status::Ok, request.fills, work);
            } else {
                request.note_written(self.memory.as_ref());
                complete(request.chain, Status::IoErr, 0, work);
            }
        }
        self.done = done;
        if self.disk.is_behind() {
            self.poll_after(POLL_DELAY);
        }
        let size = self.disk.size();
        if size != self.state.config.capacity() {
            self.state.config.set_capacity(size);
            work.config_changed();
        }
    }

    fn poll_after(&mut self, after: Duration) {
        // The kernel accepts every valid time.
        let _ = self.poll_timer.reset(after, None);
    }

    fn release(&mut self, slot: u32) -> Option<InFlight> {
        let request = self.in_flight.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(request)
    }

    /// Frees the slot of an abandoned request that the backend has finished.
    fn free_abandoned(&mut self, slot: u32) {
        if let Some(at) = self.abandoned.iter().position(|(abandoned, _)| *abandoned == slot) {
            self.abandoned.swap_remove(at).1.note_written(self.memory.as_ref());
            self.free.push(slot);
        }
    }

    /// Abandons the requests in flight whose chains are selected by `is_meant`, and waits for the backend for `limit` at most.
    fn abandon(&mut self, is_meant: impl Fn(&Chain) -> bool, limit: Duration) {
        let is_meant = |(slot, place): (u32, &Option<InFlight>)| {
            place.as_ref().is_some_and(|request| is_meant(&request.chain)).then_some(slot)
        };
        let slots: Vec<u32> = (0..).zip(&self.in_flight).filter_map(is_meant).collect();
        if !slots.is_empty() {
            let left = self.disk.abandon(&slots, limit);
            for slot in slots {
                let Some(request) = self.release(slot) else { continue };
                if left.contains(&slot) {
                    // The slot stays in use.
                    self.free.pop();
                    self.abandoned.push((slot, request));
                } else {
                    request.note_written(self.memory.as_ref());
                }
            }
        }
    }
}

/// Completes a request with its status, after the first `filled` bytes of its writable part.
fn complete(chain: Chain, status: Status, filled: u32, work: &mut Work<'_>) {
    let at = room(&chain);
    chain.write_at(work.memory(), at, &[status as u8]);
    work.note_written(&chain, at, 1);
    // The used length covers a contiguous part from the start (section 2.7.8.2), which may end before the status.
    work.complete(chain, if filled == at { at + 1 } else { filled });
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            // Requests are the same without it, and some drivers never accept it (the crate virtio-drivers).
            version_1_is_optional: true,
            coalesces_interrupts: true,
            ..DeviceType::new(MODEL.name, 2, &self.queue_sizes, self.features)
        }
    }

    fn config(&self) -> &[u8] {
        self.state.config.bytes()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if self.features & feature::CONFIG_WCE != 0 {
            self.state.config.write(offset, data);
        }
    }

    fn activate(&mut self, features: u64) {
        self.state.has_flush = features & feature::FLUSH != 0;
    }

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.serve(queue, work)?;
        self.run(work)
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let source = |fd, token| Source { fd, token, interest: Interest::Read };
        list.extend([
            source(self.limiter.fd(), TOKEN_LIMIT),
            source(self.disk.fd(), TOKEN_DISK),
            source(self.poll_timer.as_raw_fd(), TOKEN_POLL),
        ]);
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_LIMIT => {
                self.limiter.expired();
                self.serve_all(work)?;
            }
            // Disarmed until it is set again.
            TOKEN_POLL => drop(self.poll_timer.clear()),
            _ => {}
        }
        self.run(work)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::MemoryDisk;
    use super::*;
    use crate::host::Host;
    use crate::virtio::GuestMemoryMmap;
    use crate::virtio::testing::{Buffer, Rig, on_mmio};

    /// A device with at most two requests in flight, and the disk that holds them up.
    fn narrow() -> (Rig, MemoryDisk) {
        let disk = MemoryDisk::new(8).unwrap();
        let host = disk.clone();
        let rig = Rig::build(|wiring| {
            let settings = BlkConfig { queues: DiskQueues::new(2), ..BlkConfig::new("disk") };
            let end = host.open(&settings.plan(), Arc::clone(&wiring.memory));
            let limiter = Limiter::new(None, None).unwrap();
            let timer = TimerFd::new().unwrap();
            let memory = Arc::clone(&wiring.memory);
            let mut blk = Blk::new(&settings, end, memory, limiter, timer);
            blk.free.truncate(2);
            on_mmio(Box::new(blk), wiring)
        });
        (rig, disk)
    }

    #[test]
    fn requests_beyond_what_may_be_in_flight_wait_for_their_turn() {
        let (mut rig, disk) = narrow();
        rig.start(feature::FLUSH | feature::MQ);
        disk.hold();
        let flush = [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for queue in [0, 1] {
            for _ in 0..6 {
                rig.add(queue, &[Buffer::Read(&flush), Buffer::Write(1)]);
            }
            rig.kick(queue);
        }
        for _ in 0..10 {
            assert_eq!(disk.waiting(), 2);
            assert!(disk.release_one(0));
            rig.run();
        }
        disk.release();
        rig.run();
        for queue in [0, 1] {
            assert_eq!(std::iter::from_fn(|| rig.take_used(queue)).count(), 6, "queue {queue}");
        }
    }

    #[test]
    fn a_pause_completes_what_has_begun_and_fails_if_the_disk_does_not_answer() {
        let (mut rig, disk) = narrow();
        rig.start(feature::FLUSH | feature::MQ);
        disk.hold();
        let flush = [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for _ in 0..3 {
            rig.add(0, &[Buffer::Read(&flush), Buffer::Write(1)]);
        }
        rig.kick(0);
        assert_eq!(disk.waiting(), 2);
        let error = rig.device.pause().unwrap_err();
        assert_eq!(error.to_string(), "its disk does not complete a request");
        disk.release();
        rig.device.pause().unwrap();
        let completed = std::iter::from_fn(|| rig.take_used(0)).count();
        assert_eq!(completed, 2, "the third is not begun");
        rig.device.resume();
        rig.run();
        assert!(rig.take_used(0).is_some());
    }

    #[test]
    fn without_a_host_there_is_no_disk() {
        let settings = BlkConfig::new("a");
        let memory = Arc::new(GuestMemoryMmap::new());
        let error = crate::host::NoHost.disk(&settings.plan(), memory).err().unwrap();
        assert_eq!(error.to_string(), "Cannot open disk a: this host has no disks");
    }
}
