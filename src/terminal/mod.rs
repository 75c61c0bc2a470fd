//! The host's end of the guest's console: standard input and output, a file, a pseudo terminal, a socket, or what a program
//! that embeds rvmm hands over. Nothing here blocks: see [`rvmm_devices::ConsoleBackend`].
//!
//! | file | what is in it |
//! |---|---|
//! | `keys.rs` | Ctrl-A x, z and h: what rvmm keeps for itself on a terminal |
//! | `raw.rs` | the terminal's mode and every way back |
//! | `foreground.rs` | job control: when the terminal is ours to read and set |
//! | `descriptor.rs` | one descriptor of any kind that never blocks |
//! | `streams.rs`, `stdio.rs` | a console on two descriptors; on standard input and output |
//! | `pty.rs`, `socket.rs` | consoles whose user comes and goes |
//! | `shared.rs` | a console that outlives its user |
//! | `writer.rs` | a console that ends in any [`Write`] |

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rvmm_devices::{ConsoleBackend, NullConsole};

use crate::config::SerialConfig;
use crate::error::Error;
use crate::host::connect_to_starting;

mod descriptor;
mod foreground;
mod keys;
mod pty;
mod raw;
mod shared;
mod socket;
mod stdio;
mod streams;
mod writer;

pub use raw::restore;
pub(crate) use raw::{resized, resume, suspend};
pub(crate) use shared::Shared;

/// What somebody calls who wants the machine to end: the user by Ctrl-A x, or a signal.
///
/// It is called on the I/O thread, for Ctrl-A x with the serial device's lock held: it may ask (set a flag, kick a hart,
/// write an eventfd), but neither wait nor touch the bus.
pub type StopRequest = Arc<dyn Fn() + Send + Sync>;

/// A console that is ready for [`rvmm_devices::Wiring`].
pub struct Console {
    /// The host's end.
    pub backend: Box<dyn ConsoleBackend>,
    /// The path that a terminal program opens, if this is a pseudo terminal; for the caller to tell the user.
    pub pty: Option<PathBuf>,
}

/// Opens the console that a configuration asks for.
///
/// Standard input, where it is a terminal, becomes raw and is put back when the console is dropped (see [`restore`]).
/// The file of [`SerialConfig::File`] may be anything that can be written: symbolic links are followed, a FIFO needs a
/// reader.
///
/// # Errors
/// [`Error::File`] and [`Error::Host`]: what cannot be opened, why, and what to do.
pub fn open(serial: &SerialConfig, stop: StopRequest) -> Result<Console, Error> {
    match serial {
        SerialConfig::Stdio => Console::stdio(stop),
        SerialConfig::Null => Ok(Console::null()),
        SerialConfig::File(path) => Console::file(path),
        SerialConfig::Pty => Console::pty(),
        SerialConfig::Unix(path) => Console::unix(path),
        SerialConfig::Connect(path) => Console::connect(path),
    }
}

impl Console {
    fn new(backend: impl ConsoleBackend + 'static) -> Self {
        Self { backend: Box::new(backend), pty: None }
    }

    /// Standard input and output, with Ctrl-A x calling `stop` where the input is a terminal.
    ///
    /// # Errors
    /// [`Error::Host`], also where another console of this process has the terminal.
    pub fn stdio(stop: StopRequest) -> Result<Self, Error> {
        match stdio::Stdio::open(stop) {
            Ok(stdio) => Ok(Self::new(stdio)),
            Err(source) => {
                let what = match source.kind() {
                    io::ErrorKind::AlreadyExists => {
                        "Cannot use the terminal: another guest of this process has it (give one of them another console)"
                    }
                    _ => "Cannot use standard input and output as the console",
                };
                Err(Error::Host { what: what.into(), source })
            }
        }
    }

    /// Nobody: output vanishes, input never comes.
    #[must_use]
    pub fn null() -> Self {
        Self::new(NullConsole)
    }

    /// Descriptors of any kind: pipes, sockets, terminals, files. They are never blocked on and their flags never changed;
    /// no byte has a meaning of its own, and no terminal's mode is touched.
    ///
    /// # Errors
    /// [`Error::Host`] for descriptors that are no streams.
    pub fn from_fds(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Result<Self, Error> {
        streams::Streams::new(input, output).map(Self::new).map_err(|source| Error::Host {
            what: "Cannot use these descriptors as a console".into(),
            source,
        })
    }

    /// Anything that can be written; there is no input. A thread named `console` does the writing, so it may block: at
    /// most 68 KiB wait for it, then the guest is held back. Once it fails, output is dropped. Dropping the console waits
    /// up to a second for what is left to be written.
    ///
    /// # Errors
    /// [`Error::Host`] where no thread or pipe can be had.
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
                        "Cannot write to {}: it is a FIFO that nobody reads, or a socket (start the reader first)",
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
            what: "Cannot make a pseudo terminal".into(),
            source,
        })?;
        Ok(Self { backend: Box::new(pty), pty: Some(path) })
    }

    fn connect(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Host {
            what: format!(
                "Cannot connect to {} (start the machine that listens there first: unix:PATH)",
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
    // Opening must not wait for a FIFO's reader, and a terminal must not become ours.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path)
}

/// Whether the other end has gone for good: the errors that a device takes for the end of the output.
fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    ) || error.raw_os_error() == Some(libc::EIO)
}

/// Whether a read that failed may be tried again.
fn may_go_on(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
