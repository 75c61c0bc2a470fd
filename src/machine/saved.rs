//! Saving a paused machine, and continuing a saved one.

use std::error::Error as _;
use std::fmt::Display;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Machine;
use super::build::{Backends, Board, Run, RunFacts, has_closed_counters};
use crate::config::{IrqchipChoice, ValidConfig, VmConfig};
use crate::error::{Error, VmError};
use crate::gdb::DebugContext;
use crate::memory::GuestRam;
use crate::snapshot::{DiskIdentity, SavedMachine, Snapshot};
use crate::vcpu::Wakeups;
use crate::vcpu::hart::Hart;

/// The memory of a paused machine, as the guest sees it: without a debugger's breakpoints.
pub(crate) struct SavedMemory {
    ram: Arc<GuestRam>,
    debugger: Option<Arc<DebugContext>>,
}

impl SavedMemory {
    /// Size of RAM in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.ram.span().size
    }

    /// The ranges that may hold other bytes than zeroes ([`GuestRam::occupied`]).
    pub(crate) fn occupied(&self) -> io::Result<Vec<Range<u64>>> {
        self.ram.occupied()
    }

    /// Reads RAM at an offset from its start.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let addr = self.ram.span().base.saturating_add(offset);
        let read = match &self.debugger {
            Some(debugger) => debugger.read(addr, bytes),
            None => self.ram.read(addr, bytes),
        };
        read.map_err(|error| io::Error::other(self.ram.explain(error)))
    }
}

/// How a machine continues from a snapshot.
pub(crate) struct Continuation {
    /// What was saved.
    pub(crate) snapshot: Snapshot,
    /// The guest's time goes on as if it had run meanwhile.
    pub(crate) follows_wall_clock: bool,
}

impl Continuation {
    /// Ticks by which the guest's time goes on at once.
    fn ticks_missed(&self, timebase_hz: u64) -> u64 {
        if !self.follows_wall_clock {
            return 0;
        }
        let elapsed = now_ns().saturating_sub(self.snapshot.machine().saved_at_ns);
        let ticks = u128::from(elapsed) * u128::from(timebase_hz) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    fn refused(&self, error: &dyn Display) -> Error {
        let folder = self.snapshot.folder().display();
        Error::Snapshot(format!("Cannot use the snapshot {folder}: {error}"))
    }
}

/// Nanoseconds since 1970 (UTC).
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl Machine {
    /// The state of the machine, which is paused, without its RAM, and access to that.
    ///
    /// # Errors
    /// A part of the state is out of reach: of a device, of emulated firmware, or of a guest that has suspended itself.
    pub(crate) fn save(&self) -> Result<(SavedMachine, SavedMemory), Error> {
        let Some(run) = &self.run else { return Err(cannot_save("it is not running")) };
        if run.context.firmware.is_some() {
            return Err(cannot_save(
                "it emulates firmware (--sbi-v01, --timer user, --csr, --start-mode vu), whose state is in the guest's code",
            ));
        }
        if self.board.control.is_suspended() {
            return Err(cannot_save(
                "the guest has suspended itself, and the kernel does not show where it continues (wake it up first)",
            ));
        }
        if run.debug_context.as_ref().is_some_and(|context| context.is_stepping()) {
            return Err(cannot_save("a debugger makes a step (try again)"));
        }
        let failed = |e| VmError::io("Cannot read the state of the virtual machine", e);
        let starting = self.board.vm.starting().map_err(failed)?;
        if !starting.is_empty() {
            return Err(cannot_save(&format!("harts {starting:?} are about to start (try again)")));
        }
        let vm = self.board.vm.save().map_err(failed)?;
        let devices = self.board.bus.save().map_err(|error| Error::Device(error.to_string()))?;
        let mut config = VmConfig::clone(&self.config);
        let folder = std::env::current_dir().map_err(|source| Error::Host {
            what: "Cannot find the working directory".into(),
            source,
        })?;
        config.make_absolute(&folder);
        // The same controller everywhere, whatever the other host would choose.
        config.irqchip =
            if vm.irqchip.is_some() { IrqchipChoice::Aia } else { IrqchipChoice::Plic };
        // These belong to this process, and would be taken from it.
        (config.trace, config.gdb, config.boot.dump_dtb) = (None, None, None);
        let disks = DiskIdentity::of_config(&config)?;
        let state = SavedMachine { saved_at_ns: now_ns(), config, disks, vm, devices };
        let (ram, debugger) = (Arc::clone(&self.board.ram), run.debug_context.clone());
        Ok((state, SavedMemory { ram, debugger }))
    }
}

fn cannot_save(reason: &str) -> Error {
    Error::Config(format!("Cannot save the machine: {reason}"))
}

impl Board {
    /// Puts a saved machine in the place of one that starts: memory, harts and devices continue where they were. The devices are paused.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for a state that does not fit this host; the board is of no use then.
    pub(super) fn restore(
        &self,
        config: &ValidConfig,
        from: &Continuation,
        backends: &Backends,
        harts: Vec<Box<dyn Hart>>,
    ) -> Result<Run, Error> {
        let timebase_hz = self.vm.cpu_facts()?.timebase_hz;
        let opens_counters = match harts.first() {
            Some(boot) => has_closed_counters(boot.as_ref())?,
            None => false,
        };
        from.snapshot.fill(&self.ram)?;
        let SavedMachine { mut vm, devices, .. } = from.snapshot.machine().clone();
        vm.time = vm.time.wrapping_add(from.ticks_missed(timebase_hz));
        let interrupted = self.vm.restore(&vm).map_err(|error| match error.source() {
            Some(source) => from.refused(&format_args!("{error}: {source}")),
            None => from.refused(&error),
        })?;
        self.bus.restore(devices).map_err(|error| from.refused(&error))?;
        self.vm
            .code_changed()
            .map_err(|e| VmError::io("Cannot make the guest's code visible to the harts", e))?;
        let facts = RunFacts { timebase_hz, opens_counters, firmware: None };
        let mut run = self.connect(config, backends, harts, facts)?;
        if let Some(context) = Arc::get_mut(&mut run.context).filter(|_| !interrupted.is_empty()) {
            context.wakeups = Some(Wakeups::new(interrupted));
        }
        Ok(run)
    }
}
