//! The interface between a console device and its backend on the host.

use std::io;
use std::os::fd::RawFd;

/// The backend of a console device: a terminal, a pipe, a pty, a socket, a file.
///
/// No method may block: both directions return [`io::ErrorKind::WouldBlock`] instead. `write` is
/// called by vCPU threads and by the I/O thread; `read` and `process_event` by the I/O thread only; never
/// concurrently.
///
/// A backend whose peer connects and disconnects (socket, pty) reports it through [`ports`](Self::ports), which
/// the device calls after every other call. Two rules keep the epoll set correct, as a new descriptor can
/// get the number of a closed one: descriptors are closed only in `read` and `process_event` (a `write` that
/// finds the peer gone reports [`Port::Closed`] for output from then on, and leaves the closing to
/// the I/O thread, which gets the hang-up), and no call both closes one and opens one.
pub trait ConsoleBackend: Send {
    /// The current state of the two directions, and the descriptor of the backend's own events.
    fn ports(&self) -> Ports;

    /// Reads input for the guest: at most `buffer.len()` bytes (at least 1), as many as are available.
    ///
    /// `Ok(0)` is the end of the input: the device does not read again until
    /// [`process_event`](Self::process_event) has run.
    ///
    /// # Errors
    /// `WouldBlock` if there is no input yet, `Interrupted` to be called again; anything else counts
    /// as the end of the input.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes output of the guest: at most `bytes.len()` bytes (at least 1), and returns the number
    /// written.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now: the device keeps the bytes, and throttles the guest
    /// when it has too many. `Interrupted` to be called again. Anything else, and `Ok(0)`: these
    /// bytes are dropped and counted; after `BrokenPipe`, `ConnectionReset`, `NotConnected` or
    /// the system's `EIO` the device does not write again until [`process_event`](Self::process_event) has run.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Columns and rows of the terminal, if the backend is one.
    fn size(&self) -> Option<(u16, u16)> {
        None
    }

    /// The descriptor in [`Ports::event_fd`] is readable: a client connects, or a pty has to be
    /// checked again.
    fn process_event(&mut self) {}
}

/// The state of a console's two directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Bytes for the guest.
    pub input: Port,
    /// Bytes from the guest.
    pub output: Port,
    /// A descriptor, other than those of the two directions, on whose readability
    /// [`ConsoleBackend::process_event`] is called.
    pub event_fd: Option<RawFd>,
}

/// One direction of a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// No peer: there is no input, output is dropped and counted.
    Closed,
    /// Never blocks: a regular file, `/dev/null` (epoll accepts neither).
    Always,
    /// Ready when epoll reports it. Both directions may have the same descriptor.
    Poll(RawFd),
}

/// A console that discards all output and never has input: `--serial null`.
#[derive(Debug, Clone, Copy, Default)]
pub struct NullConsole;

impl ConsoleBackend for NullConsole {
    fn ports(&self) -> Ports {
        Ports { input: Port::Closed, output: Port::Always, event_fd: None }
    }

    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}
