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
    /// [`StateError`] for a state without its device, a device without a state or with two, and a state that does not fit.
    pub fn restore(&self, states: Vec<DeviceState>) -> Result<(), StateError> {
        let map = self.map();
        let failed = |model: &str, base, reason: String| StateError {
            action: "restore",
            model: model.into(),
            base,
            reason,
        };
        // Everything fits before the first device is touched.
        let mut matched: Vec<Option<SavedState>> = vec![None; map.slots.len()];
        for DeviceState { model, base, state } in states {
            let at = map.slots.iter().position(|slot| slot.name == model && slot.base == base);
            let Some(place) = at.and_then(|at| matched.get_mut(at)) else {
                return Err(failed(&model, base, "the machine has no such device".into()));
            };
            if place.replace(state).is_some() {
                return Err(failed(&model, base, "it has two saved states".into()));
            }
        }
        if let Some((slot, _)) = map.slots.iter().zip(&matched).find(|(_, state)| state.is_none()) {
            return Err(failed(slot.name, slot.base, "it has no saved state".into()));
        }
        for (slot, state) in map.slots.iter().zip(matched.into_iter().flatten()) {
            let restored = slot.lock().restore(state);
            restored.map_err(|error| failed(slot.name, slot.base, error.to_string()))?;
        }
        Ok(())
    }
}
