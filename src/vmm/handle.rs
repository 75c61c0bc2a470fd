//! The clients' side of a machine.

use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Sender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::virtio::balloon::BalloonControl;

use super::command::{Command, CommandError, DeviceChange, Event, ReplyTo, SavedParts};
use crate::inspect::{Query, Reply};
use crate::machine::MachineMemory;
use crate::snapshot::{Parent, SavedMachine};
use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

/// The state of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineState {
    /// Built; its guest has not started.
    Built,
    /// The guest runs.
    Running,
    /// The harts are out of the guest, and the devices at rest.
    Paused,
    /// The guest has ended; the devices write their last output.
    Stopping,
    /// Ended for good.
    Ended,
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Built => "not started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Ended => "ended",
        })
    }
}

/// Controls a machine from any thread, but not from one that the machine waits for (an observer, a console). Clones control the same
/// machine.
#[derive(Clone)]
pub struct Handle {
    link: Arc<Link>,
}

/// The connection to the controller.
struct Link {
    events: Sender<Event>,
    control: Arc<Control>,
    balloon: BalloonControl,
    /// A stop was requested: no run begins any more.
    is_stopped: AtomicBool,
    now: Mutex<Status>,
    /// Held by the client that saves the machine: two would take each other's written pages.
    saving: Mutex<()>,
}

/// The state as clients see it.
#[derive(Debug, Clone, Copy)]
struct Status {
    state: MachineState,
    /// The controller takes commands.
    is_attended: bool,
}

/// Keeps a machine paused until it is dropped, independently of other pauses.
#[must_use = "dropped, it lets the machine run"]
pub struct Paused(Handle);

impl Handle {
    pub(super) fn new(
        events: Sender<Event>,
        control: Arc<Control>,
        balloon: BalloonControl,
    ) -> Self {
        let now = Mutex::new(Status { state: MachineState::Built, is_attended: false });
        Self {
            link: Arc::new(Link {
                events,
                control,
                balloon,
                is_stopped: AtomicBool::new(false),
                now,
                saving: Mutex::new(()),
            }),
        }
    }

    /// The machine's state.
    #[must_use]
    pub fn state(&self) -> MachineState {
        self.lock().state
    }

    /// The control of the machine's first balloon: its target, and the memory that the guest has given. In a machine without a balloon
    /// it does nothing.
    #[must_use]
    pub fn balloon(&self) -> &BalloonControl {
        &self.link.balloon
    }

    /// Starts the guest of a machine that was launched.
    ///
    /// # Errors
    /// [`CommandError::WrongState`] if it was started before.
    pub fn start(&self) -> Result<(), CommandError> {
        self.call("start", Command::Start)
    }

    /// Requests a stop with [`StopReason::Requested`]; returns at once, from any thread. A machine that is not running yet ends
    /// as soon as it is run.
    pub fn stop(&self) {
        self.link.is_stopped.store(true, SeqCst);
        self.link.control.stop(StopReason::Requested);
    }

    /// Pauses the machine: all harts leave the guest, and then all devices come to rest. It runs again when as many of these guards were
    /// dropped as there were. Queries ([`Handle::inspect`]) neither end a pause nor are disturbed by its end.
    ///
    /// # Errors
    /// [`CommandError::WrongState`] if the guest does not run or ends meanwhile; [`CommandError::Device`] if a device goes on: then the
    /// machine does, too.
    pub fn pause(&self) -> Result<Paused, CommandError> {
        self.call("pause", Command::Pause).map(|()| Paused(self.clone()))
    }

    /// Ends one pause that was [kept](Paused::keep).
    ///
    /// # Errors
    /// [`CommandError::WrongState`] if the machine is not paused.
    pub fn resume(&self) -> Result<(), CommandError> {
        self.call("resume", Command::Resume)
    }

