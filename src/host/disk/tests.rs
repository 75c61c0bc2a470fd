//! Disks over files, on this machine: with each engine that its kernel has, and with one whose outcomes the test makes up.
#![allow(clippy::cast_possible_truncation, reason = "a test's sizes are small")]

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rvmm_devices::Wiring;
use rvmm_devices::testing::create;
use rvmm_devices::testing::{leave_out, skip, turn};
use rvmm_devices::virtio::testing::{Buffer, Rig};
use rvmm_devices::virtio::{GuestMemoryMmap, Segment};
use tempfile::{NamedTempFile, TempDir};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::Buffers;
use super::uring::Uring;
use super::*;

pub(super) const RAM: u64 = 0x8000_0000;
const RAM_SIZE: usize = 16 << 20;
const DISK_SIZE: u64 = 8 << 20;

/// A byte pattern with a long period.
pub(super) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31) ^ (i >> 9).wrapping_mul(7) ^ seed) as u8).collect()
}

fn plan(path: &str, options: &str) -> DiskPlan {
    DiskPlan {
        path: path.into(),
        is_read_only: options.contains("ro"),
        cache: match options {
            text if text.contains("none") => DiskCache::None,
            text if text.contains("unsafe") => DiskCache::Unsafe,
            _ => DiskCache::Writeback,
        },
        format: DiskFormat::Raw,
    }
}

fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(Worker::new().unwrap())];
    match Uring::new() {
        Ok(ring) => engines.push(Box::new(ring)),
        Err(error) => leave_out(&format!("no io_uring: {error}")),
    }
    engines
}

/// A disk, its file, and RAM.
pub(super) struct Bench {
    pub(super) disk: Disk,
    memory: GuestMemoryMmap,
    file: NamedTempFile,
}

impl Bench {
    pub(super) fn new(options: &str, engine: Box<dyn Engine>) -> Result<Self, HostError> {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern(DISK_SIZE as usize, 0)).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), RAM_SIZE)]).unwrap();
        let ram = Arc::new(memory.clone());
        let mut disk = Disk::open(&plan(file.path().to_str().unwrap(), options), ram, engine)?;
        // All calls go to the engine, also if the file is in memory.
        disk.inline = None;
        Ok(Self { disk, memory, file })
    }

    /// One over an existing file, according to `plan`.
    pub(super) fn over(plan: &DiskPlan) -> Result<Self, HostError> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), RAM_SIZE)]).unwrap();
        let disk = open(plan, Arc::new(memory.clone()))?;
        Ok(Self { disk, memory, file: NamedTempFile::new().unwrap() })
    }

    /// One with each engine, and one whose file counts as in memory.
    fn all(options: &str) -> Vec<Self> {
        let new = |engine| Self::new(options, engine).unwrap();
        let mut all: Vec<Self> = engines().into_iter().map(new).collect();
        let mut inline = new(Box::new(Worker::new().unwrap()));
        inline.disk.inline = Some(0);
        all.push(inline);
        all
    }

    pub(super) fn start(&mut self, slot: u32, op: DiskOp, offset: u64, data: &[Segment]) {
        let len = data.iter().map(|segment| u64::from(segment.len)).sum();
        self.disk.start(DiskRequest { slot, op, offset, len, data });
    }

    pub(super) fn clear(&mut self, slot: u32, op: DiskOp, offset: u64, len: u64) {
        self.disk.start(DiskRequest { slot, op, offset, len, data: &[] });
    }

    /// Waits until `count` requests have ended.
    pub(super) fn ended(&mut self, count: usize) -> Vec<DiskDone> {
        let mut done = Vec::new();
        loop {
            self.disk.poll(&mut done);
            if done.len() >= count {
                assert_eq!(done.len(), count);
                done.sort_by_key(|done| done.slot);
                return done;
            }
            // SAFETY: the descriptor is the disk's, which outlives the borrow.
            let fd = unsafe { BorrowedFd::borrow_raw(self.disk.fd()) };
            let timeout = Timespec { tv_sec: 60, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
            assert!(ready != Ok(0), "the disk never ends: {done:?}");
        }
    }

    pub(super) fn run(&mut self, op: DiskOp, offset: u64, data: &[Segment]) -> bool {
        self.start(3, op, offset, data);
        self.ended(1)[0].is_ok
    }

    pub(super) fn ram(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(super) fn fill(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.file.path()).unwrap()
    }
}

