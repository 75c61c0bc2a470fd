//! All that the answer to an exit needs besides the hart.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rvmm_devices::Bus;

use super::firmware::Firmware;
use super::hart::Hart;
use super::restarts::Restarts;
use crate::config::Unassigned;
use crate::memory::GuestRam;

/// What the harts of one machine share.
pub struct World {
    /// The devices.
    pub bus: Arc<Bus>,
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// What an access to an address without memory and device does.
    pub unassigned: Unassigned,
    /// Guest-physical address of the serial port whose line SBI console calls share. Without one, what is written vanishes
    /// and there is never anything to read.
    pub console: Option<u64>,
    /// What stands in for firmware, where the guest needs it.
    pub firmware: Option<Firmware>,
    /// Ticks of the guest's `time` in a second.
    pub timebase_hz: u64,
    /// Who gives harts what they lack after a start, where the kernel leaves something to be done.
    pub restarts: Option<Restarts>,
    /// Who may have planted an `ebreak` that comes out; nobody where the machine has no debugger.
    pub debugger: Option<Arc<dyn Debugger>>,
    noticed: AtomicU32,
}

/// Who plants `ebreak`s in guest memory in order to stop harts there.
pub trait Debugger: Send + Sync {
    /// Asked on the hart's own thread about an `ebreak` that came out, with the program counter at it. True where it was planted:
    /// the hart stays at it, and has been kicked, so that it looks at its [`super::Control`] next. Otherwise the guest has put it
    /// there and takes it as its own breakpoint exception.
    ///
    /// # Errors
    /// A register cannot be read, which no guest causes.
    fn claims(&self, hart: &dyn Hart, pc: u64) -> io::Result<bool>;
}

/// What a guest does that is worth one line in the log, once.
#[derive(Debug, Clone, Copy)]
pub(super) enum Notice {
    UnknownCsr,
    UnknownSbi,
    ConsoleMissing,
    AccessFault,
}

impl World {
    /// The world of one machine.
    #[must_use]
    pub fn new(
        bus: Arc<Bus>,
        ram: Arc<GuestRam>,
        unassigned: Unassigned,
        console: Option<u64>,
    ) -> Self {
        Self {
            bus,
            ram,
            unassigned,
            console,
            firmware: None,
            timebase_hz: 10_000_000,
            restarts: None,
            debugger: None,
            noticed: AtomicU32::new(0),
        }
    }

    /// True the first time that this is noticed.
    pub(super) fn first(&self, notice: Notice) -> bool {
        let bit = 1 << notice as u32;
        // The load alone is what every time but the first costs.
        self.noticed.load(Ordering::Relaxed) & bit == 0
            && self.noticed.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}
