//! Start, stop, pause and resume of all harts of a machine, from any thread; for a debugger, of single ones, and visits to them.
//!
//! One lock and one condition variable. Whoever wants something of the harts writes it down and kicks them; a hart that was
//! kicked looks here. A hart looks under the lock before it waits, so that nothing said in between is missed; what is said
//! while it is on its way into the guest reaches it by the kick, which is never lost.
//!
//! Lock order: this lock is taken last. With it held only kicks are called, which call nobody; so a device may stop or wake
//! the machine with its own lock held.

use std::collections::BTreeSet;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::hart::{Hart, Kick};
use super::stop::StopReason;

/// The will of a machine: what its harts are to do. One per run; a reboot makes a new one.
#[derive(Default)]
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    started: bool,
    /// How many [`Pause`]s there are.
    pauses: usize,
    /// What a debugger holds, beside a pause: it lets go of harts without ending somebody else's pause.
    held: Held,
    stop: Option<StopReason>,
    /// Every hart whose thread lives.
    harts: Vec<RegisteredHart>,
    /// How many of them wait here.
    parked: usize,
    /// How many of the waiting sleep in SBI SUSP.
    asleep: usize,
    /// Counts host events, for those that sleep until one.
    wakes: u64,
    /// What harts are to do where they wait, in the order of asking.
    tasks: Vec<(u32, HartTask)>,
}

/// Something that a hart does on its own thread while it waits.
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

impl State {
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

/// What a hart is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Run,
    Park,
    End,
}

/// Why a hart no longer waits.
pub(super) enum Wakeup {
    Run,
    End,
    /// To do this, and to wait again.
    Task(HartTask),
}

impl Control {
    /// A control whose harts wait for [`Control::start`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the harts run: those that are here and those that come later.
    pub fn start(&self) {
        self.lock().started = true;
        self.changed.notify_all();
    }

