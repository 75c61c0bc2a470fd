//! A Unix socket through which people come in, one after the other, as long as the machine lives.
//!
//! Where the host cannot let somebody in (it has no descriptors left), it could not at once again either, and the socket stays
//! readable: whoever watches it would spin. So for a second a timer is watched in its place. Those who come meanwhile wait.

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

/// How long nobody is let in after the host could not.
const REST: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The socket. One thread at a time lets people in.
#[derive(Debug)]
pub(crate) struct Acceptor {
    listening: Listening,
    /// Made at the beginning: when it is needed there may be no descriptor for it.
    timer: OwnedFd,
    /// Whether the timer is watched.
    rests: AtomicBool,
    /// Whether the present trouble has been told.
    is_told: AtomicBool,
}

impl Acceptor {
    /// Makes the socket and its file; `backlog` may wait to be let in.
    ///
    /// # Errors
    /// As [`Listening::open`]; [`Error::Host`] where the host has no descriptors left.
    pub(crate) fn open(path: &Path, backlog: i32) -> Result<Self, Error> {
        let listening = Listening::open(path, backlog)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|error| {
            let what = format!("Cannot make a timer for the socket {}", path.display());
            Error::Host { what, source: error.into() }
        })?;
        Ok(Self { listening, timer, rests: false.into(), is_told: false.into() })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.listening.path()
    }

    /// What is readable when there is a reason to call [`Acceptor::admit`]. May be another one after each call.
    pub(crate) fn fd(&self) -> RawFd {
        if self.rests.load(Relaxed) { self.timer.as_raw_fd() } else { self.listening.as_raw_fd() }
    }

    /// Lets the next one in, where somebody waits and the host can. Where it cannot, the log says so once, until it can again.
    pub(crate) fn admit(&self) -> Option<OwnedFd> {
        if self.rests.load(Relaxed) {
            // Refused: the time is not over.
            rustix::io::read(&self.timer, &mut [0_u8; 8]).ok()?;
            self.rests.store(false, Relaxed);
        }
        match self.listening.accept() {
            Ok(stream) => {
                self.is_told.store(false, Relaxed);
                return Some(stream);
            }
            // The kernel takes a descriptor before it looks who waits: there is one again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.is_told.store(false, Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => self.rest(&error),
        }
        None
    }

    fn rest(&self, error: &io::Error) {
        if !self.is_told.swap(true, Relaxed) {
            let path = self.path().display();
            warn!("Nobody can be let in at {path}: {error} (it is tried again each second)");
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timer = Itimerspec { it_interval: none, it_value: REST };
        let is_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok();
        self.rests.store(is_set, Relaxed);
    }
}
