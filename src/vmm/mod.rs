//! The controller of a machine: one thread owns it, and everybody else is a client who sends commands.
//!
//! | file | what is in it |
//! |---|---|
//! | `mod.rs` | [`Vmm`]: a machine with its controller, before it runs |
//! | `handle.rs` | [`Handle`]: the clients' side |
//! | `command.rs` | commands and their errors |
//! | `controller.rs` | the controller's thread |
//! | `snapshot.rs`, `restore.rs` | saving a machine in a folder, and continuing it from there |
//! | `migrate.rs`, `throttle.rs` | moving a running machine to another process; slowing its guest down for that |
//!
//! ```text
//!              start            pause, first of them
//!     Built ----------> Running <--------------------> Paused
//!       |                  |       resume, last of them   |
//!       |                  +-- the guest ends, a stop ----+
//!       |                  v
//!       +--- stop ---> Stopping ---> Ended          (a reset comes back to the state before)
//! ```
//!
//! Clients are the command line, signals and Ctrl-A x (which only stop), the inspection socket (`rvmm stat`, `stop`, `snapshot`, ...), and
//! programs that embed rvmm. A debugger works with the harts directly ([`Control`]); the controller tells it when a run begins and ends.
//!
//! ```no_run
//! use rvmm::config::VmConfig;
//! use rvmm::vmm::Vmm;
//!
//! let mut config = VmConfig::default();
//! config.boot.kernel = Some("Image".into());
//! let reason = Vmm::build(config.validate()?)?.run()?;
//! println!("{reason}");
//! # Ok::<(), rvmm::error::Error>(())
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

pub use rvmm_devices::virtio::balloon::BalloonControl;

use crate::config::{GdbAddress, ValidConfig};
use crate::error::{Error, chain};
use crate::inspect::{Inspectable, InspectionServer, Order, Query, Reply};
pub use crate::machine::Parts;
use crate::machine::inspect::unavailable;
use crate::machine::{Continuation, Links, Machine, Origin};
use crate::snapshot::Snapshot;
pub use crate::snapshot::{SnapshotReport, SnapshotRequest};
use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

mod command;
mod controller;
mod handle;
mod migrate;
mod restore;
mod snapshot;
#[cfg(test)]
mod tests;
mod throttle;

use command::Event;
pub use command::{CommandError, DeviceChange};
use controller::Controller;
pub use handle::{Handle, MachineState, Paused};
pub use restore::{NewEnd, RestoreOptions};

/// A machine that is built, and its controller.
pub struct Vmm {
    machine: Machine,
    handle: Handle,
    events: Receiver<Event>,
    /// The guest waits for [`Handle::resume`].
    is_paused: bool,
}

/// A machine whose controller has a thread of its own.
pub struct Running {
    handle: Handle,
    thread: JoinHandle<Result<StopReason, Error>>,
}

impl Vmm {
    /// Builds the machine that `config` describes on this host's KVM, with the console that it names.
    ///
    /// # Errors
    /// A file cannot be used, or the host lacks a resource: see [`Error`].
    pub fn build(config: ValidConfig) -> Result<Self, Error> {
        Self::build_with(config, Parts::default())
    }

    /// As [`Vmm::build`], with some parts given.
    ///
    /// # Errors
    /// As [`Vmm::build`].
    pub fn build_with(config: ValidConfig, parts: Parts) -> Result<Self, Error> {
        Self::connect(parts, |parts, links| Machine::build(config, parts, links))
    }

    /// Builds the machine of a snapshot, with other ends of the host where the options say so. Its guest continues when it is run or
    /// started.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for a snapshot that does not fit this host, or whose disks have changed; the others as for [`Vmm::build`].
    pub fn restore(
        snapshot: Snapshot,
        options: RestoreOptions,
        parts: Parts,
    ) -> Result<Self, Error> {
        let is_paused = options.paused;
        let (config, from) = options.apply(Origin::Snapshot(Box::new(snapshot)))?;
        Ok(Self { is_paused, ..Self::continue_from(config, from, parts)? })
    }

    fn continue_from(config: ValidConfig, from: Continuation, parts: Parts) -> Result<Self, Error> {
        Self::connect(parts, |parts, links| Machine::restore(config, parts, links, &from))
    }