    /// Ends the run. The first reason counts; true where this is the one. Returns at once: [`Control::wait`] waits.
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
        // Who waits for an task learns by its loss that nobody will run it; not under the lock, since it is their code.
        let lost = std::mem::take(&mut state.tasks);
        drop(state);
        drop(lost);
        first
    }

    /// Takes all harts out of the guest and waits until they are: their registers are true then, and memory and devices
    /// change only by what the host does. A hart that has not started counts as out. None runs until the last [`Pause`] is
    /// dropped: who wants to look at a paused machine takes one too, and nobody ends that of somebody else.
    ///
    /// `None` where the machine ends. Not to be called by a hart's thread or with a device's lock held.
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

    /// Keeps all harts from the guest until [`Control::release`], whether they have started or not. Returns at once: callable
    /// from a hart's own thread. [`Control::await_held`] waits.
    pub fn hold(&self) {
        let mut state = self.lock();
        state.held = Held::All;
        state.kick_all();
    }

    /// Keeps one more hart from the guest. Returns at once, as [`Control::hold`] does.
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

    /// Waits until all harts are out of the guest after [`Control::hold`], with true registers. False where the machine ends.
    /// Not to be called by a hart's thread or with a device's lock held.
    pub fn await_held(&self) -> bool {
        let state = self.lock();
        let state = self.wait_while(state, |state| state.stop.is_none() && !state.all_are_out());
        state.stop.is_none()
    }

    /// Lets go of all harts, or of those in `only` and no others.
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

    /// The harts whose threads live, in ascending order.
    #[must_use]
    pub fn harts(&self) -> Vec<u32> {
        let mut harts: Vec<u32> = self.lock().harts.iter().map(|hart| hart.id).collect();
        harts.sort_unstable();
        harts
    }

    /// Has a hart that is out of the guest do `task` on its own thread, where alone its registers are to be reached, and waits for
    /// the result. `None` where there is no such hart, or the machine ends first. A hart that is not held or paused does
    /// it when it next is.
    pub fn run_on<R: Send + 'static>(
        &self,
        id: u32,
        task: impl FnOnce(&mut dyn Hart) -> R + Send + 'static,
    ) -> Option<R> {
        let (give, take) = sync_channel(1);
        let task: HartTask = Box::new(move |hart| {
            // Nobody waits any more where the visitor's thread died.
            let _ = give.send(task(hart));
        });
        let mut state = self.lock();
        if state.stop.is_some() || !state.harts.iter().any(|hart| hart.id == id) {
            return None;
        }
        state.tasks.push((id, task));
        self.changed.notify_all();
        drop(state);
        take.recv().ok()
    }

    /// Says that something has happened which wakes a system that sleeps in SBI SUSP: console input, a rising interrupt
    /// line. Cheap where none sleeps, and callable with a device's lock held.
    pub fn wake(&self) {
        let mut state = self.lock();
        state.wakes = state.wakes.wrapping_add(1);
        if state.asleep > 0 {
            self.changed.notify_all();
        }
    }

    /// Gets hart `id` out of the guest for a moment, to do what has become due.
    pub(super) fn kick(&self, id: u32) {
        if let Some(hart) = self.lock().harts.iter().find(|hart| hart.id == id) {
            hart.kick.kick();
        }
    }

    /// Waits until the run has a reason to end and every hart's thread has ended, and says the reason.
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

    /// Waits until there is a reason to stop, for `limit` at most. True where there is one.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let state = self.lock();
        let goes_on = |state: &mut State| state.stop.is_none();
        let waited = self.changed.wait_timeout_while(state, limit, goes_on);
        waited.map_or(true, |(state, _)| state.stop.is_some())
    }

    /// Why the run ends, once it does.
    #[must_use]
    pub fn reason(&self) -> Option<StopReason> {
        self.lock().stop.clone()
    }

    /// Whether somebody has a [`Pause`].
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.lock().pauses > 0
    }

    /// Enters a hart into the list of those that are kicked and waited for, until the guard is dropped by its thread.
    pub(super) fn enlist(self: &Arc<Self>, id: u32, kick: Arc<dyn Kick>) -> Service {
        self.lock().harts.push(RegisteredHart { id, kick });
        Service { control: Arc::clone(self), id }
    }

    /// What a hart is to do now.
    pub(super) fn order(&self, id: u32) -> Order {
        let state = self.lock();
        match state.stop {
            Some(_) => Order::End,
            None if state.may_run(id) => Order::Run,
            None => Order::Park,
        }
    }

    /// How many host events there were so far, for [`Control::sleep`].
    pub(super) fn events(&self) -> u64 {
        self.lock().wakes
    }

    /// Waits until the hart may run, is visited, or the run ends.
    pub(super) fn park(&self, id: u32) -> Wakeup {
        self.rest(id, None)
    }

    /// As [`Control::park`], and until there were other than `events` host events, for `limit` at most.
    pub(super) fn sleep(&self, id: u32, events: u64, limit: Duration) -> Wakeup {
        self.rest(id, Some((events, limit)))
    }

    fn rest(&self, id: u32, sleep: Option<(u64, Duration)>) -> Wakeup {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        if let Some((events, limit)) = sleep {
            state.asleep += 1;
            let waited = self.changed.wait_timeout_while(state, limit, |state| {
                state.stop.is_none() && state.wakes == events && !state.has_task(id)
            });
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.asleep -= 1;
        }
        state = self.wait_while(state, |state| {
            state.stop.is_none() && !state.may_run(id) && !state.has_task(id)
        });
        state.parked -= 1;
        match state.take_task(id) {
            _ if state.stop.is_some() => Wakeup::End,
            Some(task) => Wakeup::Task(task),
            None => Wakeup::Run,
        }
    }

    fn leave(&self, id: u32) {
        let mut state = self.lock();
        state.harts.retain(|hart| hart.id != id);
        let lost = std::mem::take(&mut state.tasks);
        if state.stop.is_none() {
            state.stop = Some(StopReason::HostFailure(format!("The thread of hart {id} died")));
            state.kick_all();
        }
        self.changed.notify_all();
        drop(state);
        drop(lost);
    }

    /// A thread that panicked has left the state whole: nothing in here can panic half way.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        condition: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let condition = |state: &mut State| condition(state);
        self.changed.wait_while(state, condition).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps all harts out of the guest for as long as it lives, whoever else does, too.
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

/// A hart's place in the list. Dropped last by its thread, however that ends; a run without a reason to end gets one then.
pub(super) struct Service {
    control: Arc<Control>,
    id: u32,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.control.leave(self.id);
    }
}
