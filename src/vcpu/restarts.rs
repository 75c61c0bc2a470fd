//! What a hart lacks after the kernel has started it anew (SBI HSM, or the end of a system suspend): firmware on hardware opens the
//! counters to user mode before it starts a hart, and lines are as they are; KVM closes the counters since Linux 6.16, and forgets the level
//! of the external interrupt.
//!
//! Nobody hears of a start: the kernel does it, and a register that is written before is lost. So a thread looks at what the kernel
//! counts of each hart. One that has left the guest for the first time, or again after it had not for a while, may have been
//! started: it is kicked, and given what it lacks. That is some milliseconds after the start, long before a kernel
//! has come to user mode on that hart.
//!
//! A hart that stops and starts again faster than `QUIET` is not noticed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, info};

use super::control::Control;
use super::hart::{Csr, Hart, Reg};

/// `scounteren` as firmware leaves it: user mode may read cycle, time and instret.
pub const COUNTERS: u64 = 0b111;

/// How long a hart has not left the guest that may have been stopped; also the least time between two looks at a hart.
const QUIET: Duration = Duration::from_millis(20);

/// Time between two looks at the counts, while a first start is likely, and later.
const SOON: Duration = Duration::from_millis(2);
const LATER: Duration = QUIET;

/// How long a guest is likely to start its harts.
const YOUNG: Duration = Duration::from_secs(60);

/// As often a hart may be found closed. One that closes its counters by itself again and again wants that.
const MOST_OPENED: u32 = 64;

/// How often hart `hart` has left the guest so far; it may be asked while the hart runs.
pub trait Exits: Send + Sync {
    /// The number, which never falls.
    ///
    /// # Errors
    /// The kernel does not say.
    fn count(&self) -> io::Result<u64>;
}

/// Watches harts for starts.
pub struct Restarts {
    shared: Arc<Shared>,
    /// There once there is something to be noticed.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    exits: Vec<Box<dyn Exits>>,
    control: Arc<Control>,
    /// Whether harts start with their counters closed.
    opens: bool,
    state: Mutex<State>,
    changed: Condvar,
    /// Who is to look after itself, by hart.
    asked: Vec<AtomicBool>,
}

struct State {
    watches: Vec<Watch>,
    ended: bool,
}

/// What is known of a hart.
#[derive(Debug, Clone, Copy)]
struct Watch {
    exits: u64,
    /// When that was last seen to change.
    moved: Instant,
    /// It is to be looked at when it moves, however short it was quiet.
    is_due: bool,
    /// It is looked at after a quiet time, too.
    is_tracked: bool,
    looked: Instant,
    opened: u32,
}

impl Restarts {
    /// Watches harts 0, 1, ... by their counts, of which the first is the boot hart and started. `opens` where the kernel starts harts
    /// with closed counters; otherwise only those are looked at that `Restarts::expect` names.
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
        let state = State { watches: watches.collect(), ended: false };
        let asked = exits.iter().map(|_| AtomicBool::new(false)).collect();
        let (state, changed, control) = (Mutex::new(state), Condvar::new(), Arc::clone(control));
        let shared = Arc::new(Shared { exits, control, opens, state, changed, asked });
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

    /// The hart is out of the guest, and is started anew by the kernel when it next enters it.
    pub(super) fn expect(&self, hart: u32) {
        let index = index(hart);
        let mut state = self.shared.lock();
        if let Some((watch, exits)) = state.watches.get_mut(index).zip(self.shared.exits.get(index))
        {
            // Where they cannot be counted, the thread finds that, too, and says so.
            watch.exits = exits.count().unwrap_or(watch.exits);
            (watch.is_due, watch.opened) = (true, 0);
        }
        drop(state);
        if let Err(error) = self.ensure_thread() {
            info!("The start of hart {hart} is not noticed: {error}");
        }
        self.shared.changed.notify_all();
    }

