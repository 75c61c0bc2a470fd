//! A client of the protocol's packets, and a guest of minimal harts for it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, fs, process};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::hart::{HartProbe, TinyHart};
use crate::config::{GdbAddress, GdbConfig, Unassigned};
use crate::gdb::{DebugContext, Server};
use crate::memory::GuestRam;
use crate::vcpu::record::Unrecorded;
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::{RAM, context};
use crate::vcpu::{Control, Debugger, spawn_hart};

/// Address of the code of hart 0; that of hart N is N pages further.
pub(in crate::gdb) const CODE: u64 = RAM.base + 0x1_0000;
/// Offset of the trap vector from the start of each hart's code.
pub(in crate::gdb) const VECTOR: u64 = 0x800;

/// Time-out for hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// One run of a guest.
pub(in crate::gdb) struct TestGuest {
    pub(in crate::gdb) control: Arc<Control>,
    pub(in crate::gdb) ram: Arc<GuestRam>,
    pub(in crate::gdb) context: Arc<DebugContext>,
    pub(in crate::gdb) harts: Vec<Arc<HartProbe>>,
    threads: Vec<JoinHandle<()>>,
}

impl TestGuest {
    /// Creates harts with these programs, not started.
    pub(in crate::gdb) fn new(programs: &[&[u32]]) -> Self {
        let mut machine_context = context(Unassigned::Zero).0;
        let (control, ram) = (Arc::new(Control::new()), Arc::clone(&machine_context.ram));
        let context =
            DebugContext::new(Arc::clone(&control), Arc::clone(&ram), Box::new(|| Ok(())), false);
        let context = Arc::new(context.unwrap());
        machine_context.debugger = Some(Arc::clone(&context) as Arc<dyn Debugger>);
        let machine_context = Arc::new(machine_context);
        let (mut harts, mut threads) = (Vec::new(), Vec::new());
        for (id, program) in (0..).zip(programs) {
            let start = CODE + u64::from(id) * 0x1000;
            let bytes: Vec<u8> = program.iter().flat_map(|word| word.to_le_bytes()).collect();
            ram.write(start, &bytes).unwrap();
            let probe = Arc::new(HartProbe::default());
            let hart = Box::new(TinyHart::new(id, &ram, start, &probe));
            harts.push(probe);
            let thread = spawn_hart(
                hart,
                Arc::clone(&machine_context),
                Arc::clone(&control),
                None,
                Unrecorded,
            );
            threads.push(thread.unwrap());
        }
        Self { control, ram, context, harts, threads }
    }

    pub(in crate::gdb) fn memory(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(addr, &mut bytes).unwrap();
        bytes
    }

    /// Waits until the run has ended.
    pub(in crate::gdb) fn end(self) -> StopReason {
        let (done, over) = channel();
        let control = self.control;
        thread::spawn(move || done.send(control.wait()));
        let reason = over.recv_timeout(LIMIT).expect("the run ends");
        for thread in self.threads {
            thread.join().unwrap();
        }
        reason
    }
}

/// A server on a socket of its own.
pub(in crate::gdb) struct TestServer {
    pub(in crate::gdb) server: Server,
    pub(in crate::gdb) socket: PathBuf,
    _folder: Folder,
}

/// A temporary folder, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("rvmm-gdb-{}-{}", process::id(), COUNT.fetch_add(1, Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl TestServer {
    pub(in crate::gdb) fn new(wait: bool) -> Self {
        let folder = Folder::new();
        let socket = folder.0.join("gdb");
        let config = GdbConfig { at: GdbAddress::Unix(socket.as_path().into()), wait };
        Self { server: Server::open(&config).unwrap(), socket, _folder: folder }
    }

    /// Begins a run, as a machine does.
    pub(in crate::gdb) fn begin(&self, guest: &TestGuest) {
        self.server.begin(Arc::clone(&guest.context));
        guest.control.start();
    }
}

/// A debugger's connection.
pub(in crate::gdb) struct Client(UnixStream);

impl Client {
    pub(in crate::gdb) fn new(socket: &Path) -> Self {
        // A fuzzer's alarm signal may interrupt the call.
        let stream = loop {
            match UnixStream::connect(socket) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result.unwrap(),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    /// Sends bytes; ignores the error if the server has closed the connection.
    pub(in crate::gdb) fn raw(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    pub(in crate::gdb) fn send(&mut self, packet: &str) {
        self.raw(&framed(packet.as_bytes()));
    }

    /// Sends a packet and returns the reply.
    pub(in crate::gdb) fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.reply().unwrap_or_else(|| panic!("no reply to {packet}"))
    }

    /// The next packet, with run lengths expanded; `None` at the end of the connection.
    pub(in crate::gdb) fn reply(&mut self) -> Option<String> {
        while self.byte()? != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                b'*' => {
                    let count = usize::from(self.byte()?) - 29;
                    let last = *text.last().expect("a byte to repeat");
                    text.extend(std::iter::repeat_n(last, count));
                }
                byte => text.push(byte),
            }
        }
        let _ = (self.byte()?, self.byte()?);
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        loop {
            // A reset ends the connection as well.
            return match self.0.read(&mut byte) {
                Ok(1) => Some(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("no reply"),
                _ => None,
            };
        }
    }

    /// True if there is something to read; waits a millisecond for it.
    pub(in crate::gdb) fn has_more(&self) -> bool {
        let limit = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit)).is_ok_and(|count| count > 0)
    }

    /// Shuts down the sending side, and waits until the server has closed the connection.
    pub(in crate::gdb) fn hang_up(mut self) {
        let _ = self.0.shutdown(Shutdown::Write);
        assert!(self.is_at_its_end());
    }

    /// Reads everything until the server closes the connection.
    pub(in crate::gdb) fn is_at_its_end(&mut self) -> bool {
        while self.byte().is_some() {}
        true
    }

    /// A register of 64 bits, by GDB's number.
    pub(in crate::gdb) fn register(&mut self, number: usize) -> u64 {
        let text = self.ask(&format!("p{number:x}"));
        u64::from_str_radix(&text, 16).map(u64::swap_bytes).unwrap_or_else(|_| panic!("{text}"))
    }
}

/// A packet with its frame.
pub(in crate::gdb) fn framed(packet: &[u8]) -> Vec<u8> {
    let sum = packet.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", packet, format!("#{sum:02x}").as_bytes()].concat()
}
