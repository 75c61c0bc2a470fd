//! Control of a machine from outside, over all its lives.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

/// Stops, pauses and resumes a machine from any thread. Clones mean the same machine.
#[derive(Clone, Default)]
pub struct Handle(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// The control of the present life; none before the start, between two lives and after the end.
    current: Option<Arc<Control>>,
    /// Asked to stop: a life that begins later ends at once.
    stopped: bool,
}

impl Handle {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Asks the machine to stop with [`StopReason::Requested`]; returns at once. A machine that is not running yet ends
    /// as soon as it is run.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        if let Some(control) = &state.current {
            control.stop(StopReason::Requested);
        }
    }

    /// Stops all harts where they are, and returns once they are out of the guest. Devices on the host's side go on.
    /// False where the machine is not running or ends meanwhile.
    #[must_use]
    pub fn pause(&self) -> bool {
        let current = self.lock().current.clone();
        current.is_some_and(|control| control.pause())
    }

    /// Lets the harts of a paused machine go on.
    pub fn resume(&self) {
        if let Some(control) = &self.lock().current {
            control.resume();
        }
    }

    /// A life begins.
    pub(super) fn enter(&self, control: &Arc<Control>) {
        let mut state = self.lock();
        if state.stopped {
            control.stop(StopReason::Requested);
        }
        state.current = Some(Arc::clone(control));
    }

    /// A life ended.
    pub(super) fn leave(&self) {
        self.lock().current = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
