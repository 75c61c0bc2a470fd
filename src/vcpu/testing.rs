//! For tests, here and in other modules: a hart that runs a script, a fake UART, and a [`MachineContext`] with both.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![cfg_attr(fuzzing, allow(dead_code, reason = "fuzzers use a part of it"))]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use rvmm_devices::{Access, Bus, FdtDesc, MmioDevice, SerialLine, stateless};

use super::MachineContext;
use super::exit::{CsrAccess, Exit, Fault, SbiCall, SystemEvent};
use super::hart::{Hart, Kick, Reg};
use crate::config::Unassigned;
use crate::layout::Span;
use crate::memory::GuestRam;

/// RAM of [`context`].
pub(crate) const RAM: Span = Span { base: 0x8000_0000, size: 2 << 20 };
/// The UART of [`context`].
pub(crate) const UART: u64 = 0x1000_0000;
/// An unassigned address of [`context`].
pub(crate) const NOWHERE: u64 = 0x2000_0000;

/// One step of a scripted hart.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Load {
        addr: u64,
        len: usize,
    },
    Store {
        addr: u64,
        bytes: Vec<u8>,
    },
    Sbi {
        extension: u64,
        function: u64,
        args: [u64; 6],
    },
    Csr {
        csr: u64,
    },
    System(SystemEvent),
    Debug,
    Fault(Fault),
    Unknown(u32),
    /// Stays in the guest until it is kicked.
    Idle,
    /// `enter` fails.
    Broken,
    /// The thread panics.
    Panic,
}

/// An event of a scripted hart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Bound,
    Entered,
    Loaded(Vec<u8>),
    Sbi([u64; 2]),
    Csr(u64),
    Settled,
    Abandoned,
    Interrupted,
    Ebreaks(bool),
    TimerPending(bool),
    ExternalDriven,
}

/// A hart that runs a script, then idles in the guest.
pub(crate) struct ScriptHart {
    id: u32,
    script: VecDeque<Step>,
    regs: Vec<(Reg, u64)>,
    kick: Arc<TestKick>,
    log: EventLog,
    step: Option<Step>,
    data: Vec<u8>,
    sbi: [u64; 2],
    csr: u64,
    has_no_sstc: bool,
}

/// The events of a scripted hart, readable while it runs.
#[derive(Clone, Default)]
pub(crate) struct EventLog(Arc<(Mutex<Vec<Event>>, Condvar)>);

impl EventLog {
    fn note(&self, event: Event) {
        self.0.0.lock().unwrap().push(event);
        self.0.1.notify_all();
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.0.lock().unwrap().clone()
    }

    /// Waits until `event` has happened `times` times.
    pub(crate) fn await_event(&self, event: &Event, times: usize) {
        let missing =
            |events: &mut Vec<Event>| events.iter().filter(|e| *e == event).count() < times;
        drop(self.0.1.wait_while(self.0.0.lock().unwrap(), missing).unwrap());
    }
}

#[derive(Default)]
struct TestKick {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for TestKick {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl ScriptHart {
    pub(crate) fn new(id: u32, script: impl IntoIterator<Item = Step>) -> Self {
        Self {
            id,
            script: script.into_iter().collect(),
            regs: Vec::new(),
            kick: Arc::default(),
            log: EventLog::default(),
            step: None,
            data: Vec::new(),
            sbi: [0; 2],
            csr: 0,
            has_no_sstc: false,
        }
    }

    /// The same hart on a host without Sstc, whose timer interrupt only its guest can clear.
    pub(crate) fn without_sstc(mut self) -> Self {
        self.has_no_sstc = true;
        self
    }

    /// The same hart with these registers; all others are zero.
    pub(crate) fn with(mut self, regs: impl IntoIterator<Item = (Reg, u64)>) -> Self {
        self.regs.extend(regs);
        self
    }

    pub(crate) fn log(&self) -> EventLog {
        self.log.clone()
    }

    fn complete(&mut self) {
        match self.step.take() {
            Some(Step::Load { .. }) => self.log.note(Event::Loaded(self.data.clone())),
            Some(Step::Sbi { .. }) => self.log.note(Event::Sbi(self.sbi)),
            Some(Step::Csr { .. }) => self.log.note(Event::Csr(self.csr)),
            _ => {}
        }
    }

    fn interrupted(&self) -> Exit<'_> {
        self.log.note(Event::Interrupted);
        Exit::Interrupted
    }
}

impl Hart for ScriptHart {
    fn id(&self) -> u32 {
        self.id
    }

    fn bind(&mut self) -> io::Result<Arc<dyn Kick>> {
        self.log.note(Event::Bound);
        Ok(Arc::<TestKick>::clone(&self.kick))
    }

    fn enter(&mut self) -> io::Result<Exit<'_>> {
        self.complete();
        self.log.note(Event::Entered);
        let idle = matches!(self.script.front(), None | Some(Step::Idle));
        let mut kicked = self.kick.kicked.lock().unwrap();
        if idle {
            kicked = self.kick.changed.wait_while(kicked, |kicked| !*kicked).unwrap();
        }
        let taken = std::mem::take(&mut *kicked);
        drop(kicked);
        if taken {
            if idle {
                self.script.pop_front();
            }
            return Ok(self.interrupted());
        }
        let step = self.script.pop_front().unwrap_or(Step::Idle);
        match &step {
            Step::Load { len, .. } => self.data = vec![0xa5; *len],
            Step::Sbi { .. } => self.sbi = [u64::MAX - 1, 0],
            Step::Broken => return Err(io::Error::other("broken")),
            _ => {}
        }
        self.step = Some(step);
        Ok(self.last_exit())
    }

