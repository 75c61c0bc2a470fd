//! The machine: built in boot order, run by one thread per hart, reset in place.
//!
//! | file | what is in it |
//! |---|---|
//! | `mod.rs` | [`Machine`]: its parts, and how it is built |
//! | `run.rs` | a run of the guest: begin, end, reset, pause |
//! | `saved.rs`, `origin.rs` | saving a machine, and continuing a saved one; what it continues from |
//! | `build.rs` | the board: VM, RAM, harts, devices; one step a line |
//! | `attach.rs`, `irqchip.rs`, `fdt.rs` | devices, their interrupt lines, the device tree |
//! | `load.rs` | the user's files |
//! | `firmware.rs` | replacements for firmware in the guest |
//! | `inspect.rs` | counters, registers and page tables of the running guest |
//! | `upkeep.rs` | work at certain times: freeing memory, detecting a stalled guest |
//!
//! The controller ([`crate::vmm`]) owns the machine, and is the only one that calls it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use rvmm_devices::GenerationControl;
use rvmm_devices::virtio::balloon::BalloonControl;

use crate::button::Button;
use crate::config::{GdbAddress, ValidConfig, VmConfig};
use crate::error::Error;
use crate::gdb;
use crate::host::Linux;
use crate::hypervisor::{Counters, Hypervisor};
use crate::inspect::InspectionServer;
use crate::io_loop::{IoLoop, IoThread};
use crate::kvm;
use crate::signals::Signals;
use crate::terminal::{self, Console, StopRequest};
use crate::trace::{DeviceMap, Trace, TracePlan};
use crate::vcpu::Control;
use crate::vcpu::observer::ExitObserver;

mod attach;
mod build;
mod fdt;
mod firmware;
pub(crate) mod inspect;
mod irqchip;
mod load;
mod origin;
mod run;
mod saved;
mod stall;
#[cfg(test)]
pub(crate) mod testing;
mod upkeep;
mod waking_console;

use build::{Backends, Board, Run};
use load::Files;
pub(crate) use origin::{Continuation, Migrated, Origin};
pub(crate) use saved::MachineMemory;
use saved::Tracking;
use upkeep::Upkeep;

/// The parts of a machine besides its configuration; the command uses [`Parts::default`].
#[derive(Default)]
pub struct Parts {
    /// The backend of the first UART, instead of the one that `config.serial` names.
    pub console: Option<Console>,
    /// Creates the VM; KVM by default.
    pub hypervisor: Option<Box<dyn Hypervisor>>,
    /// Receives every exit of every hart.
    pub observer: Option<Arc<dyn ExitObserver>>,
    /// True if SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the machine; with a power button the first SIGTERM presses that
    /// instead, and the guest has `config.shutdown_timeout_s` to power off. Signals belong to the process: this is only for a program that
    /// does nothing but run this machine.
    ///
    /// The memory that only the start of the program needed is freed then, too.
    pub signals: bool,
    /// The path of the Unix socket for inspection by the machine's owner ([`crate::inspect`]). If it cannot be created, a warning is
    /// logged and the machine runs without it.
    pub socket: Option<PathBuf>,
}

/// The controller's connections to the machine that it owns.
pub(crate) struct Links {
    /// Of the harts.
    pub(crate) control: Arc<Control>,
    /// Stops the machine at a user's request, from any thread.
    pub(crate) stop: StopRequest,
    /// Has the controller call [`Machine::note_activity`], from any thread.
    pub(crate) activity: Arc<dyn Fn() + Send + Sync>,
    /// Of the first balloon.
    pub(crate) balloon: BalloonControl,
}

/// How the first run of a machine begins.
enum Beginning<'a> {
    /// Boxed: the other variant is small.
    Start(Box<Files>),
    Continue(&'a Continuation),
}

/// A machine: the board, and its connections to the host, each of which it owns across resets.
pub(crate) struct Machine {
    config: ValidConfig,
    host: Box<dyn Hypervisor>,
    backends: Backends,
    pty: Option<PathBuf>,
    stop: StopRequest,
    activity: Arc<dyn Fn() + Send + Sync>,
    /// Taken by the I/O thread.
    signals: Option<Signals>,
    owns_process: bool,
    socket: Option<Arc<InspectionServer>>,
    debugger: Option<gdb::Server>,
    trace: Option<Trace>,
    /// The files that the guest starts from; `None` in a machine that was restored and has not restarted.
    files: Option<Files>,
    upkeep: Upkeep,
    /// The current or the next run; dropped before the board.
    run: Option<Run>,
    threads: Vec<JoinHandle<()>>,
    /// The hypervisor's counters of the current run.
    counters: Vec<Box<dyn Counters>>,
    /// The host's failure to begin the current run.
    failure: Option<Error>,
    /// Ends before the devices do.
    io: Option<IoThread>,
    are_devices_paused: bool,
    has_departed: bool,
    tracking: Tracking,
    /// The start of the current run.
    begun: Option<Instant>,
    board: Board,
}

