//! State that a debugger shares with the harts of one run of the guest: the inserted breakpoints, and the harts that hit one.
//!
//! The lock here is held briefly and never while the control's lock is taken. Only the debugger inserts and removes breakpoints,
//! while all harts are held; harts only read.

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

/// Maximum number of breakpoints that a debugger may set.
const MAX_BREAKPOINTS: usize = 1000;

/// The reason for which a hart stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopCause {
    /// It hit a breakpoint at the virtual address that the debugger set it for.
    Breakpoint,
    /// Its step is done.
    Step,
    /// It hit a breakpoint through another virtual address of the same memory.
    Alias,
}

/// The breakpoints of one run of the guest.
pub(crate) struct DebugContext {
    pub(super) control: Arc<Control>,
    pub(super) ram: Arc<GuestRam>,
    state: Mutex<ContextState>,
    /// Readable while there are stops that [`DebugContext::take_stop`] has not taken.
    wake: OwnedFd,
    sync_code: SyncCode,
    /// True if `ebreak`s exit to user space for another reason as well, and still do without a debugger.
    pub(super) keeps_ebreak_exits: bool,
}

/// Makes instructions written to guest memory visible to all harts, none of which is in the guest.
pub(crate) type SyncCode = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

#[derive(Default)]
struct ContextState {
    inserted: SoftwareBreakpoints,
    /// The debugger's breakpoints: virtual address, and the guest-physical address it translated to when they were set.
    breakpoints: BTreeMap<u64, u64>,
    /// Temporary breakpoints of harts that step: (guest-physical address, hart).
    steps: BTreeSet<(u64, u32)>,
    /// Stops in order of arrival, each hart at most once, since it waits from then on.
    stops: Vec<(u32, StopCause)>,
}

impl ContextState {
    fn is_wanted(&self, addr: u64) -> bool {
        self.breakpoints.values().any(|at| *at == addr)
            || self.steps.range((addr, 0)..=(addr, u32::MAX)).next().is_some()
    }
}

impl DebugContext {
    /// Returns the context of one run. With `keeps_ebreak_exits`, `ebreak`s exit to user space without a debugger as well.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(crate) fn new(
        control: Arc<Control>,
        ram: Arc<GuestRam>,
        sync_code: SyncCode,
        keeps_ebreak_exits: bool,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { control, ram, state: Mutex::default(), wake, sync_code, keeps_ebreak_exits })
    }

    /// Makes inserted and removed breakpoints visible to all harts, which are held.
    ///
    /// # Errors
    /// The kernel's error, which no guest causes.
    pub(super) fn sync_code(&self) -> io::Result<()> {
        (self.sync_code)()
    }

    /// True while a hart makes a step for the debugger: its interrupts are masked meanwhile.
    pub(crate) fn is_stepping(&self) -> bool {
        !self.lock().steps.is_empty()
    }

    /// Sets a breakpoint of the debugger's for `va`, which translates to `addr` now; an existing one for `va` moves there. False
    /// if there are too many.
    ///
    /// # Errors
    /// `addr` is not in RAM.
    pub(super) fn set(&self, va: u64, addr: u64) -> Result<bool, RamError> {
        let mut state = self.lock();
        if state.breakpoints.len() >= MAX_BREAKPOINTS && !state.breakpoints.contains_key(&va) {
            return Ok(false);
        }
        state.inserted.insert(&self.ram, addr)?;
        let before = state.breakpoints.insert(va, addr);
        if let Some(before) = before.filter(|before| *before != addr) {
            self.remove(&mut state, before);
        }
        Ok(true)
    }

    /// Removes the debugger's breakpoint for `va`, if there is one.
    pub(super) fn unset(&self, va: u64) {
        let mut state = self.lock();
        if let Some(addr) = state.breakpoints.remove(&va) {
            self.remove(&mut state, addr);
        }
    }

    /// Inserts a temporary breakpoint at `addr` for a step of `hart`. False if `addr` is not in RAM.
    pub(super) fn step_to(&self, addr: u64, hart: u32) -> bool {
        let mut state = self.lock();
        let is_there = state.inserted.insert(&self.ram, addr).is_ok();
        if is_there {
            state.steps.insert((addr, hart));
        }
        is_there
    }

    /// Ends all steps, and inserts the breakpoints again that were removed for one.
    pub(super) fn end_steps(&self) {
        let mut state = self.lock();
        for (addr, _) in std::mem::take(&mut state.steps) {
            self.remove(&mut state, addr);
        }
        for addr in state.breakpoints.values().copied().collect::<Vec<_>>() {
            // It was RAM when the breakpoint was set.
            let _ = state.inserted.insert(&self.ram, addr);
        }
    }

    /// Removes the breakpoint at `addr` from memory until [`DebugContext::end_steps`]; false if there is none.
    pub(super) fn remove_for_step(&self, addr: u64) -> bool {
        let mut state = self.lock();
        let is_there = state.inserted.has(addr);
        state.inserted.remove(&self.ram, addr);
        is_there
    }

    /// True if a hart at virtual address `va`, which translates to `addr`, is at a breakpoint that the debugger set for another
    /// virtual address.
    pub(super) fn is_alias(&self, va: u64, addr: u64) -> bool {
        let state = self.lock();
        state.inserted.has(addr) && state.breakpoints.get(&va) != Some(&addr)
    }

    /// True if the debugger has no breakpoints.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().breakpoints.is_empty()
    }

    /// Removes all breakpoints and ends all steps.
    pub(super) fn clear(&self) {
        let mut state = self.lock();
        state.inserted.remove_all(&self.ram);
        *state = ContextState::default();
    }

    /// Reads memory as it would be without breakpoints.
    ///
    /// # Errors
    /// As [`GuestRam::read`].
    pub(crate) fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), RamError> {
        let state = self.lock();
        self.ram.read(addr, bytes)?;
        state.inserted.hide(addr, bytes);
        Ok(())
    }

    /// Writes memory underneath the breakpoints, which stay inserted.
    ///
    /// # Errors
    /// As [`GuestRam::write`].
    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), RamError> {
        self.lock().inserted.write(&self.ram, addr, bytes)
    }

    /// Records that `hart` has stopped, and wakes the debugger's thread.
    pub(super) fn report_stop(&self, hart: u32, cause: StopCause) {
        self.lock().stops.push((hart, cause));
        // A full counter is readable already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Takes all recorded stops and returns the first: the other harts hit their breakpoints again when they are resumed.
    pub(super) fn take_stop(&self) -> Option<(u32, StopCause)> {
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        let stops = std::mem::take(&mut self.lock().stops);
        stops.first().copied()
    }

    fn remove(&self, state: &mut ContextState, addr: u64) {
        if !state.is_wanted(addr) {
            state.inserted.remove(&self.ram, addr);
        }
    }

    /// A poisoned lock is safe to use: no code that holds it can panic halfway through a change.
    fn lock(&self) -> MutexGuard<'_, ContextState> {
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
        let cause = if state.breakpoints.get(&pc) == Some(&addr) {
            Some(StopCause::Breakpoint)
        } else if state.steps.contains(&(addr, hart.id())) {
            Some(StopCause::Step)
        } else if state.breakpoints.values().any(|at| *at == addr) {
            Some(StopCause::Alias)
        } else {
            None
        };
        drop(state);
        match cause {
            Some(cause) => {
                self.control.hold();
                self.report_stop(hart.id(), cause);
            }
            // A temporary breakpoint of another hart's step.
            None => self.control.hold_one(hart.id()),
        }
        Ok(true)
    }
}
