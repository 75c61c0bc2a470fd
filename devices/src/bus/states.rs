//! Pause, resume, reset, save and restore of all devices on a bus.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Bus;
use crate::lifecycle::SavedState;

/// The state of a device on a bus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// The model's name.
    pub model: String,
    /// Guest-physical address of its first byte.
    pub base: u64,
    /// Its state.
    pub state: SavedState,
}

/// An error of one device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("Cannot {action} device {model} at {base:#x}: {reason}")]
pub struct StateError {
    action: &'static str,
    model: String,
    base: u64,
    reason: String,
}

impl Bus {
    /// Pauses every device, in order of address. No hart runs meanwhile, and no event is delivered until [`Bus::resume`].
    ///
    /// # Errors
    /// [`StateError`] for a device that does not come to rest; the others were resumed.
    pub fn pause(&self) -> Result<(), StateError> {
        let map = self.map();
        for (count, slot) in map.slots.iter().enumerate() {
            let paused = slot.lock().pause();
            if let Err(error) = paused {
                map.slots.iter().take(count).for_each(|slot| slot.lock().resume());
                let (model, base) = (slot.name.to_owned(), slot.base);
                return Err(StateError { action: "pause", model, base, reason: error.to_string() });
            }
        }
        Ok(())
    }

    /// Resumes every device.
    pub fn resume(&self) {
        self.map().slots.iter().for_each(|slot| slot.lock().resume());
    }

    /// Resets every device, in order of address. No hart may run meanwhile.
    pub fn reset(&self) {
        self.map().slots.iter().for_each(|slot| slot.lock().reset());
    }

    /// The states of all devices, which are paused, in order of address.
    ///
    /// # Errors
    /// [`StateError`] for a device that cannot be saved.
    pub fn save(&self) -> Result<Vec<DeviceState>, StateError> {
        let save = |slot: &std::sync::Arc<super::BusSlot>| {
            let (model, base) = (slot.name.to_owned(), slot.base);
            let state = slot.lock().save();
            state.map(|state| DeviceState { model: model.clone(), base, state }).map_err(|error| {
                StateError { action: "save", model, base, reason: error.to_string() }
            })
        };
        self.map().slots.iter().map(save).collect()
    }

    /// Restores the states of all devices, which are new; they are paused afterwards.
    ///
    /// # Errors
    /// [`StateError`] for a state without its device, a device without a state, and a state that does not fit.
    pub fn restore(&self, states: Vec<DeviceState>) -> Result<(), StateError> {
        let map = self.map();
        let failed = |model: &str, base, reason: String| StateError {
            action: "restore",
            model: model.into(),
            base,
            reason,
        };
        let has_state =
            |name: &str, base| states.iter().any(|state| state.model == name && state.base == base);
        if let Some(slot) = map.slots.iter().find(|slot| !has_state(slot.name, slot.base)) {
            return Err(failed(slot.name, slot.base, "it has no saved state".into()));
        }
        for DeviceState { model, base, state } in states {
            let slot = map.slots.iter().find(|slot| slot.name == model && slot.base == base);
            let slot =
                slot.ok_or_else(|| failed(&model, base, "the machine has no such device".into()))?;
            let restored = slot.lock().restore(state);
            restored.map_err(|error| failed(&model, base, error.to_string()))?;
        }
        Ok(())
    }
}
