//! Control of a machine from outside, across reboots.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::virtio::balloon::BalloonControl;

use crate::vcpu::stop::StopReason;
use crate::vcpu::{Control, Pause};

/// Stops, pauses and resumes a machine from any thread. Clones control the same machine.
#[derive(Clone)]
pub struct Handle {
    state: Arc<Mutex<State>>,
    balloon: BalloonControl,
}

#[derive(Default)]
struct State {
    /// The control of the current run; none before the start, between two runs and after the end.
    current: Option<Arc<Control>>,
    /// The pauses of this handle and its clones in the current run.
    pauses: Vec<Pause>,
    /// True once a stop was requested: a run that begins later ends at once.
    stopped: bool,
}

impl Handle {
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { state: Arc::default(), balloon: BalloonControl::new()? })
    }

    /// The control of the machine's first balloon: sets its target while the guest runs, and reports the memory that the guest has
    /// given. In a machine without a balloon it does nothing.
    #[must_use]
    pub fn balloon(&self) -> &BalloonControl {
        &self.balloon
    }

    /// Requests a stop with [`StopReason::Requested`]; returns at once. A machine that is not running yet ends
    /// as soon as it is run.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        if let Some(control) = &state.current {
            control.stop(StopReason::Requested);
        }
    }

    /// Pauses all harts, and returns once they are out of the guest. The devices' backends keep running. False if the machine
    /// is not running or ends meanwhile.
    ///
    /// Pauses are counted: the harts resume after as many calls of [`Handle::resume`] as there were of this one that returned
    /// true. Queries from other programs (`rvmm regs`) neither end a pause nor are disturbed by its end.
    #[must_use]
    pub fn pause(&self) -> bool {
        let Some(control) = self.lock().current.clone() else { return false };
        // Not under the lock: this may take a while, and the machine may be stopped meanwhile.
        let Some(pause) = control.pause() else { return false };
        let mut state = self.lock();
        let is_current = state.current.as_ref().is_some_and(|now| Arc::ptr_eq(now, &control));
        if is_current {
            state.pauses.push(pause);
        }
        is_current
    }

    /// Ends one pause; the harts resume if it was the last. Does nothing if there is none.
    pub fn resume(&self) {
        let ended = self.lock().pauses.pop();
        drop(ended);
    }

    /// True if the current run of the guest has a pause that [`Handle::resume`] has not ended.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        !self.lock().pauses.is_empty()
    }

    /// Begins a run.
    pub(super) fn enter(&self, control: &Arc<Control>) {
        let mut state = self.lock();
        if state.stopped {
            control.stop(StopReason::Requested);
        }
        state.current = Some(Arc::clone(control));
    }

    /// Ends a run.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.current = None;
        state.pauses.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
