//! The session of one debugger. However it ends, the guest is left without breakpoints and without changed state.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Machine;
use gdbstub::stub::{BaseStopReason, DisconnectReason, GdbStub, MultiThreadStopReason};
use log::info;
use rustix::event::{PollFd, PollFlags, poll};

use super::connection::RspConnection;
use super::context::DebugContext;
use super::debuggee::{Debuggee, Stop};
use super::server::{MachineEvent, ServerThread};
use super::target::thread;
use crate::vcpu::stop::StopReason;

/// Maximum packet length, and bytes per read. A longer packet ends the session.
const PACKET: usize = 4096;

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionEnd {
    /// The debugger disconnected, or was disconnected.
    Disconnected,
    /// rvmm ends.
    MachineEnded,
}

/// The result of [`Session::wait`].
enum SessionEvent {
    Byte(u8),
    Stop(MultiThreadStopReason<u64>),
    /// rvmm ends, and the debugger does not wait for a stop.
    MachineEnded,
    /// The connection is closed or broken.
    Broken(io::Error),
}

struct Session<'a> {
    server: &'a mut ServerThread,
    guest: Debuggee,
    input: VecDeque<u8>,
}

/// Serves a debugger of the run `context`, until it disconnects or rvmm ends.
pub(super) fn serve(
    server: &mut ServerThread,
    context: &Arc<DebugContext>,
    connection: RspConnection,
) -> SessionEnd {
    let mut session = Session { server, guest: Debuggee::default(), input: VecDeque::new() };
    if session.guest.attach(context).is_err() {
        return SessionEnd::Disconnected;
    }
    info!("A debugger has connected: the guest is stopped");
    let ended = match session.run(connection) {
        Ok(ended) => ended,
        Err(error) => {
            info!("The debugger's session failed: {error}");
            SessionEnd::Disconnected
        }
    };
    session.guest.detach();
    info!("The debugger has disconnected");
    ended
}

impl Session<'_> {
    fn run(&mut self, connection: RspConnection) -> Result<SessionEnd, String> {
        // A buffer owned by gdbstub would grow with the packet.
        let mut buffer = [0; PACKET];
        let stub = GdbStub::<Debuggee, RspConnection>::builder(connection)
            .with_packet_buffer(&mut buffer)
            .build();
        let stub = stub.map_err(|error| error.to_string())?;
        let mut machine = stub.run_state_machine(&mut self.guest).map_err(|e| e.to_string())?;
        loop {
            machine = match machine {
                Machine::Disconnected(mut inner) => {
                    let reason = inner.get_reason();
                    return self.disconnected(reason, inner.borrow_conn());
                }
                Machine::CtrlCInterrupt(inner) => {
                    // A stopped guest reports no second stop.
                    let stop = self.guest.is_running().then(|| self.guest.interrupt().ok());
                    let reason = stop.flatten().map(reason);
                    inner.interrupt_handled(&mut self.guest, reason).map_err(|e| e.to_string())?
                }
                Machine::Idle(mut inner) => match self.wait(inner.borrow_conn()) {
                    SessionEvent::Byte(byte) => inner
                        .incoming_data(&mut self.guest, byte)
                        .map_err(|error| error.to_string())?,
                    SessionEvent::Stop(_) => inner.into(),
                    SessionEvent::MachineEnded => return Ok(SessionEnd::MachineEnded),
                    SessionEvent::Broken(error) => return Err(error.to_string()),
                },
                Machine::Running(mut inner) => match self.wait(inner.borrow_conn()) {
                    SessionEvent::Byte(byte) => inner
                        .incoming_data(&mut self.guest, byte)
                        .map_err(|error| error.to_string())?,
                    SessionEvent::Stop(reason) => inner
                        .report_stop(&mut self.guest, reason)
                        .map_err(|error| error.to_string())?,
                    SessionEvent::MachineEnded => return Ok(SessionEnd::MachineEnded),
                    SessionEvent::Broken(error) => return Err(error.to_string()),
                },
            };
        }
    }

    fn disconnected(
        &self,
        reason: DisconnectReason,
        connection: &mut RspConnection,
    ) -> Result<SessionEnd, String> {
        match reason {
            DisconnectReason::Kill => {
                // gdbstub sends no reply, which `vKill` requires and `k` allows.
                let reply = b"$OK#9a".iter().try_for_each(|byte| connection.write(*byte));
                let _ = reply.and_then(|()| connection.flush());
                info!("The debugger has killed the machine");
                if let Some(context) = self.guest.context() {
                    context.control.stop(StopReason::Requested);
                }
                Ok(SessionEnd::Disconnected)
            }
            DisconnectReason::TargetExited(_) => Ok(SessionEnd::MachineEnded),
            DisconnectReason::Disconnect | DisconnectReason::TargetTerminated(_) => {
                Ok(SessionEnd::Disconnected)
            }
        }
    }

    /// Waits for input from the debugger, or for a stop or end of the guest.
    fn wait(&mut self, connection: &mut RspConnection) -> SessionEvent {
        loop {
            if let Some(byte) = self.input.pop_front() {
                return SessionEvent::Byte(byte);
            }
            if let Err(error) = self.await_readable(connection.as_fd()) {
                return SessionEvent::Broken(error);
            }
            if let Some(event) = self.take_machine_events() {
                return event;
            }
            // An error means that the machine is ending, which an event will report.
            if let Ok(Some(stop)) = self.guest.poll_stop() {
                return SessionEvent::Stop(reason(stop));
            }
            let mut bytes = [0; PACKET];
            match connection.read(&mut bytes) {
                Ok(count) => self.input.extend(bytes.iter().take(count.unwrap_or(0))),
                Err(error) => return SessionEvent::Broken(error),
            }
        }
    }

    fn await_readable(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        let context = self.guest.context().map(|context| context.as_fd());
        let fds = [Some(connection), Some(self.server.wakeup.as_fd()), context];
        let fds = fds.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN));
        let mut fds: Vec<_> = fds.collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Handles the events of the machine's thread.
    fn take_machine_events(&mut self) -> Option<SessionEvent> {
        self.server.wakeup.clear();
        while let Ok(event) = self.server.events.try_recv() {
            match event {
                MachineEvent::RunEnded(done) => {
                    self.guest.run_ended();
                    self.server.context = None;
                    let _ = done.send(());
                }
                MachineEvent::RunStarted(context, done) => {
                    let was_running = self.guest.is_running();
                    let attached = self.guest.attach(&context);
                    self.server.context = Some(context);
                    let _ = done.send(());
                    if attached.is_ok() && was_running {
                        return Some(SessionEvent::Stop(reason(self.guest.stop_after_reset())));
                    }
                }
                MachineEvent::MachineEnded(code) => {
                    self.server.has_ended = true;
                    let exited = BaseStopReason::Exited(code);
                    return Some(if self.guest.is_running() {
                        SessionEvent::Stop(exited)
                    } else {
                        SessionEvent::MachineEnded
                    });
                }
            }
        }
        None
    }
}

/// Converts a stop to gdbstub's type.
fn reason(stop: Stop) -> MultiThreadStopReason<u64> {
    let signal = |hart, signal| BaseStopReason::SignalWithThread { tid: thread(hart), signal };
    match stop {
        Stop::Breakpoint(hart) => BaseStopReason::SwBreak(thread(hart)),
        Stop::Trap(hart) => signal(hart, Signal::SIGTRAP),
        Stop::Interrupt(hart) => signal(hart, Signal::SIGINT),
    }
}
