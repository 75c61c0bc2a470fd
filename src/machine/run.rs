//! A run of the guest: from the start of the harts until all their threads have ended, and the reset before the next one.

use std::io;
use std::mem;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rvmm_devices::StateError;

use super::load::Files;
use super::upkeep::Upkeep;
use super::{Machine, host_error};
use crate::error::{EXIT_OK, Error};
use crate::io_loop::{IoLoop, IoThread};
use crate::vcpu::hart::Hart;
use crate::vcpu::record::Unrecorded;
use crate::vcpu::stop::StopReason;
use crate::vcpu::{MachineContext, Pause, spawn_hart};

/// Time that harts that the guest has just started have to begin before a pause. They take some microseconds, once they get a CPU.
const START_PATIENCE: Duration = Duration::from_secs(10);

impl Machine {
    /// Begins a run: the harts enter the guest, or wait for the end of a pause if the machine `is_paused`. A hart whose thread cannot be
    /// started is a reason to stop.
    ///
    /// # Errors
    /// The host has no resources left for the I/O thread.
    pub(crate) fn begin(&mut self, is_paused: bool) -> Result<(), Error> {
        let Some(run) = &mut self.run else { return Ok(()) };
        let harts = mem::take(&mut run.harts);
        let (context, debug_context) = (Arc::clone(&run.context), run.debug_context.clone());
        self.counters = self.board.vm.counters();
        self.upkeep = Upkeep::of_run(self.board.vm.as_ref(), self.owns_process);
        match &self.io {
            None => self.io = Some(self.start_io()?),
            Some(io) => io.expect_activity(),
        }
        for hart in harts {
            let what = format!("start hart {}", hart.id());
            match self.start_hart(hart, &context) {
                Ok(thread) => self.threads.push(thread),
                Err(error) => {
                    self.failure = Some(host_error(&what, error));
                    self.board.control.stop(StopReason::HostFailure(what));
                    break;
                }
            }
        }
        let wakes_harts = context.wakeups.is_some();
        drop(context);
        if !is_paused {
            self.resume_devices();
        }
        if let (Some(server), Some(context)) = (&self.debugger, debug_context) {
            server.begin(context);
        }
        self.begun = Some(Instant::now());
        self.board.control.start();
        self.upkeep.started(wakes_harts);
        Ok(())
    }

    /// Starts the I/O thread, which serves all runs.
    fn start_io(&mut self) -> Result<IoThread, Error> {
        let new = IoLoop::new(Arc::clone(&self.board.bus));
        let mut io = new.map_err(|e| host_error("create the event loop", e))?;
        if let Some(signals) = self.signals.take() {
            let button = self.backends.button.clone();
            io.watch_signals(signals, Arc::clone(&self.stop));
            let _ = button.map(|button| io.watch_power_button(button));
        }
        if let Some(socket) = &self.socket {
            io.watch_external(Arc::clone(socket) as _);
        }
        if self.owns_process {
            let activity = Arc::clone(&self.activity);
            io.watch_activity(Box::new(move || activity()));
        }
        if self.are_devices_paused {
            io.start_paused();
        }
        let control = Arc::clone(&self.board.control);
        io.watch_failure(Box::new(move |what| {
            control.stop(StopReason::HostFailure(what));
        }));
        io.spawn().map_err(|e| host_error("start the event loop", e))
    }

    /// Starts a hart's thread, with a recorder where there is a trace.
    fn start_hart(
        &self,
        hart: Box<dyn Hart>,
        context: &Arc<MachineContext>,
    ) -> io::Result<JoinHandle<()>> {
        let (id, context, control) =
            (hart.id(), Arc::clone(context), Arc::clone(&self.board.control));
        let affinity = &self.config.cpus.affinity;
        let pinned = affinity.iter().find(|(hart, _)| *hart == id).map(|(_, cpu)| *cpu);
        match self.trace.as_ref().and_then(|trace| trace.recorder(id)) {
            None => spawn_hart(hart, context, control, pinned, Unrecorded),
            Some(recorder) => spawn_hart(hart, context, control, pinned, recorder),
        }
    }

    /// Ends a run that has a reason to end: waits for the harts' threads, and returns the reason. Devices go on.
    pub(crate) fn finish_run(&mut self) -> StopReason {
        let reason = self.board.control.wait();
        for thread in self.threads.drain(..) {
            // A hart that panicked has already stopped the machine with that reason.
            let _ = thread.join();
        }
        if let Some(debugger) = &self.debugger {
            debugger.over();
        }
        self.upkeep = Upkeep::default();
        self.counters.clear();
        // With it the threads that belong to the run end.
        self.run = None;
        reason
    }

