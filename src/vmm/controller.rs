//! The controller: the only owner of a machine. It waits for commands, for the end of a run, and for the time of the machine's upkeep.

use std::sync::mpsc::Receiver;
use std::time::Instant;

use super::command::{Command, CommandError, DeviceChange, Event, ReplyTo, SavedParts};
use super::handle::{Handle, MachineState};
use crate::config::OnReset;
use crate::error::Error;
use crate::inspect::GuestState;
use crate::machine::{Machine, MachineMemory};
use crate::vcpu::Pause;
use crate::vcpu::stop::StopReason;

/// A machine, and the state of its controller.
pub(super) struct Controller {
    machine: Machine,
    handle: Handle,
    events: Receiver<Event>,
    state: MachineState,
    /// Number of pauses, and what keeps the harts out of the guest.
    pauses: usize,
    pause: Option<Pause>,
    /// Number of clients that save the machine's memory; it is paused meanwhile.
    saves: usize,
    /// The locks of the disks were given up: without them the guest must not run.
    has_lent_disks: bool,
    /// Clients that wait for a reset.
    resets: Vec<ReplyTo<()>>,
}

impl Controller {
    /// Of a machine that does not run yet; with `is_paused` it starts as after one pause.
    pub(super) fn new(
        machine: Machine,
        handle: Handle,
        events: Receiver<Event>,
        is_paused: bool,
    ) -> Self {
        let (state, resets) = (MachineState::Built, Vec::new());
        let pause = is_paused.then(|| handle.control().pause()).flatten();
        let pauses = usize::from(pause.is_some());
        let (saves, has_lent_disks) = (0, false);
        Self { machine, handle, events, state, pauses, pause, saves, has_lent_disks, resets }
    }

    /// Serves clients until the machine has ended; starts the guest first if `begins`.
    pub(super) fn run(self, begins: bool) -> Result<StopReason, Error> {
        let handle = self.handle.clone();
        let result = self.serve(begins);
        handle.set_state(MachineState::Ended);
        result
    }

    fn serve(mut self, begins: bool) -> Result<StopReason, Error> {
        self.set_state(MachineState::Built);
        if begins {
            self.begin()?;
        }
        loop {
            match self.next_event() {
                Some(Event::Command(command)) => self.carry_out(command)?,
                Some(Event::Active) => self.machine.note_activity(),
                Some(Event::Stopping) => {
                    let reason = self.machine.finish_run();
                    if !self.restarts(&reason) {
                        return self.end(reason);
                    }
                    self.restart()?;
                }
                None => self.machine.work(),
            }
        }
    }

    /// Waits for the next event; `None` when work of the machine is due.
    fn next_event(&self) -> Option<Event> {
        let Some(at) = self.machine.next_work() else { return self.events.recv().ok() };
        // The channel stays open: the control has a sender.
        self.events.recv_timeout(at.saturating_duration_since(Instant::now())).ok()
    }

    fn set_state(&mut self, state: MachineState) {
        self.state = state;
        self.handle.set_state(state);
    }

    fn begin(&mut self) -> Result<(), Error> {
        self.machine.begin(self.pauses > 0)?;
        self.set_state(if self.pauses > 0 { MachineState::Paused } else { MachineState::Running });
        Ok(())
    }

    /// True if the machine is reset after a run that ended for this reason.
    fn restarts(&self, reason: &StopReason) -> bool {
        let is_wanted =
            !self.resets.is_empty() || self.machine.config().on_reset == OnReset::Restart;
        *reason == StopReason::Reset && is_wanted && self.state != MachineState::Built
    }

    fn restart(&mut self) -> Result<(), Error> {
        log::info!("The guest restarts");
        self.machine.reset()?;
        if self.handle.is_stopped() {
            // Requested while the last run already had a reason to end.
            self.handle.control().stop(StopReason::Requested);
        }
        self.begin()?;
        for reply in self.resets.drain(..) {
            // An error means that the client has gone.
            let _ = reply.send(Ok(()));
        }
        Ok(())
    }

    fn end(mut self, reason: StopReason) -> Result<StopReason, Error> {
        self.set_state(MachineState::Stopping);
        // Clients that still wait are told that the machine ends, since nobody replies.
        let Self { machine, events, resets, pause, .. } = self;
        drop((events, resets, pause));
        machine.end(reason)
    }

