//! Where the other side is: a Unix socket, a loopback address, or a descriptor that the parent process has opened.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, poll};

use crate::error::Error;
use crate::host::duplicate;
use crate::sockets::{Listening, connect_to};

/// The end of a connection for a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address of this host: what is sent is not encrypted.
    Tcp(SocketAddr),
    /// A connected stream socket that this process has inherited.
    Descriptor(RawFd),
}

/// What a mistake in an address is answered with.
const FORMS: &str = "it is none of unix:PATH, tcp:HOST:PORT and fd:N";

impl Address {
    /// Parses `unix:PATH`, `tcp:HOST:PORT` or `fd:N`.
    ///
    /// # Errors
    /// The reason: another form, or a host that is not this one.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        if let Some(path) = bytes.strip_prefix(b"unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(OsStr::from_bytes(path).into()));
        }
        let text = text.to_str().ok_or(FORMS)?;
        if let Some(number) = text.strip_prefix("fd:") {
            let number = number.parse().ok().filter(|number: &RawFd| *number >= 0);
            return number.map(Self::Descriptor).ok_or_else(|| FORMS.into());
        }
        let name = text.strip_prefix("tcp:").ok_or(FORMS)?;
        let found = name.to_socket_addrs();
        let found = found.map_err(|error| format!("its host and port are not found: {error}"))?;
        let found: Vec<_> = found.collect();
        if let Some(other) = found.iter().find(|address| !address.ip().is_loopback()) {
            return Err(format!(
                "{other} is not this host's own, and the guest's memory would leave it unencrypted (forward a socket: ssh -L /run/user/0/there:/run/user/0/here HOST, or give fd:N)"
            ));
        }
        found.first().copied().map(Self::Tcp).ok_or_else(|| FORMS.into())
    }

    /// Connects to the other side.
    ///
    /// # Errors
    /// Nobody listens there, or the descriptor is not open.
    pub fn connect(&self) -> Result<OwnedFd, Error> {
        let connected = match self {
            Self::Unix(path) => connect_to(path).map(OwnedFd::from),
            Self::Tcp(address) => TcpStream::connect(address).map(OwnedFd::from),
            Self::Descriptor(fd) => duplicate(*fd),
        };
        connected.map_err(|source| self.failed("connect to", source))
    }

    /// Waits for a connection from the other side.
    ///
    /// # Errors
    /// The address is in use, or the descriptor is not open.
    pub fn accept(&self) -> Result<OwnedFd, Error> {
        let accepted = match self {
            Self::Unix(path) => {
                let socket = Listening::open(path, 1)?;
                accept(&socket)
            }
            Self::Tcp(address) => TcpListener::bind(address)
                .and_then(|listener| listener.accept())
                .map(|(stream, _)| OwnedFd::from(stream)),
            Self::Descriptor(fd) => duplicate(*fd),
        };
        accepted.map_err(|source| self.failed("listen on", source))
    }

    fn failed(&self, verb: &str, source: io::Error) -> Error {
        Error::Host { what: format!("Cannot {verb} {self}"), source }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Descriptor(fd) => write!(f, "fd:{fd}"),
        }
    }
}

fn accept(socket: &Listening) -> io::Result<OwnedFd> {
    loop {
        match socket.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(socket, PollFlags::IN)], None) {
                    Err(error) if error != rustix::io::Errno::INTR => return Err(error.into()),
                    _ => {}
                }
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_three_forms_and_none_leads_out_of_this_host() {
        for text in ["unix:/a b", "tcp:127.0.0.1:7000", "tcp:[::1]:7000", "fd:3"] {
            assert_eq!(Address::parse(text.as_ref()).unwrap().to_string(), text);
        }
        for (text, part) in [
            ("unix:", "none of"),
            ("fd:-1", "none of"),
            ("fd:x", "none of"),
            ("/a", "none of"),
            ("tcp:1.2.3.4:5", "unencrypted"),
            ("tcp:[::]:5", "unencrypted"),
            ("tcp:127.0.0.1", "not found"),
        ] {
            let reason = Address::parse(text.as_ref()).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_an_error_that_names_it() {
        let error = Address::Descriptor(999_999).connect().unwrap_err().to_string();
        assert_eq!(error, "Cannot connect to fd:999999");
    }
}
