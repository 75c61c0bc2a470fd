//! Pagers in threads of this process, which serve memory that it then reads.
#![allow(clippy::cast_possible_truncation, reason = "a test's sizes are small")]

use std::fs;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rvmm_devices::testing::skip;
use tempfile::TempDir;

use super::protocol::{self, GREETING, REQUEST, Reply};
use super::remote::Remote;
use super::server::{Machine, Served};
use super::source::Source;
use super::*;
use crate::config::VmConfig;
use crate::error::Error;
use crate::hypervisor::VmState;
use crate::layout::Span;
use crate::memory::{GuestRam, RamError};
use crate::snapshot::{Parent, SavedMachine, Snapshot, SnapshotWriter};
use crate::sockets::LocalAddress;
use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

const SPAN: Span = Span { base: 0x8000_0000, size: 4 << 20 };
const SECOND: Duration = Duration::from_secs(1);

fn all(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![1; SPAN.size as usize];
    ram.read(SPAN.base, &mut bytes).unwrap();
    bytes
}

fn save(folder: &Path, ram: &GuestRam, ranges: &[Range<u64>], parent: Option<Parent>) -> Parent {
    let read = |at: u64, to: &mut [u8]| ram.read(SPAN.base + at, to).map_err(std::io::Error::other);
    let mut writer = SnapshotWriter::create(folder, SPAN.size, parent).unwrap();
    writer.add_pages(ranges, &read).unwrap();
    let vm = VmState { time: 5, harts: Vec::new(), irqchip: None };
    let config = VmConfig { mem: SPAN.size, ..VmConfig::default() };
    let machine =
        SavedMachine { saved_at_ns: 7, config, disks: Vec::new(), vm, devices: Vec::new() };
    writer.finish_memory(&read).unwrap().finish(machine, folder).unwrap()
}

/// Three snapshots in a row, and the memory that the last one has: pages of the first one, others that were replaced, also by zeroes, and
/// pages that none has.
fn saved() -> (TempDir, Vec<u8>) {
    let temporary = tempfile::tempdir().unwrap();
    let ram = GuestRam::new(SPAN, false).unwrap();
    let bytes: Vec<u8> = (0..1_u32 << 20).map(|at| (at / 4096 % 250 + 1) as u8).collect();
    ram.write(SPAN.base + (1 << 20), &bytes).unwrap();
    let first = ram.occupied().unwrap();
    let mut parent = save(&temporary.path().join("0"), &ram, &first, None);
    for (number, byte) in [("1", 0), ("2", 99)] {
        let dirty = [256, 300 + u64::from(byte), 700].map(|page| page * 4096..(page + 1) * 4096);
        for range in &dirty {
            ram.write(SPAN.base + range.start, &[byte; 4096]).unwrap();
        }
        parent = save(&temporary.path().join(number), &ram, &dirty, Some(parent));
    }
    (temporary, all(&ram))
}

fn snapshot(folder: &TempDir) -> Snapshot {
    Snapshot::open(&folder.path().join("2")).unwrap()
}