    /// Gives the hart what it lacks, if it was kicked for that.
    pub(super) fn attend(&self, hart: &mut dyn Hart) -> io::Result<()> {
        let id = hart.id();
        let asked = self.shared.asked.get(index(id));
        if !asked.is_some_and(|asked| asked.swap(false, SeqCst)) {
            return Ok(());
        }
        hart.drive_external()?;
        if !self.shared.opens {
            return Ok(());
        }
        let counters = Reg::Csr(Csr::Scounteren);
        let found = hart.get(counters)?;
        let mut state = self.shared.lock();
        let Some(watch) = state.watches.get_mut(index(id)) else { return Ok(()) };
        if watch.judge(found) {
            drop(state);
            debug!("Hart {id} has started: its counters are open to user mode now");
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
            // A thread that panicked has nothing left to be done.
            let _ = thread.join();
        }
    }
}

fn index(hart: u32) -> usize {
    usize::try_from(hart).unwrap_or(usize::MAX)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let born = Instant::now();
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            for (id, ((watch, exits), asked)) in
                (0..).zip(state.watches.iter_mut().zip(&self.exits).zip(&self.asked))
            {
                match exits.count() {
                    Ok(count) if watch.step(now, count) => {
                        asked.store(true, SeqCst);
                        self.control.kick(id);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        info!("Starts of hart {id} are not noticed: {error}");
                        (watch.is_due, watch.is_tracked) = (false, false);
                    }
                }
            }
            let is_young = now.duration_since(born) < YOUNG;
            let pause = state.watches.iter().filter_map(|watch| watch.pause(is_young)).min();
            state = match pause {
                Some(pause) => self
                    .changed
                    .wait_timeout(state, pause)
                    .map_or_else(|e| e.into_inner().0, |(state, _)| state),
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Watch {
    fn new(is_due: bool, is_tracked: bool, now: Instant) -> Self {
        let is_due = is_due && is_tracked;
        Self { exits: 0, moved: now, is_due, is_tracked, looked: now, opened: 0 }
    }

    /// Takes a new count; true where the hart is to be looked at.
    fn step(&mut self, now: Instant, exits: u64) -> bool {
        if exits == self.exits {
            return false;
        }
        let was_quiet = now.duration_since(self.moved) >= QUIET;
        let is_rested = now.duration_since(self.looked) >= QUIET;
        self.exits = exits;
        self.moved = now;
        let looks = self.is_due || self.is_tracked && was_quiet && is_rested;
        if looks {
            (self.is_due, self.looked) = (false, now);
        }
        looks
    }

    /// What the hart's `scounteren` was found to be; true where it is to be opened.
    fn judge(&mut self, found: u64) -> bool {
        match found {
            0 if self.opened < MOST_OPENED => {
                self.opened += 1;
                true
            }
            COUNTERS => false,
            // The guest sees to it by itself.
            _ => {
                self.is_tracked = false;
                false
            }
        }
    }

    /// When to look at the counts again; `None` where nothing is to be noticed.
    fn pause(&self, is_young: bool) -> Option<Duration> {
        match (self.is_due, self.is_tracked) {
            (true, false) => Some(SOON),
            (true, true) if is_young => Some(SOON),
            (_, true) => Some(LATER),
            (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_hart_is_looked_at_when_it_first_leaves_the_guest_and_after_each_quiet_time() {
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
    fn a_hart_that_is_expected_is_looked_at_when_it_moves_and_no_other_where_the_kernel_opens_counters()
     {
        let start = Instant::now();
        let mut watch = Watch::new(true, false, start);
        assert_eq!(watch.pause(true), None);
        assert!(!watch.step(start + 500 * MS, 1));
        watch.is_due = true;
        assert_eq!(watch.pause(false), Some(SOON));
        assert!(!watch.step(start + 501 * MS, 1));
        assert!(watch.step(start + 502 * MS, 2));
        assert_eq!(watch.pause(true), None);
    }

    #[test]
    fn counters_are_opened_unless_the_guest_sees_to_them() {
        let mut watch = Watch::new(true, true, Instant::now());
        assert!(watch.judge(0));
        assert!(!watch.judge(COUNTERS));
        assert!(watch.judge(0), "started again");
        assert!(watch.is_tracked);
        assert!(!watch.judge(0b10), "Linux with a PMU");
        assert!(!watch.is_tracked);
        let mut stubborn = Watch::new(true, true, Instant::now());
        let opened = (0..1000).filter(|_| stubborn.judge(0)).count();
        assert_eq!(opened, MOST_OPENED as usize);
        assert!(!stubborn.is_tracked, "it closes them by itself");
    }
}
