//! Restores state that a hart loses when the kernel starts it (SBI HSM, or the end of a system suspend): on hardware, firmware
//! enables user-mode access to the counters before it starts a hart, and interrupt lines keep their levels; KVM disables the access
//! since Linux 6.16, and loses the level of the external interrupt.
//!
//! User space is not notified of a start: the kernel does it, and a register that is written before it is lost. So a thread polls
//! the kernel's count of exits of each hart. A hart that exits for the first time, or again after a quiet time, may have been
//! started: it is kicked, and its state is restored. That is some milliseconds after the start, long before a kernel enters user
//! mode on that hart.
//!
//! A hart that stops and starts again within `QUIET` is not detected.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, info};

use super::control::Control;
use super::hart::{Csr, Hart, Reg};

/// `scounteren` as firmware sets it: user mode may read cycle, time and instret.
pub const COUNTERS: u64 = 0b111;

/// Minimum time without exits of a hart that may have been stopped; also the minimum time between two checks of a hart.
const QUIET: Duration = Duration::from_millis(20);

/// Polling intervals of the counts: while a first start is likely, and later.
const FAST_POLL: Duration = Duration::from_millis(2);
const SLOW_POLL: Duration = QUIET;

/// Time in which a guest is likely to start its harts.
const BOOT_TIME: Duration = Duration::from_secs(60);

/// Maximum number of times that the counters of a hart are enabled. A guest that disables them again and again does so on purpose.
const MAX_OPENED: u32 = 64;

/// The number of exits of one hart so far; readable while the hart runs.
pub trait Exits: Send + Sync {
    /// Returns the number, which never decreases.
    ///
    /// # Errors
    /// The kernel cannot return it.
    fn count(&self) -> io::Result<u64>;
}

/// Detects starts of harts.
pub struct Restarts {
    shared: Arc<SharedRestarts>,
    /// The polling thread, once there is something to detect.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct SharedRestarts {
    exits: Vec<Box<dyn Exits>>,
    control: Arc<Control>,
    /// True if harts start with their counters disabled.
    opens: bool,
    state: Mutex<RestartState>,
    changed: Condvar,
    /// True for harts that were kicked to restore their state.
    kicked: Vec<AtomicBool>,
}

struct RestartState {
    watches: Vec<Watch>,
    ended: bool,
}

/// The observed state of a hart.
#[derive(Debug, Clone, Copy)]
struct Watch {
    exits: u64,
    /// Time of the last observed change of `exits`.
    changed: Instant,
    /// It is checked at its next exit, without a quiet time before.
    is_due: bool,
    /// It is checked at the first exit after each quiet time.
    is_tracked: bool,
    checked: Instant,
    opened: u32,
}

impl Restarts {
    /// Watches harts 0, 1, ... by their counts; the first is the boot hart, which is already started. `opens` if the kernel starts
    /// harts with disabled counters; otherwise only harts named by `Restarts::expect` are checked.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn watch(
        exits: Vec<Box<dyn Exits>>,
        opens: bool,
        control: &Arc<Control>,
    ) -> io::Result<Self> {
        let now = Instant::now();
        let is_tracked = opens && exits.len() > 1;
        let watches = (0..exits.len()).map(|hart| Watch::new(hart > 0, is_tracked, now));
        let state = RestartState { watches: watches.collect(), ended: false };
        let kicked = exits.iter().map(|_| AtomicBool::new(false)).collect();
        let (state, changed, control) = (Mutex::new(state), Condvar::new(), Arc::clone(control));
        let shared = Arc::new(SharedRestarts { exits, control, opens, state, changed, kicked });
        let this = Self { shared, thread: Mutex::default() };
        if is_tracked {
            this.ensure_thread()?;
        }
        Ok(this)
    }

    fn ensure_thread(&self) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let body = move || shared.run();
            *thread = Some(thread::Builder::new().name("restarts".into()).spawn(body)?);
        }
        Ok(())
    }

    /// Expects a start: the hart is out of the guest, and the kernel starts it at its next entry.
    pub(super) fn expect(&self, hart: u32) {
        let index = index(hart);
        let mut state = self.shared.lock();
        if let Some((watch, exits)) = state.watches.get_mut(index).zip(self.shared.exits.get(index))
        {
            // The thread gets the same error, and logs it.
            watch.exits = exits.count().unwrap_or(watch.exits);
            (watch.is_due, watch.opened) = (true, 0);
        }
        drop(state);
        if let Err(error) = self.ensure_thread() {
            info!("Cannot detect the start of hart {hart}: {error}");
        }
        self.shared.changed.notify_all();
    }

    /// Restores the hart's state, if it was kicked for that.
    pub(super) fn handle_kick(&self, hart: &mut dyn Hart) -> io::Result<()> {
        let id = hart.id();
        let kicked = self.shared.kicked.get(index(id));
        if !kicked.is_some_and(|kicked| kicked.swap(false, SeqCst)) {
            return Ok(());
        }
        hart.sync_external_interrupt()?;
        if !self.shared.opens {
            return Ok(());
        }
        let counters = Reg::Csr(Csr::Scounteren);
        let found = hart.get(counters)?;
        let mut state = self.shared.lock();
        let Some(watch) = state.watches.get_mut(index(id)) else { return Ok(()) };
        if watch.needs_opening(found) {
            drop(state);
            debug!("Hart {id} has started: user mode may read its counters now");
            hart.set(counters, COUNTERS)?;
        }
        Ok(())
    }
}

