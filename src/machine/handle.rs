//! Control of a machine from outside, over all its lives.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::virtio::balloon::BalloonControl;

use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
