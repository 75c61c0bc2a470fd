//! Saving a paused machine, and continuing a saved one.

use std::error::Error as _;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::build::{Backends, Board, Run, RunFacts, has_closed_counters};
use super::origin::{Continuation, now_ns};
use super::{Machine, host_error};
use crate::config::{IrqchipChoice, ValidConfig, VmConfig};
use crate::error::{Error, VmError};
use crate::gdb::DebugContext;
use crate::hypervisor::{RAM_SLOT, Vm};
use crate::memory::{GuestRam, PAGE, append};
use crate::snapshot::{DiskIdentity, Parent, SavedMachine};
use crate::vcpu::Wakeups;
use crate::vcpu::hart::Hart;

/// The memory of a machine, as the guest sees it: without a debugger's breakpoints. It may be read while the guest runs.
pub(crate) struct MachineMemory {
    /// Released before the memory that it has mapped.
    vm: Arc<dyn Vm>,
    debugger: Option<Arc<DebugContext>>,
    ram: Arc<GuestRam>,
}

impl MachineMemory {
    /// Size of RAM in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.ram.span().size
    }

    /// True if RAM is in huge pages of the host's pool.
    pub(crate) fn is_huge(&self) -> bool {
        self.ram.is_huge()
    }

    /// The ranges that may hold other bytes than zeroes ([`GuestRam::occupied`]).
    pub(crate) fn occupied(&self) -> io::Result<Vec<Range<u64>>> {
        self.ram.occupied()
    }

    /// RAM itself, of a machine at rest; `None` if a debugger has put breakpoints into it.
    pub(crate) fn resting(&self) -> Option<&GuestRam> {
        self.debugger.is_none().then_some(&*self.ram)
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

    /// The ranges that were written since the last call, by the guest or by rvmm. The machine's writes are tracked.
    ///
    /// # Errors
    /// They are not tracked, or the kernel cannot tell.
    pub(crate) fn take_dirty(&self) -> io::Result<Vec<Range<u64>>> {
        let own = self.ram.take_written();
        let guests = self.vm.dirty_pages(RAM_SLOT)?;
        if own.len() != guests.len() {
            return Err(io::Error::other("the writes of devices are not recorded"));
        }
        Ok(ranges_of(guests.into_iter().zip(own).map(|(guests, own)| guests | own), self.size()))
    }
}

/// The ranges of the pages whose bits are set, 64 in a word, in a RAM of this size.
fn ranges_of(words: impl Iterator<Item = u64>, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (word, first) in words.zip((0..).step_by(64)) {
        let mut left = word;
        while left != 0 {
            let page = first + u64::from(left.trailing_zeros());
            left &= left - 1;
            append(&mut ranges, page * PAGE..(page + 1) * PAGE);
        }
    }
    ranges.retain(|range| range.end <= size);
    ranges
}

/// Whether the machine's writes to its memory are tracked, and since when.
#[derive(Default)]
pub(super) struct Tracking {
    is_on: bool,
    /// The snapshot that has the memory of the moment since which writes are tracked.
    base: Option<Parent>,
    /// Number of differences begun: a base that was begun before another one is no base any more.
    begun: u64,
}

impl Machine {
    /// The state of the machine, which is paused, without its RAM, and access to that.
    ///
    /// # Errors
    /// A part of the state is out of reach: of a device, of emulated firmware, or of a guest that has suspended itself.
    pub(crate) fn save(&self) -> Result<(SavedMachine, MachineMemory), Error> {
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
        Ok((state, self.memory()))
    }

    /// Access to the memory.
    pub(crate) fn memory(&self) -> MachineMemory {
        let debugger = self.run.as_ref().and_then(|run| run.debug_context.clone());
        let (vm, ram) = (Arc::clone(&self.board.vm), Arc::clone(&self.board.ram));
        MachineMemory { vm, debugger, ram }
    }

