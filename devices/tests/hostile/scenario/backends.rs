//! The backends of a device with a hostile guest: all in memory, slow or failing as the script selects.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rvmm_devices::testing::MemoryConsole;
use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::blk::testing::MemoryDisk;
use rvmm_devices::virtio::blk::{DiskBackend, DiskPlan};
use rvmm_devices::virtio::net::testing::MemoryNet;
use rvmm_devices::virtio::net::{NetBackend, NetworkSource};
use rvmm_devices::{ConsoleBackend, Endpoint, Host, HostError, Listener};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::kind::Kind;
use super::script::Script;

/// Sectors of the disk at the start.
pub(crate) const SECTORS: usize = 16;

/// All backends of a device. A clone refers to the same ones.
#[derive(Clone)]
pub(crate) struct Backends {
    pub(crate) disk: MemoryDisk,
    pub(crate) net: MemoryNet,
    pub(crate) console: MemoryConsole,
    pub(crate) button: Arc<EventFd>,
    /// Number of opened consoles: the first one is `console`, the others are ignored.
    consoles: Arc<Mutex<usize>>,
    sockets: Arc<Mutex<Sockets>>,
    pending: Arc<EventFd>,
}

/// Unix sockets without files.
#[derive(Default)]
struct Sockets {
    /// Connections that wait to be accepted.
    callers: VecDeque<UnixStream>,
    /// The programs' ends of streams.
    programs: Vec<UnixStream>,
    /// The error of the guest's next connections, if they fail.
    refusal: Option<ErrorKind>,
}

impl Backends {
    pub(crate) fn new() -> Self {
        let event = |flags| Arc::new(EventFd::new(EFD_NONBLOCK | flags).unwrap());
        let console = MemoryConsole::new().unwrap();
        console.set_size((80, 25));
        Self {
            disk: MemoryDisk::new(SECTORS).unwrap(),
            net: MemoryNet::new().unwrap(),
            console,
            button: event(0),
            consoles: Arc::default(),
            sockets: Arc::default(),
            pending: event(EFD_SEMAPHORE),
        }
    }

    /// Restores all backends and unblocks them.
    pub(crate) fn restore(&self) {
        self.disk.fail_after(None);
        self.disk.release();
        self.disk.change(|bytes| bytes.resize(SECTORS * 512, 0));
        self.net.fail(None);
        self.net.set_full(false);
        self.console.fail_writes(None);
        self.console.set_room(None);
        self.console.connect();
        self.sockets.lock().unwrap().refusal = None;
    }

    /// Lets another device open the backends from the first on.
    pub(crate) fn reopen(&self) {
        *self.consoles.lock().unwrap() = 0;
    }

    /// Writes these bytes to every stream of the host's programs.
    pub(crate) fn talk(&self, bytes: &[u8]) {
        for mut program in &self.sockets.lock().unwrap().programs {
            drop(program.write(bytes));
        }
    }

    /// Blocks all backends.
    pub(crate) fn hold(&self) {
        self.disk.hold();
        self.net.set_full(true);
        self.console.set_room(Some(0));
    }

    /// Triggers an event in the backend of this device.
    pub(crate) fn random_event(&self, kind: Kind, script: &mut Script<'_>) {
        match kind {
            Kind::Blk => self.disk_event(script),
            Kind::Net => self.net_event(script),
            Kind::Console => self.console_event(script),
            Kind::Vsock => self.sockets_event(script),
            Kind::Input => drop(self.button.write(1)),
            Kind::Rng | Kind::Balloon => {}
        }
    }

    fn disk_event(&self, script: &mut Script<'_>) {
        match script.below(6) {
            0 | 1 => self.disk.hold(),
            2 => self.disk.release(),
            3 => drop(self.disk.release_one(script.below(8))),
            4 => self.disk.fail_after(script.flag().then_some(script.below(1500))),
            _ => {
                let sectors = script.pick(&[1, 2, SECTORS - 1, SECTORS, SECTORS + 5]);
                self.disk.change(|bytes| bytes.resize(sectors * 512, 0));
            }
        }
        drop(self.disk.journal());
    }

    fn net_event(&self, script: &mut Script<'_>) {
        const FAILURES: [ErrorKind; 4] = [
            ErrorKind::Other,
            ErrorKind::InvalidInput,
            ErrorKind::NotConnected,
            ErrorKind::Interrupted,
        ];
        match script.below(8) {
            0 => self.net.set_full(true),
            1 => self.net.set_full(false),
            2 => self.net.fail(None),
            3 if script.once_in(4) => {
                let kind = script.pick(&FAILURES);
                // No real network is interrupted for ever.
                self.net.fail((kind != ErrorKind::Interrupted).then_some(kind));
            }
            _ => {
                let header = script.bytes(12).try_into().unwrap();
                let header = if script.flag() { [0; 12] } else { header };
                let len = script.pick(&[60, 14, 1, 0, 1514, 5000, 65_550, 70_000]);
                self.net.arrive(header, &vec![0xa5; len]);
            }
        }
        drop(self.net.sent());
    }

