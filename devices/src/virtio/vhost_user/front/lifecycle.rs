//! Pause and reset of a device that another program serves. Its state is in that program.

use std::mem;

use log::{info, warn};

use super::{Front, Origin, Peer, PeerError, STOP_TIMEOUT};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::virtio::{VirtioLifecycle, Work};

/// The reason why it cannot be saved or restored.
const UNSAVABLE: &str = "its state is in the program that serves it";

impl VirtioLifecycle for Front {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        if self.is_paused {
            return Ok(());
        }
        let queues = mem::take(&mut self.queues);
        // Also waits for queues of before a reset, even if there are none now.
        let has_stopped = self.stop_within(&queues, STOP_TIMEOUT);
        self.queues = queues;
        if has_stopped {
            self.stopping = None;
            self.is_paused = true;
            return Ok(());
        }
        self.start_all(false);
        Err(PauseError("its program does not stop the queues"))
    }

    fn resume(&mut self) {
        self.is_paused = false;
        self.start_all(false);
    }

    fn reset(&mut self) {
        let queues = mem::take(&mut self.queues);
        self.running = None;
        if !self.is_paused {
            self.stop(&queues);
        }
    }

    fn reopen(&mut self) {
        let Origin::Started(_, service) = &self.origin else { return };
        if !self.is_gone {
            return;
        }
        let model = self.kind.model;
        match Peer::start(self.host.as_ref(), service) {
            Ok(Peer { session, origin }) => {
                self.connections = self.connections.wrapping_add(1);
                (self.session, self.origin) = (Some(session), origin);
                (self.is_ready, self.is_gone, self.has_warned) = (true, false, false);
                if self.suits() {
                    info!("{model}: its program was started again");
                } else {
                    self.disconnect(&PeerError::Unsuitable("it is another device than before"));
                }
            }
            Err(error) => warn!("{model}: its program cannot be started again: {error}"),
        }
    }

    fn reset_queue(&mut self, queue: u16) {
        let (stopped, kept) =
            mem::take(&mut self.queues).into_iter().partition(|q| q.rings.queue == queue);
        self.queues = kept;
        self.stop(&stopped);
    }

    fn is_quiescent(&self) -> bool {
        self.stopping.is_none()
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        Err(SaveError(UNSAVABLE.into()))
    }

    fn restore(
        &mut self,
        _state: SavedState,
        _features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        Err(RestoreError(UNSAVABLE.into()))
    }
}