pub(super) fn segment(addr: u64, len: u32) -> Segment {
    Segment { addr: GuestAddress(addr), len }
}

pub(super) const WRITE: DiskOp = DiskOp::Write { is_durable: false };

pub(super) fn zeroes(may_unmap: bool) -> DiskOp {
    DiskOp::WriteZeroes { may_unmap, is_durable: true }
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_again() {
    for mut bench in Bench::all("") {
        let data = pattern(3 * 512, 99);
        bench.fill(RAM + 5, &data);
        // In three pieces that are not adjacent.
        let out = [segment(RAM + 5, 1), segment(RAM + 6, 1000), segment(RAM + 1006, 535)];
        assert!(bench.run(WRITE, 7 * 512, &out));
        assert!(bench.run(DiskOp::Write { is_durable: true }, 100 * 512, &out));
        for sector in [7, 100] {
            assert_eq!(bench.bytes()[sector * 512..][..data.len()], data);
        }
        assert!(bench.run(
            DiskOp::Read,
            7 * 512,
            &[segment(RAM + 9000, 36), segment(RAM + 20_000, 1500)]
        ));
        assert_eq!([bench.ram(RAM + 9000, 36), bench.ram(RAM + 20_000, 1500)].concat(), data);
        assert_eq!(bench.bytes().len() as u64, DISK_SIZE);
    }
}

#[test]
fn many_requests_in_flight_each_get_their_own_data() {
    for mut bench in Bench::all("") {
        let name = bench.disk.engine.name();
        for slot in 0..200_u32 {
            let at = u64::from(slot) * 8192;
            bench.start(slot, DiskOp::Read, at, &[segment(RAM + at, 8192)]);
        }
        let done = bench.ended(200);
        assert!(done.iter().zip(0..).all(|(done, slot)| done.is_ok && done.slot == slot), "{name}");
        assert_eq!(bench.ram(RAM, 200 * 8192), pattern(200 * 8192, 0), "{name}");
    }
}

#[test]
fn a_request_of_many_megabytes_is_done_whole() {
    for mut bench in Bench::all("") {
        assert!(bench.run(
            DiskOp::Read,
            0,
            &[segment(RAM, 5 << 20), segment(RAM + (6 << 20), 3 << 20)]
        ));
        let read = [bench.ram(RAM, 5 << 20), bench.ram(RAM + (6 << 20), 3 << 20)].concat();
        assert_eq!(read, pattern(DISK_SIZE as usize, 0));
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_a_smaller_disk() {
    for mut bench in Bench::all("") {
        let file = File::options().write(true).open(bench.file.path()).unwrap();
        file.set_len(4096 + 100).unwrap();
        assert!(!bench.run(DiskOp::Read, 4096, &[segment(RAM, 512)]));
        assert!(!bench.run(DiskOp::Read, 1 << 20, &[segment(RAM, 512)]));
        assert!(bench.run(DiskOp::Read, 0, &[segment(RAM, 4096)]));
        assert_eq!(bench.disk.size(), 4096);
    }
}

#[test]
fn a_file_that_became_longer_is_a_larger_disk_at_the_next_flush() {
    for mut bench in Bench::all("unsafe") {
        let file = File::options().write(true).open(bench.file.path()).unwrap();
        file.set_len(DISK_SIZE + 1023).unwrap();
        assert_eq!(bench.disk.size(), DISK_SIZE);
        assert!(bench.run(DiskOp::Flush, 0, &[]));
        assert_eq!(bench.disk.size(), DISK_SIZE + 512);
    }
}

#[test]
fn zeroes_and_discards_clear_their_range_and_nothing_else() {
    for mut bench in Bench::all("") {
        for (slot, op) in [(0, zeroes(true)), (1, zeroes(false))] {
            bench.clear(slot, op, 512 + u64::from(slot) * (1 << 20), 100 * 512);
            assert!(bench.ended(1)[0].is_ok);
        }
        let mut expected = pattern(DISK_SIZE as usize, 0);
        expected[512..][..100 * 512].fill(0);
        expected[512 + (1 << 20)..][..100 * 512].fill(0);
        assert!(bench.bytes() == expected);
        // The contents of a discarded range are undefined, its bounds are not.
        bench.clear(0, DiskOp::Discard, 0, DISK_SIZE / 2);
        assert!(bench.ended(1)[0].is_ok);
        let half = DISK_SIZE as usize / 2;
        assert!(bench.bytes()[half..] == expected[half..] && bench.bytes().len() == expected.len());
    }
}

#[test]
fn without_the_page_cache_nothing_has_to_be_aligned() {
    for engine in engines() {
        let mut bench = match Bench::new("none", engine) {
            Ok(bench) => bench,
            Err(error) => {
                return skip(&error.to_string());
            }
        };
        let name = bench.disk.engine.name();
        let mut expected = pattern(DISK_SIZE as usize, 0);
        // Aligned and unaligned addresses, lengths and sectors, within and across bounce buffers.
        let shapes: [(u64, u64, &[u32]); 6] = [
            (0, 0, &[4096, 4096]),
            (1, 8, &[4096]),
            (513, 16, &[100, 3996, 8192]),
            (0, 33, &[512]),
            (7, 35, &[511, 1, 1024]),
            (3, 4096, &[1 << 20, 77, 4096 - 77]),
        ];
        for (round, (shift, sector, lens)) in shapes.into_iter().enumerate() {
            let mut at = RAM + shift;
            let mut data = Vec::new();
            for len in lens {
                data.push(segment(at, *len));
                at += u64::from(*len);
            }
            let bytes = pattern((at - RAM - shift) as usize, round + 1);
            bench.fill(RAM + shift, &bytes);
            assert!(bench.run(WRITE, sector * 512, &data), "{name} {round}");
            expected[sector as usize * 512..][..bytes.len()].copy_from_slice(&bytes);
            bench.fill(RAM + shift, &vec![0; bytes.len()]);
            assert!(bench.run(DiskOp::Read, sector * 512, &data), "{name} {round}");
            assert!(bench.ram(RAM + shift, bytes.len()) == bytes, "{name} {round}");
        }
        assert!(bench.run(DiskOp::Flush, 0, &[]));
        assert!(bench.bytes() == expected, "{name}");
    }
}

#[test]
fn after_a_drain_nothing_touches_memory_and_the_others_are_reported() {
    for mut bench in Bench::all("") {
        for round in 0..20 {
            for slot in 0..32_u32 {
                let at = u64::from(slot) * (64 << 10);
                bench.start(slot, DiskOp::Read, at, &[segment(RAM + at, 64 << 10)]);
            }
            // One of the flushes is given up, too.
            bench.clear(32, DiskOp::Flush, 0, 0);
            bench.clear(33, DiskOp::Flush, 0, 0);
            if round % 2 == 0 {
                // Some are in flight, some not submitted yet.
                let mut done = Vec::new();
                bench.disk.poll(&mut done);
                if !done.is_empty() {
                    // As a device does: a slot that was reported is not given up.
                    let mut left: Vec<u32> = (0..34).collect();
                    left.retain(|slot| done.iter().all(|done| done.slot != *slot));
                    bench.disk.drain(&left);
                    continue;
                }
            }
            let given_up: Vec<u32> = (0..33).filter(|slot| *slot != 5).collect();
            bench.disk.drain(&given_up);
            bench.fill(RAM, &[0xaa; 5 << 16]);
            bench.fill(RAM + (6 << 16), &[0xaa; 26 << 16]);
            let done = bench.ended(2);
            assert_eq!(done.iter().map(|done| done.slot).collect::<Vec<_>>(), [5, 33]);
            assert!(bench.ram(RAM, 5 << 16).iter().all(|byte| *byte == 0xaa));
            assert!(bench.ram(RAM + (6 << 16), 26 << 16).iter().all(|byte| *byte == 0xaa));
            let whole = pattern(6 << 16, 0);
            assert!(bench.ram(RAM + (5 << 16), 1 << 16) == whole[5 << 16..]);
        }
    }
}

#[test]
fn a_disk_that_is_dropped_waits_for_calls_in_flight() {
    for mut bench in Bench::all("") {
        for slot in 0..64_u32 {
            bench.start(slot, DiskOp::Read, 0, &[segment(RAM, 1 << 20)]);
        }
        bench.disk.poll(&mut Vec::new());
        let Bench { disk, memory, .. } = bench;
        drop(disk);
        memory.write_slice(&[0xaa; 1 << 20], GuestAddress(RAM)).unwrap();
        let mut after = vec![0; 1 << 20];
        memory.read_slice(&mut after, GuestAddress(RAM)).unwrap();
        assert!(after.iter().all(|byte| *byte == 0xaa));
    }
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1024).unwrap();
    let path = file.path().to_str().unwrap();
    let open = |options| Files::open(&plan(path, options));
    let writer = open("").unwrap();
    let text = open("").unwrap_err().to_string();
    assert_eq!(
        text,
        format!(
            "Cannot use disk {path}: another program has it open for writing (stop that program)"
        )
    );
    assert!(open("ro").unwrap_err().to_string().contains("for writing"));
    drop(writer);
    let readers = [open("ro").unwrap(), open("ro").unwrap()];
    assert!(
        open("").unwrap_err().to_string().contains("for reading (stop that program, or add ro=on)")
    );
    drop(readers);
    open("").unwrap();
}

#[test]
fn the_lock_is_free_as_soon_as_a_busy_disk_is_gone() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let plan = plan(file.path().to_str().unwrap(), "");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), RAM_SIZE)]).unwrap();
    for _ in 0..20 {
        for engine in engines() {
            let mut disk = Disk::open(&plan, Arc::new(memory.clone()), engine).unwrap();
            let data = [segment(RAM, 1 << 20)];
            disk.start(DiskRequest { slot: 0, op: WRITE, offset: 0, len: 1 << 20, data: &data });
            disk.start(DiskRequest { slot: 1, op: DiskOp::Flush, offset: 0, len: 0, data: &[] });
            disk.poll(&mut Vec::new());
        }
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
}

