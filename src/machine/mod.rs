//! The machine: built in boot order, run by one thread per hart, ended by a reason.
//!
//! ```no_run
//! use rvmm::config::VmConfig;
//! use rvmm::machine::Machine;
//!
//! let mut config = VmConfig::default();
//! config.boot.kernel = Some("Image".into());
//! let reason = Machine::build(config)?.run()?;
//! println!("{reason}");
//! # Ok::<(), rvmm::error::Error>(())
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::button::Button;
use crate::config::{GdbAddress, OnReset, VmConfig};
use crate::error::{EXIT_OK, Error};
use crate::gdb;
use crate::host::Linux;
use crate::inspect::InspectionServer;
use crate::io_loop::IoLoop;
use crate::kvm;
use crate::memory;
use crate::signals::Signals;
use crate::terminal::{self, Console};
use crate::trace::{Places, Plan, Trace};
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
pub mod hypervisor;
mod inspector;
mod irqchip;
mod load;
mod shared_console;
mod stall;
#[cfg(test)]
mod tests;

use build::{Board, Ends};
pub use handle::Handle;
use hypervisor::Hypervisor;
use inspector::Inspector;
use load::Files;
pub use rvmm_devices::virtio::balloon::BalloonControl;
use shared_console::SharedConsole;
use stall::StallWatch;

/// How long a guest may take to start until rvmm gives back what memory only that needed. Nothing depends on it but memory.
const GUEST_START: Duration = Duration::from_secs(2);

/// What a machine is built with besides its configuration; [`Parts::default`] is what the command uses.
#[derive(Default)]
pub struct Parts {
    /// The far end of the first UART, instead of what `config.serial` says.
    pub console: Option<Console>,
    /// Who makes the VM; KVM where nothing is given.
    pub hypervisor: Option<Box<dyn Hypervisor>>,
    /// Who is told of every exit of every hart.
    pub observer: Option<Arc<dyn ExitObserver>>,
    /// SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the machine; in one with a power button the first SIGTERM presses that
    /// instead, and the guest has `config.grace_s` to power off. They belong to the process: only a program that is nothing
    /// but this machine wants that.
    ///
    /// The memory that only the start of the program needed is given back then, too.
    pub signals: bool,
    /// Where a Unix socket is made through which the machine's owner can look at it ([`crate::inspect`]). Where that fails, the log
    /// says so and the machine runs without.
    pub socket: Option<PathBuf>,
}

/// A virtual machine that is built and not yet running.
pub struct Machine {
    config: VmConfig,
    host: Box<dyn Hypervisor>,
    ends: Ends,
    pty: Option<PathBuf>,
    signals: Option<Signals>,
    handle: Handle,
    debugger: Option<gdb::Server>,
    files: Files,
    board: Board,
    observers: Observers,
}

/// Those who look on: they change nothing in the machine.
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
    /// A file that cannot be used, a host that cannot provide, a configuration that contradicts itself: see [`Error`].
    pub fn build(config: VmConfig) -> Result<Self, Error> {
        Self::build_with(config, Parts::default())
    }

    /// As [`Machine::build`], with some parts given.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn build_with(config: VmConfig, parts: Parts) -> Result<Self, Error> {
        let mut config = config.validate()?.into_inner();
        // The user's files come first: a wrong one is found before the host is asked for anything and the terminal changes.
        let mut files = Files::open(&config)?;
        let handle = Handle::new().map_err(|e| host_error("make the machine's control", e))?;
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
        let button = signals.and_then(|_| config.power_off_patience());
        let button = button.map(Button::new).transpose();
        let button = button.map_err(|e| host_error("make the power button", e))?.map(Arc::new);
        let stopper = handle.clone();
        let linux = Arc::new(Linux::new(Arc::new(move || stopper.stop())));
        let ends = Ends {
            console,
            button,
            balloon: handle.balloon().clone(),
            host: linux,
            observer: parts.observer,
        };
        let debugger = config.gdb.as_ref().map(gdb::Server::open).transpose()?;
        let board = Board::build(&config, &files, host.as_ref(), &ends)?;
        files.rest();
        // It is written once: a restart needs nothing from paths, and the tree is the same.
        config.boot.dump_dtb = None;
        let trace = trace(&config, &board)?;
        let inspection = parts.socket.and_then(|path| inspection(&config.name, &path));
        let observers = Observers { trace, inspection };
        Ok(Self { config, host, ends, pty, signals, handle, debugger, files, board, observers })
    }

    /// What stops, pauses and resumes the machine from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The pseudo terminal of the console, where there is one.
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// Where a debugger may connect, if anywhere, and whether the guest waits for it. The port is the one that was taken where
    /// the configuration leaves it open.
    #[must_use]
    pub fn debugger(&self) -> Option<(&GdbAddress, bool)> {
        self.debugger.as_ref().map(|server| (server.address(), server.waits()))
    }

    /// Runs the guest until it stops for good; a reset restarts it in place where the configuration says so.
    ///
    /// # Errors
    /// The host fails to start a thread or the event loop, a restart finds a file or the host changed, or a guest that ended
    /// well has a trace that could not be written whole.
    pub fn run(self) -> Result<StopReason, Error> {
        let Self {
            config,
            host,
            ends,
            signals,
            handle,
            debugger,
            mut files,
            mut board,
            observers,
            ..
        } = self;
        loop {
            let callers = signals.map(|signals| (signals, ends.button.clone()));
            let context = RunContext {
                handle: &handle,
                debugger: debugger.as_ref(),
                observers: &observers,
                callers,
            };
            let reason = run_board(board, &config, context)?;
            if reason != StopReason::Reset || config.on_reset == OnReset::Exit {
                if let Some(debugger) = debugger {
                    debugger.end(reason.exit_code());
                }
                return ended(reason, observers.trace);
            }
            log::info!("The guest restarts");
            files.wake()?;
            board = Board::build(&config, &files, host.as_ref(), &ends)?;
            files.rest();
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
    /// What stops, pauses and resumes the machine from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until the machine has stopped and its threads have ended.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn wait(self) -> Result<StopReason, Error> {
        let died = || Ok(StopReason::HostFailure("the machine's thread panicked".into()));
        self.thread.join().unwrap_or_else(|_| died())
    }
}