impl Machine {
    /// Builds the machine that `config` describes.
    ///
    /// # Errors
    /// A file cannot be used, or the host lacks a resource: see [`Error`].
    pub(crate) fn build(config: ValidConfig, parts: Parts, links: Links) -> Result<Self, Error> {
        // The user's files come first: a wrong one is found before the host's resources are used and the terminal changes.
        let files = Files::open(&config)?;
        Self::assemble(config, parts, links, Beginning::Start(Box::new(files)))
    }

    /// Builds the machine that `config` describes, which is that of a snapshot or the same with other ends of the host, and continues what
    /// was saved. Its devices are paused.
    ///
    /// # Errors
    /// As for [`Machine::build`]; [`Error::Snapshot`] for a state that does not fit this host.
    pub(crate) fn restore(
        config: ValidConfig,
        parts: Parts,
        links: Links,
        from: &Continuation,
    ) -> Result<Self, Error> {
        Self::assemble(config, parts, links, Beginning::Continue(from))
    }

    fn assemble(
        mut config: ValidConfig,
        parts: Parts,
        links: Links,
        beginning: Beginning<'_>,
    ) -> Result<Self, Error> {
        let host = match parts.hypervisor {
            Some(host) => host,
            None => Box::new(kvm::open()?),
        };
        // Before the terminal changes: from here on no signal ends the process without restoring it.
        let signals = parts.signals.then(IoLoop::take_signals).transpose();
        let signals = signals.map_err(|e| host_error("take over the process's signals", e))?;
        let Links { control, stop, activity, balloon } = links;
        let console = match parts.console {
            Some(console) => console,
            None => terminal::open(&config.serial, Arc::clone(&stop))?,
        };
        let Console { backend, pty } = console;
        let button = config.shutdown_timeout().map(Button::new).transpose();
        let button = button.map_err(|e| host_error("create the power button", e))?.map(Arc::new);
        let generation = GenerationControl::new();
        let generation = generation.map_err(|e| host_error("create the generation ID", e))?;
        let mut backends = Backends {
            console: Some(backend),
            button,
            balloon,
            generation,
            host: Arc::new(Linux::new(Arc::clone(&stop))),
            observer: parts.observer,
        };
        let debugger = config.gdb.as_ref().map(gdb::Server::open).transpose()?;
        let (are_devices_paused, ram) = match &beginning {
            Beginning::Start(_) => (false, None),
            Beginning::Continue(from) => (true, from.origin.ram().cloned()),
        };
        let ram = ram.map_or_else(|| Board::ram(&config), Ok)?;
        let built = Board::build(&config, host.as_ref(), &mut backends, &control, ram);
        let (mut board, harts) = match (&beginning, built) {
            (Beginning::Continue(from), Err(Error::Vm(error))) if error.is_lack() => {
                return Err(from.origin.refused(error));
            }
            (_, built) => built?,
        };
        let (run, files) = match beginning {
            Beginning::Start(mut files) => {
                let run = board.load(&config, &files, host.as_ref(), &backends, harts)?;
                files.free_uncompressed();
                (run, Some(*files))
            }
            // Its kernel may not even exist here.
            Beginning::Continue(from) => (board.restore(&config, from, &backends, harts)?, None),
        };
        // The tree is written once: a reset does not use paths, and the tree is the same.
        config.forget_tree_file();
        let trace = trace(&config, &board)?;
        Ok(Self {
            config,
            host,
            backends,
            pty,
            stop,
            activity,
            owns_process: signals.is_some(),
            signals,
            socket: None,
            debugger,
            trace,
            files,
            upkeep: Upkeep::default(),
            run: Some(run),
            threads: Vec::new(),
            counters: Vec::new(),
            failure: None,
            io: None,
            are_devices_paused,
            has_departed: false,
            tracking: Tracking::default(),
            begun: None,
            board,
        })
    }

    /// The configuration.
    pub(crate) fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The pseudo terminal of the console, where there is one.
    pub(crate) fn pty(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// The address a debugger connects to, and true if the guest waits for it; `None` without a debugger.
    pub(crate) fn debugger(&self) -> Option<(&GdbAddress, bool)> {
        self.debugger.as_ref().map(|server| (server.address(), server.waits()))
    }

    /// Watches the inspection socket while the machine runs.
    pub(crate) fn watch_socket(&mut self, socket: InspectionServer) {
        self.socket = Some(Arc::new(socket));
    }

    /// The power button, if SIGTERM presses one.
    pub(crate) fn button(&self) -> Option<&Button> {
        self.backends.button.as_deref()
    }
}

/// Starts the trace that the configuration asks for.
fn trace(config: &VmConfig, board: &Board) -> Result<Option<Trace>, Error> {
    let Some(wanted) = &config.trace else { return Ok(None) };
    let (name, harts) = (config.name.clone(), config.cpus.count);
    let plan =
        TracePlan { name, harts, ticks: board.vm.ticks()?, places: DeviceMap::of(&board.bus) };
    Trace::start(wanted, plan).map(Some)
}

fn host_error(what: &str, source: io::Error) -> Error {
    Error::Host { what: format!("Cannot {what}"), source }
}