    /// Begins or ends the tracking of writes to the memory. The machine is paused for a moment. Without it there is no base.
    ///
    /// # Errors
    /// The machine ends, a device does not come to rest, or the kernel refuses.
    pub(crate) fn track(&mut self, on: bool) -> Result<(), Error> {
        if self.tracking.is_on == on {
            return Ok(());
        }
        let pause = self.board.control.pause();
        let _pause = pause.ok_or_else(|| cannot_save("it ends"))?;
        let was_paused = self.are_devices_paused;
        if !was_paused {
            self.pause_devices().map_err(|error| Error::Device(error.to_string()))?;
        }
        self.tracking = Tracking { begun: self.tracking.begun, ..Tracking::default() };
        self.board.ram.record_writes(on);
        let logged = self.board.vm.log_dirty(RAM_SLOT, on);
        if !was_paused {
            self.resume_devices();
        }
        logged?;
        self.tracking.is_on = on;
        Ok(())
    }

    /// Gives up the locks of the disks' files. The machine is paused until [`Machine::take_disks_back`], or ends.
    pub(crate) fn lend_disks(&self) {
        self.backends.host.release_locks();
    }

    /// Takes the locks of the disks' files again.
    ///
    /// # Errors
    /// Another program uses a disk, which is named.
    pub(crate) fn take_disks_back(&self) -> Result<(), Error> {
        self.backends.host.retake_locks().map_err(|error| Error::Device(error.to_string()))
    }

    /// Begins a difference: returns its base, if there is one, and its number. Until [`Machine::set_base`] there is no base.
    pub(crate) fn begin_difference(&mut self) -> (Option<Parent>, u64) {
        self.tracking.begun += 1;
        (self.tracking.base.take(), self.tracking.begun)
    }

    /// Makes a snapshot the base of the next difference, unless another difference was begun since.
    pub(crate) fn set_base(&mut self, base: Parent, begun: u64) {
        if self.tracking.is_on && self.tracking.begun == begun {
            self.tracking.base = Some(base);
        }
    }
}

fn cannot_save(reason: &str) -> Error {
    Error::Config(format!("Cannot save the machine: {reason}"))
}

impl Board {
    /// Puts a saved machine in the place of one that starts: memory, harts and devices continue where they were, but for the generation ID,
    /// which is a new one where others may continue from the same state. The devices are paused.
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
        let origin = &from.origin;
        let filling = from.fill(self)?;
        let SavedMachine { mut vm, devices, .. } = origin.machine().clone();
        vm.time = vm.time.wrapping_add(from.ticks_missed(timebase_hz));
        let interrupted = self.vm.restore(&vm).map_err(|error| match error.source() {
            Some(source) => origin.refused(format_args!("{error}: {source}")),
            None => origin.refused(&error),
        })?;
        self.bus.restore(devices).map_err(|error| origin.refused(&error))?;
        if origin.may_be_copied() {
            // Other copies may run already, with the same random numbers.
            let renewed = backends.generation.renew();
            renewed.map_err(|e| host_error("renew the generation ID", e))?;
        }
        self.vm
            .code_changed()
            .map_err(|e| VmError::io("Cannot make the guest's code visible to the harts", e))?;
        let facts = RunFacts { timebase_hz, opens_counters, firmware: None };
        let mut run = self.connect(config, backends, harts, facts)?;
        run.filling = filling;
        if let Some(context) = Arc::get_mut(&mut run.context).filter(|_| !interrupted.is_empty()) {
            context.wakeups = Some(Wakeups::new(interrupted));
        }
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_ranges_of_pages_inside_ram() {
        let words = [0b1011, 0, 1 << 63, 1];
        let ranges = ranges_of(words.into_iter(), 193 * PAGE);
        assert_eq!(ranges, [0..2 * PAGE, 3 * PAGE..4 * PAGE, 191 * PAGE..193 * PAGE]);
        assert_eq!(ranges_of(words.into_iter(), 64 * PAGE).len(), 2);
    }
}
