//! The machine: built in boot order, run by one thread per hart, stopped with a reason.
//!
//! ```no_run
//! use rvmm::config::VmConfig;
//! use rvmm::machine::Machine;
//!
//! let mut config = VmConfig::default();
//! config.boot.kernel = Some("Image".into());
//! let reason = Machine::build(config.validate()?)?.run()?;
//! println!("{reason}");
//! # Ok::<(), rvmm::error::Error>(())
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::button::Button;
use crate::config::{GdbAddress, OnReset, ValidConfig, VmConfig};
use crate::error::{EXIT_OK, Error};
use crate::gdb;
use crate::host::Linux;
use crate::inspect::InspectionServer;
use crate::io_loop::IoLoop;
use crate::kvm;
use crate::memory;
use crate::signals::Signals;
use crate::terminal::{self, Console};
use crate::trace::{DeviceMap, Plan, Trace};
use crate::vcpu::hart::Hart;
use crate::vcpu::observer::ExitObserver;
use crate::vcpu::record::Unrecorded;
use crate::vcpu::spawn_hart;
use crate::vcpu::stop::StopReason;

mod attach;
mod build;
mod fdt;
mod firmware;
mod handle;
mod inspector;
mod irqchip;
mod load;
mod shared_console;
mod stall;
#[cfg(test)]
mod tests;

use crate::hypervisor::Hypervisor;
use build::{Backends, Board};
pub use handle::Handle;
use inspector::Inspector;
use load::Files;
pub use rvmm_devices::virtio::balloon::BalloonControl;
use shared_console::SharedConsole;
use stall::StallWatch;

/// Time after which rvmm frees the memory that only the guest's start needed. Only memory use depends on it.
const GUEST_START: Duration = Duration::from_secs(2);

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

/// A virtual machine that is built and not yet running.
pub struct Machine {
    config: ValidConfig,
    host: Box<dyn Hypervisor>,
    backends: Backends,
    pty: Option<PathBuf>,
    signals: Option<Signals>,
    handle: Handle,
    debugger: Option<gdb::Server>,
    files: Files,
    board: Board,
    observers: Observers,
}

/// Trace and inspection, which change nothing in the machine.
#[derive(Default)]
struct Observers {
    trace: Option<Trace>,
    inspection: Option<(Arc<Inspector>, Arc<InspectionServer>)>,
}

/// A virtual machine that runs on threads of its own.
pub struct Running {
    handle: Handle,
    thread: JoinHandle<Result<StopReason, Error>>,
}

impl Machine {
    /// Builds the machine that `config` describes on this host's KVM, with the console that it names.
    ///
    /// # Errors
    /// A file cannot be used, or the host lacks a resource: see [`Error`].
    pub fn build(config: ValidConfig) -> Result<Self, Error> {
        Self::build_with(config, Parts::default())
    }

