//! The life cycle of a device: pause, resume, reset, save, restore; one set of methods for every device, interrupt controller and host
//! end, without default bodies, so that no model leaves one out by mistake.
//!
//! ```text
//!             reset()                        save()
//!               |                              |
//! built ---> running ------- pause() ------> paused ---> restore() of a new device of the same configuration
//!               ^----------- resume() -----------'
//! ```
//!
//! A state is what the guest can see or has caused, and nothing of the host: files, sockets, descriptors and programs belong to the
//! machine, which opens them by the configuration before it restores a state.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

/// The life cycle of a device. Calls are made under the device's lock, and while no hart runs, but for
/// [`reset`](Self::reset), which a guest can cause.
pub trait Lifecycle {
    /// Brings the device to rest: when this returns, no thread, program or kernel of the host works for it, and nothing accesses guest
    /// memory. What the host has begun is completed, and the guest's interrupt driven; what has not begun stays in the guest's queues.
    /// No event is delivered until [`resume`](Self::resume). A paused device may be reset, and stays paused.
    ///
    /// # Errors
    /// [`PauseError`] if the host does not complete a request in time. The device is not paused then.
    fn pause(&mut self) -> Result<(), PauseError>;

    /// Continues after [`pause`](Self::pause) or [`restore`](Self::restore).
    fn resume(&mut self);

    /// Resets every guest-visible register to its value after power-on, and drives the interrupt line low: a reset of the whole machine.
    /// An end of the host that was lost for good (a program that has ended, a network that was deleted) is opened again, if possible.
    fn reset(&mut self);

    /// Returns the whole state of a paused device.
    ///
    /// # Errors
    /// [`SaveError`] with the reason, if a part of the state is out of reach.
    fn save(&self) -> Result<SavedState, SaveError>;

    /// Takes over the state of a device of the same configuration. The device is new, and paused afterwards; its interrupt line is
    /// driven to the saved level.
    ///
    /// # Errors
    /// [`RestoreError`] if the state is none of such a device: the device has to be dropped or reset.
    fn restore(&mut self, state: SavedState) -> Result<(), RestoreError>;
}

/// A device that is still working for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct PauseError(
    /// The reason, in words for the user.
    pub &'static str,
);

/// A device whose state is not all available.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct SaveError(
    /// The reason, in words for the user.
    pub String,
);

/// A state that does not fit the device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct RestoreError(
    /// The reason, in words for the user.
    pub String,
);

impl RestoreError {
    /// An error for a value that no such device can have.
    pub(crate) fn invalid(what: &str) -> Self {
        Self(format!("{what} is invalid"))
    }
}

/// The state of a device, as typed data of the device that has saved it.
#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct SavedState(Value);

impl SavedState {
    /// The state of a device without any.
    #[must_use]
    pub fn none() -> Self {
        Self(Value::Null)
    }

    /// Wraps a device's own state.
    ///
    /// # Errors
    /// [`SaveError`] for a type that JSON cannot represent.
    pub fn of(state: &impl Serialize) -> Result<Self, SaveError> {
        serde_json::to_value(state).map(Self).map_err(|error| SaveError(error.to_string()))
    }

    /// Reads the state as that of a certain device.
    ///
    /// # Errors
    /// [`RestoreError`] if it is another one's.
    pub fn read<T: DeserializeOwned>(self) -> Result<T, RestoreError> {
        serde_json::from_value(self.0).map_err(|error| RestoreError(error.to_string()))
    }
}

/// Implements [`Lifecycle`] for a device without any state, and without work of the host. A function may be
/// given that is called for a reset.
#[macro_export]
macro_rules! stateless {
    ($device:ty) => {
        $crate::stateless!($device, |_device| {});
    };
    ($device:ty, $reset:expr) => {
        impl $crate::lifecycle::Lifecycle for $device {
            fn pause(&mut self) -> Result<(), $crate::lifecycle::PauseError> {
                Ok(())
            }

            fn resume(&mut self) {}

            fn reset(&mut self) {
                let reset: fn(&mut Self) = $reset;
                reset(self);
            }

            fn save(&self) -> Result<$crate::lifecycle::SavedState, $crate::lifecycle::SaveError> {
                Ok($crate::lifecycle::SavedState::none())
            }

            fn restore(
                &mut self,
                state: $crate::lifecycle::SavedState,
            ) -> Result<(), $crate::lifecycle::RestoreError> {
                state.read::<()>()
            }
        }
    };
}
