//! The host's end of a guest's console, as a device sees it.

use std::io;
use std::os::fd::RawFd;

/// Where a console device's bytes go and come from: a terminal, a pipe, a pty, a socket, a file.
///
/// Nothing here may block: both directions return [`io::ErrorKind::WouldBlock`] instead. `write` is
/// called by vCPU threads and by the I/O thread; `read` and `attend` by the I/O thread only; never
/// two at a time.
///
/// A backend whose peer comes and goes (socket, pty) says so through [`ports`](Self::ports), which
/// the device asks after every call. Two rules keep the epoll set right, where a new descriptor can
/// get an old one's number: descriptors are closed only in `read` and `attend` (a `write` that
/// finds the peer gone reports [`Port::Closed`] for output from then on, and leaves the closing to
/// the I/O thread, which sees the hang-up), and no call both closes one and opens one.
pub trait ConsoleBackend: Send {
    /// The two directions as they are now, and the descriptor of the backend's own business.
    fn ports(&self) -> Ports;

    /// Takes input for the guest: at most `buffer.len()` bytes (at least 1), as many as are there.
    ///
    /// `Ok(0)` is the end of the input: the device does not ask again until
    /// [`attend`](Self::attend) has run.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing yet, `Interrupted` to be asked again; anything else counts
    /// as the end of the input.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Takes output of the guest: at most `bytes.len()` bytes (at least 1), and says how many it
    /// took.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now: the device keeps the bytes, and holds the guest back
    /// when it has too many. `Interrupted` to be asked again. Anything else, and `Ok(0)`: these
    /// bytes are dropped and counted; after `BrokenPipe`, `ConnectionReset`, `NotConnected` or
    /// the system's `EIO` the device does not ask again until [`attend`](Self::attend) has run.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Columns and rows of the terminal, where the backend is one.
    fn size(&self) -> Option<(u16, u16)> {
        None
    }

    /// The descriptor in [`Ports::attention`] is readable: a client wants in, a pty has to be
    /// looked at again.
    fn attend(&mut self) {}
}

/// The state of a console's two directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Bytes for the guest.
    pub input: Port,
    /// Bytes from the guest.
    pub output: Port,
    /// A descriptor, other than those of the two directions, whose readability means
    /// [`ConsoleBackend::attend`].
    pub attention: Option<RawFd>,
}

/// One direction of a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Nobody is there: no input comes, output is dropped and counted.
    Closed,
    /// Never waits: a regular file, `/dev/null` (epoll takes neither).
    Always,
    /// Ready when epoll says so. Both directions may name the same descriptor.
    Poll(RawFd),
}

/// A console that swallows all output and never has input: `--serial null`.
#[derive(Debug, Clone, Copy, Default)]
pub struct NullConsole;

impl ConsoleBackend for NullConsole {
    fn ports(&self) -> Ports {
        Ports { input: Port::Closed, output: Port::Always, attention: None }
    }

    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}