#[test]
fn the_kernel_keeps_a_disk_that_is_only_read_as_it_is() {
    for mut bench in Bench::all("ro") {
        assert!(!bench.run(WRITE, 0, &[segment(RAM, 512)]));
        bench.clear(0, zeroes(true), 0, 512);
        assert!(!bench.ended(1)[0].is_ok);
        assert!(bench.run(DiskOp::Flush, 0, &[]));
        assert!(bench.bytes() == pattern(DISK_SIZE as usize, 0));
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused_in_one_line() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("empty"), b"").unwrap();
    fs::write(at("short"), [0; 511]).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo").as_str(), 0o600.into()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
    let memory: Arc<dyn DmaMemory> = Arc::new(GuestMemoryMmap::new());
    for (path, part) in [
        (at(""), "it is a folder"),
        (at("fifo"), "it is a FIFO"),
        (at("socket"), "it is a socket"),
        ("/dev/null".into(), "it is a character device"),
        (at("empty"), "it has 0 bytes"),
        (at("short"), "truncate -s"),
        (at("missing"), "create it"),
        (at("empty/x"), "Not a directory"),
        ("\0".into(), "NUL byte"),
    ] {
        for options in ["", "ro", "none"] {
            let error = open(&plan(&path, options), Arc::clone(&memory)).err().unwrap();
            let (what, source) = error.into_parts();
            let text = format!("{what}: {}", source.map(|s| s.to_string()).unwrap_or_default());
            let is_direct = options == "none" && text.contains("O_DIRECT");
            assert!(text.contains(&path) && (text.contains(part) || is_direct), "{text}");
            assert!(text.starts_with("Cannot ") && !text.contains('\n'), "{text}");
        }
    }
}

