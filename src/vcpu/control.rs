//! Start, stop, pause and resume of all harts of a machine, from any thread; for a debugger, also of single harts, and tasks on
//! their threads.
//!
//! One lock and one condition variable. A request changes the state and kicks the harts; a kicked hart checks the state. It
//! checks under the lock before it waits, so that no request is missed; a request that arrives while it enters the guest reaches
//! it through the kick, which is never lost.
//!
//! Lock order: this lock is taken last. With it held only kicks are called, which call nothing else; so a device may stop or
//! wake the machine with its own lock held.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::hart::{Hart, Kick};
use super::stop::StopReason;

/// The requested state of a machine's harts.
#[derive(Default)]
pub struct Control {
    state: Mutex<ControlState>,
    changed: Condvar,
    /// Count of host events that wake sleeping harts, and number of the harts that sleep in SBI SUSP. Not under the lock, since every
    /// interrupt is such an event.
    wakes: AtomicU64,
    asleep: AtomicUsize,
    on_stop: Mutex<Vec<StopTask>>,
}

/// A task for the moment in which a run gets its reason to end.
type StopTask = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct ControlState {
    started: bool,
    /// Number of [`Pause`]s.
    pauses: usize,
    /// Harts held by a debugger, independently of pauses: releasing them ends no pause.
    held: Held,
    stop: Option<StopReason>,
    /// Every hart whose thread is running.
    harts: Vec<RegisteredHart>,
    /// Number of those that wait in [`Control::park`] or [`Control::sleep`].
    parked: usize,
    /// Tasks for waiting harts, oldest first.
    tasks: Vec<(u32, HartTask)>,
}

/// A task that a hart runs on its own thread while it waits.
pub(super) type HartTask = Box<dyn FnOnce(&mut dyn Hart) + Send>;

#[derive(Default)]
enum Held {
    #[default]
    None,
    Some(BTreeSet<u32>),
    All,
}

impl Held {
    fn has(&self, id: u32) -> bool {
        match self {
            Self::None => false,
            Self::Some(harts) => harts.contains(&id),
            Self::All => true,
        }
    }
}

struct RegisteredHart {
    id: u32,
    kick: Arc<dyn Kick>,
}

impl ControlState {
    fn may_run(&self, id: u32) -> bool {
        self.started && self.pauses == 0 && !self.held.has(id)
    }

    fn all_are_out(&self) -> bool {
        self.parked >= self.harts.len()
    }

    fn has_task(&self, id: u32) -> bool {
        self.tasks.iter().any(|(hart, _)| *hart == id)
    }

    fn take_task(&mut self, id: u32) -> Option<HartTask> {
        let at = self.tasks.iter().position(|(hart, _)| *hart == id)?;
        Some(self.tasks.remove(at).1)
    }

    fn kick_all(&self) {
        for hart in &self.harts {
            hart.kick.kick();
        }
    }
}

mod waiting;

pub(super) use waiting::Registration;

/// The requested state of one hart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Run,
    Park,
    End,
}

/// The reason for which a hart no longer waits.
pub(super) enum WakeReason {
    Run,
    End,
    /// To run this task, and to wait again.
    Task(HartTask),
}

impl Control {
    /// Creates a control whose harts wait for [`Control::start`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the harts run, those that are registered later included.
    pub fn start(&self) {
        self.lock().started = true;
        self.changed.notify_all();
    }

    /// Calls `task` whenever a run gets its reason to end, on the thread that has the reason: it must neither block nor call a device.
    /// It does not register another one. Tasks stay, in the order in which they were registered.
    pub fn on_stop(&self, task: Box<dyn Fn() + Send + Sync>) {
        self.stop_tasks().push(task);
    }