    /// Carries out a command and replies. An error ends the machine.
    fn carry_out(&mut self, command: Command) -> Result<(), Error> {
        match command {
            Command::Start(reply) => {
                if self.state != MachineState::Built {
                    self.refuse("start", &reply);
                    return Ok(());
                }
                self.begin()?;
                let _ = reply.send(Ok(()));
            }
            Command::Pause(reply) => {
                let _ = reply.send(self.pause());
            }
            Command::Resume(reply) => {
                let _ = reply.send(self.resume());
            }
            Command::Reset(reply) => {
                if !self.has_guest() {
                    self.refuse("reset", &reply);
                    return Ok(());
                }
                if self.saves > 0 {
                    let _ = reply.send(Err(CommandError::Saving("reset")));
                    return Ok(());
                }
                self.resets.push(reply);
                // If the guest ends by itself at this moment, the client is told that the machine has ended.
                self.handle.control().stop(StopReason::Reset);
            }
            Command::PressPowerButton(reply) => {
                let pressed = match self.machine.button() {
                    None => Err(CommandError::NoDevice("power button")),
                    Some(button) if button.press() => Ok(()),
                    Some(_) => Err(CommandError::Pressed),
                };
                let _ = reply.send(pressed);
            }
            Command::Change(change, reply) => {
                let _ = reply.send(self.change(change));
            }
            Command::Inspect(query, reply) => {
                let state = match self.state {
                    MachineState::Running => GuestState::Running,
                    MachineState::Paused => GuestState::Paused,
                    _ => {
                        self.refuse("inspect", &reply);
                        return Ok(());
                    }
                };
                let _ = reply.send(Ok(self.machine.inspect(query, state)));
            }
            Command::Save(reply) => {
                let saved = self.save();
                let is_saved = saved.is_ok();
                if reply.send(saved).is_ok() && is_saved {
                    self.saves = self.saves.saturating_add(1);
                }
            }
            Command::EndSave(reply) => {
                self.saves = self.saves.saturating_sub(1);
                let _ = reply.send(Ok(()));
            }
            Command::Depart(reply) => {
                let _ = reply.send(self.depart());
            }
            Command::LendDisks(reply) => {
                self.machine.lend_disks();
                self.has_lent_disks = true;
                let _ = reply.send(Ok(()));
            }
            Command::TakeDisksBack(reply) => {
                let _ = reply.send(self.take_disks_back());
            }
            Command::Track(on, reply) => {
                let _ = reply.send(self.track(on));
            }
            Command::BeginDifference(reply) => {
                let _ = reply.send(Ok(self.machine.begin_difference()));
            }
            Command::SetBase(base, begun, reply) => {
                self.machine.set_base(base, begun);
                let _ = reply.send(Ok(()));
            }
        }
        Ok(())
    }

    fn has_guest(&self) -> bool {
        matches!(self.state, MachineState::Running | MachineState::Paused)
    }

    fn refused(&self, command: &'static str) -> CommandError {
        CommandError::WrongState { command, state: self.state }
    }

    fn refuse<T>(&self, command: &'static str, reply: &ReplyTo<T>) {
        let _ = reply.send(Err(self.refused(command)));
    }

    fn pause(&mut self) -> Result<(), CommandError> {
        if !self.has_guest() {
            return Err(self.refused("pause"));
        }
        if self.pauses == 0 {
            let pause = self.machine.pause_harts();
            let pause = pause.ok_or(CommandError::WrongState {
                command: "pause",
                state: MachineState::Stopping,
            })?;
            self.machine.pause_devices()?;
            self.pause = Some(pause);
            self.set_state(MachineState::Paused);
        }
        self.pauses = self.pauses.saturating_add(1);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), CommandError> {
        let left = self.pauses.checked_sub(1).ok_or_else(|| self.refused("resume"))?;
        if left == 0 {
            self.take_disks_back()?;
        }
        self.pauses = left;
        if left == 0 {
            self.machine.resume_devices();
            self.pause = None;
            self.set_state(MachineState::Running);
        }
        Ok(())
    }

    /// Takes the locks of the disks again, if they were given up.
    fn take_disks_back(&mut self) -> Result<(), CommandError> {
        if self.has_lent_disks {
            let taken = self.machine.take_disks_back();
            taken.map_err(|error| CommandError::State(Box::new(error)))?;
            self.has_lent_disks = false;
        }
        Ok(())
    }

    /// The state of the paused machine.
    fn save(&self) -> Result<SavedParts, CommandError> {
        if self.pauses == 0 || !self.has_guest() {
            return Err(self.refused("save"));
        }
        let saved = self.machine.save().map_err(|error| CommandError::State(Box::new(error)));
        // One pause is that of the client who saves.
        let is_paused = self.pauses > self.saves.saturating_add(1);
        saved.map(|(machine, memory)| SavedParts { machine, memory, is_paused })
    }

    /// Ends the machine, which continues elsewhere as it was saved.
    fn depart(&mut self) -> Result<(), CommandError> {
        if self.saves == 0 {
            return Err(self.refused("end"));
        }
        self.machine.depart();
        self.handle.stop();
        Ok(())
    }

    fn track(&mut self, on: bool) -> Result<MachineMemory, CommandError> {
        if !self.has_guest() {
            return Err(self.refused("save"));
        }
        let tracked = self.machine.track(on);
        tracked.map_err(|error| CommandError::State(Box::new(error)))?;
        Ok(self.machine.memory())
    }

    fn change(&self, change: DeviceChange) -> Result<(), CommandError> {
        match change {
            DeviceChange::BalloonTarget(_) if !self.machine.config().has_device("balloon") => {
                Err(CommandError::NoDevice("balloon"))
            }
            DeviceChange::BalloonTarget(bytes) => Ok(self.handle.balloon().set_target(bytes)?),
        }
    }
}