    fn console_event(&self, script: &mut Script<'_>) {
        match script.below(9) {
            0 => self.console.set_room(Some(script.below(9000))),
            1 => self.console.set_room(None),
            2 => self.console.hang_up(),
            3 => self.console.connect(),
            4 => self.console.fail_writes(Some(ErrorKind::Other)),
            5 => self.console.fail_writes(None),
            6 => self.console.set_size((script.odd16(), script.odd16())),
            7 if script.once_in(4) => self.console.end_input(),
            _ => self.console.type_in(&vec![b'k'; script.below(5000)]),
        }
    }

    fn sockets_event(&self, script: &mut Script<'_>) {
        let mut sockets = self.sockets.lock().unwrap();
        let count = sockets.programs.len();
        if count == 0 || script.below(8) == 0 {
            if count < 64 {
                let (program, stream) = pair();
                let port = script.below(4);
                let line = match script.below(4) {
                    0 => script.bytes(40),
                    _ => format!("CONNECT {port}\n").into_bytes(),
                };
                let _ = (&program).write(&line);
                sockets.callers.push_back(stream);
                sockets.programs.push(program);
                drop(self.pending.write(1));
            }
            return;
        }
        let at = script.below(count);
        let mut program = &sockets.programs[at];
        match script.below(7) {
            0 => drop(program.write(&vec![b's'; script.pick(&[1, 100, 5000, 100_000])])),
            1 => drop(program.read(&mut vec![0; script.pick(&[1, 100, 5000, 100_000])])),
            2 => drop(program.shutdown(Shutdown::Write)),
            3 => drop(program.shutdown(Shutdown::Read)),
            4 => drop(sockets.programs.swap_remove(at)),
            5 => {
                const REFUSALS: [Option<ErrorKind>; 4] = [
                    None,
                    Some(ErrorKind::NotFound),
                    Some(ErrorKind::WouldBlock),
                    Some(ErrorKind::Other),
                ];
                sockets.refusal = script.pick(&REFUSALS);
            }
            _ => drop(program.write(b"x\n")),
        }
    }
}

fn pair() -> (UnixStream, UnixStream) {
    let (program, stream) = UnixStream::pair().unwrap();
    program.set_nonblocking(true).unwrap();
    stream.set_nonblocking(true).unwrap();
    (program, stream)
}

impl Host for Backends {
    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        Ok(self.disk.open(plan, memory))
    }

    fn network(&self, _end: &NetworkSource) -> Result<Box<dyn NetBackend>, HostError> {
        Ok(Box::new(self.net.clone()))
    }

    fn network_queues(
        &self,
        _end: &NetworkSource,
        pairs: u16,
    ) -> Result<Vec<Box<dyn NetBackend>>, HostError> {
        let others = (1..pairs).map(|_| MemoryNet::new().unwrap());
        let ends = std::iter::once(self.net.clone()).chain(others);
        Ok(ends.map(|end| Box::new(end) as Box<dyn NetBackend>).collect())
    }

    fn console(&self, _to: &Endpoint) -> Result<Box<dyn ConsoleBackend>, HostError> {
        let mut consoles = self.consoles.lock().unwrap();
        *consoles += 1;
        let first = *consoles == 1;
        Ok(Box::new(if first { self.console.clone() } else { MemoryConsole::new().unwrap() }))
    }

    fn listen(&self, _path: &Path) -> Result<Box<dyn Listener>, HostError> {
        Ok(Box::new(TestListener(self.clone())))
    }

    fn connect(&self, _path: &Path) -> io::Result<UnixStream> {
        let mut sockets = self.sockets.lock().unwrap();
        match sockets.refusal {
            Some(kind) => Err(kind.into()),
            None => {
                let (program, stream) = pair();
                sockets.programs.push(program);
                Ok(stream)
            }
        }
    }
}

/// Accepts connections of host programs.
struct TestListener(Backends);

impl AsRawFd for TestListener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.pending.as_raw_fd()
    }
}

impl Listener for TestListener {
    fn accept(&self) -> io::Result<UnixStream> {
        self.0.pending.read()?;
        let caller = self.0.sockets.lock().unwrap().callers.pop_front();
        caller.ok_or_else(|| ErrorKind::WouldBlock.into())
    }
}
