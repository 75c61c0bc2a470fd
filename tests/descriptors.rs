//! Ring 1: sockets on a host that temporarily has no file descriptors left. In a separate process, because that affects the
//! whole process.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

use std::fs::{self, DirEntry, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rvmm::config::Endpoint;
use rvmm::inspect::{Inspectable, InspectionServer, Order, Query, Reply, Stat};
use rvmm::io_loop::IoLoop;
use rvmm::terminal;
use rvmm_devices::{Bus, ConsoleBackend, Port};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Counts the log lines about connections that cannot be accepted.
struct Complaints;

static COMPLAINTS: AtomicUsize = AtomicUsize::new(0);

impl Log for Complaints {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if record.args().to_string().contains("Cannot accept connections on") {
            COMPLAINTS.fetch_add(1, SeqCst);
        }
    }

    fn flush(&self) {}
}

/// Serializes the tests: they use up all descriptors.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // It is already set in the second test.
    let _ = log::set_logger(&Complaints);
    log::set_max_level(LevelFilter::Warn);
    COMPLAINTS.store(0, SeqCst);
    turn
}

/// Holds all free descriptors of this process.
struct Hoard {
    _files: Vec<File>,
    before: Rlimit,
}

impl Hoard {
    fn new() -> Self {
        let before = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(64), ..before }).unwrap();
        let files = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        Self { _files: files, before }
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        setrlimit(Resource::Nofile, self.before).unwrap();
    }
}

/// A socket that can be connected when no more can be created.
struct Caller(OwnedFd);

impl Caller {
    fn new() -> Self {
        Self(socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap())
    }

    fn call(self, path: &Path) -> UnixStream {
        connect(&self.0, &SocketAddrUnix::new(path).unwrap()).unwrap();
        self.0.into()
    }
}

struct Empty;

impl Inspectable for Empty {
    fn answer(&self, _: Query) -> Reply {
        Reply::Stat(Stat::default())
    }

    fn carry_out(&self, _: Order, _: Option<OwnedFd>, _: &mut dyn FnMut(&Reply) -> bool) -> Reply {
        Reply::Done { took_ns: 0 }
    }
}

#[test]
fn a_connection_without_free_descriptors_is_accepted_later() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-1.sock");
    let server = InspectionServer::open(&path, Arc::new(Empty)).unwrap();
    let mut io = IoLoop::new(Arc::new(Bus::new(Vec::new()).unwrap())).unwrap();
    io.watch_external(Arc::new(server));
    let io = io.spawn().unwrap();
    // Kept open: the time at which the descriptor of a closed connection becomes free is unknown.
    let mut clients = Vec::new();
    for round in 1..=2 {
        let caller = Caller::new();
        let hoard = Hoard::new();
        let before = io.turns();
        let began = Instant::now();
        let mut client = caller.call(&path);
        while io.turns() < before + 3 {
            thread::sleep(Duration::from_millis(1));
        }
        // The first turn finds the client, and each one after that follows a back-off of a second: the loop does not spin.
        assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
        assert_eq!(COMPLAINTS.load(SeqCst), round, "one line for each shortage");
        drop(hoard);
        client.write_all(b"stat\n").unwrap();
        let mut answer = String::new();
        BufReader::new(&client).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("{\"stat\""), "{answer}");
        clients.push(client);
    }
    io.stop(Duration::ZERO).unwrap();
    drop(clients);
    await_end_of_threads("inspect");
}

/// Waits until no thread of this process has this name: each closes a descriptor when it ends, which the next test would find free.
fn await_end_of_threads(name: &str) {
    let is_named = |task: std::io::Result<DirEntry>| {
        let comm = task.and_then(|task| fs::read_to_string(task.path().join("comm")));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    };
    while fs::read_dir("/proc/self/task").unwrap().any(is_named) {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for the console's descriptor, processes its event, and returns the descriptor.
fn process_event(console: &mut dyn ConsoleBackend, epoll: &Epoll) -> RawFd {
    let fd = console.ports().event_fd.expect("somebody can come");
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, fd, event).unwrap();
    while !matches!(epoll.wait(-1, &mut [EpollEvent::default()]), Ok(1)) {}
    epoll.ctl(ControlOperation::Delete, fd, event).unwrap();
    console.process_event();
    fd
}

#[test]
fn a_console_connection_without_free_descriptors_is_accepted_later() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let mut console =
        terminal::open(&Endpoint::Unix(path.as_path().into()), Arc::new(|| {})).unwrap().backend;
    let (first, second, epoll) = (Caller::new(), Caller::new(), Epoll::new().unwrap());
    let hoard = Hoard::new();
    let user = first.call(&path);
    let socket = process_event(console.as_mut(), &epoll);
    for _ in 0..2 {
        assert_ne!(
            process_event(console.as_mut(), &epoll),
            socket,
            "the socket itself would be readable for ever"
        );
        assert_eq!(console.ports().output, Port::Closed);
    }
    assert_eq!(COMPLAINTS.load(SeqCst), 1);
    drop(hoard);
    process_event(console.as_mut(), &epoll);
    assert_ne!(console.ports().output, Port::Closed);
    assert_eq!(console.ports().event_fd, Some(socket));
    // As before: a second user gets the message that the console is in use.
    let second = second.call(&path);
    process_event(console.as_mut(), &epoll);
    let mut line = String::new();
    BufReader::new(&second).read_line(&mut line).unwrap();
    assert!(line.contains("another client"), "{line}");
    drop(user);
}
