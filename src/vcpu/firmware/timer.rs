//! The timer of `--timer user`: emulates in user space, where it is visible, what KVM does inside the kernel.
//!
//! A guest sets its timer by an SBI call, which exits as a breakpoint; a thread sleeps until the deadline and kicks the hart, which
//! raises its own timer interrupt: `hip.VSTIP`, by a comparator (`vstimecmp`) that is due at once. Privileged specification, 15.2.3;
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
    shared: Arc<SharedTimer>,
    hz: u64,
    observer: Option<Arc<dyn ExitObserver>>,
    thread: Option<JoinHandle<()>>,
}

struct SharedTimer {
    state: Mutex<TimerState>,
    changed: Condvar,
    /// True for harts whose timer has expired.
    due: Vec<AtomicBool>,
}

#[derive(Default)]
struct TimerState {
    deadlines: Vec<Option<Instant>>,
    ended: bool,
}

impl UserTimer {
    /// Starts timers for `harts` harts whose `time` has `hz` ticks per second. Events are reported to `observer`.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(
        harts: u32,
        hz: u64,
        control: &Arc<Control>,
        observer: Option<Arc<dyn ExitObserver>>,
    ) -> io::Result<Self> {
        let state = TimerState { deadlines: (0..harts).map(|_| None).collect(), ended: false };
        let due = (0..harts).map(|_| AtomicBool::new(false)).collect();
        let shared =
            Arc::new(SharedTimer { state: Mutex::new(state), changed: Condvar::new(), due });
        let (this, control) = (Arc::clone(&shared), Arc::clone(control));
        let thread =
            thread::Builder::new().name("timer".into()).spawn(move || this.run(&control))?;
        Ok(Self { shared, hz: hz.max(1), observer, thread: Some(thread) })
    }

    /// Sets the hart's timer to the tick `at` of its `time`, and clears its interrupt; false if the guest has to clear it.
    pub(super) fn set(&self, hart: &mut dyn Hart, at: u64) -> io::Result<bool> {
        let id = hart.id();
        self.notify(id, HartEvent::TimerSet);
        let now = hart.get(Reg::Time)?;
        let is_cleared = hart.set_timer_pending(false)?;
        // A deadline beyond the range of the host's clock is never.
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
        Ok(is_cleared)
    }

    /// Raises the hart's timer interrupt if its timer has expired. The hart was kicked for that.
    pub(super) fn fire(&self, hart: &mut dyn Hart) -> io::Result<()> {
        let id = hart.id();
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        let due = self.shared.due.get(index);
        if !due.is_some_and(|due| due.swap(false, SeqCst)) {
            return Ok(());
        }
        self.notify(id, HartEvent::TimerFired);
        hart.set_timer_pending(true)?;
        Ok(())
    }

    fn notify(&self, hart: u32, note: HartEvent) {
        if let Some(observer) = &self.observer {
            observer.note(hart, note);
        }
    }
}

impl SharedTimer {
    fn lock(&self) -> MutexGuard<'_, TimerState> {
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
            // A thread that panicked needs no cleanup.
            let _ = thread.join();
        }
    }
}
