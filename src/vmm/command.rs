//! Commands of clients to the controller, each with a reply.

use std::sync::mpsc::SyncSender;

use super::handle::MachineState;
use crate::error::Error;
use crate::inspect::{Query, Reply};
use crate::machine::MachineMemory;
use crate::snapshot::{Parent, SavedMachine};
use rvmm_devices::StateError;
use rvmm_devices::virtio::balloon::BalloonTooLarge;

/// What the controller waits for.
pub(super) enum Event {
    /// The current run has a reason to end; sent once for each run.
    Stopping,
    /// The I/O thread has served events again after an idle time.
    Active,
    /// A command of a client.
    Command(Command),
}

/// Receives the result of a command. If it is dropped, the machine has ended before.
pub(super) type ReplyTo<T> = SyncSender<Result<T, CommandError>>;

/// A command.
pub(super) enum Command {
    Start(ReplyTo<()>),
    Pause(ReplyTo<()>),
    Resume(ReplyTo<()>),
    Reset(ReplyTo<()>),
    PressPowerButton(ReplyTo<()>),
    Change(DeviceChange, ReplyTo<()>),
    Inspect(Query, ReplyTo<Reply>),
    Save(ReplyTo<SavedParts>),
    EndSave(ReplyTo<()>),
    Depart(ReplyTo<()>),
    LendDisks(ReplyTo<()>),
    TakeDisksBack(ReplyTo<()>),
    Track(bool, ReplyTo<MachineMemory>),
    BeginDifference(ReplyTo<(Option<Parent>, u64)>),
    SetBase(Parent, u64, ReplyTo<()>),
}

/// The parts of a machine that is saved.
pub(super) struct SavedParts {
    /// Everything but RAM.
    pub(super) machine: SavedMachine,
    /// RAM.
    pub(super) memory: MachineMemory,
    /// The machine is paused not only for that.
    pub(super) is_paused: bool,
}

/// A change of a device of a machine that may be running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChange {
    /// The target of the first balloon in bytes.
    BalloonTarget(u64),
}

/// The reason for which a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The machine is in another state.
    #[error("Cannot {command} the machine: it is {state}")]
    WrongState {
        /// The command: a verb.
        command: &'static str,
        /// The machine's state.
        state: MachineState,
    },
    /// The machine's memory is being saved: it must not change meanwhile.
    #[error("Cannot {0} the machine: it is being saved (try again)")]
    Saving(&'static str),
    /// The machine's state cannot be saved.
    #[error(transparent)]
    State(Box<Error>),
    /// A device does not come to rest.
    #[error(transparent)]
    Device(#[from] StateError),
    /// The machine has no such device.
    #[error("The machine has no {0}")]
    NoDevice(&'static str),
    /// The button was pressed before.
    #[error("The power button was pressed before, and the guest has not powered off")]
    Pressed,
    /// A target that no balloon can have.
    #[error(transparent)]
    Balloon(#[from] BalloonTooLarge),
}
