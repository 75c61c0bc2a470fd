//! The thread `gdb`: lets one debugger in at a time, through all lives of the guest.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use log::info;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::{DebugListener, RspConnection, Wakeup};
use super::context::DebugContext;
use super::session::{Ended, serve};
use crate::config::{GdbAddress, GdbConfig};
use crate::error::Error;

/// How long nobody is let in after the host could not.
const ACCEPT_BACKOFF: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What the machine's thread tells. The first two wait until they were done.
pub(super) enum MachineEvent {
    /// A life begins; its harts have not started.
    Begin(Arc<DebugContext>, SyncSender<()>),
    /// A life is over.
    Over(SyncSender<()>),
    /// The machine ends, with this exit code.
    End(u8),
}

/// What the thread works with.
pub(super) struct ServerThread {
    listener: DebugListener,
    pub(super) wakeup: Arc<Wakeup>,
    pub(super) events: Receiver<MachineEvent>,
    pub(super) life: Option<Arc<DebugContext>>,
    pub(super) has_ended: bool,
    /// Whether the guest waits for the first debugger.
    waits: bool,
    /// Whether the listener is not looked at for a while: the host could not let somebody in.
    is_backing_off: bool,
}

/// The debugger's end of a machine. Dropping it sends a debugger away.
#[derive(Debug)]
pub(crate) struct Server {
    events: Sender<MachineEvent>,
    wakeup: Arc<Wakeup>,
    at: GdbAddress,
    waits: bool,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens where `config` says.
    ///
    /// # Errors
    /// The port or the path is taken or cannot be; the host has no threads or descriptors left.
    pub(crate) fn open(config: &GdbConfig) -> Result<Self, Error> {
        let listener = DebugListener::open(&config.at)?;
        let at = listener.address()?;
        let failed = |source: io::Error| Error::Host {
            what: "Cannot start the thread for a debugger".into(),
            source,
        };
        let wakeup = Arc::new(Wakeup::new().map_err(failed)?);
        let (tell, events) = channel();
        let waits = config.wait;
        let server = ServerThread {
            listener,
            wakeup: Arc::clone(&wakeup),
            events,
            life: None,
            has_ended: false,
            waits,
            is_backing_off: false,
        };
        let thread = thread::Builder::new().name("gdb".into()).spawn(move || server.run());
        Ok(Self { events: tell, wakeup, at, waits, thread: Some(thread.map_err(failed)?) })
    }

    /// Where a debugger connects.
    pub(crate) fn address(&self) -> &GdbAddress {
        &self.at
    }

    /// Whether the guest waits for a debugger before its first instruction.
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// A life begins. When this returns, its harts are held where a debugger is there or waited for.
    pub(crate) fn begin(&self, context: Arc<DebugContext>) {
        self.tell(|done| MachineEvent::Begin(context, done));
    }

    /// A life is over: nothing of it is kept when this returns.
    pub(crate) fn over(&self) {
        self.tell(MachineEvent::Over);
    }

    /// The machine has ended with this exit code, which a debugger is told.
    pub(crate) fn end(mut self, code: u8) {
        self.close(code);
    }

    fn tell(&self, events: impl FnOnce(SyncSender<()>) -> MachineEvent) {
        let (done, wait) = sync_channel(1);
        if self.events.send(events(done)).is_ok() {
            self.wakeup.notify();
            // Where the thread has died, it needs no telling.
            let _ = wait.recv();
        }
    }

    fn close(&mut self, code: u8) {
        let Some(thread) = self.thread.take() else { return };
        let _ = self.events.send(MachineEvent::End(code));
        self.wakeup.notify();
        // What it had to do with the guest is over.
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
            if ended == Ended::Closed || self.has_ended {
                return;
            }
        }
    }

    /// Waits for the next debugger while there is a guest; nothing when the machine has ended.
    fn await_debugger(&mut self) -> Option<(Arc<DebugContext>, RspConnection)> {
        loop {
            let mut fds = vec![PollFd::new(&self.wakeup, PollFlags::IN)];
            if self.life.is_some() && !self.is_backing_off {
                fds.push(PollFd::new(&self.listener, PollFlags::IN));
            }
            let limit = self.is_backing_off.then_some(&ACCEPT_BACKOFF);
            match poll(&mut fds, limit) {
                Ok(0) => self.is_backing_off = false,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("No debugger can connect any more: {error}");
                    return None;
                }
            }
            if !self.take_machine_events() {
                return None;
            }
            let Some(context) = self.life.clone().filter(|_| !self.is_backing_off) else {
                continue;
            };
            match self.listener.accept() {
                Ok(Some(fd)) => {
                    return Some((context, RspConnection::new(fd, Arc::clone(&self.wakeup))));
                }
                Ok(None) => {}
                Err(error) => {
                    info!("A debugger cannot be let in: {error}");
                    self.is_backing_off = true;
                }
            }
        }
    }

    /// Takes what the machine's thread has to say; false where the machine has ended.
    fn take_machine_events(&mut self) -> bool {
        self.wakeup.clear();
        while let Ok(events) = self.events.try_recv() {
            match events {
                MachineEvent::Begin(context, done) => {
                    if self.waits {
                        context.control.hold();
                    }
                    self.life = Some(context);
                    let _ = done.send(());
                }
                MachineEvent::Over(done) => {
                    self.life = None;
                    let _ = done.send(());
                }
                MachineEvent::End(_) => return false,
            }
        }
        true
    }
}
