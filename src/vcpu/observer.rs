//! An observer of every exit of a machine's harts, with access to their registers: the labs narrate events with it. It costs
//! system calls at every exit; without an observer there is no overhead.

use std::io;
use std::sync::Arc;

use super::exit::{Exit, Fault, SystemEvent};
use super::hart::{Hart, Kick, Reg};

/// Receives every exit of every hart.
pub trait ExitObserver: Send + Sync {
    /// The hart has left the guest and the exit has not been handled yet. Its registers are as the guest left them: the program
    /// counter is at the instruction that caused the exit.
    fn exit(&self, hart: &dyn Hart, seen: &ExitRecord);

    /// Another event of hart `hart`.
    fn note(&self, hart: u32, note: HartEvent);
}

/// An event that is not an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HartEvent {
    /// The guest set its timer, which user space emulates.
    TimerSet,
    /// The timer interrupt was raised.
    TimerFired,
}

/// An exit, copied: see [`Exit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of Exit")]
pub enum ExitRecord {
    MmioRead { addr: u64, len: usize },
    MmioWrite { addr: u64, len: usize, value: u64 },
    Sbi { extension: u64, function: u64, args: [u64; 6] },
    Csr { number: u64 },
    System(SystemEvent),
    Breakpoint,
    Interrupted,
    Fault(Fault),
    Unknown(u32),
}

impl ExitRecord {
    fn of(exit: &Exit<'_>) -> Self {
        match exit {
            Exit::MmioRead { addr, data } => Self::MmioRead { addr: *addr, len: data.len() },
            Exit::MmioWrite { addr, data } => {
                let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                Self::MmioWrite { addr: *addr, len: data.len(), value }
            }
            Exit::Sbi(call) => {
                Self::Sbi { extension: call.extension, function: call.function, args: *call.args }
            }
            Exit::Csr(access) => Self::Csr { number: access.csr },
            Exit::System(event) => Self::System(*event),
            Exit::Debug => Self::Breakpoint,
            Exit::Interrupted => Self::Interrupted,
            Exit::Fault(fault) => Self::Fault(*fault),
            Exit::Unknown(reason) => Self::Unknown(*reason),
        }
    }
}

/// A hart whose exits are reported to an observer before they are handled.
pub(crate) struct ObservedHart {
    hart: Box<dyn Hart>,
    observer: Arc<dyn ExitObserver>,
}

impl ObservedHart {
    pub(crate) fn new(hart: Box<dyn Hart>, observer: Arc<dyn ExitObserver>) -> Self {
        Self { hart, observer }
    }
}

impl Hart for ObservedHart {
    fn id(&self) -> u32 {
        self.hart.id()
    }

    fn bind(&mut self) -> io::Result<Arc<dyn Kick>> {
        self.hart.bind()
    }

    fn enter(&mut self) -> io::Result<Exit<'_>> {
        let seen = ExitRecord::of(&self.hart.enter()?);
        self.observer.exit(self.hart.as_ref(), &seen);
        Ok(self.hart.last_exit())
    }

    fn last_exit(&mut self) -> Exit<'_> {
        self.hart.last_exit()
    }

    fn settle(&mut self) -> io::Result<()> {
        self.hart.settle()
    }

    fn abandon(&mut self) {
        self.hart.abandon();
    }

    fn trap_ebreaks(&mut self, on: bool) -> io::Result<()> {
        self.hart.trap_ebreaks(on)
    }

    fn set_timer_pending(&mut self, on: bool) -> io::Result<bool> {
        self.hart.set_timer_pending(on)
    }

    fn sync_external_interrupt(&mut self) -> io::Result<()> {
        self.hart.sync_external_interrupt()
    }

    fn get(&self, reg: Reg) -> io::Result<u64> {
        self.hart.get(reg)
    }

    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()> {
        self.hart.set(reg, value)
    }
}
