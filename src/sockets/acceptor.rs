//! A listening socket that accepts connections, one at a time, for the whole run of the machine.
//!
//! If accept(2) fails because the host has no descriptors left, the socket stays readable, and an event loop that polls it
//! would spin. So a timer is polled in its place for a second. Connections wait in the backlog meanwhile.

use std::fmt::{self, Display};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
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
    socket: Socket,
    /// Created in advance: when it is needed there may be no descriptor for it.
    timer: OwnedFd,
    /// The timer is polled, not the socket.
    is_backing_off: AtomicBool,
    /// The present failure has been logged.
    has_warned: AtomicBool,
}

#[derive(Debug)]
enum Socket {
    Unix(Listening),
    Tcp(TcpListener, SocketAddr),
}

impl Socket {
    fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(listening) => listening.accept(),
            Self::Tcp(listener, _) => listener.accept().map(|(stream, _)| {
                // Messages are small, and each waits for its reply.
                let _ = stream.set_nodelay(true);
                stream.into()
            }),
        }
    }
}

impl Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(listening) => listening.path().display().fmt(f),
            Self::Tcp(_, address) => address.fmt(f),
        }
    }
}

impl Acceptor {
    /// Creates a Unix socket and its file; up to `backlog` connections may wait to be accepted.
    ///
    /// # Errors
    /// As [`Listening::open`]; [`Error::Host`] if the host has no descriptors left.
    pub(crate) fn open(path: &Path, backlog: i32) -> Result<Self, Error> {
        Self::new(Socket::Unix(Listening::open(path, backlog)?))
    }

    /// Listens on a TCP address; port 0 chooses a free port.
    ///
    /// # Errors
    /// [`Error::Host`] if the port is taken or the address is not this host's, or the host has no descriptors left.
    pub(crate) fn open_tcp(address: SocketAddr) -> Result<Self, Error> {
        let listener = TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(|listener| listener.local_addr().map(|bound| Socket::Tcp(listener, bound)));
        Self::new(listener.map_err(|source| {
            let what = format!("Cannot listen on {address} (choose another port or address)");
            Error::Host { what, source }
        })?)
    }

    fn new(socket: Socket) -> Result<Self, Error> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|error| {
            let what = format!("Cannot create a timer for the socket {socket}");
            Error::Host { what, source: error.into() }
        })?;
        Ok(Self { socket, timer, is_backing_off: false.into(), has_warned: false.into() })
    }

    /// TCP address of the socket, with the actual port; `None` for a Unix socket.
    pub(crate) fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Unix(_) => None,
            Socket::Tcp(_, address) => Some(*address),
        }
    }

    /// The raw descriptor of [`Acceptor::as_fd`].
    pub(crate) fn fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }

    /// Accepts the next connection, if one waits and the host has a descriptor for it. Logs a failure once until accept(2) works again.
    pub(crate) fn accept(&self) -> Option<OwnedFd> {
        if self.is_backing_off.load(Relaxed) {
            // Fails until the timer has expired.
            rustix::io::read(&self.timer, &mut [0_u8; 8]).ok()?;
            self.is_backing_off.store(false, Relaxed);
        }
        match self.socket.accept() {
            Ok(stream) => {
                self.has_warned.store(false, Relaxed);
                return Some(stream);
            }
            Err(error) => match error.kind() {
                // The kernel allocates the descriptor before it looks for a connection: there is one again.
                io::ErrorKind::WouldBlock => self.has_warned.store(false, Relaxed),
                io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                _ => self.back_off(&error),
            },
        }
        None
    }

    fn back_off(&self, error: &io::Error) {
        if !self.has_warned.swap(true, Relaxed) {
            let socket = &self.socket;
            warn!("Cannot accept connections on {socket}: {error} (retrying every second)");
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timer = Itimerspec { it_interval: none, it_value: BACK_OFF };
        let is_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok();
        self.is_backing_off.store(is_set, Relaxed);
    }
}

impl Display for Acceptor {
    /// Path or address of the socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

impl AsFd for Acceptor {
    /// Descriptor that is readable when [`Acceptor::accept`] is to be called. May be another one after each call.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            _ if self.is_backing_off.load(Relaxed) => self.timer.as_fd(),
            Socket::Unix(listening) => listening.as_fd(),
            Socket::Tcp(listener, _) => listener.as_fd(),
        }
    }
}