    fn last_exit(&mut self) -> Exit<'_> {
        let Some(step) = &self.step else { return Exit::Interrupted };
        match step {
            Step::Load { addr, .. } => Exit::MmioRead { addr: *addr, data: &mut self.data },
            Step::Store { addr, bytes } => Exit::MmioWrite { addr: *addr, data: bytes },
            Step::Sbi { extension, function, args } => {
                let (extension, function) = (*extension, *function);
                Exit::Sbi(SbiCall { extension, function, args, ret: &mut self.sbi })
            }
            Step::Csr { csr } => {
                Exit::Csr(CsrAccess { csr: *csr, new_value: 0, write_mask: 0, ret: &mut self.csr })
            }
            Step::System(event) => Exit::System(*event),
            Step::Debug => Exit::Debug,
            Step::Fault(fault) => Exit::Fault(*fault),
            Step::Unknown(reason) => Exit::Unknown(*reason),
            Step::Idle | Step::Broken => Exit::Interrupted,
            Step::Panic => panic!("a hart's thread panics on purpose"),
        }
    }

    fn set_timer_pending(&mut self, on: bool) -> io::Result<bool> {
        self.log.note(Event::TimerPending(on));
        self.set(Reg::TimeCompare, if on { 0 } else { u64::MAX })?;
        Ok(!self.has_no_sstc || on)
    }

    fn sync_external_interrupt(&mut self) -> io::Result<()> {
        self.log.note(Event::ExternalDriven);
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        self.complete();
        self.log.note(Event::Settled);
        Ok(())
    }

    fn abandon(&mut self) {
        self.step = None;
        self.log.note(Event::Abandoned);
    }

    fn trap_ebreaks(&mut self, on: bool) -> io::Result<()> {
        self.log.note(Event::Ebreaks(on));
        Ok(())
    }

    fn get(&self, reg: Reg) -> io::Result<u64> {
        Ok(self.regs.iter().rev().find(|(r, _)| *r == reg).map_or(0, |(_, value)| *value))
    }

    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()> {
        self.regs.push((reg, value));
        Ok(())
    }
}

/// A [`MachineContext`] with 2 MiB of RAM and one UART, and the test's side of the UART.
pub(crate) fn context(unassigned: Unassigned) -> (MachineContext, FakeUart) {
    let uart = FakeUart::default();
    let bus = Bus::new(vec![(UART, Box::new(uart.clone()))]).unwrap();
    let ram = GuestRam::new(RAM, false).unwrap();
    (MachineContext::new(Arc::new(bus), Arc::new(ram), unassigned, Some(UART)), uart)
}

/// A UART whose line the test controls.
#[derive(Clone, Default)]
pub(crate) struct FakeUart(Arc<Mutex<Line>>);

#[derive(Default)]
pub(crate) struct Line {
    /// Sent bytes.
    pub(crate) sent: Vec<u8>,
    /// Number of bytes that can still be sent.
    pub(crate) room: usize,
    /// Input for the guest.
    pub(crate) typed: VecDeque<u8>,
    /// Number of accesses that were not one byte to a known register.
    pub(crate) unexpected: usize,
    /// Number of accesses through [`SerialLine`].
    pub(crate) accesses: usize,
}

impl FakeUart {
    pub(crate) fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        self.0.lock().unwrap()
    }
}

stateless!(FakeUart);

impl MmioDevice for FakeUart {
    fn name(&self) -> &'static str {
        "fake-uart"
    }

    fn size(&self) -> u64 {
        0x100
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let mut line = self.line();
        data.fill(0);
        data[0] = match (offset, data.len()) {
            (0, 1) => line.typed.pop_front().unwrap_or(0),
            (5, 1) => u8::from(!line.typed.is_empty()) | u8::from(line.room > 0) << 5,
            (7, _) => 0x77,
            _ => {
                line.unexpected += 1;
                0
            }
        };
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let mut line = self.line();
        if (offset, data.len()) == (0, 1) && line.room > 0 {
            line.room -= 1;
            line.sent.push(data[0]);
        } else {
            line.unexpected += 1;
        }
        Ok(())
    }

    fn serial_line(&mut self) -> Option<&mut dyn SerialLine> {
        Some(self)
    }

    fn fdt(&self) -> Option<FdtDesc> {
        None
    }
}

impl SerialLine for FakeUart {
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut line = self.line();
        let taken = bytes.len().min(line.room);
        line.accesses += 1;
        line.room -= taken;
        line.sent.extend(&bytes[..taken]);
        taken
    }

    fn take(&mut self, buffer: &mut [u8]) -> usize {
        let mut line = self.line();
        let taken = buffer.len().min(line.typed.len());
        line.accesses += 1;
        buffer.iter_mut().zip(line.typed.drain(..taken)).for_each(|(slot, byte)| *slot = byte);
        taken
    }

    fn has_input(&mut self) -> bool {
        !self.line().typed.is_empty()
    }
}