    /// Resets the machine in place, whatever its configuration says about resets of the guest; returns when the guest starts again. A
    /// machine that is paused stays so.
    ///
    /// # Errors
    /// [`CommandError::WrongState`] if the guest does not run, or the machine cannot be reset and ends.
    pub fn reset(&self) -> Result<(), CommandError> {
        self.call("reset", Command::Reset)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// [`CommandError::NoDevice`] without one, [`CommandError::Pressed`] if it was pressed before.
    pub fn press_power_button(&self) -> Result<(), CommandError> {
        self.call("press the power button of", Command::PressPowerButton)
    }

    /// Changes a device.
    ///
    /// # Errors
    /// [`CommandError::NoDevice`] without such a device, or the device's own error.
    pub fn change(&self, change: DeviceChange) -> Result<(), CommandError> {
        self.call("change a device of", |reply| Command::Change(change, reply))
    }

    /// Inspects the running guest: its counters, registers or page tables.
    ///
    /// # Errors
    /// [`CommandError::WrongState`] if the guest does not run.
    pub fn inspect(&self, query: Query) -> Result<Reply, CommandError> {
        self.call("inspect", |reply| Command::Inspect(query, reply))
    }

    /// Pauses the machine, and returns its state. It stays paused, and cannot be reset, until the result is dropped.
    ///
    /// # Errors
    /// As for [`Handle::pause`]; [`CommandError::State`] if a part of the state is out of reach.
    pub(super) fn save(&self) -> Result<Saved, CommandError> {
        let pause = self.pause()?;
        let SavedParts { machine, memory, is_paused } = self.call("save", Command::Save)?;
        Ok(Saved { machine, memory, is_paused, end: SaveEnd(self.clone()), pause })
    }

    /// Waits until no other client saves the machine, and keeps others from it.
    pub(super) fn turn_to_save(&self) -> MutexGuard<'_, ()> {
        self.link.saving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Access to the machine's memory, whose writes are tracked or not from now on.
    ///
    /// # Errors
    /// The guest does not run, or the kernel refuses.
    pub(super) fn track(&self, on: bool) -> Result<MachineMemory, CommandError> {
        self.call("save", |reply| Command::Track(on, reply))
    }

    /// Ends the machine, which is being saved, and continues elsewhere: its devices do nothing more.
    ///
    /// # Errors
    /// It ends for another reason.
    pub(super) fn depart(&self) -> Result<(), CommandError> {
        self.call("end", Command::Depart)
    }

    /// Gives up the locks of the disks of the machine, which is being saved, so that it can continue elsewhere.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn lend_disks(&self) -> Result<(), CommandError> {
        self.call("save", Command::LendDisks)
    }

    /// Takes the locks of the disks again.
    ///
    /// # Errors
    /// Another program uses a disk, which is named.
    pub(super) fn take_disks_back(&self) -> Result<(), CommandError> {
        self.call("resume", Command::TakeDisksBack)
    }

    /// Begins a difference: its base, if there is one, and its number.
    pub(super) fn begin_difference(&self) -> Result<(Option<Parent>, u64), CommandError> {
        self.call("save", Command::BeginDifference)
    }

    /// Makes a snapshot the base of the next difference.
    pub(super) fn set_base(&self, base: Parent, begun: u64) -> Result<(), CommandError> {
        self.call("save", |reply| Command::SetBase(base, begun, reply))
    }

    /// Sends a command, and waits for its reply.
    fn call<T>(
        &self,
        verb: &'static str,
        command: impl FnOnce(ReplyTo<T>) -> Command,
    ) -> Result<T, CommandError> {
        let refused = || CommandError::WrongState { command: verb, state: self.state() };
        let (reply, answer) = sync_channel(1);
        // Sent under the lock: the controller stops taking commands under it, too.
        let now = self.lock();
        let is_sent =
            now.is_attended && self.link.events.send(Event::Command(command(reply))).is_ok();
        drop(now);
        if !is_sent {
            return Err(refused());
        }
        answer.recv().unwrap_or_else(|_| Err(refused()))
    }

    /// Sets the state for clients.
    pub(super) fn set_state(&self, state: MachineState) {
        let mut now = self.lock();
        *now = Status { state, is_attended: state != MachineState::Ended };
    }

    /// True once a stop was requested.
    pub(super) fn is_stopped(&self) -> bool {
        self.link.is_stopped.load(SeqCst)
    }

    pub(super) fn control(&self) -> &Arc<Control> {
        &self.link.control
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.link.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine that is being saved.
pub(super) struct Saved {
    /// Everything but RAM.
    pub(super) machine: SavedMachine,
    /// RAM.
    pub(super) memory: MachineMemory,
    /// The machine is paused not only for that.
    pub(super) is_paused: bool,
    // In this order: the end of the pause is the last.
    end: SaveEnd,
    pause: Paused,
}

impl Saved {
    /// Ends the save, and keeps the machine paused.
    pub(super) fn into_pause(self) -> Paused {
        let Self { machine: _, memory: _, is_paused: _, end, pause } = self;
        drop(end);
        pause
    }
}

/// Tells the controller that the memory may change again.
struct SaveEnd(Handle);

impl Drop for SaveEnd {
    fn drop(&mut self) {
        // An error means that the machine has ended.
        let _ = self.0.call("save", Command::EndSave);
    }
}

impl Paused {
    /// Keeps the machine paused until [`Handle::resume`].
    pub fn keep(self) {
        mem::forget(self);
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        // An error means that the machine has ended.
        let _ = self.0.resume();
    }
}

impl fmt::Debug for Paused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paused").finish_non_exhaustive()
    }
}