    /// Resets the machine in place, after [`Machine::finish_run`]: devices, memory, harts and interrupt controller are as at power-on.
    /// Everything of the host stays open. Paused devices stay paused.
    ///
    /// # Errors
    /// The host lacks a resource, or a device does not come to rest; the machine cannot run any more.
    pub(crate) fn reset(&mut self) -> Result<(), Error> {
        let was_paused = self.are_devices_paused;
        if !was_paused {
            let rested = self.rest_devices(IoLoop::LONG_DRAIN);
            rested.map_err(|e| host_error("reset the machine", io::Error::other(e)))?;
        }
        if self.io.as_ref().is_some_and(IoThread::has_ended) {
            return Err(host_error("continue", io::Error::other("The I/O thread has ended")));
        }
        let mut files = match self.files.take() {
            Some(mut files) => {
                files.uncompress_again()?;
                files
            }
            // A machine that was restored needs them for the first time.
            None => Files::open(&self.config)?,
        };
        let harts = self.board.reset(&self.config)?;
        let (config, host) = (&self.config, self.host.as_ref());
        self.run = Some(self.board.load(config, &files, host, &self.backends, harts)?);
        files.free_uncompressed();
        self.files = Some(files);
        // The old guest's code may be in the CPUs' instruction caches.
        let changed = self.board.vm.code_changed();
        changed.map_err(|e| host_error("make the new guest's code visible to the harts", e))?;
        self.board.control.reset();
        if !was_paused {
            self.resume_devices();
        }
        Ok(())
    }

    /// Makes all harts leave the guest, when none of them is about to be started: that cannot be seen in its state. `None` if the machine
    /// ends.
    pub(crate) fn pause_harts(&self) -> Option<Pause> {
        let began = Instant::now();
        loop {
            let pause = self.board.control.pause()?;
            // A failure is noticed when the state is saved.
            let is_starting = self.board.vm.starting().is_ok_and(|harts| !harts.is_empty());
            if !is_starting || began.elapsed() > START_PATIENCE {
                return Some(pause);
            }
            // It begins as soon as it runs.
            drop(pause);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Brings all devices to rest. The harts are out of the guest.
    ///
    /// # Errors
    /// [`StateError`] for a device that goes on; none is paused then.
    pub(crate) fn pause_devices(&mut self) -> Result<(), StateError> {
        self.rest_devices(Duration::ZERO)
    }

    fn rest_devices(&mut self, drain: Duration) -> Result<(), StateError> {
        let Some(io) = &self.io else { return Ok(()) };
        io.pause(drain);
        let paused = self.board.bus.pause();
        match paused {
            Ok(()) => self.are_devices_paused = true,
            Err(_) => io.resume(),
        }
        paused
    }

    /// Continues after [`Machine::pause_devices`].
    pub(crate) fn resume_devices(&mut self) {
        if mem::take(&mut self.are_devices_paused) {
            self.board.bus.resume();
            let _ = self.io.as_ref().map(IoThread::resume);
        }
    }

    /// Notes that the paused machine continues elsewhere: until it ends its devices stay at rest, and serve nothing that the guest has
    /// requested, since they do so there.
    pub(crate) fn depart(&mut self) {
        self.has_departed = true;
    }

    /// Ends the machine with the reason of its last run, after the devices' last output, unless it [departs](Machine::depart).
    ///
    /// # Errors
    /// The host failed to start a thread or the event loop, or the trace of a guest that ended well could not be written completely.
    pub(crate) fn end(mut self, reason: StopReason) -> Result<StopReason, Error> {
        let stopped = if self.has_departed && self.are_devices_paused {
            self.io.take().map_or(Ok(()), IoThread::stop_at_rest)
        } else {
            self.resume_devices();
            let is_forced = self.failure.is_some() || reason == StopReason::Requested;
            let drain = if is_forced { IoLoop::DRAIN } else { IoLoop::LONG_DRAIN };
            self.io.take().map_or(Ok(()), |io| io.stop(drain))
        };
        if let Some(debugger) = self.debugger.take() {
            debugger.end(reason.exit_code());
        }
        stopped.map_err(|e| host_error("end the event loop", e))?;
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        // A failure of the guest takes precedence over one of its trace.
        match self.trace.take().map_or(Ok(()), crate::trace::Trace::finish) {
            Err(error) if reason.exit_code() == EXIT_OK => Err(error),
            _ => Ok(reason),
        }
    }
}
