//! A socket whose peer may be slow, silent or gone: each message has a time-out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Time-out for a message that has begun, or that is due.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A connected stream socket.
#[derive(Debug)]
pub(super) struct Wire {
    socket: OwnedFd,
    patience: Duration,
}

impl Wire {
    /// Of a socket, which does not block any more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn new(socket: OwnedFd, patience: Duration) -> io::Result<Self> {
        fcntl_setfl(&socket, fcntl_getfl(&socket)? | OFlags::NONBLOCK)?;
        Ok(Self { socket, patience })
    }

    /// Sends all bytes.
    ///
    /// # Errors
    /// `TimedOut` if the peer does not read; the connection is closed.
    pub(super) fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        let until = Instant::now() + self.patience;
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN) => wait(&self.socket, PollFlags::OUT, Some(until))?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives as many bytes.
    ///
    /// # Errors
    /// `TimedOut` if they do not come; `UnexpectedEof` if the peer closes the connection.
    pub(super) fn receive(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.receive_until(bytes, Instant::now() + self.patience)
    }

    fn receive_until(&self, mut bytes: &mut [u8], until: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            wait(&self.socket, PollFlags::IN, Some(until))?;
            match recv(&self.socket, &mut *bytes, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, count)) => bytes = bytes.get_mut(count..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits for a message, for ever, and receives it. False if the peer has closed the connection instead.
    ///
    /// # Errors
    /// As for [`Wire::receive`] once it has begun.
    pub(super) fn receive_next(&self, bytes: &mut [u8]) -> io::Result<bool> {
        wait(&self.socket, PollFlags::IN, None)?;
        match recv(&self.socket, &mut [0; 1], RecvFlags::PEEK) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(false),
            _ => self.receive(bytes).map(|()| true),
        }
    }
}

/// Waits until a descriptor is ready or its peer is gone.
///
/// # Errors
/// `TimedOut` if it is not ready in time.
pub(super) fn wait(fd: &impl AsFd, flags: PollFlags, until: Option<Instant>) -> io::Result<()> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(fd, flags)], left.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
