//! The inspection of a running machine: its counters, registers and page tables.

use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rvmm_devices::Bus;

use super::build::Board;
use crate::hypervisor::{Counters, SHIM_SLOT, Vm};
use crate::inspect::{
    DeviceCount, HartCount, HartRegisters, Inspectable, Query, Reply, Stages, Stat, Walk,
};
use crate::trace::DeviceMap;
use crate::vcpu::firmware::shim;
use crate::vcpu::hart::{Csr, Reg};
use crate::vcpu::{Control, World, registers};

/// Answers queries about one machine, across reboots. A query holds the lock, so that a run is not torn down while it is
/// inspected.
pub(super) struct Inspector {
    name: String,
    now: Mutex<Option<Run>>,
}

/// The current run.
struct Run {
    start: Instant,
    harts: u32,
    counters: Vec<Box<dyn Counters>>,
    vm: Arc<dyn Vm>,
    bus: Arc<Bus>,
    world: Arc<World>,
    control: Arc<Control>,
}

impl Inspector {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.into(), now: Mutex::default() }
    }

    /// Begins a run, whose harts have not run yet.
    pub(super) fn enter(&self, board: &Board, harts: u32) {
        *self.lock() = Some(Run {
            start: Instant::now(),
            harts,
            counters: board.vm.counters(),
            vm: Arc::clone(&board.vm),
            bus: Arc::clone(&board.bus),
            world: Arc::clone(&board.world),
            control: Arc::clone(&board.control),
        });
    }

    /// Ends the run: nothing of it is kept.
    pub(super) fn leave(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Run>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stat(&self, run: &Run) -> Stat {
        let counted = run.bus.counters();
        let read = |counters: &dyn Counters| HartCount {
            hart: counters.hart(),
            counters: counters.read().unwrap_or_default().into_iter().collect(),
        };
        let mut harts: Vec<_> = run.counters.iter().map(|c| read(c.as_ref())).collect();
        if harts.is_empty() {
            let none = |hart| HartCount { hart, ..HartCount::default() };
            harts = (0..run.harts).map(none).collect();
        }
        let devices = run.bus.devices().map(|slot| DeviceCount {
            name: slot.name.into(),
            base: slot.base,
            reads: slot.reads,
            writes: slot.writes,
            refused: slot.refused,
        });
        Stat {
            name: self.name.clone(),
            pid: process::id(),
            age_ns: u64::try_from(run.start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            harts,
            devices: devices.collect(),
            unassigned_reads: counted.unassigned_reads,
            unassigned_writes: counted.unassigned_writes,
        }
    }
}

impl Run {
    fn registers(&self) -> Vec<HartRegisters> {
        let read = |hart| HartRegisters {
            hart,
            registers: registers()
                .map(|(name, reg)| (name.to_owned(), self.vm.reg(hart, reg).ok()))
                .collect(),
        };
        (0..self.harts).map(read).collect()
    }

    fn walk(&self, hart: u32, address: u64) -> Reply {
        let satp = match self.vm.reg(hart, Reg::Csr(Csr::Satp)) {
            Ok(satp) => satp,
            Err(error) => {
                return Reply::Error(format!("Cannot read satp of hart {hart}: {error}"));
            }
        };
        let places = DeviceMap::of(&self.bus);
        let address_bits = self.vm.address_bits();
        let shim = self.world.firmware.is_some().then_some((SHIM_SLOT, shim::PAGE));
        let stages = Stages { ram: &self.world.ram, shim, places: &places, address_bits };
        Reply::Walk(Walk::of(stages, hart, satp, address))
    }

    /// Calls `read` while all harts are out of the guest. A machine that is paused by others, before or meanwhile, stays paused.
    fn paused(&self, read: impl FnOnce() -> Reply) -> Reply {
        let Some(_pause) = self.control.pause() else { return unavailable() };
        read()
    }
}

impl Inspectable for Inspector {
    fn answer(&self, query: Query) -> Reply {
        let now = self.lock();
        let Some(run) = now.as_ref() else { return unavailable() };
        match query {
            Query::Stat => Reply::Stat(self.stat(run)),
            Query::Registers => run.paused(|| Reply::Registers(run.registers())),
            Query::Walk { hart, .. } if hart >= run.harts => {
                Reply::Error(format!("There is no hart {hart} (the last one is {})", run.harts - 1))
            }
            Query::Walk { address, hart } => run.paused(|| run.walk(hart, address)),
        }
    }
}

fn unavailable() -> Reply {
    Reply::Error("The machine is starting, restarting or ending: try again".into())
}