    fn stop_tasks(&self) -> MutexGuard<'_, Vec<StopTask>> {
        self.on_stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares another run, whose harts wait for [`Control::start`]. The threads of the last one have ended. Pauses stay.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.stop = None;
        state.started = false;
        state.held = Held::None;
    }

    /// Ends the run. Only the first reason counts; true if it is this one. Returns at once: [`Control::wait`] waits.
    ///
    /// Callable from any thread, a hart's own included, and with a device's lock held.
    pub fn stop(&self, reason: StopReason) -> bool {
        let mut state = self.lock();
        let first = state.stop.is_none();
        if first {
            state.stop = Some(reason);
            state.kick_all();
            self.changed.notify_all();
        }
        // Dropping a task tells its requester that it will not run; not under the lock, since it runs the requester's code.
        let lost = std::mem::take(&mut state.tasks);
        drop(state);
        drop(lost);
        if first {
            self.tell_stop();
        }
        first
    }

    fn tell_stop(&self) {
        self.stop_tasks().iter().for_each(|task| task());
    }

    /// Makes all harts leave the guest and waits for that: their registers are current then, and only the host changes memory
    /// and devices. A hart that has not started counts as out of the guest. None runs until the last [`Pause`] is dropped: a
    /// thread that inspects a paused machine takes one as well, since it cannot rely on those of others.
    ///
    /// `None` if the machine ends. Not to be called by a hart's thread or with a device's lock held.
    #[must_use]
    pub fn pause(self: &Arc<Self>) -> Option<Pause> {
        let mut state = self.lock();
        state.pauses += 1;
        if state.pauses == 1 {
            state.kick_all();
        }
        let pause = Pause { control: Arc::clone(self) };
        let state = self.wait_while(state, |state| state.stop.is_none() && !state.all_are_out());
        let ends = state.stop.is_some();
        drop(state);
        (!ends).then_some(pause)
    }

    /// Keeps all harts out of the guest until [`Control::release`], whether they have started or not. Returns at once: callable
    /// from a hart's own thread. [`Control::await_held`] waits.
    pub fn hold(&self) {
        let mut state = self.lock();
        state.held = Held::All;
        state.kick_all();
    }

    /// Keeps one more hart out of the guest. Returns at once, as [`Control::hold`] does.
    pub fn hold_one(&self, id: u32) {
        let mut state = self.lock();
        match &mut state.held {
            Held::All => {}
            Held::Some(harts) => _ = harts.insert(id),
            held => *held = Held::Some(BTreeSet::from([id])),
        }
        for hart in state.harts.iter().filter(|hart| hart.id == id) {
            hart.kick.kick();
        }
    }

    /// Waits until all harts are out of the guest after [`Control::hold`], with current registers. False if the machine ends.
    /// Not to be called by a hart's thread or with a device's lock held.
    pub fn await_held(&self) -> bool {
        let state = self.lock();
        let state = self.wait_while(state, |state| state.stop.is_none() && !state.all_are_out());
        state.stop.is_none()
    }

    /// Releases all harts, or those in `only` and no others.
    pub fn release(&self, only: Option<&[u32]>) {
        let mut state = self.lock();
        state.held = match only {
            None => Held::None,
            Some(harts) => {
                let others = state.harts.iter().map(|hart| hart.id);
                Held::Some(others.filter(|id| !harts.contains(id)).collect())
            }
        };
        self.changed.notify_all();
    }

    /// The harts whose threads are running, in ascending order.
    #[must_use]
    pub fn harts(&self) -> Vec<u32> {
        let mut harts: Vec<u32> = self.lock().harts.iter().map(|hart| hart.id).collect();
        harts.sort_unstable();
        harts
    }

    /// Runs `task` on the thread of a hart that is out of the guest, since only that thread may access its registers, and waits
    /// for the result. `None` if there is no such hart, or the machine ends first. A hart that is not held or paused runs it
    /// when it next is.
    pub fn run_on<R: Send + 'static>(
        &self,
        id: u32,
        task: impl FnOnce(&mut dyn Hart) -> R + Send + 'static,
    ) -> Option<R> {
        let (sender, receiver) = sync_channel(1);
        let task: HartTask = Box::new(move |hart| {
            // An error means that the requester's thread has died.
            let _ = sender.send(task(hart));
        });
        let mut state = self.lock();
        if state.stop.is_some() || !state.harts.iter().any(|hart| hart.id == id) {
            return None;
        }
        state.tasks.push((id, task));
        self.changed.notify_all();
        drop(state);
        receiver.recv().ok()
    }

    /// Wakes a system that sleeps in SBI SUSP, upon console input or a rising interrupt line. Cheap if none sleeps, and callable
    /// with a device's lock held.
    pub fn wake(&self) {
        // In this order: a hart that goes to sleep does the opposite, under the lock until it waits.
        self.wakes.fetch_add(1, SeqCst);
        if self.asleep.load(SeqCst) > 0 {
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Makes hart `id` leave the guest briefly, to handle pending work.
    pub(super) fn kick(&self, id: u32) {
        if let Some(hart) = self.lock().harts.iter().find(|hart| hart.id == id) {
            hart.kick.kick();
        }
    }

    /// Waits until the run has a reason to end and every hart's thread has ended, and returns the reason.
    #[must_use]
    pub fn wait(&self) -> StopReason {
        let mut state = self.lock();
        loop {
            match &state.stop {
                Some(reason) if state.harts.is_empty() => return reason.clone(),
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits until there is a reason to stop, for `limit` at most. True if there is one.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let state = self.lock();
        let is_running = |state: &mut ControlState| state.stop.is_none();
        let waited = self.changed.wait_timeout_while(state, limit, is_running);
        waited.map_or(true, |(state, _)| state.stop.is_some())
    }

    /// The reason for which the run ends, once it does.
    #[must_use]
    pub fn reason(&self) -> Option<StopReason> {
        self.lock().stop.clone()
    }

    /// True while there is a [`Pause`].
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.lock().pauses > 0
    }

    /// True while a hart sleeps because the guest has suspended the system (SBI SUSP).
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        self.asleep.load(SeqCst) > 0
    }

    /// A poisoned lock is safe to use: no code that holds it can panic halfway through a change.
    fn lock(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, ControlState>,
        condition: impl Fn(&ControlState) -> bool,
    ) -> MutexGuard<'a, ControlState> {
        let condition = |state: &mut ControlState| condition(state);
        self.changed.wait_while(state, condition).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps all harts out of the guest until it is dropped, independently of other pauses.
#[must_use = "dropped, it lets the harts run"]
pub struct Pause {
    control: Arc<Control>,
}

impl Drop for Pause {
    fn drop(&mut self) {
        let mut state = self.control.lock();
        state.pauses -= 1;
        if state.pauses == 0 {
            self.control.changed.notify_all();
        }
    }
}

impl std::fmt::Debug for Pause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pause").finish_non_exhaustive()
    }
}
