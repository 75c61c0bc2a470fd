//! A running machine as those see it who look at it from context: what it counts, its registers, its page tables.

use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rvmm_devices::Bus;

use super::build::Board;
use super::hypervisor::{Counters, SHIM_SLOT, Vm};
use crate::inspect::{
    DeviceCount, HartCount, HartRegisters, Inspectable, Query, Reply, Stages, Stat, Walk,
};
use crate::trace::Places;
use crate::vcpu::firmware::shim;
use crate::vcpu::hart::{Csr, Reg};
use crate::vcpu::{Control, World, registers};

/// Answers questions about one machine, over all its lives. A query holds the lock, so that nobody takes a life apart that
/// is being looked at.
pub(super) struct Inspector {
    name: String,
    now: Mutex<Option<Life>>,
}

/// The present life.
struct Life {
    began: Instant,
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

    /// A life begins; its harts have not run yet.
    pub(super) fn enter(&self, board: &Board, harts: u32) {
        *self.lock() = Some(Life {
            began: Instant::now(),
            harts,
            counters: board.vm.counters(),
            vm: Arc::clone(&board.vm),
            bus: Arc::clone(&board.bus),
            world: Arc::clone(&board.world),
            control: Arc::clone(&board.control),
        });
    }

    /// The life is over: nothing of it is kept.
    pub(super) fn leave(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Life>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stat(&self, life: &Life) -> Stat {
        let counted = life.bus.counters();
        let read = |counters: &dyn Counters| HartCount {
            hart: counters.hart(),
            counters: counters.read().unwrap_or_default().into_iter().collect(),
        };
        let mut harts: Vec<_> = life.counters.iter().map(|c| read(c.as_ref())).collect();
        if harts.is_empty() {
            let none = |hart| HartCount { hart, ..HartCount::default() };
            harts = (0..life.harts).map(none).collect();
        }
        let devices = life.bus.devices().map(|slot| DeviceCount {
            name: slot.name.into(),
            base: slot.base,
            reads: slot.reads,
            writes: slot.writes,
            refused: slot.refused,
        });
        Stat {
            name: self.name.clone(),
            pid: process::id(),
            age_ns: u64::try_from(life.began.elapsed().as_nanos()).unwrap_or(u64::MAX),
            harts,
            devices: devices.collect(),
            unassigned_reads: counted.unassigned_reads,
            unassigned_writes: counted.unassigned_writes,
        }
    }
}

impl Life {
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
        let places = Places::of(&self.bus);
        let address_bits = self.vm.address_bits();
        let shim = self.world.firmware.is_some().then_some((SHIM_SLOT, shim::PAGE));
        let stages = Stages { ram: &self.world.ram, shim, places: &places, address_bits };
        Reply::Walk(Walk::of(stages, hart, satp, address))
    }

    /// Calls `look` while all harts are out of the guest. A machine that somebody has paused, or pauses meanwhile, stays paused.
    fn paused(&self, look: impl FnOnce() -> Reply) -> Reply {
        let Some(_pause) = self.control.pause() else { return gone() };
        look()
    }
}

impl Inspectable for Inspector {
    fn answer(&self, query: Query) -> Reply {
        let now = self.lock();
        let Some(life) = now.as_ref() else { return gone() };
        match query {
            Query::Stat => Reply::Stat(self.stat(life)),
            Query::Registers => life.paused(|| Reply::Registers(life.registers())),
            Query::Walk { hart, .. } if hart >= life.harts => Reply::Error(format!(
                "There is no hart {hart} (the last one is {})",
                life.harts - 1
            )),
            Query::Walk { address, hart } => life.paused(|| life.walk(hart, address)),
        }
    }
}

fn gone() -> Reply {
    Reply::Error("The machine is starting, restarting or ending: ask again".into())
}
