//! Block device (virtio 1.3, section 5.2): a disk whose contents lie in a file or block device of the host.
//!
//! The format is what the user says, raw if nothing: what lies in the file is never asked for it, so a guest cannot make its
//! disk into something else by what it writes. Requests go to the host's end ([`DiskBackend`]) and come back in any order; how many are on the way is bounded.
//! Left out: legacy geometry, secure erase, lifetime, zones.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::bucket::Limiter;
use super::{Chain, Segment, VirtioDevice, VirtioError, VirtioMmio, Work, pieces};
use crate::catalog::{BuildError, Built, Key, Model, Placement, Wiring};
use crate::device::{Interest, Source};
use crate::options::Options;

mod backend;
mod config;
mod feature;
mod request;
mod settings;
pub mod testing;

pub use backend::{DiskBackend, DiskCache, DiskDone, DiskFormat, DiskOp, DiskPlan, DiskRequest};

use config::Config;
use request::{HEADER, ID_BYTES, Limits, Status, Verdict, judge, room};
use settings::{BlkSettings, derived_id};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "blk",
    summary: "virtio block device: a disk in a file or block device",
    keys: &[
        key("path", "FILE", "the file or block device; has to be given"),
        key("ro", "on|off", "the guest cannot write (default: off)"),
        key("serial", "TEXT", "identity of up to 20 bytes (default: derived from the file)"),
        key(
            "cache",
            "MODE",
            "writeback, none (O_DIRECT) or unsafe (no flush) (default: writeback)",
        ),
        key("queues", "N", "request queues, 1 to 8 (default: 1)"),
        key("iops", "N", "requests a second at most (default: no limit)"),
        key("bps", "BYTES", "bytes a second at most (default: no limit)"),
        key("format", "FORMAT", "raw or qcow2 (default: raw, whatever the file holds)"),
        key("backing", "on|off", "a qcow2 image may name a backing file (default: off)"),
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
    build,
};

/// Entries of each queue: a mebibyte of scattered pages is one request.
const QUEUE_SIZE: u16 = 512;
/// Buffers of data in a request: header and status take two descriptors.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests that are with the host's end at most, of all queues together.
const MAX_IN_FLIGHT: u32 = 256;

/// How long a reset waits for the disk, with the device's lock held. What takes longer is waited for by the driver.
const PATIENCE: Duration = Duration::from_secs(1);

/// After how long a host's end that did not take everything is polled again.
const LATER: Duration = Duration::from_millis(1);
/// What a timer takes for now.
const NOW: Duration = Duration::from_nanos(1);

const TOKEN_LIMIT: u32 = 0;
const TOKEN_DISK: u32 = 1;
const TOKEN_AGAIN: u32 = 2;

const fn key(name: &'static str, value: &'static str, help: &'static str) -> Key {
    Key { name, value, help }
}

/// A disk.
struct Blk {
    // Fixed.
    queue_sizes: Box<[u16]>,
    features: u64,
    is_read_only: bool,
    id: [u8; ID_BYTES],

    // The host's side.
    disk: Box<dyn DiskBackend>,
    limiter: Limiter,
    /// Makes the I/O thread look again: after a queue was reset by a hart, and where the host's end is behind.
    again: TimerFd,
    /// What is with the host's end, by slot: never by the driver's head, which the driver chooses.
    in_flight: Box<[Option<InFlight>]>,
    free: Vec<u32>,
    /// Slots of requests that were given up and with which the host's end is not through.
    abandoned: Vec<u32>,
    /// A queue was left because no slot was free.
    is_starved: bool,
    /// Kept for their room only.
    done: Vec<DiskDone>,
    data: Vec<Segment>,

    // Guest-visible.
    state: State,
}

/// A request that is with the host's end.
struct InFlight {
    chain: Chain,
    /// Bytes of the chain's writable part that are filled when all goes well, the status apart.
    fills: u32,
}

/// What the driver sees and sets.
struct State {
    config: Config,
    /// The driver knows that it has to flush.
    has_flush: bool,
}

