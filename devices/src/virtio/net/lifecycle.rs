//! Pause, reset and save of a network device. The backend's frames that are not received stay in the host.

use log::{info, warn};
use serde::{Deserialize, Serialize};

use super::pairs::PairsState;
use super::{Kernel, MODEL, Net, bit};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::virtio::{VirtioLifecycle, Work};

/// The state of a network device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetState {
    /// The address that the driver has read.
    mac: [u8; 6],
    pairs: PairsState,
}

impl VirtioLifecycle for Net {
    fn pause(&mut self, work: &mut Work<'_>) -> Result<(), PauseError> {
        let _ = self.kernel.as_mut().map(|kernel| kernel.pause(work.memory()));
        Ok(())
    }

    fn resume(&mut self) {
        let _ = self.kernel.as_mut().map(Kernel::resume);
    }

    fn reset(&mut self) {
        self.taken = 0;
        let _ = self.kernel.as_mut().map(Kernel::reset);
        self.pairs.reset();
    }

    fn reopen(&mut self) {
        let Some(network) = self.network.as_ref().filter(|_| self.pairs.is_gone()) else { return };
        match network.open(self.pairs.count(), self.kernel.is_some()) {
            Ok((backends, queues)) => {
                self.pairs.connect(backends);
                let _ = self.kernel.as_mut().map(|kernel| kernel.connect(queues));
                info!("{}: its network was opened again", MODEL.name);
            }
            Err(error) => warn!("{}: its network cannot be opened again: {error}", MODEL.name),
        }
    }

    fn reset_queue(&mut self, queue: u16) {
        if queue == self.control() {
            return;
        }
        match &mut self.kernel {
            Some(kernel) => kernel.reset_queue(queue),
            None => self.pairs.reset_queue(queue),
        }
    }

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        // The link's state in the configuration space is that of the backend, which is read again; the rest but the address is constant.
        let Self {
            extra: _,
            queue_sizes: _,
            pairs,
            config: _,
            has_chosen_mac: _,
            taken: _,
            kernel: _,
            network: _,
        } = self;
        SavedState::of(&NetState { mac: self.mac(), pairs: pairs.save() })
    }

    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let NetState { mac, pairs } = state.read()?;
        // The driver keeps the one that it has read, whatever network this is now.
        if !self.has_chosen_mac {
            self.set_mac(mac);
        }
        self.taken = features.unwrap_or(0);
        self.pairs.restore(&pairs, self.taken)?;
        self.require_offloads(self.pairs.offloads());
        if let (Some(kernel), Some(features)) = (&mut self.kernel, features) {
            kernel.restore(features);
            if features & bit::MQ == 0 {
                kernel.wake();
            }
        }
        self.update_link(work);
        Ok(())
    }
}