/// A machine's memory and its connection to a pager. Reports a skip where the user may not.
fn linked(path: &Path) -> Option<(Arc<GuestRam>, Arc<Control>, PagerLink)> {
    let ram = Arc::new(GuestRam::new(SPAN, false).unwrap());
    let control = Arc::new(Control::new());
    match PagerLink::connect(path, &ram, &control) {
        Ok(link) => Some((ram, control, link)),
        Err(error) if error.to_string().contains("another program serve") => {
            skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A pager, which listens when this returns.
fn start(path: &Path, contents: Contents) -> JoinHandle<Result<Served, Error>> {
    let (sender, listens) = std::sync::mpsc::channel();
    let at = path.to_owned();
    let pager = thread::spawn(move || serve_machine(&at, contents, || sender.send(()).unwrap()));
    listens.recv().unwrap();
    pager
}

#[test]
fn a_machine_reads_the_memory_of_a_chain_of_differences_from_a_pager() {
    let (folder, expected) = saved();
    let path = folder.path().join("pager");
    let pager = start(&path, Contents::Snapshot(Box::new(snapshot(&folder))));
    let Some((ram, control, link)) = linked(&path) else { return };
    // Several threads at once, each from another page on, and one that writes.
    thread::scope(|scope| {
        for first in 0..4 {
            let (ram, expected) = (&ram, &expected);
            scope.spawn(move || {
                for page in (first * 251..1024).chain(0..first * 251) {
                    let mut bytes = [0; 4096];
                    ram.read(SPAN.base + page * 4096, &mut bytes).unwrap();
                    assert!(bytes[..] == expected[page as usize * 4096..][..4096], "{page}");
                }
            });
        }
    });
    ram.write(SPAN.base, b"the guest's own").unwrap();
    assert_eq!(&all(&ram)[..15], b"the guest's own");
    assert_eq!(control.reason(), None);
    drop(link);
    let served = pager.join().unwrap().unwrap();
    assert_eq!(served.pages, 1024);
    assert!(served.faults >= 1024 / 16, "{served:?}");
    // The socket's file was that of this machine only.
    assert!(!path.exists());
}

#[test]
fn pages_from_another_host_come_with_and_without_being_waited_for() {
    let (folder, expected) = saved();
    let (path, far) = (folder.path().join("pager"), folder.path().join("far"));
    let listener = UnixListener::bind(&far).unwrap();
    let source = snapshot(&folder);
    let store = thread::spawn(move || {
        store::serve_client(listener.accept().unwrap().0.into(), &source, SECOND)
    });
    let pager = start(&path, Contents::Remote(LocalAddress::Unix(far)));
    let Some((ram, control, link)) = linked(&path) else { return };
    let mut bytes = [0; 4096];
    ram.read(SPAN.base + 256 * 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [99; 4096]);
    // No one asks for the rest.
    while ram.present_bytes() < SPAN.size {
        assert_eq!(control.reason(), None);
        thread::sleep(Duration::from_millis(1));
    }
    assert!(all(&ram) == expected);
    drop(link);
    let served = pager.join().unwrap().unwrap();
    assert!(served.pages == 1024 && served.faults < 1024, "{served:?}");
    store.join().unwrap().unwrap();
}

/// A pager that takes over the memory, fills nothing, and runs until it is dropped.
fn idle_pager(path: &Path) -> JoinHandle<(UnixStream, OwnedFd)> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let stream = listener.accept().unwrap().0;
        let (_, faults) = handshake::receive(&stream, SECOND).unwrap();
        (stream, faults)
    })
}

#[test]
fn a_pager_that_vanishes_ends_the_machine_and_nobody_waits_or_reads_zeroes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pager");
    for keeps_faults in [false, true] {
        let pager = idle_pager(&path);
        let Some((ram, control, _link)) = linked(&path) else { return };
        let (stream, faults) = pager.join().unwrap();
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..3)
                .map(|page| {
                    let ram = &ram;
                    scope.spawn(move || ram.read(SPAN.base + page * 4096, &mut [0; 8]))
                })
                .collect();
            thread::sleep(Duration::from_millis(20));
            assert!(waiting.iter().all(|thread| !thread.is_finished()));
            let kept = keeps_faults.then_some(faults);
            drop(stream);
            for thread in waiting {
                assert_eq!(thread.join().unwrap(), Err(RamError::Lost));
            }
            drop(kept);
        });
        let Some(StopReason::HostFailure(what)) = control.reason() else { panic!("no reason") };
        assert!(what.contains("has ended") && what.contains("/pager"), "{what}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_stop_does_not_wait_for_a_pager_that_does_not_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pager");
    let pager = idle_pager(&path);
    let Some((ram, control, link)) = linked(&path) else { return };
    let connection = pager.join().unwrap();
    thread::scope(|scope| {
        let waits = scope.spawn(|| ram.read(SPAN.base, &mut [0; 8]));
        thread::sleep(Duration::from_millis(20));
        assert!(!waits.is_finished());
        control.stop(StopReason::Requested);
        assert_eq!(waits.join().unwrap(), Err(RamError::Lost));
    });
    assert_eq!(control.reason(), Some(StopReason::Requested));
    drop((link, connection));
    // Without a pager there is no machine.
    let control = Arc::new(Control::new());
    let nobody =
        PagerLink::connect(&path, &Arc::new(GuestRam::new(SPAN, false).unwrap()), &control);
    let error = nobody.err().unwrap();
    assert!(error.to_string().contains("start it first") && error.exit_code() == 1, "{error}");
}

