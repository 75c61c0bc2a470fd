//! Control of a machine from context, over all its lives.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::virtio::balloon::BalloonControl;

use crate::vcpu::stop::StopReason;
use crate::vcpu::{Control, Pause};

/// Stops, pauses and resumes a machine from any thread. Clones mean the same machine.
#[derive(Clone)]
pub struct Handle {
    state: Arc<Mutex<State>>,
    balloon: BalloonControl,
}

#[derive(Default)]
struct State {
    /// The control of the present life; none before the start, between two lives and after the end.
    current: Option<Arc<Control>>,
    /// Those of this handle and its clones, in the present life.
    pauses: Vec<Pause>,
    /// Asked to stop: a life that begins later ends at once.
    stopped: bool,
}

impl Handle {
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { state: Arc::default(), balloon: BalloonControl::new()? })
    }

    /// What sets the target of the machine's first balloon while the guest runs, and tells what it has given. In a machine
    /// without a balloon it does nothing.
    #[must_use]
    pub fn balloon(&self) -> &BalloonControl {
        &self.balloon
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
    ///
    /// Pauses are counted: the harts go on after as many calls of [`Handle::resume`] as there were of this one that returned
    /// true. Who looks at the machine from elsewhere (`rvmm regs`) neither ends a pause nor is disturbed by its end.
    #[must_use]
    pub fn pause(&self) -> bool {
        let Some(control) = self.lock().current.clone() else { return false };
        // Not under the lock: harts take their time, and somebody may want to stop the machine meanwhile.
        let Some(pause) = control.pause() else { return false };
        let mut state = self.lock();
        let is_current = state.current.as_ref().is_some_and(|now| Arc::ptr_eq(now, &control));
        if is_current {
            state.pauses.push(pause);
        }
        is_current
    }

    /// Ends one pause; the harts go on where it was the last. Does nothing where there is none.
    pub fn resume(&self) {
        let ended = self.lock().pauses.pop();
        drop(ended);
    }

    /// Whether there is a pause that [`Handle::resume`] has not ended, in the present life of the guest.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        !self.lock().pauses.is_empty()
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
        let mut state = self.lock();
        state.current = None;
        state.pauses.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
