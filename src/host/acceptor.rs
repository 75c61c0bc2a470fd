//! A listening Unix socket that accepts connections, one at a time, for the whole run of the machine.
//!
//! If accept(2) fails because the host has no descriptors left, the socket stays readable, and an event loop that polls it
//! would spin. So a timer is polled in its place for a second. Connections wait in the backlog meanwhile.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use log::warn;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::listening::Listening;
use crate::error::Error;

/// Back-off after accept(2) has failed.
const BACK_OFF: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The socket. One thread at a time accepts connections.
#[derive(Debug)]
pub(crate) struct Acceptor {
    listening: Listening,
    /// Created in advance: when it is needed there may be no descriptor for it.
    timer: OwnedFd,
    /// The timer is polled, not the socket.
    is_backing_off: AtomicBool,
    /// The present failure has been logged.
    has_warned: AtomicBool,
}

impl Acceptor {
    /// Creates the socket and its file; up to `backlog` connections may wait to be accepted.
    ///
    /// # Errors
    /// As [`Listening::open`]; [`Error::Host`] if the host has no descriptors left.
    pub(crate) fn open(path: &Path, backlog: i32) -> Result<Self, Error> {
        let listening = Listening::open(path, backlog)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|error| {
            let what = format!("Cannot create a timer for the socket {}", path.display());
            Error::Host { what, source: error.into() }
        })?;
        Ok(Self { listening, timer, is_backing_off: false.into(), has_warned: false.into() })
    }

    /// Path of the socket.
    pub(crate) fn path(&self) -> &Path {
        self.listening.path()
    }

    /// Descriptor that is readable when [`Acceptor::accept`] is to be called. May be another one after each call.
    pub(crate) fn fd(&self) -> RawFd {
        let is_backing_off = self.is_backing_off.load(Relaxed);
        if is_backing_off { self.timer.as_raw_fd() } else { self.listening.as_raw_fd() }
    }

    /// Accepts the next connection, if one waits and the host has a descriptor for it. Logs a failure once until accept(2) works again.
    pub(crate) fn accept(&self) -> Option<OwnedFd> {
        if self.is_backing_off.load(Relaxed) {
            // Fails until the timer has expired.
            rustix::io::read(&self.timer, &mut [0_u8; 8]).ok()?;
            self.is_backing_off.store(false, Relaxed);
        }
        match self.listening.accept() {
            Ok(stream) => {
                self.has_warned.store(false, Relaxed);
                return Some(stream);
            }
            // The kernel allocates the descriptor before it looks for a connection: there is one again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.has_warned.store(false, Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => self.back_off(&error),
        }
        None
    }

    fn back_off(&self, error: &io::Error) {
        if !self.has_warned.swap(true, Relaxed) {
            let path = self.path().display();
            warn!("Cannot accept connections on {path}: {error} (retrying every second)");
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timer = Itimerspec { it_interval: none, it_value: BACK_OFF };
        let is_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok();
        self.is_backing_off.store(is_set, Relaxed);
    }
}