#[test]
fn a_pager_refuses_what_is_no_machine_of_its_snapshot() {
    let pair = || UnixStream::pair().unwrap();
    let receive = |far: UnixStream, size| match Machine::receive(far.into(), size, SECOND) {
        Ok(_) => panic!("it is served"),
        Err(error) => crate::error::chain(&error),
    };
    let (mut near, far) = pair();
    near.write_all(b"hello").unwrap();
    assert!(receive(far, SPAN.size).contains("expected value"));
    let (near, far) = pair();
    drop(near);
    assert!(receive(far, SPAN.size).contains("it has ended"));
    let region = |size| handshake::Region {
        base_host_virt_addr: 1 << 30,
        size,
        offset: 0,
        page_size: 4096,
        page_size_kib: 4096,
    };
    // Another kind of descriptor, and memory of another size.
    let (near, far) = pair();
    let file = pair().0;
    file.set_nonblocking(true).unwrap();
    handshake::send(&near, &[region(SPAN.size)], &file).unwrap();
    assert!(receive(far, SPAN.size).contains("no userfaultfd"));
    let (near, far) = pair();
    handshake::send(&near, &[region(4096)], &file).unwrap();
    assert!(receive(far, SPAN.size).contains("do not belong together"));
}

#[test]
fn a_snapshot_that_shrinks_ends_the_pager_and_so_the_machine() {
    let (folder, _) = saved();
    let path = folder.path().join("pager");
    let pager = start(&path, Contents::Snapshot(Box::new(snapshot(&folder))));
    let Some((ram, control, _link)) = linked(&path) else { return };
    let file = fs::File::options().write(true).open(folder.path().join("0/memory")).unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(ram.read(SPAN.base + (1 << 20), &mut [0; 8]), Err(RamError::Lost));
    let error = pager.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("cannot read its memory"), "{error}");
    assert!(matches!(control.reason(), Some(StopReason::HostFailure(_))));
}

/// A `Remote`, and the other end of its connection, which has sent these bytes.
fn remote_of(bytes: &[u8]) -> (Result<Remote, Error>, UnixStream) {
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(bytes).unwrap();
    (Remote::over(near.into(), "the other host".into(), Duration::from_millis(50)), far)
}

fn text(error: &Error) -> String {
    crate::error::chain(error)
}

#[test]
fn another_host_that_is_none_or_silent_is_refused() {
    for (bytes, what) in [
        (&b"HTTP/1.1 400 Bad Request"[..], "no rvmm pager --serve"),
        (b"rvmm", "does not reply"),
        (&protocol::greeting(77), "its memory has 77 bytes"),
    ] {
        let (remote, _far) = remote_of(bytes);
        let error = text(&remote.err().unwrap());
        assert!(error.contains("from the other host") && error.contains(what), "{error}");
    }
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let error = Remote::over(near.into(), "x".into(), SECOND).err().unwrap();
    assert!(text(&error).contains("closed the connection"), "{error}");
}

