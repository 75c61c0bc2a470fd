//! The state that handling an exit needs besides the hart.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rvmm_devices::Bus;

use super::firmware::Firmware;
use super::hart::Hart;
use super::restarts::Restarts;
use super::wakeups::Wakeups;
use crate::config::Unassigned;
use crate::memory::GuestRam;

/// State shared by the harts of one machine.
pub struct MachineContext {
    /// The devices.
    pub bus: Arc<Bus>,
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// The policy for accesses to addresses without memory or device.
    pub unassigned: Unassigned,
    /// Guest-physical address of the serial port whose line SBI console calls share. Without one, output is discarded and there
    /// is never input.
    pub console: Option<u64>,
    /// Emulated firmware, if the guest needs it.
    pub firmware: Option<Firmware>,
    /// Ticks of the guest's `time` per second.
    pub timebase_hz: u64,
    /// Restores state of harts after a start, if the kernel loses some.
    pub restarts: Option<Restarts>,
    /// Harts that were restored with an interrupt for which they have to be woken.
    pub wakeups: Option<Wakeups>,
    /// The debugger, which may have inserted an `ebreak` that exits; `None` if the machine has no debugger.
    pub debugger: Option<Arc<dyn Debugger>>,
    noticed: AtomicU32,
}

/// Inserts `ebreak`s in guest memory as breakpoints.
pub trait Debugger: Send + Sync {
    /// Called on the hart's own thread after an exit for an `ebreak`, with the program counter at it. True if it is the debugger's:
    /// the hart stays at it, and has been kicked, so that it checks its [`super::Control`] next. Otherwise it is the guest's and
    /// raises its breakpoint exception.
    ///
    /// # Errors
    /// A register cannot be read, which no guest causes.
    fn claims(&self, hart: &dyn Hart, pc: u64) -> io::Result<bool>;
}

/// Guest behaviour that is logged once.
#[derive(Debug, Clone, Copy)]
pub(super) enum Notice {
    UnknownCsr,
    UnknownSbi,
    ConsoleMissing,
    AccessFault,
}

impl MachineContext {
    /// Creates the shared state of one machine.
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
            wakeups: None,
            debugger: None,
            noticed: AtomicU32::new(0),
        }
    }

    /// True the first time that it is called for this notice.
    pub(super) fn is_first(&self, notice: Notice) -> bool {
        let bit = 1 << notice as u32;
        // Every call but the first costs only the load.
        self.noticed.load(Ordering::Relaxed) & bit == 0
            && self.noticed.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}