#[test]
fn a_file_that_ends_within_a_sector_loses_that() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1500).unwrap();
    let plan = plan(file.path().to_str().unwrap(), "");
    let disk = open(&plan, Arc::new(GuestMemoryMmap::new())).unwrap();
    assert_eq!(disk.size(), 1024);
}

/// An engine whose outcomes the test makes up, and which withdraws no call if its last field is true.
#[derive(Clone)]
struct Script(
    Arc<Mutex<Vec<(u32, Call)>>>,
    Arc<Mutex<Vec<Outcome>>>,
    Arc<EventFd>,
    Arc<AtomicBool>,
);

impl Script {
    fn new() -> Self {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self(Arc::default(), Arc::default(), event, Arc::default())
    }

    /// The only call in flight.
    fn call(&self) -> (u32, CallKind, u64, u64) {
        let mut calls = self.0.lock().unwrap();
        assert_eq!(calls.len(), 1);
        calls.pop().map(|(id, call)| (id, call.kind, call.offset, call.len)).unwrap()
    }

    fn answer(&self, id: u32, result: io::Result<u32>) {
        self.1.lock().unwrap().push((id, result));
        self.2.write(1).unwrap();
    }
}

impl Engine for Script {
    fn name(&self) -> &'static str {
        "a script"
    }

    unsafe fn push(&mut self, id: u32, call: Call) {
        self.0.lock().unwrap().push((id, call));
    }

    fn submit(&mut self) {}

    fn is_behind(&self) -> bool {
        false
    }

    fn withdraw(&mut self, id: u32) -> bool {
        if self.3.load(SeqCst) {
            return false;
        }
        let mut calls = self.0.lock().unwrap();
        calls.retain(|(pushed, _)| *pushed != id);
        true
    }

    fn reap(&mut self, outcomes: &mut Vec<Outcome>) {
        outcomes.append(&mut self.1.lock().unwrap());
    }

    fn wait(&mut self, most: Option<Duration>) {
        assert!(most.is_some(), "no call is in flight");
    }

    fn fd(&self) -> RawFd {
        self.2.as_raw_fd()
    }
}

