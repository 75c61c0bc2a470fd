//! One debugger, from its connection to its end. Whatever ends it, the guest is left without a trace of it.

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

/// The longest packet, and bytes read at once. A longer one ends the session.
const PACKET: usize = 4096;

/// How a session ended, as far as others are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The debugger went, or was sent away.
    Gone,
    /// rvmm ends.
    Closed,
}

/// What the wait for something brought.
enum SessionEvent {
    Byte(u8),
    Stop(MultiThreadStopReason<u64>),
    /// rvmm ends, and nobody waits for a stop.
    Closed,
    /// The connection is at its end.
    Broken(io::Error),
}

struct Session<'a> {
    server: &'a mut ServerThread,
    guest: Debuggee,
    input: VecDeque<u8>,
}

/// Serves a debugger whose guest is `context`, until it leaves or rvmm ends.
pub(super) fn serve(
    server: &mut ServerThread,
    context: &Arc<DebugContext>,
    connection: RspConnection,
) -> Ended {
    let mut session = Session { server, guest: Debuggee::default(), input: VecDeque::new() };
    if session.guest.take(context).is_err() {
        return Ended::Gone;
    }
    info!("A debugger has connected: the guest stands still");
    let ended = match session.talk(connection) {
        Ok(ended) => ended,
        Err(what) => {
            info!("The debugger's session ends: {what}");
            Ended::Gone
        }
    };
    session.guest.let_go();
    info!("The debugger is gone");
    ended
}

impl Session<'_> {
    fn talk(&mut self, connection: RspConnection) -> Result<Ended, String> {
        // One that gdbstub owns would grow with the packet.
        let mut room = [0; PACKET];
        let stub = GdbStub::<Debuggee, RspConnection>::builder(connection)
            .with_packet_buffer(&mut room)
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
                    // One that stands still stands where it is.
                    let stop = self.guest.is_running().then(|| self.guest.interrupt().ok());
                    let reason = stop.flatten().map(reason);
                    inner.interrupt_handled(&mut self.guest, reason).map_err(|e| e.to_string())?
                }
                Machine::Idle(mut inner) => match self.wait(inner.borrow_conn()) {
                    SessionEvent::Byte(byte) => inner
                        .incoming_data(&mut self.guest, byte)
                        .map_err(|error| error.to_string())?,
                    SessionEvent::Stop(_) => inner.into(),
                    SessionEvent::Closed => return Ok(Ended::Closed),
                    SessionEvent::Broken(error) => return Err(error.to_string()),
                },
                Machine::Running(mut inner) => match self.wait(inner.borrow_conn()) {
                    SessionEvent::Byte(byte) => inner
                        .incoming_data(&mut self.guest, byte)
                        .map_err(|error| error.to_string())?,
                    SessionEvent::Stop(reason) => inner
                        .report_stop(&mut self.guest, reason)
                        .map_err(|error| error.to_string())?,
                    SessionEvent::Closed => return Ok(Ended::Closed),
                    SessionEvent::Broken(error) => return Err(error.to_string()),
                },
            };
        }
    }

    fn disconnected(
        &self,
        reason: DisconnectReason,
        connection: &mut RspConnection,
    ) -> Result<Ended, String> {
        match reason {
            DisconnectReason::Kill => {
                // gdbstub leaves the answer out, which `vKill` has and `k` may have.
                let answer = b"$OK#9a".iter().try_for_each(|byte| connection.write(*byte));
                let _ = answer.and_then(|()| connection.flush());
                info!("The debugger ends the machine");
                if let Some(context) = self.guest.context() {
                    context.control.stop(StopReason::Requested);
                }
                Ok(Ended::Gone)
            }
            DisconnectReason::TargetExited(_) => Ok(Ended::Closed),
            DisconnectReason::Disconnect | DisconnectReason::TargetTerminated(_) => Ok(Ended::Gone),
        }
    }

    /// Waits until the debugger says something, or the guest does something that it waits for.
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
            // The machine may be ending; then there will be events.
            if let Ok(Some(stop)) = self.guest.settle() {
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

    /// Takes what the machine's thread has to say.
    fn take_machine_events(&mut self) -> Option<SessionEvent> {
        self.server.wakeup.clear();
        while let Ok(events) = self.server.events.try_recv() {
            match events {
                MachineEvent::Over(done) => {
                    self.guest.lose();
                    self.server.life = None;
                    let _ = done.send(());
                }
                MachineEvent::Begin(context, done) => {
                    let was_running = self.guest.is_running();
                    let taken = self.guest.take(&context);
                    self.server.life = Some(context);
                    let _ = done.send(());
                    if taken.is_ok() && was_running {
                        return Some(SessionEvent::Stop(reason(self.guest.reborn())));
                    }
                }
                MachineEvent::End(code) => {
                    self.server.has_ended = true;
                    let exited = BaseStopReason::Exited(code);
                    return Some(if self.guest.is_running() {
                        SessionEvent::Stop(exited)
                    } else {
                        SessionEvent::Closed
                    });
                }
            }
        }
        None
    }
}

/// A stop as gdbstub reports it.
fn reason(stop: Stop) -> MultiThreadStopReason<u64> {
    let signal = |hart, signal| BaseStopReason::SignalWithThread { tid: thread(hart), signal };
    match stop {
        Stop::Breakpoint(hart) => BaseStopReason::SwBreak(thread(hart)),
        Stop::Trap(hart) => signal(hart, Signal::SIGTRAP),
        Stop::Interrupt(hart) => signal(hart, Signal::SIGINT),
    }
}
