//! The harts' side of the control: they register, check what is requested of them, and wait.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::{Control, Order, RegisteredHart, WakeReason};
use crate::vcpu::hart::Kick;
use crate::vcpu::stop::StopReason;

impl Control {
    /// Registers a hart to be kicked and waited for, until its thread drops the guard.
    pub(in crate::vcpu) fn register(
        self: &Arc<Self>,
        id: u32,
        kick: Arc<dyn Kick>,
    ) -> Registration {
        self.lock().harts.push(RegisteredHart { id, kick });
        Registration { control: Arc::clone(self), id }
    }

    /// The requested state of a hart.
    pub(in crate::vcpu) fn order(&self, id: u32) -> Order {
        let state = self.lock();
        match state.stop {
            Some(_) => Order::End,
            None if state.may_run(id) => Order::Run,
            None => Order::Park,
        }
    }

    /// Number of host events so far, for [`Control::sleep`].
    pub(in crate::vcpu) fn events(&self) -> u64 {
        self.wakes.load(SeqCst)
    }

    /// Waits until the hart may run or has a task, or the run ends.
    pub(in crate::vcpu) fn park(&self, id: u32) -> WakeReason {
        self.wait_parked(id, None)
    }

    /// As [`Control::park`], but first sleeps until the number of host events differs from `events`, for `limit` at most.
    pub(in crate::vcpu) fn sleep(&self, id: u32, events: u64, limit: Duration) -> WakeReason {
        self.wait_parked(id, Some((events, limit)))
    }

    fn wait_parked(&self, id: u32, sleep: Option<(u64, Duration)>) -> WakeReason {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        if let Some((events, limit)) = sleep {
            self.asleep.fetch_add(1, SeqCst);
            let waited = self.changed.wait_timeout_while(state, limit, |state| {
                state.stop.is_none() && self.wakes.load(SeqCst) == events && !state.has_task(id)
            });
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.asleep.fetch_sub(1, SeqCst);
        }
        state = self.wait_while(state, |state| {
            state.stop.is_none() && !state.may_run(id) && !state.has_task(id)
        });
        state.parked -= 1;
        match state.take_task(id) {
            _ if state.stop.is_some() => WakeReason::End,
            Some(task) => WakeReason::Task(task),
            None => WakeReason::Run,
        }
    }

    fn deregister(&self, id: u32) {
        let mut state = self.lock();
        state.harts.retain(|hart| hart.id != id);
        let lost = std::mem::take(&mut state.tasks);
        let first = state.stop.is_none();
        if first {
            state.stop = Some(StopReason::HostFailure(format!("The thread of hart {id} died")));
            state.kick_all();
        }
        self.changed.notify_all();
        drop(state);
        drop(lost);
        if first {
            self.tell_stop();
        }
    }
}

/// Registration of a hart. Dropped last by its thread, however that ends; if the run has no reason to end yet, it gets one then.
pub(in crate::vcpu) struct Registration {
    control: Arc<Control>,
    id: u32,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.control.deregister(self.id);
    }
}
