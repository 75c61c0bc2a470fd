//! The sockets: where a debugger connects, and the connection as gdbstub writes to it.

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

/// Bytes that wait to be sent until there are so many.
const BATCH: usize = 4096;
/// Debuggers that may wait while another is served.
const BACKLOG: i32 = 1;

/// Where debuggers connect.
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

    /// Where it is: the port that was taken, where any would do.
    pub(super) fn address(&self) -> Result<GdbAddress, Error> {
        match self {
            Self::Unix(listening) => Ok(GdbAddress::Unix(listening.path().into())),
            Self::Tcp(listener) => {
                listener.local_addr().map(GdbAddress::Tcp).map_err(|source| Error::Host {
                    what: "Cannot find out on which port a debugger may connect".into(),
                    source,
                })
            }
        }
    }

    /// Lets the next one in; nothing where nobody waits any more.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let accepted = match self {
            Self::Unix(listening) => listening.accept(),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| {
                // Packets are small and answers are waited for.
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

/// Gets the thread `gdb` out of a wait, one for the debugger included.
#[derive(Debug)]
pub(super) struct Wakeup {
    fd: OwnedFd,
    rung: AtomicBool,
}

impl Wakeup {
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, rung: AtomicBool::new(false) })
    }

    pub(super) fn notify(&self) {
        self.rung.store(true, Ordering::SeqCst);
        // Full means that it is readable already.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }

    /// Makes it silent; whoever does looks for the reason afterwards.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0_u8; 8]);
        self.rung.store(false, Ordering::SeqCst);
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A connection. Reading never waits; writing waits for the debugger until the wakeup rings.
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

    /// Reads what has come: nothing (`None`) where that is nothing yet.
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
        if self.wakeup.rung.load(Ordering::SeqCst) {
            let what = "the machine cannot wait for a debugger that does not read";
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
