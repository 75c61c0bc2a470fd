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

use super::debuggee::{Debuggee, Stop};
use super::post::Post;
use super::server::{News, Office};
use super::target::thread;
use super::wire::Wire;
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
enum Came {
    Byte(u8),
    Stop(MultiThreadStopReason<u64>),
    /// rvmm ends, and nobody waits for a stop.
    Closed,
    /// The connection is at its end.
    Broken(io::Error),
}

struct Session<'a> {
    office: &'a mut Office,
    guest: Debuggee,
    input: VecDeque<u8>,
}

/// Serves a debugger whose guest is `post`, until it leaves or rvmm ends.
pub(super) fn serve(office: &mut Office, post: &Arc<Post>, wire: Wire) -> Ended {
    let mut session = Session { office, guest: Debuggee::default(), input: VecDeque::new() };
    if session.guest.take(post).is_err() {
        return Ended::Gone;
    }
    info!("A debugger has connected: the guest stands still");
    let ended = match session.talk(wire) {
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
    fn talk(&mut self, wire: Wire) -> Result<Ended, String> {
        // One that gdbstub owns would grow with the packet.
        let mut room = [0; PACKET];
        let stub = GdbStub::<Debuggee, Wire>::builder(wire).with_packet_buffer(&mut room).build();
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
                    Came::Byte(byte) => inner
                        .incoming_data(&mut self.guest, byte)
                        .map_err(|error| error.to_string())?,
                    Came::Stop(_) => inner.into(),
                    Came::Closed => return Ok(Ended::Closed),
                    Came::Broken(error) => return Err(error.to_string()),
                },
                Machine::Running(mut inner) => match self.wait(inner.borrow_conn()) {
                    Came::Byte(byte) => inner
                        .incoming_data(&mut self.guest, byte)
                        .map_err(|error| error.to_string())?,
                    Came::Stop(reason) => inner
                        .report_stop(&mut self.guest, reason)
                        .map_err(|error| error.to_string())?,
                    Came::Closed => return Ok(Ended::Closed),
                    Came::Broken(error) => return Err(error.to_string()),
                },
            };
        }
    }

    fn disconnected(&self, reason: DisconnectReason, wire: &mut Wire) -> Result<Ended, String> {
        match reason {
            DisconnectReason::Kill => {
                // gdbstub leaves the answer out, which `vKill` has and `k` may have.
                let answer = b"$OK#9a".iter().try_for_each(|byte| wire.write(*byte));
                let _ = answer.and_then(|()| wire.flush());
                info!("The debugger ends the machine");
                if let Some(post) = self.guest.post() {
                    post.control.stop(StopReason::Requested);
                }
                Ok(Ended::Gone)
            }
            DisconnectReason::TargetExited(_) => Ok(Ended::Closed),
            DisconnectReason::Disconnect | DisconnectReason::TargetTerminated(_) => Ok(Ended::Gone),
        }
    }

    /// Waits until the debugger says something, or the guest does something that it waits for.
    fn wait(&mut self, wire: &mut Wire) -> Came {
        loop {
            if let Some(byte) = self.input.pop_front() {
                return Came::Byte(byte);
            }
            if let Err(error) = self.await_readable(wire.as_fd()) {
                return Came::Broken(error);
            }
            if let Some(came) = self.hear_news() {
                return came;
            }
            // The machine may be ending; then there will be news.
            if let Ok(Some(stop)) = self.guest.settle() {
                return Came::Stop(reason(stop));
            }
            let mut bytes = [0; PACKET];
            match wire.read(&mut bytes) {
                Ok(count) => self.input.extend(bytes.iter().take(count.unwrap_or(0))),
                Err(error) => return Came::Broken(error),
            }
        }
    }

    fn await_readable(&self, wire: BorrowedFd<'_>) -> io::Result<()> {
        let post = self.guest.post().map(|post| post.as_fd());
        let fds = [Some(wire), Some(self.office.bell.as_fd()), post];
        let fds = fds.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN));
        let mut fds: Vec<_> = fds.collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what the machine's thread has to say.
    fn hear_news(&mut self) -> Option<Came> {
        self.office.bell.silence();
        while let Ok(news) = self.office.news.try_recv() {
            match news {
                News::Over(heard) => {
                    self.guest.lose();
                    self.office.life = None;
                    let _ = heard.send(());
                }
                News::Begin(post, heard) => {
                    let was_running = self.guest.is_running();
                    let taken = self.guest.take(&post);
                    self.office.life = Some(post);
                    let _ = heard.send(());
                    if taken.is_ok() && was_running {
                        return Some(Came::Stop(reason(self.guest.reborn())));
                    }
                }
                News::End(code) => {
                    self.office.has_ended = true;
                    let exited = BaseStopReason::Exited(code);
                    return Some(if self.guest.is_running() {
                        Came::Stop(exited)
                    } else {
                        Came::Closed
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