    /// As [`Machine::build`], with some parts given.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn build_with(mut config: ValidConfig, parts: Parts) -> Result<Self, Error> {
        // The user's files come first: a wrong one is found before the host's resources are used and the terminal changes.
        let mut files = Files::open(&config)?;
        let handle = Handle::new().map_err(|e| host_error("create the machine's control", e))?;
        let host = match parts.hypervisor {
            Some(host) => host,
            None => Box::new(kvm::open()?),
        };
        // Before the terminal changes: from here on no signal ends the process without restoring it.
        let signals = parts.signals.then(IoLoop::take_signals).transpose();
        let signals = signals.map_err(|e| host_error("take over the process's signals", e))?;
        let stopper = handle.clone();
        let console = match parts.console {
            Some(console) => console,
            None => terminal::open(&config.serial, Arc::new(move || stopper.stop()))?,
        };
        let Console { backend, pty } = console;
        let console = SharedConsole::new(backend);
        let button = signals.and_then(|_| config.shutdown_timeout());
        let button = button.map(Button::new).transpose();
        let button = button.map_err(|e| host_error("create the power button", e))?.map(Arc::new);
        let stopper = handle.clone();
        let linux = Arc::new(Linux::new(Arc::new(move || stopper.stop())));
        let backends = Backends {
            console,
            button,
            balloon: handle.balloon().clone(),
            host: linux,
            observer: parts.observer,
        };
        let debugger = config.gdb.as_ref().map(gdb::Server::open).transpose()?;
        let board = Board::build(&config, &files, host.as_ref(), &backends)?;
        files.free_uncompressed();
        // The tree is written once: a reboot does not use paths, and the tree is the same.
        config.forget_tree_file();
        let trace = trace(&config, &board)?;
        let inspection = parts.socket.and_then(|path| inspection(&config.name, &path));
        let observers = Observers { trace, inspection };
        Ok(Self { config, host, backends, pty, signals, handle, debugger, files, board, observers })
    }

    /// A handle that stops, pauses and resumes the machine from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The pseudo terminal of the console, where there is one.
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// The address a debugger connects to, and true if the guest waits for it; `None` without a debugger. The port is the actual one
    /// where the configuration leaves it open.
    #[must_use]
    pub fn debugger(&self) -> Option<(&GdbAddress, bool)> {
        self.debugger.as_ref().map(|server| (server.address(), server.waits()))
    }

    /// Runs the guest until it stops for good; a reset restarts it in place where the configuration says so.
    ///
    /// # Errors
    /// The host fails to start a thread or the event loop, a reboot fails since a file or the host has changed, or the trace of a
    /// guest that ended well could not be written completely.
    pub fn run(self) -> Result<StopReason, Error> {
        let Self {
            config,
            host,
            backends,
            signals,
            handle,
            debugger,
            mut files,
            mut board,
            observers,
            ..
        } = self;
        loop {
            let signals = signals.map(|signals| (signals, backends.button.clone()));
            let context = RunContext {
                handle: &handle,
                debugger: debugger.as_ref(),
                observers: &observers,
                signals,
            };
            let reason = run_board(board, &config, context)?;
            if reason != StopReason::Reset || config.on_reset == OnReset::Exit {
                if let Some(debugger) = debugger {
                    debugger.end(reason.exit_code());
                }
                return ended(reason, observers.trace);
            }
            log::info!("The guest restarts");
            files.uncompress_again()?;
            board = Board::build(&config, &files, host.as_ref(), &backends)?;
            files.free_uncompressed();
        }
    }

    /// As [`Machine::run`], on a thread named `machine`.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start(self) -> Result<Running, Error> {
        let handle = self.handle();
        let thread = thread::Builder::new().name("machine".into()).spawn(move || self.run());
        Ok(Running {
            handle,
            thread: thread.map_err(|e| host_error("start the thread of a machine", e))?,
        })
    }
}

impl Running {
    /// A handle that stops, pauses and resumes the machine from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until the machine has stopped and its threads have ended.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn wait(self) -> Result<StopReason, Error> {
        let panicked = || Ok(StopReason::HostFailure("the machine's thread panicked".into()));
        self.thread.join().unwrap_or_else(|_| panicked())
    }
}

/// The parts of a running machine that are not part of its board.
struct RunContext<'a> {
    handle: &'a Handle,
    debugger: Option<&'a gdb::Server>,
    /// The process's signals, and the button that the first SIGTERM presses.
    signals: Option<(Signals, Option<Arc<Button>>)>,
    observers: &'a Observers,
}

/// The result of a machine. A failure of the guest takes precedence over one of its trace.
fn ended(reason: StopReason, trace: Option<Trace>) -> Result<StopReason, Error> {
    match trace.map_or(Ok(()), Trace::finish) {
        Err(error) if reason.exit_code() == EXIT_OK => Err(error),
        _ => Ok(reason),
    }
}

