//! A connection as gdbstub writes to it, and the event that ends waiting for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gdbstub::conn::Connection;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Size of the output buffer, which is sent when full or flushed.
const BATCH: usize = 4096;

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
