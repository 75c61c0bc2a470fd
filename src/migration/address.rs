//! Where the other side is: a socket of this host, or a descriptor that the parent process has opened.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::error::Error;
use crate::host::duplicate;
use crate::sockets::LocalAddress;

/// The end of a connection for a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket of this host: what is sent is not encrypted.
    Socket(LocalAddress),
    /// A connected stream socket that this process has inherited.
    Descriptor(RawFd),
}

impl Address {
    /// Parses `unix:PATH`, `tcp:HOST:PORT` or `fd:N`. A relative path is one from the working directory.
    ///
    /// # Errors
    /// The reason: another form, or a host that is not this one.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        const FORM: &str = "it is not of the form fd:N, with the number of a descriptor";
        if let Some(number) = text.to_str().and_then(|text| text.strip_prefix("fd:")) {
            let number = number.parse().ok().filter(|number: &RawFd| *number >= 0);
            return number.map(Self::Descriptor).ok_or_else(|| FORM.into());
        }
        LocalAddress::parse(text).map(Self::Socket).map_err(Into::into)
    }

    /// A Unix socket.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        Self::Socket(LocalAddress::Unix(path.into()))
    }

    /// Connects to the other side.
    ///
    /// # Errors
    /// Nobody listens there, or the descriptor is not open.
    pub fn connect(&self) -> Result<OwnedFd, Error> {
        let connected = match self {
            Self::Socket(address) => address.connect(),
            Self::Descriptor(fd) => duplicate(*fd),
        };
        connected.map_err(|source| Error::Host {
            what: format!("Cannot connect to {self} (start rvmm restore --listen there first)"),
            source,
        })
    }

    /// Waits for a connection from the other side; calls `ready` with the address when it can be made.
    ///
    /// # Errors
    /// The address is in use, or the descriptor is not open.
    pub fn accept(&self, ready: impl FnOnce(&str)) -> Result<OwnedFd, Error> {
        let failed =
            |source: io::Error| Error::Host { what: format!("Cannot listen on {self}"), source };
        let address = match self {
            Self::Socket(address) => address,
            Self::Descriptor(fd) => {
                ready(&self.to_string());
                return duplicate(*fd).map_err(failed);
            }
        };
        let acceptor = address.listen()?;
        let bound = acceptor.tcp_address().map_or_else(|| address.clone(), LocalAddress::Tcp);
        ready(&bound.to_string());
        loop {
            match poll(&mut [PollFd::new(&acceptor.as_fd(), PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
            if let Some(socket) = acceptor.accept() {
                return Ok(socket);
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Descriptor(fd) => write!(f, "fd:{fd}"),
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
            ("unix:", "path"),
            ("fd:-1", "fd:N"),
            ("fd:x", "fd:N"),
            ("/a", "unix:PATH"),
            ("tcp:1.2.3.4:5", "ssh -L"),
            ("tcp:[::]:5", "ssh -L"),
            ("tcp:127.0.0.1", "tcp:HOST:PORT"),
        ] {
            let reason = Address::parse(text.as_ref()).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_an_error_that_names_it() {
        let error = Address::Descriptor(999_999).connect().unwrap_err().to_string();
        assert!(error.starts_with("Cannot connect to fd:999999"), "{error}");
    }
}
