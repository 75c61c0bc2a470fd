//! The thread `gdb`: serves one debugger at a time, across all runs of the guest.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};

use super::connection::{RspConnection, Wakeup};
use super::context::DebugContext;
use super::session::{SessionEnd, serve};
use crate::config::{GdbAddress, GdbConfig};
use crate::error::Error;
use crate::sockets::Acceptor;

/// Connections that may wait while another debugger is served.
const BACKLOG: i32 = 1;

/// An event from the machine's thread, which waits until the first two have been handled.
pub(super) enum MachineEvent {
    /// A run begins; its harts have not started.
    RunStarted(Arc<DebugContext>, SyncSender<()>),
    /// A run is over.
    RunEnded(SyncSender<()>),
    /// The machine ends, with this exit code.
    MachineEnded(u8),
}

/// The state of the thread `gdb`.
pub(super) struct ServerThread {
    acceptor: Acceptor,
    pub(super) wakeup: Arc<Wakeup>,
    pub(super) events: Receiver<MachineEvent>,
    /// The current run; `None` between two.
    pub(super) context: Option<Arc<DebugContext>>,
    pub(super) has_ended: bool,
    /// True while the guest waits for the first debugger.
    waits: bool,
}

/// The GDB server of a machine. Dropping it disconnects the debugger.
#[derive(Debug)]
pub(crate) struct Server {
    events: Sender<MachineEvent>,
    wakeup: Arc<Wakeup>,
    at: GdbAddress,
    waits: bool,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at the address in `config`.
    ///
    /// # Errors
    /// The port or path is taken or invalid; the host has no threads or descriptors left.
    pub(crate) fn open(config: &GdbConfig) -> Result<Self, Error> {
        let acceptor = match &config.at {
            GdbAddress::Unix(path) => Acceptor::open(path, BACKLOG)?,
            GdbAddress::Tcp(address) => Acceptor::open_tcp(*address)?,
        };
        let at = acceptor.tcp_address().map_or_else(|| config.at.clone(), GdbAddress::Tcp);
        let failed = |source: io::Error| Error::Host {
            what: "Cannot start the thread for a debugger".into(),
            source,
        };
        let wakeup = Arc::new(Wakeup::new().map_err(failed)?);
        let (sender, events) = channel();
        let waits = config.wait;
        let server = ServerThread {
            acceptor,
            wakeup: Arc::clone(&wakeup),
            events,
            context: None,
            has_ended: false,
            waits,
        };
        let thread = thread::Builder::new().name("gdb".into()).spawn(move || server.run());
        Ok(Self { events: sender, wakeup, at, waits, thread: Some(thread.map_err(failed)?) })
    }

    /// The address a debugger connects to.
    pub(crate) fn address(&self) -> &GdbAddress {
        &self.at
    }

    /// True if the guest waits for a debugger before its first instruction.
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// Begins a run. When this returns, its harts are held if a debugger is connected or waited for.
    pub(crate) fn begin(&self, context: Arc<DebugContext>) {
        self.send_and_wait(|done| MachineEvent::RunStarted(context, done));
    }

    /// Ends a run: nothing of it is kept when this returns.
    pub(crate) fn over(&self) {
        self.send_and_wait(MachineEvent::RunEnded);
    }

    /// Ends the server. The exit code is reported to the debugger.
    pub(crate) fn end(mut self, code: u8) {
        self.close(code);
    }

    fn send_and_wait(&self, event: impl FnOnce(SyncSender<()>) -> MachineEvent) {
        let (done, wait) = sync_channel(1);
        if self.events.send(event(done)).is_ok() {
            self.wakeup.notify();
            // An error means that the thread has ended.
            let _ = wait.recv();
        }
    }

    fn close(&mut self, code: u8) {
        let Some(thread) = self.thread.take() else { return };
        let _ = self.events.send(MachineEvent::MachineEnded(code));
        self.wakeup.notify();
        // A thread that panicked needs no cleanup: the run is over.
        let _ = thread.join();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close(1);
    }
}

impl ServerThread {
    fn run(mut self) {
        while let Some((context, connection)) = self.await_debugger() {
            self.waits = false;
            let ended = serve(&mut self, &context, connection);
            drop(context);
            if ended == SessionEnd::MachineEnded || self.has_ended {
                return;
            }
        }
    }

    /// Waits until there is a run and a debugger connects; `None` once the machine has ended.
    fn await_debugger(&mut self) -> Option<(Arc<DebugContext>, RspConnection)> {
        loop {
            let mut fds = vec![PollFd::new(&self.wakeup, PollFlags::IN)];
            if self.context.is_some() {
                fds.push(PollFd::new(&self.acceptor, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("No debugger can connect any more: {error}");
                    return None;
                }
            }
            if !self.take_machine_events() {
                return None;
            }
            let Some(context) = self.context.clone() else { continue };
            if let Some(fd) = self.acceptor.accept() {
                return Some((context, RspConnection::new(fd, Arc::clone(&self.wakeup))));
            }
        }
    }

    /// Handles the events of the machine's thread; false once the machine has ended.
    fn take_machine_events(&mut self) -> bool {
        self.wakeup.clear();
        while let Ok(event) = self.events.try_recv() {
            match event {
                MachineEvent::RunStarted(context, done) => {
                    if self.waits {
                        context.control.hold();
                    }
                    self.context = Some(context);
                    let _ = done.send(());
                }
                MachineEvent::RunEnded(done) => {
                    self.context = None;
                    let _ = done.send(());
                }
                MachineEvent::MachineEnded(_) => return false,
            }
        }
        true
    }
}