    /// Builds a machine, and connects it to a controller.
    fn connect(
        mut parts: Parts,
        build: impl FnOnce(Parts, Links) -> Result<Machine, Error>,
    ) -> Result<Self, Error> {
        let control = Arc::new(Control::new());
        let (sender, events) = channel();
        let balloon = BalloonControl::new().map_err(|e| host_error("create the balloon", e))?;
        let handle = Handle::new(sender.clone(), Arc::clone(&control), balloon.clone());
        // An error means that the controller has ended.
        let notify = |event: fn() -> Event| {
            let sender = sender.clone();
            move || _ = sender.send(event())
        };
        control.on_stop(Box::new(notify(|| Event::Stopping)));
        let activity = Arc::new(notify(|| Event::Active));
        let socket = parts.socket.take();
        let stopper = handle.clone();
        let stop = Arc::new(move || stopper.stop());
        let links = Links { control, stop, activity, balloon };
        let mut machine = build(parts, links)?;
        if let Some(socket) = socket.and_then(|path| inspection(&path, &handle)) {
            machine.watch_socket(socket);
        }
        Ok(Self { machine, handle, events, is_paused: false })
    }

    /// A handle that controls the machine from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The pseudo terminal of the console, where there is one.
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        self.machine.pty()
    }

    /// The address a debugger connects to, and true if the guest waits for it; `None` without a debugger. The port is the actual one
    /// where the configuration leaves it open.
    #[must_use]
    pub fn debugger(&self) -> Option<(&GdbAddress, bool)> {
        self.machine.debugger()
    }

    /// Runs the guest on this thread until it stops for good; a reset restarts it in place where the configuration says so.
    ///
    /// # Errors
    /// The host fails to start a thread or the event loop, a reset fails, or the trace of a
    /// guest that ended well could not be written completely.
    pub fn run(self) -> Result<StopReason, Error> {
        self.controller().run(true)
    }

    /// As [`Vmm::run`], on a thread named `vmm`. Returns at once.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start(self) -> Result<Running, Error> {
        self.spawn(true)
    }

    /// As [`Vmm::start`], but the guest runs only after [`Handle::start`].
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn launch(self) -> Result<Running, Error> {
        self.spawn(false)
    }

    fn spawn(self, begins: bool) -> Result<Running, Error> {
        let handle = self.handle();
        let controller = self.controller();
        let thread = thread::Builder::new().name("vmm".into());
        let thread = thread.spawn(move || controller.run(begins));
        let thread = thread.map_err(|e| host_error("start the thread of a machine", e))?;
        Ok(Running { handle, thread })
    }

    fn controller(self) -> Controller {
        let Self { machine, handle, events, is_paused } = self;
        Controller::new(machine, handle, events, is_paused)
    }
}

impl Running {
    /// A handle that controls the machine from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until the machine has stopped and its threads have ended.
    ///
    /// # Errors
    /// As [`Vmm::run`].
    pub fn wait(self) -> Result<StopReason, Error> {
        let panicked = || Ok(StopReason::HostFailure("the machine's thread panicked".into()));
        self.thread.join().unwrap_or_else(|_| panicked())
    }
}

/// Opens the machine's inspection socket. The machine also runs without it.
fn inspection(path: &Path, handle: &Handle) -> Option<InspectionServer> {
    InspectionServer::open(path, Arc::new(handle.clone()))
        .inspect_err(|error| log::warn!("Inspection socket unavailable: {error}"))
        .ok()
}

impl Inspectable for Handle {
    fn answer(&self, query: Query) -> Reply {
        self.inspect(query).unwrap_or_else(|_| unavailable())
    }

    fn carry_out(
        &self,
        order: Order,
        attached: Option<OwnedFd>,
        tell: &mut dyn FnMut(&Reply) -> bool,
    ) -> Reply {
        let began = Instant::now();
        let done = |result: Result<(), CommandError>| match result {
            Ok(()) => {
                let took_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                Reply::Done { took_ns }
            }
            Err(error) => Reply::Error(error.to_string()),
        };
        match order {
            Order::Pause => done(self.pause().map(Paused::keep)),
            Order::Resume => done(self.resume()),
            Order::Reset => done(self.reset()),
            Order::PowerButton => done(self.press_power_button()),
            Order::Stop => {
                self.stop();
                done(Ok(()))
            }
            Order::Balloon(bytes) => done(self.change(DeviceChange::BalloonTarget(bytes))),
            Order::Snapshot(request) => match self.snapshot(&request) {
                Ok(report) => Reply::Snapshot(report),
                Err(error) => Reply::Error(chain(&error)),
            },
            Order::Migrate(request) => {
                let Some(socket) = attached else {
                    return Reply::Error("The connection to the other side is missing".into());
                };
                let mut progress = |state: &_| tell(&Reply::Progress(Clone::clone(state)));
                match self.migrate(&request, socket, &mut progress) {
                    Ok(report) => Reply::Migrated(report),
                    Err(error) => Reply::Error(chain(&error)),
                }
            }
        }
    }
}

fn host_error(what: &str, source: io::Error) -> Error {
    Error::Host { what: format!("Cannot {what}"), source }
}
