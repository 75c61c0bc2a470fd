//! What a debugger shares with the harts of one life of the guest: which breakpoints are inserted, and who came to one.
//!
//! The lock here is held for moments and never while the control's is taken. Inserting and removing are the debugger's, while all
//! harts are held; harts only look.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::breakpoints::SoftwareBreakpoints;
use crate::memory::{GuestRam, RamError};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::walk::translate;
use crate::vcpu::{Control, Debugger};

/// Most breakpoints that a debugger may have at a time.
const MOST: usize = 1000;

/// Why a hart stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopCause {
    /// It has come to a breakpoint, at the address that the debugger knows it by.
    Breakpoint,
    /// Its step is done.
    Step,
    /// It has come to a breakpoint's memory by another virtual address.
    Alias,
}

/// One life's breakpoints.
pub(crate) struct DebugContext {
    pub(super) control: Arc<Control>,
    pub(super) ram: Arc<GuestRam>,
    state: Mutex<State>,
    /// Readable while a hart has come to a breakpoint and nobody has looked.
    wake: OwnedFd,
    sync_code: SyncCode,
    /// Whether `ebreak`s come out for somebody else too, and go on doing so without a debugger.
    pub(super) has_others: bool,
}

/// Makes instructions that were written into guest memory visible to all harts, none of which is in the guest.
pub(crate) type SyncCode = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

#[derive(Default)]
struct State {
    inserted: SoftwareBreakpoints,
    /// The debugger's breakpoints: virtual address, and where it led when they were set.
    breakpoints: BTreeMap<u64, u64>,
    /// Where harts that step may report_stop: (guest-physical address, hart).
    steps: BTreeSet<(u64, u32)>,
    /// In the order of coming, each hart once: it waits from then on.
    came: Vec<(u32, StopCause)>,
}

impl State {
    fn is_wanted(&self, addr: u64) -> bool {
        self.breakpoints.values().any(|at| *at == addr)
            || self.steps.range((addr, 0)..=(addr, u32::MAX)).next().is_some()
    }
}

impl DebugContext {
    /// The context of a life whose `ebreak`s come out for somebody else as well where `has_others` is set.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(crate) fn new(
        control: Arc<Control>,
        ram: Arc<GuestRam>,
        sync_code: SyncCode,
        has_others: bool,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { control, ram, state: Mutex::default(), wake, sync_code, has_others })
    }

    /// Makes what was inserted and removed visible to all harts, which are held.
    ///
    /// # Errors
    /// What the kernel says, which no guest causes.
    pub(super) fn sync_code(&self) -> io::Result<()> {
        (self.sync_code)()
    }

    /// Sets a breakpoint of the debugger's for `va`, which leads to `addr` now; where there is one for `va`, it moves there. False
    /// where there are too many.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn set(&self, va: u64, addr: u64) -> Result<bool, RamError> {
        let mut state = self.lock();
        if state.breakpoints.len() >= MOST && !state.breakpoints.contains_key(&va) {
            return Ok(false);
        }
        state.inserted.insert(&self.ram, addr)?;
        let before = state.breakpoints.insert(va, addr);
        if let Some(before) = before.filter(|before| *before != addr) {
            self.remove(&mut state, before);
        }
        Ok(true)
    }

    /// Takes the debugger's breakpoint for `va` away, if there is one.
    pub(super) fn unset(&self, va: u64) {
        let mut state = self.lock();
        if let Some(addr) = state.breakpoints.remove(&va) {
            self.remove(&mut state, addr);
        }
    }

    /// Has `hart`, which steps, stop at `addr` too. False where no memory is.
    pub(super) fn step_to(&self, addr: u64, hart: u32) -> bool {
        let mut state = self.lock();
        let is_there = state.inserted.insert(&self.ram, addr).is_ok();
        if is_there {
            state.steps.insert((addr, hart));
        }
        is_there
    }

    /// Ends all steps, and plants again what was removed for one.
    pub(super) fn end_steps(&self) {
        let mut state = self.lock();
        for (addr, _) in std::mem::take(&mut state.steps) {
            self.remove(&mut state, addr);
        }
        for addr in state.breakpoints.values().copied().collect::<Vec<_>>() {
            // It was memory when it was set.
            let _ = state.inserted.insert(&self.ram, addr);
        }
    }

    /// Takes the breakpoint at `addr` out of memory until [`DebugContext::end_steps`]; false where none is there.
    pub(super) fn remove_for_step(&self, addr: u64) -> bool {
        let mut state = self.lock();
        let is_there = state.inserted.has(addr);
        state.inserted.remove(&self.ram, addr);
        is_there
    }

    /// Whether a hart that is at virtual address `va`, which leads to `addr`, is at a breakpoint that the debugger does not know by
    /// that address.
    pub(super) fn is_alias(&self, va: u64, addr: u64) -> bool {
        let state = self.lock();
        state.inserted.has(addr) && state.breakpoints.get(&va) != Some(&addr)
    }

    /// Whether there is any breakpoint.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().breakpoints.is_empty()
    }

    /// Takes all breakpoints out of memory for good.
    pub(super) fn clear(&self) {
        let mut state = self.lock();
        state.inserted.remove_all(&self.ram);
        *state = State::default();
    }

    /// Copies memory, as it is without breakpoints.
    ///
    /// # Errors
    /// As [`GuestRam::read`].
    pub(super) fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), RamError> {
        let state = self.lock();
        self.ram.read(addr, bytes)?;
        state.inserted.hide(addr, bytes);
        Ok(())
    }

    /// Writes memory, below breakpoints where there are some.
    ///
    /// # Errors
    /// As [`GuestRam::write`].
    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), RamError> {
        self.lock().inserted.write(&self.ram, addr, bytes)
    }

    /// Says that `hart` is where it was to be.
    pub(super) fn report_stop(&self, hart: u32, how: StopCause) {
        self.lock().came.push((hart, how));
        // Full means that it is readable already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Who came to a breakpoint, and forgets it: the first one counts, the others are still there when they go on.
    pub(super) fn take_stop(&self) -> Option<(u32, StopCause)> {
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        let came = std::mem::take(&mut self.lock().came);
        came.first().copied()
    }

    fn remove(&self, state: &mut State, addr: u64) {
        if !state.is_wanted(addr) {
            state.inserted.remove(&self.ram, addr);
        }
    }

    /// Nothing in here can panic half way.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for DebugContext {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Debugger for DebugContext {
    fn claims(&self, hart: &dyn Hart, pc: u64) -> io::Result<bool> {
        let satp = hart.get(Reg::Csr(Csr::Satp))?;
        let Ok(addr) = translate(&self.ram, satp, pc) else { return Ok(false) };
        let state = self.lock();
        if !state.inserted.has(addr) {
            return Ok(false);
        }
        let how = if state.breakpoints.get(&pc) == Some(&addr) {
            Some(StopCause::Breakpoint)
        } else if state.steps.contains(&(addr, hart.id())) {
            Some(StopCause::Step)
        } else if state.breakpoints.values().any(|at| *at == addr) {
            Some(StopCause::Alias)
        } else {
            None
        };
        drop(state);
        match how {
            Some(how) => {
                self.control.hold();
                self.report_stop(hart.id(), how);
            }
            // Another hart's step ends here.
            None => self.control.hold_one(hart.id()),
        }
        Ok(true)
    }
}