fn scripted() -> (Bench, Script) {
    scripted_with("")
}

fn scripted_with(options: &str) -> (Bench, Script) {
    let script = Script::new();
    (Bench::new(options, Box::new(script.clone())).unwrap(), script)
}

fn unsupported() -> io::Result<u32> {
    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
}

#[test]
fn a_call_that_does_not_end_is_waited_for_a_while_and_reported_when_it_has_ended() {
    let (mut bench, script) = scripted();
    script.3.store(true, SeqCst);
    bench.start(3, DiskOp::Read, 0, &[segment(RAM, 512)]);
    bench.clear(4, DiskOp::Flush, 0, 0);
    // A flush accesses no memory: it is not waited for.
    assert_eq!(bench.disk.abandon(&[3, 4], Duration::from_millis(1)), [3]);
    let mut done = Vec::new();
    bench.disk.poll(&mut done);
    assert_eq!(done, []);
    script.answer(3, Ok(512));
    bench.disk.poll(&mut done);
    assert_eq!(done, [DiskDone { slot: 3, is_ok: false }]);
    // The slot is free again. A call that ends in time is not reported.
    bench.start(3, DiskOp::Read, 0, &[segment(RAM, 512)]);
    script.answer(3, Ok(512));
    assert!(bench.disk.abandon(&[3], Duration::from_secs(600)).is_empty());
    script.answer(SYNC, Ok(0));
    done.clear();
    bench.disk.poll(&mut done);
    assert_eq!(done, []);
}