#[test]
fn a_reply_that_is_wrong_cut_or_changed_is_not_memory() {
    let page = [7; 4096];
    let reply = |sum: u64, at, len| protocol::reply(Reply::Bytes(sum), at, len).to_vec();
    let good = crate::snapshot::checksum(&page);
    for (bytes, what) in [
        ([reply(good, 4096, 4096), page.to_vec()].concat(), None),
        ([reply(good ^ 1, 4096, 4096), page.to_vec()].concat(), Some("checksum")),
        ([reply(good, 4096, 4096), [8; 4096].to_vec()].concat(), Some("checksum")),
        ([reply(good, 4096, 4096), page[..4095].to_vec()].concat(), Some("does not reply")),
        ([reply(good, 0, 4096), page.to_vec()].concat(), Some("another request")),
        ([reply(good, 4096, 8192), page.to_vec()].concat(), Some("another request")),
        (vec![0xff; 24], Some("another request")),
        (protocol::reply(Reply::Refused, 4096, 4096).to_vec(), Some("cannot read them")),
        (vec![], Some("does not reply")),
    ] {
        let (remote, mut far) = remote_of(&protocol::greeting(SPAN.size));
        far.write_all(&bytes).unwrap();
        let mut got = [1; 4096];
        match (remote.unwrap().read(4096, &mut got), what) {
            (Ok(true), None) => assert_eq!(got, page),
            (Err(error), Some(what)) => assert!(text(&error).contains(what), "{error}: {what}"),
            (other, _) => panic!("{other:?}, not {what:?}"),
        }
    }
    let (remote, mut far) = remote_of(&protocol::greeting(SPAN.size));
    far.write_all(&protocol::reply(Reply::Zeroes, 0, 4096)).unwrap();
    let mut got = [1; 4096];
    assert!(!remote.unwrap().read(0, &mut got).unwrap());
    assert_eq!(got, [0; 4096]);
}

#[test]
fn a_request_of_another_range_ends_the_connection_and_no_other_one() {
    let (folder, expected) = saved();
    let source = Arc::new(snapshot(&folder));
    let client = || {
        let (near, far) = UnixStream::pair().unwrap();
        let source = Arc::clone(&source);
        let served =
            thread::spawn(move || store::serve_client(far.into(), &source, 4 * SECOND / 100));
        (near, served)
    };
    let (good, good_served) = client();
    let mut good = Remote::over(good.into(), "x".into(), SECOND).unwrap();
    assert_eq!(good.size(), SPAN.size);
    for request in [
        protocol::request(SPAN.size, 4096),
        protocol::request(SPAN.size - 4096, 8192),
        protocol::request(1, 4096),
        protocol::request(u64::MAX - 4095, 4096),
        protocol::request(0, protocol::MOST + 4096),
    ] {
        let (mut near, served) = client();
        near.read_exact(&mut [0; GREETING]).unwrap();
        near.write_all(&request).unwrap();
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, protocol::reply(Reply::Refused, 0, 0));
        assert!(served.join().unwrap().unwrap_err().to_string().contains("no range"));
    }
    // One that stops in the middle, and one that reads nothing.
    let (mut near, served) = client();
    near.write_all(&[0; REQUEST - 1]).unwrap();
    assert_eq!(served.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    let (mut near, served) = client();
    near.set_write_timeout(Some(SECOND)).unwrap();
    let _ = (0..4).try_for_each(|_| near.write_all(&protocol::request(1 << 20, protocol::MOST)));
    assert_eq!(served.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    let mut bytes = vec![0; 1 << 20];
    for at in [0, 1 << 20, 2 << 20, 3 << 20] {
        good.read(at, &mut bytes).unwrap();
        assert!(bytes == expected[at as usize..][..1 << 20]);
    }
    drop(good);
    good_served.join().unwrap().unwrap();
}

#[test]
fn memory_that_is_read_ahead_is_all_there_and_ends_when_it_is_told() {
    let (folder, expected) = saved();
    let ram = Arc::new(GuestRam::new(SPAN, false).unwrap());
    snapshot(&folder).fill(&ram).unwrap();
    // Told before it begins.
    assert_eq!(prefetch::read_ahead(&ram, &AtomicBool::new(true)).unwrap(), 0);
    assert_eq!(ram.present_bytes(), 0);
    drop(Prefetch::start(&ram).unwrap());
    Prefetch::start(&ram).unwrap().finish();
    let saved: u64 = ram.present_bytes();
    assert!(saved >= 1 << 20, "{saved}");
    assert!(all(&ram) == expected);
    // A file that shrinks is no reason to end.
    let file = fs::File::options().write(true).open(folder.path().join("0/memory")).unwrap();
    file.set_len(0).unwrap();
    assert!(prefetch::read_ahead(&ram, &AtomicBool::new(false)).is_err());
    Prefetch::start(&ram).unwrap().finish();
}