fn build(options: &Options, wiring: Wiring) -> Built {
    let bad = |source| BuildError::Option { model: MODEL.name, source };
    let settings = BlkSettings::read(options).map_err(bad)?;
    let disk = wiring
        .host
        .disk(&settings.plan, Arc::clone(&wiring.memory))
        .map_err(|source| BuildError::End { model: MODEL.name, source })?;
    let host = |what| move |source| BuildError::Host { model: MODEL.name, what, source };
    let limiter = Limiter::new(settings.bps, settings.iops).map_err(host("timer"))?;
    let again = TimerFd::new().map_err(|error| host("timer")(error.into()))?;
    VirtioMmio::create(Box::new(Blk::new(&settings, disk, limiter, again)), wiring)
}

impl Blk {
    fn new(
        settings: &BlkSettings,
        disk: Box<dyn DiskBackend>,
        limiter: Limiter,
        again: TimerFd,
    ) -> Self {
        let is_read_only = settings.plan.is_read_only;
        let access = if is_read_only { feature::RO } else { feature::WRITABLE };
        let queues = if settings.queues > 1 { feature::MQ } else { 0 };
        let config = Config::new(disk.size(), settings.queues, SEG_MAX);
        Self {
            queue_sizes: vec![QUEUE_SIZE; settings.queues.into()].into(),
            features: feature::ALWAYS | access | queues,
            is_read_only,
            id: settings.serial.unwrap_or_else(|| derived_id(disk.file_name())),
            disk,
            limiter,
            again,
            in_flight: (0..MAX_IN_FLIGHT).map(|_| None).collect(),
            // The lowest is taken first.
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            abandoned: Vec::new(),
            is_starved: false,
            done: Vec::new(),
            data: Vec::new(),
            state: State { config, has_flush: false },
        }
    }