#[test]
fn zeroes_that_the_file_system_cannot_make_are_written_in_bounded_pieces() {
    let (mut bench, script) = scripted();
    let len = (2 << 20) + 512;
    bench.clear(0, zeroes(true), 4096, len);
    for mode in [libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE] {
        let (id, kind, offset, bytes) = script.call();
        assert!(
            matches!(kind, CallKind::Allocate { mode: m } if m == mode | libc::FALLOC_FL_KEEP_SIZE)
        );
        assert_eq!((offset, bytes), (4096, len));
        script.answer(id, unsupported());
        bench.disk.poll(&mut Vec::new());
    }
    let mut left = len;
    // The second is short.
    for moved in [1 << 20, 1000, 1 << 20, 1 << 20] {
        let (id, kind, offset, bytes) = script.call();
        assert!(matches!(kind, CallKind::Write { from, is_durable: true } if from.count <= 256));
        assert_eq!(offset, 4096 + len - left);
        assert!(bytes <= 1 << 20);
        let moved = bytes.min(moved);
        left -= moved;
        script.answer(id, Ok(u32::try_from(moved).unwrap()));
        if left == 0 {
            break;
        }
        bench.disk.poll(&mut Vec::new());
    }
    assert_eq!((left, bench.ended(1)[0].is_ok), (0, true));
}

#[test]
fn a_discard_that_the_file_system_cannot_do_is_done() {
    let (mut bench, script) = scripted();
    bench.clear(0, DiskOp::Discard, 0, 512);
    script.answer(script.call().0, unsupported());
    assert!(bench.ended(1)[0].is_ok);
    bench.clear(0, DiskOp::Discard, 0, 512);
    script.answer(script.call().0, Err(io::Error::from_raw_os_error(libc::EIO)));
    assert!(!bench.ended(1)[0].is_ok);
}

#[test]
fn a_short_transfer_is_continued_where_it_stopped() {
    let (mut bench, script) = scripted();
    bench.start(0, DiskOp::Read, 512, &[segment(RAM, 100), segment(RAM + 4096, 924)]);
    for (moved, offset, left) in [(60, 512, 1024), (40, 572, 964), (1, 612, 924), (923, 613, 923)] {
        let (id, kind, at, len) = script.call();
        assert!(matches!(kind, CallKind::Read(_)));
        assert_eq!((at, len), (offset, left));
        script.answer(id, Ok(moved));
        if moved != 923 {
            bench.disk.poll(&mut Vec::new());
        }
    }
    assert!(bench.ended(1)[0].is_ok);
    bench.start(0, WRITE, 0, &[segment(RAM, 512)]);
    script.answer(script.call().0, Ok(0));
    assert!(!bench.ended(1)[0].is_ok, "a disk that takes nothing is full");
}

#[test]
fn an_interrupted_call_is_retried_a_limited_number_of_times() {
    let (mut bench, script) = scripted();
    bench.start(0, DiskOp::Read, 0, &[segment(RAM, 512)]);
    let interrupted = || Err(io::Error::from_raw_os_error(libc::EINTR));
    let mut done = Vec::new();
    let mut tries = 0;
    while done.is_empty() {
        tries += 1;
        assert!(tries < 1000);
        script.answer(script.call().0, interrupted());
        bench.disk.poll(&mut done);
    }
    assert_eq!((done, tries), (vec![DiskDone { slot: 0, is_ok: false }], 101));
}

#[test]
fn a_thousand_flushes_are_merged_into_two() {
    let (mut bench, script) = scripted();
    for slot in 0..1000 {
        bench.clear(slot, DiskOp::Flush, 0, 0);
    }
    script.answer(script.call().0, Ok(0));
    assert_eq!(bench.ended(1), [DiskDone { slot: 0, is_ok: true }]);
    script.answer(script.call().0, Err(io::Error::from_raw_os_error(libc::EIO)));
    assert!(bench.ended(999).iter().all(|done| !done.is_ok));
    assert!(script.0.lock().unwrap().is_empty());
}

#[test]
fn durable_zeroes_end_with_a_sync() {
    let (mut bench, script) = scripted();
    bench.clear(0, zeroes(false), 0, 512);
    let (id, kind, ..) = script.call();
    assert!(matches!(kind, CallKind::Allocate { .. }));
    script.answer(id, Ok(0));
    bench.disk.poll(&mut Vec::new());
    let (id, kind, ..) = script.call();
    assert!(matches!(kind, CallKind::Sync) && id == 0);
    script.answer(id, Ok(0));
    assert!(bench.ended(1)[0].is_ok);
}

