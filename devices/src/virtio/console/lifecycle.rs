//! Pause, reset and save of a console device. Input that was not read stays in the host.

use serde::{Deserialize, Serialize};

use super::Console;
use super::port::{Port, PortState};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::virtio::{VirtioLifecycle, Work};

/// The state of a console device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleState {
    ports: Vec<PortState>,
}

impl VirtioLifecycle for Console {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        self.ports.iter_mut().for_each(Port::flush);
        Ok(())
    }

    fn resume(&mut self) {
        self.ports.iter_mut().for_each(Port::flush);
        // All queues are served, whatever the guest kicks; an error means that it is readable already.
        let _ = self.resume.write(1);
    }

    fn reset(&mut self) {
        self.taken = 0;
        self.ports.iter_mut().for_each(Port::reset);
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, queue: u16) {
        let number = self.port_of(queue);
        let port = number.and_then(|number| self.ports.get_mut(number));
        if let (Some(port), false) = (port, queue.is_multiple_of(2)) {
            port.forget_output();
        }
    }

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        // The configuration space has the size of the terminal, which is read again.
        let Self { ports, queue_sizes: _, resume: _, offered: _, taken: _, config: _ } = self;
        SavedState::of(&ConsoleState { ports: ports.iter().map(Port::save).collect() })
    }

    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let ConsoleState { ports } = state.read()?;
        if ports.len() != self.ports.len() {
            return Err(RestoreError::invalid("the number of ports"));
        }
        self.taken = features.unwrap_or(0);
        let mut both = self.ports.iter_mut().zip(ports);
        both.try_for_each(|(port, state)| port.restore(state, work))
    }
}