impl Drop for Restarts {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // A thread that panicked needs no cleanup.
            let _ = thread.join();
        }
    }
}

fn index(hart: u32) -> usize {
    usize::try_from(hart).unwrap_or(usize::MAX)
}

impl SharedRestarts {
    fn lock(&self) -> MutexGuard<'_, RestartState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let start = Instant::now();
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            for (id, ((watch, exits), kicked)) in
                (0..).zip(state.watches.iter_mut().zip(&self.exits).zip(&self.kicked))
            {
                match exits.count() {
                    Ok(count) if watch.step(now, count) => {
                        kicked.store(true, SeqCst);
                        self.control.kick(id);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        info!("Cannot detect starts of hart {id}: {error}");
                        (watch.is_due, watch.is_tracked) = (false, false);
                    }
                }
            }
            let is_booting = now.duration_since(start) < BOOT_TIME;
            let interval =
                state.watches.iter().filter_map(|watch| watch.interval(is_booting)).min();
            state = match interval {
                Some(interval) => self
                    .changed
                    .wait_timeout(state, interval)
                    .map_or_else(|e| e.into_inner().0, |(state, _)| state),
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Watch {
    fn new(is_due: bool, is_tracked: bool, now: Instant) -> Self {
        let is_due = is_due && is_tracked;
        Self { exits: 0, changed: now, is_due, is_tracked, checked: now, opened: 0 }
    }

    /// Takes a new count; true if the hart is to be checked.
    fn step(&mut self, now: Instant, exits: u64) -> bool {
        if exits == self.exits {
            return false;
        }
        let was_quiet = now.duration_since(self.changed) >= QUIET;
        let may_check = now.duration_since(self.checked) >= QUIET;
        self.exits = exits;
        self.changed = now;
        let checks = self.is_due || self.is_tracked && was_quiet && may_check;
        if checks {
            (self.is_due, self.checked) = (false, now);
        }
        checks
    }

    /// Takes the value found in the hart's `scounteren`; true if the counters are to be enabled.
    fn needs_opening(&mut self, found: u64) -> bool {
        match found {
            0 if self.opened < MAX_OPENED => {
                self.opened += 1;
                true
            }
            COUNTERS => false,
            // The guest sets it by itself.
            _ => {
                self.is_tracked = false;
                false
            }
        }
    }

    /// The time until the next poll; `None` if there is nothing to detect.
    fn interval(&self, is_booting: bool) -> Option<Duration> {
        match (self.is_due, self.is_tracked) {
            (true, false) => Some(FAST_POLL),
            (true, true) if is_booting => Some(FAST_POLL),
            (_, true) => Some(SLOW_POLL),
            (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_hart_is_checked_at_its_first_exit_and_after_each_quiet_time() {
        let start = Instant::now();
        let mut watch = Watch::new(true, true, start);
        assert!(!watch.step(start + MS, 0), "it has not been started");
        assert!(watch.step(start + 500 * MS, 1));
        assert!(!watch.step(start + 505 * MS, 9), "it runs");
        assert!(!watch.step(start + 520 * MS, 9));
        assert!(watch.step(start + 540 * MS, 10), "it may have been stopped meanwhile");
        // The boot hart runs already.
        let mut boot = Watch::new(false, true, start);
        assert!(!boot.step(start + MS, 5));
        assert!(boot.step(start + 50 * MS, 6));
    }

    #[test]
    fn only_expected_harts_are_checked_if_the_kernel_enables_the_counters() {
        let start = Instant::now();
        let mut watch = Watch::new(true, false, start);
        assert_eq!(watch.interval(true), None);
        assert!(!watch.step(start + 500 * MS, 1));
        watch.is_due = true;
        assert_eq!(watch.interval(false), Some(FAST_POLL));
        assert!(!watch.step(start + 501 * MS, 1));
        assert!(watch.step(start + 502 * MS, 2));
        assert_eq!(watch.interval(true), None);
    }

    #[test]
    fn counters_are_enabled_unless_the_guest_sets_them() {
        let mut watch = Watch::new(true, true, Instant::now());
        assert!(watch.needs_opening(0));
        assert!(!watch.needs_opening(COUNTERS));
        assert!(watch.needs_opening(0), "started again");
        assert!(watch.is_tracked);
        assert!(!watch.needs_opening(0b10), "Linux with a PMU");
        assert!(!watch.is_tracked);
        let mut stubborn = Watch::new(true, true, Instant::now());
        let opened = (0..1000).filter(|_| stubborn.needs_opening(0)).count();
        assert_eq!(opened, MAX_OPENED as usize);
        assert!(!stubborn.is_tracked, "it disables them by itself");
    }
}