#[test]
fn an_unsafe_disk_makes_nothing_durable() {
    let (mut bench, script) = scripted_with("unsafe");
    bench.clear(0, DiskOp::Flush, 0, 0);
    assert!(bench.ended(1)[0].is_ok);
    bench.clear(0, zeroes(true), 0, 512);
    script.answer(script.call().0, Ok(0));
    assert!(bench.ended(1)[0].is_ok);
    bench.start(0, DiskOp::Write { is_durable: true }, 0, &[segment(RAM, 512)]);
    let (id, kind, ..) = script.call();
    assert!(matches!(kind, CallKind::Write { is_durable: false, .. }));
    script.answer(id, Ok(512));
    assert!(bench.ended(1)[0].is_ok);
}

#[test]
fn a_request_as_large_as_memory_is_moved_in_bounded_calls() {
    let (mut bench, script) = scripted();
    bench.start(0, DiskOp::Read, 0, &[segment(RAM, 1000), segment(RAM + 4096, (7 << 20) + 24)]);
    let mut left = (7 << 20) + 1024;
    while left > 0 {
        let (id, kind, offset, len) = script.call();
        assert!(matches!(kind, CallKind::Read(Buffers { count: 1..=3, .. })));
        assert!(len <= 2 << 20 && len <= left && offset == (7 << 20) + 1024 - left);
        left -= len;
        script.answer(id, Ok(u32::try_from(len).unwrap()));
        if left > 0 {
            bench.disk.poll(&mut Vec::new());
        }
    }
    assert!(bench.ended(1)[0].is_ok);
}

#[test]
fn changes_of_the_file_by_the_user_are_seen() {
    for mut bench in Bench::all("") {
        bench.file.as_file().write_all_at(b"changed", 512).unwrap();
        assert!(bench.run(DiskOp::Read, 512, &[segment(RAM, 512)]));
        assert_eq!(bench.ram(RAM, 7), b"changed");
    }
}

#[test]
fn a_driver_reaches_the_file_through_the_device_and_its_event_loop() {
    for options in ["", ",queues=2", ",cache=none"] {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern(1 << 20, 0)).unwrap();
        let path = file.path().to_str().unwrap();
        if let Err(error) = Files::open(&plan(path, options)) {
            assert!(error.to_string().contains("O_DIRECT"), "{error}");
            leave_out(&error.to_string());
            continue;
        }
        let text = format!("blk,path={path}{options}");
        let host = Arc::new(crate::host::Linux::new(Arc::new(|| {})));
        let device = |wiring| create(&text, Wiring { host, ..wiring }).unwrap();
        let mut rig = Rig::build(device);
        rig.start(1 << 9);
        let header =
            |kind: u8, sector: u8| [kind, 0, 0, 0, 0, 0, 0, 0, sector, 0, 0, 0, 0, 0, 0, 0];
        let data = pattern(8192, 77);
        let mut ask = |buffers: &[Buffer<'_>]| {
            let head = rig.add(0, buffers);
            rig.kick(0);
            loop {
                match rig.take_used(0) {
                    Some((used, _)) => {
                        assert_eq!(used, head);
                        return rig.written(0, head);
                    }
                    // A result that is not available yet is announced by the descriptor.
                    None => assert_ne!(turn(rig.device.as_mut(), 60_000).unwrap(), 0),
                }
            }
        };
        for round in 0..15 {
            let sector = round * 16;
            let out =
                ask(&[Buffer::Read(&header(1, sector)), Buffer::Read(&data), Buffer::Write(1)]);
            assert_eq!(out, [0]);
            assert_eq!(ask(&[Buffer::Read(&header(4, 0)), Buffer::Write(1)]), [0]);
            let read =
                ask(&[Buffer::Read(&header(0, sector)), Buffer::Write(8192), Buffer::Write(1)]);
            assert!(read[..8192] == data && read[8192] == 0);
        }
        assert!(fs::read(path).unwrap()[..8192] == data);
        // The last results may be delayed, while the loop sleeps.
        rig.run();
    }
}

