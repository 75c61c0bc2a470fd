//! The sockets: the listener, and a connection as gdbstub writes to it.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gdbstub::conn::Connection;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::config::GdbAddress;
use crate::error::Error;
use crate::host::Listening;

/// Size of the output buffer, which is sent when full or flushed.
const BATCH: usize = 4096;
/// Connections that may wait while another debugger is served.
const BACKLOG: i32 = 1;

/// A listening socket for debuggers.
#[derive(Debug)]
pub(super) enum DebugListener {
    Tcp(TcpListener),
    Unix(Listening),
}

impl DebugListener {
    /// # Errors
    /// [`Error::Host`] where the port is taken or the address is not this host's; for a path see [`Listening::open`].
    pub(super) fn open(at: &GdbAddress) -> Result<Self, Error> {
        let address = match at {
            GdbAddress::Unix(path) => return Ok(Self::Unix(Listening::open(path, BACKLOG)?)),
            GdbAddress::Tcp(address) => address,
        };
        let listener = TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        listener.map(Self::Tcp).map_err(|source| Error::Host {
            what: format!("Cannot listen on {at} for a debugger (choose another port or address)"),
            source,
        })
    }

    /// Returns the bound address: for TCP with the actual port if port 0 was asked for.
    pub(super) fn address(&self) -> Result<GdbAddress, Error> {
        match self {
            Self::Unix(listening) => Ok(GdbAddress::Unix(listening.path().into())),
            Self::Tcp(listener) => {
                listener.local_addr().map(GdbAddress::Tcp).map_err(|source| Error::Host {
                    what: "Cannot read the address of the listener for a debugger".into(),
                    source,
                })
            }
        }
    }

    /// Accepts the next connection; `None` if none is waiting any more.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let accepted = match self {
            Self::Unix(listening) => listening.accept(),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| {
                // Packets are small, and each waits for its reply.
                let _ = stream.set_nodelay(true);
                stream.into()
            }),
        };
        match accepted {
            Ok(fd) => Ok(Some(fd)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

impl AsFd for DebugListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listening) => listening.as_fd(),
        }
    }
}

/// Wakes the thread `gdb` from any wait, that for room in the socket's send buffer included.
#[derive(Debug)]
pub(super) struct Wakeup {
    fd: OwnedFd,
    is_notified: AtomicBool,
}

impl Wakeup {
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, is_notified: AtomicBool::new(false) })
    }

    pub(super) fn notify(&self) {
        self.is_notified.store(true, Ordering::SeqCst);
        // A full counter is readable already.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }

    /// Clears the notification; the caller checks for events afterwards.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0_u8; 8]);
        self.is_notified.store(false, Ordering::SeqCst);
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A connection. Reading never waits; writing waits for the debugger until [`Wakeup::notify`].
#[derive(Debug)]
pub(super) struct RspConnection {
    fd: OwnedFd,
    out: Vec<u8>,
    wakeup: Arc<Wakeup>,
}

impl RspConnection {
    pub(super) fn new(fd: OwnedFd, wakeup: Arc<Wakeup>) -> Self {
        Self { fd, out: Vec::with_capacity(BATCH), wakeup }
    }

    /// Reads received bytes; `None` if there are none yet.
    ///
    /// # Errors
    /// The debugger has closed the connection, or the connection is broken.
    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        match recv(&self.fd, bytes, RecvFlags::DONTWAIT).map(|(count, _)| count) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => Ok(Some(count)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let mut rest = self.out.as_slice();
        while !rest.is_empty() {
            match send(&self.fd, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN) => self.await_room()?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        Ok(())
    }

    fn await_room(&self) -> io::Result<()> {
        if self.wakeup.is_notified.load(Ordering::SeqCst) {
            let what = "the debugger does not read replies, and the machine resets or ends";
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        let mut fds =
            [PollFd::new(&self.fd, PollFlags::OUT), PollFd::new(&self.wakeup, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Connection for RspConnection {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.out.push(byte);
        if self.out.len() < BATCH { Ok(()) } else { self.send() }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

impl AsFd for RspConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