    /// Takes what the driver has made available, as far as limits and slots allow.
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
            match judge(&chain, work.memory(), &limits) {
                Verdict::Refuse => work.refuse(chain),
                Verdict::Answer(status) => answer(chain, status, 0, work),
                Verdict::Identity => {
                    let id = self.id.get(..room(&chain) as usize).unwrap_or(&self.id);
                    let filled = chain.write_at(work.memory(), 0, id);
                    let filled = u32::try_from(filled).unwrap_or(0);
                    answer(chain, Status::Ok, filled, work);
                }
                Verdict::Do { op, offset, len } => {
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

    /// Hands a request to the host's end; `slot` is the next free one.
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

    /// Sets everything going and gives back what has ended, until there is nothing more to do now.
    fn turn(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        loop {
            self.collect(work);
            if !self.is_starved || self.free.is_empty() || self.limiter.is_waiting() {
                return Ok(());
            }
            self.serve_all(work)?;
        }
    }

    fn collect(&mut self, work: &mut Work<'_>) {
        let mut done = std::mem::take(&mut self.done);
        self.disk.poll(&mut done);
        for DiskDone { slot, is_ok } in done.drain(..) {
            let Some(InFlight { chain, fills }) = self.release(slot) else {
                self.note_through(slot);
                continue;
            };
            let (status, filled) = if is_ok { (Status::Ok, fills) } else { (Status::IoErr, 0) };
            answer(chain, status, filled, work);
        }
        self.done = done;
        if self.disk.is_behind() {
            self.look_again(LATER);
        }
        let size = self.disk.size();
        if size != self.state.config.capacity() {
            self.state.config.set_capacity(size);
            work.config_changed();
        }
    }

    fn look_again(&mut self, after: Duration) {
        // The kernel refuses no time that is one.
        let _ = self.again.reset(after, None);
    }

    fn release(&mut self, slot: u32) -> Option<InFlight> {
        let request = self.in_flight.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(request)
    }

    /// The host's end is through with a request that was given up.
    fn note_through(&mut self, slot: u32) {
        if let Some(at) = self.abandoned.iter().position(|abandoned| *abandoned == slot) {
            self.abandoned.swap_remove(at);
            self.free.push(slot);
        }
    }

    /// Gives up what is in flight and `is_meant`.
    fn give_up(&mut self, is_meant: impl Fn(&Chain) -> bool) {
        let is_meant = |(slot, place): (u32, &Option<InFlight>)| {
            place.as_ref().is_some_and(|request| is_meant(&request.chain)).then_some(slot)
        };
        let slots: Vec<u32> = (0..).zip(&self.in_flight).filter_map(is_meant).collect();
        if !slots.is_empty() {
            let left = self.disk.abandon(&slots, PATIENCE);
            for slot in slots {
                drop(self.release(slot));
                if left.contains(&slot) {
                    // As it was, but for the request.
                    self.free.pop();
                    self.abandoned.push(slot);
                }
            }
        }
    }
}

/// Gives a request back with its status, after the first `filled` bytes of its writable part.
fn answer(chain: Chain, status: Status, filled: u32, work: &mut Work<'_>) {
    let at = room(&chain);
    chain.write_at(work.memory(), at, &[status as u8]);
    // The length is that of an unbroken run from the start (section 2.7.8.2), which the status may not be part of.
    work.complete(chain, if filled == at { at + 1 } else { filled });
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn id(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Requests are the same without it, and there are drivers that never take it (the crate virtio-drivers).
    fn may_lack_version_1(&self) -> bool {
        true
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        self.state.config.bytes()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if self.features & feature::CONFIG_WCE != 0 {
            self.state.config.write(offset, data);
        }
    }

    fn may_hold(&self) -> bool {
        true
    }

    fn activate(&mut self, features: u64) {
        self.state.has_flush = features & feature::FLUSH != 0;
    }

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.serve(queue, work)?;
        self.turn(work)
    }

    fn reset_queue(&mut self, queue: u16) {
        self.give_up(|chain| chain.queue() == queue);
        // Others may have ended meanwhile.
        self.look_again(NOW);
    }

    fn is_settled(&self) -> bool {
        self.abandoned.is_empty()
    }

    fn reset(&mut self) {
        self.give_up(|_| true);
        if self.disk.is_behind() {
            self.look_again(LATER);
        }
        self.is_starved = false;
        self.state.config.set_writeback(true);
        self.state.has_flush = false;
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd, token| Source { fd, token, interest: Interest::Read };
        vec![
            source(self.limiter.fd(), TOKEN_LIMIT),
            source(self.disk.fd(), TOKEN_DISK),
            source(self.again.as_raw_fd(), TOKEN_AGAIN),
        ]
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_LIMIT => {
                self.limiter.expired();
                self.serve_all(work)?;
            }
            // Quiet until it is set again.
            TOKEN_AGAIN => drop(self.again.clear()),
            _ => {}
        }
        self.turn(work)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::MemoryDisk;
    use super::*;
    use crate::host::Host;
    use crate::virtio::GuestMemoryMmap;
    use crate::virtio::testing::{Buffer, Rig};

    /// A disk of which two requests can be in flight, and who holds them up.
    fn narrow() -> (Rig, MemoryDisk) {
        let disk = MemoryDisk::new(8).unwrap();
        let host = disk.clone();
        let rig = Rig::build(|wiring| {
            let settings =
                BlkSettings::read(&Options::parse("blk,path=disk,queues=2").unwrap()).unwrap();
            let end = host.open(&settings.plan, Arc::clone(&wiring.memory));
            let limiter = Limiter::new(None, None).unwrap();
            let mut blk = Blk::new(&settings, end, limiter, TimerFd::new().unwrap());
            blk.free.truncate(2);
            VirtioMmio::create(Box::new(blk), wiring).unwrap()
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
    fn without_a_host_there_is_no_disk() {
        let settings = BlkSettings::read(&Options::parse("blk,path=a").unwrap()).unwrap();
        let memory = Arc::new(GuestMemoryMmap::new());
        let error = crate::host::NoHost.disk(&settings.plan, memory).err().unwrap();
        assert_eq!(error.to_string(), "Cannot open disk a: this host has no disks");
    }
}
