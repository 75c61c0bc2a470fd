//! A hart that runs a few instructions out of guest memory: enough for breakpoints, steps and traps without KVM.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};

use crate::memory::GuestRam;
use crate::riscv::insn::{C_EBREAK, EBREAK, WFI};
use crate::riscv::trap::cause;
use crate::riscv::trap::sstatus::SIE;
use crate::vcpu::exit::{Exit, Fault};
use crate::vcpu::hart::{Csr, Hart, Kick, Reg};
use crate::vcpu::walk::translate;

pub(in crate::gdb) use cause::TIMER_INTERRUPT as TIMER;

/// The state of a running hart that a test reads and changes.
#[derive(Default)]
pub(in crate::gdb) struct HartProbe {
    /// True while a timer interrupt is pending.
    pub(in crate::gdb) timer: AtomicBool,
    pub(in crate::gdb) traps_ebreaks: AtomicBool,
    kicked: Mutex<bool>,
    changed: Condvar,
    /// Current value of x10.
    a0: Mutex<u64>,
}

impl HartProbe {
    /// Waits until x10 differs from `before`.
    pub(in crate::gdb) fn await_a0(&self, before: u64) -> u64 {
        let a0 = self.a0.lock().unwrap();
        *self.changed.wait_while(a0, |a0| *a0 == before).unwrap()
    }

    pub(in crate::gdb) fn a0(&self) -> u64 {
        *self.a0.lock().unwrap()
    }
}

impl Kick for HartProbe {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

pub(in crate::gdb) struct TinyHart {
    id: u32,
    ram: Arc<GuestRam>,
    regs: HashMap<String, u64>,
    probe: Arc<HartProbe>,
}

impl TinyHart {
    pub(in crate::gdb) fn new(
        id: u32,
        ram: &Arc<GuestRam>,
        pc: u64,
        probe: &Arc<HartProbe>,
    ) -> Self {
        let mut hart =
            Self { id, ram: Arc::clone(ram), regs: HashMap::new(), probe: Arc::clone(probe) };
        hart.put(Reg::Pc, pc);
        hart.put(Reg::Mode, 1);
        hart
    }

    fn value(&self, reg: Reg) -> u64 {
        self.regs.get(&format!("{reg:?}")).copied().unwrap_or(0)
    }

    fn put(&mut self, reg: Reg, value: u64) {
        if reg == Reg::X(0) {
            return;
        }
        self.regs.insert(format!("{reg:?}"), value);
        if reg == Reg::X(10) {
            *self.probe.a0.lock().unwrap() = value;
            self.probe.changed.notify_all();
        }
    }

    fn csr(&self, csr: Csr) -> u64 {
        self.value(Reg::Csr(csr))
    }

    fn trap(&mut self, cause: u64) {
        self.put(Reg::Csr(Csr::Scause), cause);
        self.put(Reg::Csr(Csr::Sepc), self.value(Reg::Pc));
        self.put(Reg::Csr(Csr::Sstatus), self.csr(Csr::Sstatus) & !SIE);
        self.put(Reg::Pc, self.csr(Csr::Stvec) & !3);
    }

    fn half(&self, va: u64) -> Option<u16> {
        let addr = translate(&self.ram, self.csr(Csr::Satp), va).ok()?;
        let mut bytes = [0; 2];
        self.ram.read(addr, &mut bytes).ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    /// Runs one instruction; false if it is one that waits.
    fn run(&mut self) -> Result<bool, Exit<'static>> {
        let is_enabled = self.csr(Csr::Sie) != 0 && self.csr(Csr::Sstatus) & SIE != 0;
        if is_enabled && self.probe.timer.load(SeqCst) {
            self.trap(TIMER);
        }
        let pc = self.value(Reg::Pc);
        let Some(low) = self.half(pc) else { return Err(Exit::Fault(Fault::Unemulated)) };
        let high = self.half(pc.wrapping_add(2)).unwrap_or(0);
        let word = u32::from(high) << 16 | u32::from(low);
        let x = |number: u32| self.value(Reg::X((number & 31) as u8));
        let imm = i64::from(word.cast_signed() >> 20);
        match word {
            _ if low == C_EBREAK || word == EBREAK => {
                if self.probe.traps_ebreaks.load(SeqCst) {
                    return Err(Exit::Debug);
                }
                self.trap(3);
            }
            // c.nop
            _ if low == 1 => self.put(Reg::Pc, pc + 2),
            // wfi, and j .
            WFI | 0x0000_006f => return Ok(false),
            // j .-8 and j .-4
            0xff9f_f06f => self.put(Reg::Pc, pc - 8),
            0xffdf_f06f => self.put(Reg::Pc, pc - 4),
            _ if word & 0x707f == 0x13 => {
                let sum = x(word >> 15).wrapping_add_signed(imm);
                self.put(Reg::X((word >> 7 & 31) as u8), sum);
                self.put(Reg::Pc, pc + 4);
            }
            _ => self.trap(2),
        }
        Ok(true)
    }
}

impl Hart for TinyHart {
    fn id(&self) -> u32 {
        self.id
    }

    fn bind(&mut self) -> io::Result<Arc<dyn Kick>> {
        Ok(Arc::<HartProbe>::clone(&self.probe))
    }

    fn enter(&mut self) -> io::Result<Exit<'_>> {
        loop {
            if std::mem::take(&mut *self.probe.kicked.lock().unwrap()) {
                return Ok(Exit::Interrupted);
            }
            match self.run() {
                Err(exit) => return Ok(exit),
                Ok(true) => std::thread::yield_now(),
                Ok(false) => {
                    let kicked = self.probe.kicked.lock().unwrap();
                    drop(self.probe.changed.wait_while(kicked, |kicked| !*kicked).unwrap());
                }
            }
        }
    }

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn abandon(&mut self) {}

    fn trap_ebreaks(&mut self, on: bool) -> io::Result<()> {
        self.probe.traps_ebreaks.store(on, SeqCst);
        Ok(())
    }

    fn last_exit(&mut self) -> Exit<'_> {
        Exit::Interrupted
    }

    fn set_timer_pending(&mut self, _: bool) -> io::Result<bool> {
        Ok(true)
    }

    fn sync_external_interrupt(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn get(&self, reg: Reg) -> io::Result<u64> {
        match reg {
            Reg::Csr(Csr::Sstateen0) => Err(io::ErrorKind::NotFound.into()),
            reg => Ok(self.value(reg)),
        }
    }

    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()> {
        self.put(reg, value);
        Ok(())
    }
}
