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

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::button::Button;
use crate::config::{OnReset, VmConfig};
use crate::error::Error;
use crate::host::Linux;
use crate::io_loop::IoLoop;
use crate::kvm;
use crate::memory;
use crate::signals::Signals;
use crate::terminal::{self, Console};
use crate::vcpu::spawn_hart;
use crate::vcpu::stop::StopReason;

mod attach;
mod build;
mod handle;
mod irqchip;
mod load;
mod shared_console;
#[cfg(test)]
mod tests;
mod tree;
pub mod vm;

use build::{Board, Ends};
pub use handle::Handle;
use load::Files;
pub use rvmm_devices::virtio::balloon::BalloonControl;
use shared_console::SharedConsole;
use vm::Hypervisor;

/// How long a guest may take to start until rvmm gives back what memory only that needed. Nothing depends on it but memory.
const GUEST_START: Duration = Duration::from_secs(2);

/// What a machine is built with besides its configuration; [`Parts::default`] is what the command uses.
#[derive(Default)]
pub struct Parts {
    /// The far end of the first UART, instead of what `config.serial` says.
    pub console: Option<Console>,
    /// Who makes the VM; KVM where nothing is given.
    pub hypervisor: Option<Box<dyn Hypervisor>>,
    /// SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the machine; in one with a power button the first SIGTERM presses that
    /// instead, and the guest has `config.grace_s` to power off. They belong to the process: only a program that is nothing
    /// but this machine wants that.
    ///
    /// The memory that only the start of the program needed is given back then, too.
    pub signals: bool,
}

/// A virtual machine that is built and not yet running.
pub struct Machine {
    config: VmConfig,
    host: Box<dyn Hypervisor>,
    ends: Ends,
    pty: Option<std::path::PathBuf>,
    signals: Option<Signals>,
    handle: Handle,
    board: Board,
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
        let config = config.validate()?.into_inner();
        // The user's files come first: a wrong one is found before the host is asked for anything and the terminal changes.
        let files = Files::open(&config)?;
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
        let ends = Ends { console, button, balloon: handle.balloon().clone(), host: linux };
        let board = Board::build(&config, &files, host.as_ref(), &ends)?;
        Ok(Self { config, host, ends, pty, signals, handle, board })
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

    /// Runs the guest until it stops for good; a reset restarts it in place where the configuration says so.
    ///
    /// # Errors
    /// The host fails to start a thread or the event loop, or a restart finds a file or the host changed.
    pub fn run(self) -> Result<StopReason, Error> {
        let Self { config, host, ends, signals, handle, mut board, .. } = self;
        loop {
            let callers = signals.map(|signals| (signals, ends.button.clone()));
            let reason = live(board, &config, &handle, callers)?;
            if reason != StopReason::Reset || config.on_reset == OnReset::Exit {
                return Ok(reason);
            }
            log::info!("The guest restarts");
            let files = Files::open(&config)?;
            board = Board::build(&config, &files, host.as_ref(), &ends)?;
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

/// One life of the guest: from letting the harts go until all threads have ended.
fn live(
    mut board: Board,
    config: &VmConfig,
    handle: &Handle,
    callers: Option<(Signals, Option<Arc<Button>>)>,
) -> Result<StopReason, Error> {
    let alone = callers.is_some();
    let mut io =
        IoLoop::new(Arc::clone(&board.bus)).map_err(|e| host_error("make the event loop", e))?;
    if let Some((signals, button)) = callers {
        let stopper = handle.clone();
        io.watch_signals(signals, Arc::new(move || stopper.stop()))
            .and_then(|()| button.map_or(Ok(()), |button| io.watch_button(button)))
            .map_err(|e| host_error("watch signals", e))?;
    }
    let io = io.spawn().map_err(|e| host_error("start the event loop", e))?;
    let mut threads = Vec::new();
    let mut failed = None;
    for hart in board.harts.drain(..) {
        let pinned =
            config.cpus.affinity.iter().find(|(id, _)| *id == hart.id()).map(|(_, cpu)| *cpu);
        let what = format!("start hart {}", hart.id());
        match spawn_hart(hart, Arc::clone(&board.world), Arc::clone(&board.control), pinned) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                failed = Some(host_error(&what, error));
                board.control.stop(StopReason::HostFailure(what));
                break;
            }
        }
    }
    handle.enter(&board.control);
    board.control.start();
    if alone {
        // What only the start needed is not the guest's cost; it comes back where it is needed after all. Once for rvmm's own
        // start, and once for the guest's, which has asked for things that it will hardly ask for again.
        memory::drop_start_up();
        if !board.control.ends_within(GUEST_START) {
            memory::drop_start_up();
        }
    }
    let reason = board.control.wait();
    for thread in threads {
        // A hart that panicked has already stopped the machine with that reason.
        let _ = thread.join();
    }
    handle.leave();
    io.stop(IoLoop::DRAIN).map_err(|e| host_error("end the event loop", e))?;
    failed.map_or(Ok(reason), Err)
}

fn host_error(what: &str, source: std::io::Error) -> Error {
    Error::Host { what: format!("Cannot {what}"), source }
}
