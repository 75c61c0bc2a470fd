//! The inspection of a running machine: its counters, registers and page tables.

use std::process;

use super::Machine;
use crate::hypervisor::{Counters, Irqchip, SHIM_SLOT};
use crate::inspect::{
    BalloonSizes, Description, DeviceCount, GuestState, HartCount, HartRegisters, Query, Reply,
    Stages, Stat, Walk,
};
use crate::trace::DeviceMap;
use crate::vcpu::firmware::shim;
use crate::vcpu::hart::{Csr, Reg};
use crate::vcpu::registers;

impl Machine {
    /// Answers a query about the current run. Registers are read while all harts are out of the guest, for a moment if it is not paused.
    pub(crate) fn inspect(&self, query: Query, state: GuestState) -> Reply {
        let harts = self.config.cpus.count;
        match query {
            Query::Info => Reply::Info(self.describe(state)),
            Query::Stat => Reply::Stat(self.stat()),
            Query::Registers => self.paused(|| Reply::Registers(self.registers())),
            Query::Walk { hart, .. } if hart >= harts => {
                Reply::Error(format!("There is no hart {hart} (the last one is {})", harts - 1))
            }
            Query::Walk { address, hart } => self.paused(|| self.walk(hart, address)),
        }
    }

    fn describe(&self, state: GuestState) -> Description {
        let config = &self.config;
        let balloon = &self.backends.balloon;
        Description {
            name: config.name.clone(),
            pid: process::id(),
            state,
            harts: config.cpus.count,
            memory: config.mem,
            irqchip: match self.board.irqchip {
                Irqchip::Aia(_) => "aia".into(),
                Irqchip::None => "plic".into(),
            },
            kernel: config.boot.kernel.as_ref().map(|path| path.display().to_string()),
            age_ns: self.age_ns(),
            power_button: config.has_device("input"),
            balloon: config
                .has_device("balloon")
                .then(|| BalloonSizes { target: balloon.target(), actual: balloon.actual() }),
        }
    }

    /// Nanoseconds since the last reset.
    fn age_ns(&self) -> u64 {
        let age = self.begun.map(|begun| begun.elapsed()).unwrap_or_default();
        u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)
    }

    fn stat(&self) -> Stat {
        let counted = self.board.bus.counters();
        let read = |counters: &dyn Counters| HartCount {
            hart: counters.hart(),
            counters: counters.read().unwrap_or_default().into_iter().collect(),
        };
        let mut harts: Vec<_> = self.counters.iter().map(|c| read(c.as_ref())).collect();
        if harts.is_empty() {
            let none = |hart| HartCount { hart, ..HartCount::default() };
            harts = (0..self.config.cpus.count).map(none).collect();
        }
        let devices = self.board.bus.devices().map(|slot| DeviceCount {
            name: slot.name.into(),
            base: slot.base,
            reads: slot.reads,
            writes: slot.writes,
            refused: slot.refused,
        });
        Stat {
            name: self.config.name.clone(),
            pid: process::id(),
            age_ns: self.age_ns(),
            harts,
            devices: devices.collect(),
            unassigned_reads: counted.unassigned_reads,
            unassigned_writes: counted.unassigned_writes,
        }
    }

    fn registers(&self) -> Vec<HartRegisters> {
        let vm = &self.board.vm;
        let read = |hart| HartRegisters {
            hart,
            registers: registers()
                .map(|(name, reg)| (name.to_owned(), vm.reg(hart, reg).ok()))
                .collect(),
        };
        (0..self.config.cpus.count).map(read).collect()
    }

    fn walk(&self, hart: u32, address: u64) -> Reply {
        let vm = &self.board.vm;
        let Some(run) = &self.run else { return unavailable() };
        let satp = match vm.reg(hart, Reg::Csr(Csr::Satp)) {
            Ok(satp) => satp,
            Err(error) => {
                return Reply::Error(format!("Cannot read satp of hart {hart}: {error}"));
            }
        };
        let places = DeviceMap::of(&self.board.bus);
        let address_bits = vm.address_bits();
        let shim = run.context.firmware.is_some().then_some((SHIM_SLOT, shim::PAGE));
        let stages = Stages { ram: &run.context.ram, shim, places: &places, address_bits };
        Reply::Walk(Walk::of(stages, hart, satp, address))
    }

    /// Calls `read` while all harts are out of the guest.
    fn paused(&self, read: impl FnOnce() -> Reply) -> Reply {
        let Some(_pause) = self.board.control.pause() else { return unavailable() };
        read()
    }
}

/// The reply of a machine that is not running.
pub(crate) fn unavailable() -> Reply {
    Reply::Error("The machine is starting, restarting or ending: try again".into())
}
