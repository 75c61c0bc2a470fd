//! Backends of the guest's console: standard input and output, a file, a pseudo terminal, a socket, or descriptors or a [`Write`]
//! of a program that embeds rvmm. They never block: see [`rvmm_devices::ConsoleBackend`].
//!
//! | file | content |
//! |---|---|
//! | `keys.rs` | Ctrl-A x, z and h: the keys that rvmm handles on a terminal |
//! | `raw.rs` | the terminal's raw mode, and restoring it in all cases |
//! | `foreground.rs` | job control: when rvmm may read and set the terminal |
//! | `descriptor.rs` | non-blocking access to a descriptor of any kind |
//! | `streams.rs`, `stdio.rs` | a console on two descriptors; on standard input and output |
//! | `pty.rs`, `socket.rs` | consoles whose clients connect and disconnect |
//! | `writer.rs` | a console that writes to any [`Write`] |

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rvmm_devices::{ConsoleBackend, NullConsole};

use crate::config::Endpoint;
use crate::error::Error;
use crate::sockets::connect_to_starting;

mod descriptor;
mod foreground;
mod keys;
mod pty;
mod raw;
mod socket;
mod stdio;
mod streams;
mod writer;

pub use raw::restore;
pub(crate) use raw::{resized, resume, suspend};

/// Requests a stop of the machine: called for Ctrl-A x and for signals.
///
/// It is called on the I/O thread, for Ctrl-A x with the serial device's lock held: it may set a flag, kick a hart or
/// write an eventfd, but must neither block nor access the bus.
pub type StopRequest = Arc<dyn Fn() + Send + Sync>;

/// A console that is ready for [`rvmm_devices::Wiring`].
pub struct Console {
    /// The host's side.
    pub backend: Box<dyn ConsoleBackend>,
    /// The path that a terminal program opens, if this is a pseudo terminal. The caller shows it to the user.
    pub pty: Option<PathBuf>,
}

/// Opens the console that a configuration asks for.
///
/// Standard input, if it is a terminal, is set to raw mode and restored when the console is dropped (see [`restore`]).
/// The file of [`Endpoint::File`] may be of any kind that can be written: symbolic links are followed, a FIFO needs a
/// reader.
///
/// # Errors
/// [`Error::File`] and [`Error::Host`], with the reason and advice.
pub fn open(serial: &Endpoint, stop: StopRequest) -> Result<Console, Error> {
    match serial {
        Endpoint::Stdio => Console::stdio(stop),
        Endpoint::Null => Ok(Console::null()),
        Endpoint::File(path) => Console::file(path),
        Endpoint::Pty => Console::pty(),
        Endpoint::Unix(path) => Console::unix(path),
        Endpoint::Connect(path) => Console::connect(path),
    }
}

impl Console {
    fn new(backend: impl ConsoleBackend + 'static) -> Self {
        Self { backend: Box::new(backend), pty: None }
    }

    /// Standard input and output. Ctrl-A x calls `stop` if the input is a terminal.
    ///
    /// # Errors
    /// [`Error::Host`], also if another console of this process uses the terminal.
    pub fn stdio(stop: StopRequest) -> Result<Self, Error> {
        match stdio::Stdio::open(stop) {
            Ok(stdio) => Ok(Self::new(stdio)),
            Err(source) => {
                let what = match source.kind() {
                    io::ErrorKind::AlreadyExists => {
                        "Cannot use the terminal: another guest of this process uses it (give one of them another console)"
                    }
                    _ => "Cannot use standard input and output as the console",
                };
                Err(Error::Host { what: what.into(), source })
            }
        }
    }

    /// No backend: output is discarded, and there is no input.
    #[must_use]
    pub fn null() -> Self {
        Self::new(NullConsole)
    }

    /// Descriptors of any kind: pipes, sockets, terminals, files. They are never blocked on and their flags never changed;
    /// all bytes go to the guest, and the mode of a terminal is not changed.
    ///
    /// # Errors
    /// [`Error::Host`] for descriptors that are not streams.
    pub fn from_fds(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Result<Self, Error> {
        streams::Streams::new(input, output).map(Self::new).map_err(|source| Error::Host {
            what: "Cannot use these descriptors as a console".into(),
            source,
        })
    }

    /// Any [`Write`]; there is no input. A thread named `console` calls it, so it may block: at most 68 KiB are buffered, then
    /// the guest is throttled. After an error, output is dropped. Dropping the console waits up to a second for the rest to be
    /// written.
    ///
    /// # Errors
    /// [`Error::Host`] if no thread or pipe can be created.
    pub fn from_writer(writer: Box<dyn Write + Send>) -> Result<Self, Error> {
        writer::Writer::new(writer).map(Self::new).map_err(|source| Error::Host {
            what: "Cannot start the console's thread".into(),
            source,
        })
    }

    fn file(path: &Path) -> Result<Self, Error> {
        open_output(path).and_then(|file| streams::Streams::new(None, Some(file.into()))).map(Self::new).map_err(
            |source| match source.raw_os_error() {
                Some(libc::ENXIO) => Error::Host {
                    what: format!(
                        "Cannot write to {}: it is a FIFO without a reader, or a socket (start the reader first)",
                        path.display()
                    ),
                    source,
                },
                _ => Error::File { verb: "open", path: path.into(), source },
            },
        )
    }

    fn pty() -> Result<Self, Error> {
        let (pty, path) = pty::Pty::open().map_err(|source| Error::Host {
            what: "Cannot create a pseudo terminal".into(),
            source,
        })?;
        Ok(Self { backend: Box::new(pty), pty: Some(path) })
    }

    fn connect(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Host {
            what: format!(
                "Cannot connect to {} (start the machine that listens on it first: unix:PATH)",
                path.display()
            ),
            source,
        };
        let stream = connect_to_starting(path).map_err(failed)?;
        let input = stream.try_clone().map_err(failed)?;
        Self::from_fds(Some(input.into()), Some(stream.into()))
    }

    fn unix(path: &Path) -> Result<Self, Error> {
        socket::Socket::listen(path).map(Self::new)
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("pty", &self.pty).finish_non_exhaustive()
    }
}

fn open_output(path: &Path) -> io::Result<File> {
    // Opening must not block on a FIFO without a reader, and a terminal must not become the controlling one.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path)
}

/// True for the errors that mean the end of the output: the peer has closed it.
fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    ) || error.raw_os_error() == Some(libc::EIO)
}

/// True if a read that failed may be retried.
fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