/// Runs the guest once: from the start of the harts until all threads have ended.
fn run_board(
    mut board: Board,
    config: &VmConfig,
    context: RunContext<'_>,
) -> Result<StopReason, Error> {
    let RunContext { handle, debugger, signals, observers } = context;
    let owns_process = signals.is_some();
    let mut io =
        IoLoop::new(Arc::clone(&board.bus)).map_err(|e| host_error("create the event loop", e))?;
    if let Some((signals, button)) = signals {
        let stopper = handle.clone();
        io.watch_signals(signals, Arc::new(move || stopper.stop()))
            .and_then(|()| button.map_or(Ok(()), |button| io.watch_power_button(button)))
            .map_err(|e| host_error("watch signals", e))?;
    }
    if let Some((inspector, server)) = &observers.inspection {
        io.watch_external(Arc::clone(server) as _)
            .map_err(|e| host_error("watch the inspection socket", e))?;
        inspector.enter(&board, config.cpus.count);
    }
    let control = Arc::clone(&board.control);
    io.watch_failure(Box::new(move |what| {
        control.stop(StopReason::HostFailure(what));
    }));
    let io = io.spawn().map_err(|e| host_error("start the event loop", e))?;
    let watch = StallWatch::new(board.vm.as_ref());
    let mut threads = Vec::new();
    let mut failed = None;
    for hart in std::mem::take(&mut board.harts) {
        let what = format!("start hart {}", hart.id());
        match start_hart(hart, &board, config, observers.trace.as_ref()) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                failed = Some(host_error(&what, error));
                board.control.stop(StopReason::HostFailure(what));
                break;
            }
        }
    }
    handle.enter(&board.control);
    let debugged = debugger.zip(board.debug_context.take());
    let debugger = debugged.map(|(server, debug_context)| {
        server.begin(debug_context);
        server
    });
    board.control.start();
    if owns_process {
        // Frees the memory that only the start needed; it is loaded again where it is needed after all. Once after rvmm's own
        // start, and once after the guest's, whose requests are hardly repeated.
        memory::discard_startup_pages();
        if !board.control.ends_within(GUEST_START) {
            memory::discard_startup_pages();
        }
    }
    if let Some(watch) = watch {
        watch.run(board.vm.as_ref(), &board.control);
    }
    let reason = board.control.wait();
    for thread in threads {
        // A hart that panicked has already stopped the machine with that reason.
        let _ = thread.join();
    }
    handle.leave();
    if let Some((inspector, _)) = &observers.inspection {
        inspector.leave();
    }
    if let Some(debugger) = debugger {
        debugger.over();
    }
    let is_forced = failed.is_some() || matches!(reason, StopReason::Requested);
    let drain = if is_forced { IoLoop::DRAIN } else { IoLoop::LONG_DRAIN };
    io.stop(drain).map_err(|e| host_error("end the event loop", e))?;
    failed.map_or(Ok(reason), Err)
}

/// Starts a hart's thread, with a recorder where there is a trace.
fn start_hart(
    hart: Box<dyn Hart>,
    board: &Board,
    config: &VmConfig,
    trace: Option<&Trace>,
) -> io::Result<JoinHandle<()>> {
    let (id, world, control) = (hart.id(), Arc::clone(&board.world), Arc::clone(&board.control));
    let pinned = config.cpus.affinity.iter().find(|(hart, _)| *hart == id).map(|(_, cpu)| *cpu);
    match trace.and_then(|trace| trace.recorder(id)) {
        None => spawn_hart(hart, world, control, pinned, Unrecorded),
        Some(recorder) => spawn_hart(hart, world, control, pinned, recorder),
    }
}

/// Opens the machine's inspection socket. The machine also runs without it.
fn inspection(name: &str, path: &Path) -> Option<(Arc<Inspector>, Arc<InspectionServer>)> {
    let inspector = Arc::new(Inspector::new(name));
    match InspectionServer::open(path, Arc::clone(&inspector) as _) {
        Ok(server) => Some((inspector, Arc::new(server))),
        Err(error) => {
            log::warn!("Inspection socket unavailable: {error}");
            None
        }
    }
}

/// Starts the trace that the configuration asks for.
fn trace(config: &VmConfig, board: &Board) -> Result<Option<Trace>, Error> {
    let Some(wanted) = &config.trace else { return Ok(None) };
    let (name, harts) = (config.name.clone(), config.cpus.count);
    let plan = Plan { name, harts, ticks: board.vm.ticks()?, places: DeviceMap::of(&board.bus) };
    Trace::start(wanted, plan).map(Some)
}

fn host_error(what: &str, source: io::Error) -> Error {
    Error::Host { what: format!("Cannot {what}"), source }
}