/// The serial number of the disk at `path`, as a driver reads it.
fn serial_number(path: &str) -> Vec<u8> {
    let text = format!("blk,ro=on,path={path}");
    let host = Arc::new(crate::host::Linux::new(Arc::new(|| {})));
    let device = |wiring| create(&text, Wiring { host, ..wiring }).unwrap();
    let mut rig = Rig::build(device);
    rig.start(1 << 9);
    let get_id = [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let answer = rig.ask(0, &[Buffer::Read(&get_id), Buffer::Write(20), Buffer::Write(1)]);
    answer.unwrap()
}

#[test]
fn the_serial_number_is_the_files_however_its_path_is_spelt() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("sub")).unwrap();
    for name in ["disk", "other"] {
        File::create(at(name)).unwrap().set_len(1024).unwrap();
    }
    std::os::unix::fs::symlink("disk", at("link")).unwrap();
    // Relative to the current directory.
    let ups = std::env::current_dir().unwrap().components().count();
    let relative = format!("{}{}", "../".repeat(ups), at("disk"));
    let expected = serial_number(&at("disk"));
    assert!(expected.starts_with(b"rvmm-"), "{expected:?}");
    for path in [at("./disk"), at("sub/../disk"), at("sub/..//disk"), at("link"), relative] {
        assert_eq!(serial_number(&path), expected, "{path}");
    }
    assert_ne!(serial_number(&at("other")), expected);
}

#[test]
fn a_disk_in_memory_copies_inline_up_to_a_limit() {
    let mut bench = Bench::all("").pop().unwrap();
    let page = |slot: u64| Segment { addr: GuestAddress(RAM + slot * 4096), len: 4096 };
    bench.start(0, DiskOp::Read, 0, &[page(0)]);
    assert_eq!(bench.ram(RAM, 4096), pattern(4096, 0), "read before a poll");
    let mut done = Vec::new();
    bench.disk.poll(&mut done);
    assert_eq!(done, [DiskDone { slot: 0, is_ok: true }]);
    // Two of these are the limit of one poll; the third goes to the engine, and all end.
    let large = Segment { addr: GuestAddress(RAM), len: 2 << 20 };
    for slot in 0..3 {
        bench.start(slot, DiskOp::Read, 0, &[large]);
    }
    assert_eq!(bench.disk.outcomes.len(), 2);
    assert!(bench.ended(3).iter().all(|done| done.is_ok));
}

#[test]
fn finished_requests_of_a_disk_in_memory_can_be_given_up() {
    let mut bench = Bench::all("").pop().unwrap();
    let page = |slot: u64| Segment { addr: GuestAddress(RAM + slot * 4096), len: 4096 };
    bench.start(0, DiskOp::Read, 0, &[page(0)]);
    bench.start(1, DiskOp::Read, 0, &[page(1)]);
    bench.start(2, DiskOp::Flush, 0, &[]);
    bench.disk.drain(&[0, 2]);
    assert_eq!(bench.ended(1), [DiskDone { slot: 1, is_ok: true }]);
    // The slots are free again.
    assert!(bench.run(DiskOp::Read, 4096, &[page(2)]));
    bench.start(0, DiskOp::Flush, 0, &[]);
    assert_eq!(bench.ended(1), [DiskDone { slot: 0, is_ok: true }]);
}

#[test]
fn only_a_file_in_a_tmpfs_is_in_memory() {
    let Ok(file) = NamedTempFile::new_in("/dev/shm") else {
        return skip("there is no tmpfs in /dev/shm");
    };
    file.as_file().set_len(4096).unwrap();
    let files = Files::open(&plan(file.path().to_str().unwrap(), "")).unwrap();
    assert!(files.is_in_memory());
    let elsewhere = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let files = Files::open(&plan(elsewhere.path().to_str().unwrap(), "")).unwrap();
    let kind = rustix::fs::fstatfs(elsewhere.as_file()).unwrap().f_type;
    assert_eq!(files.is_in_memory(), kind == 0x0102_1994);
}