/// Who may want something of a running machine.
struct RunContext<'a> {
    handle: &'a Handle,
    debugger: Option<&'a gdb::Server>,
    /// Signals, and the button that the first one presses.
    callers: Option<(Signals, Option<Arc<Button>>)>,
    observers: &'a Observers,
}

/// How a machine has ended. What the guest came to counts before what became of its trace.
fn ended(reason: StopReason, trace: Option<Trace>) -> Result<StopReason, Error> {
    match trace.map_or(Ok(()), Trace::finish) {
        Err(error) if reason.exit_code() == EXIT_OK => Err(error),
        _ => Ok(reason),
    }
}

/// One life of the guest: from letting the harts go until all threads have ended.
fn run_board(
    mut board: Board,
    config: &VmConfig,
    context: RunContext<'_>,
) -> Result<StopReason, Error> {
    let RunContext { handle, debugger, callers, observers } = context;
    let alone = callers.is_some();
    let mut io =
        IoLoop::new(Arc::clone(&board.bus)).map_err(|e| host_error("make the event loop", e))?;
    if let Some((signals, button)) = callers {
        let stopper = handle.clone();
        io.watch_signals(signals, Arc::new(move || stopper.stop()))
            .and_then(|()| button.map_or(Ok(()), |button| io.watch_button(button)))
            .map_err(|e| host_error("watch signals", e))?;
    }
    if let Some((inspector, server)) = &observers.inspection {
        io.watch_external(Arc::clone(server) as _)
            .map_err(|e| host_error("watch for visitors", e))?;
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
    if alone {
        // What only the start needed is not the guest's cost; it comes back where it is needed after all. Once for rvmm's own
        // start, and once for the guest's, which has asked for things that it will hardly ask for again.
        memory::drop_start_up();
        if !board.control.ends_within(GUEST_START) {
            memory::drop_start_up();
        }
    }
    if let Some(watch) = watch {
        watch.look_on(board.vm.as_ref(), &board.control);
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
    let is_told = failed.is_some() || matches!(reason, StopReason::Requested);
    let drain = if is_told { IoLoop::DRAIN } else { IoLoop::LONG_DRAIN };
    io.stop(drain).map_err(|e| host_error("end the event loop", e))?;
    failed.map_or(Ok(reason), Err)
}

/// Gives a hart its thread, with somebody who looks on where there is a trace.
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

/// The socket through which the machine can be looked at. A machine runs as well without.
fn inspection(name: &str, path: &Path) -> Option<(Arc<Inspector>, Arc<InspectionServer>)> {
    let inspector = Arc::new(Inspector::new(name));
    match InspectionServer::open(path, Arc::clone(&inspector) as _) {
        Ok(server) => Some((inspector, Arc::new(server))),
        Err(error) => {
            log::warn!("Nobody can look at this machine: {error}");
            None
        }
    }
}

/// The trace that the configuration asks for.
fn trace(config: &VmConfig, board: &Board) -> Result<Option<Trace>, Error> {
    let Some(wanted) = &config.trace else { return Ok(None) };
    let (name, harts) = (config.name.clone(), config.cpus.count);
    let plan = Plan { name, harts, ticks: board.vm.ticks()?, places: Places::of(&board.bus) };
    Trace::start(wanted, plan).map(Some)
}

fn host_error(what: &str, source: io::Error) -> Error {
    Error::Host { what: format!("Cannot {what}"), source }
}
