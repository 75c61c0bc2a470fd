//! The timer of `--timer user`: what KVM does inside the kernel, done where it can be seen.
//!
//! A guest sets its timer by an SBI call, which comes out as a breakpoint; a thread sleeps until then, kicks the hart, and the hart
//! has its own timer interrupt raised: `hip.VSTIP`, by a comparator (`vstimecmp`) that is due at once. Privileged specification, 15.2.3;
//! Sstc. A pending timer of the kernel's also ends `wfi`, as it must.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::vcpu::Control;
use crate::vcpu::hart::{Hart, Reg};
use crate::vcpu::observer::{ExitObserver, HartEvent};

/// The timers of all harts of a machine.
pub struct UserTimer {
    shared: Arc<Shared>,
    hz: u64,
    observer: Option<Arc<dyn ExitObserver>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Whose time has come, by hart.
    due: Vec<AtomicBool>,
}

#[derive(Default)]
struct State {
    deadlines: Vec<Option<Instant>>,
    ended: bool,
}

impl UserTimer {
    /// Timers for `harts` harts whose `time` has `hz` ticks a second. What happens is told to `observer`.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(
        harts: u32,
        hz: u64,
        control: &Arc<Control>,
        observer: Option<Arc<dyn ExitObserver>>,
    ) -> io::Result<Self> {
        let state = State { deadlines: (0..harts).map(|_| None).collect(), ended: false };
        let due = (0..harts).map(|_| AtomicBool::new(false)).collect();
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), due });
        let (mine, control) = (Arc::clone(&shared), Arc::clone(control));
        let thread =
            thread::Builder::new().name("timer".into()).spawn(move || mine.run(&control))?;
        Ok(Self { shared, hz: hz.max(1), observer, thread: Some(thread) })
    }

    /// Sets the hart's timer to the tick `at` of its `time`, and takes its interrupt back; false where the guest has to do that.
    pub(super) fn set(&self, hart: &mut dyn Hart, at: u64) -> io::Result<bool> {
        let id = hart.id();
        self.tell(id, HartEvent::TimerSet);
        let now = hart.get(Reg::Time)?;
        let is_taken_back = hart.set_timer_pending(false)?;
        // Too far away for the host's clock is never.
        let left = at.saturating_sub(now);
        let wait = Duration::from_secs(left / self.hz)
            + Duration::from_nanos((left % self.hz).saturating_mul(1_000_000_000) / self.hz);
        let deadline = if at == u64::MAX { None } else { Instant::now().checked_add(wait) };
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        let mut state = self.shared.lock();
        if let Some(due) = self.shared.due.get(index) {
            due.store(false, SeqCst);
        }
        if let Some(slot) = state.deadlines.get_mut(index) {
            *slot = deadline;
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(is_taken_back)
    }

    /// Raises the hart's timer interrupt if its time has come. The hart has been kicked for it.
    pub(super) fn fire(&self, hart: &mut dyn Hart) -> io::Result<()> {
        let id = hart.id();
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        let due = self.shared.due.get(index);
        if !due.is_some_and(|due| due.swap(false, SeqCst)) {
            return Ok(());
        }
        self.tell(id, HartEvent::TimerFired);
        hart.set_timer_pending(true)?;
        Ok(())
    }

    fn tell(&self, hart: u32, note: HartEvent) {
        if let Some(observer) = &self.observer {
            observer.note(hart, note);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, control: &Control) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            let mut next: Option<Instant> = None;
            for ((id, slot), due) in (0..).zip(state.deadlines.iter_mut()).zip(&self.due) {
                match slot {
                    Some(deadline) if *deadline <= now => {
                        *slot = None;
                        due.store(true, SeqCst);
                        control.kick(id);
                    }
                    Some(deadline) => {
                        next = Some(next.map_or(*deadline, |next| next.min(*deadline)))
                    }
                    None => {}
                }
            }
            state = match next {
                Some(next) => {
                    let wait = next.saturating_duration_since(now);
                    self.changed
                        .wait_timeout(state, wait)
                        .map_or_else(|e| e.into_inner().0, |(state, _)| state)
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Drop for UserTimer {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to be done.
            let _ = thread.join();
        }
    }
}
