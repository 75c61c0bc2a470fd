//! The addresses of sockets: `unix:PATH`, and `tcp:HOST:PORT` on this host only.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::{Acceptor, connect_to};
use crate::error::Error;

/// Time-out of a connection.
const PATIENCE: Duration = Duration::from_secs(30);

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// The address of a socket on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalAddress {
    /// A Unix socket, for the user who has created it.
    Unix(PathBuf),
    /// A TCP port of a loopback address.
    Tcp(SocketAddr),
}

impl LocalAddress {
    /// Parses `unix:PATH` or `tcp:HOST:PORT`, where HOST is `localhost` or a loopback address, one of IPv6 in brackets.
    ///
    /// # Errors
    /// The reason for which the text is invalid.
    pub fn parse(text: &OsStr) -> Result<Self, &'static str> {
        if text.as_bytes().starts_with(b"unix:") {
            return unix_path(text).map(Self::Unix);
        }
        const FORMS: &str = "it is neither unix:PATH nor tcp:HOST:PORT";
        let text = text.to_str().and_then(|text| text.strip_prefix("tcp:")).ok_or(FORMS)?;
        let (host, port) = text.rsplit_once(':').ok_or(FORMS)?;
        let port = port.parse().map_err(|_| "its port is not a number from 0 to 65535")?;
        let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match literal.unwrap_or(host) {
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            host => host.parse().map_err(|_| "its host is neither localhost nor an address")?,
        };
        if !host.is_loopback() {
            return Err(
                "its host is not this one: the memory would be readable on the way (forward a port or a socket of this host to the other one: ssh -L PORT:localhost:PORT HOST)",
            );
        }
        Ok(Self::Tcp(SocketAddr::new(host, port)))
    }

    /// Listens on it.
    ///
    /// # Errors
    /// Another program listens on it, or the host lacks a resource.
    pub(crate) fn listen(&self) -> Result<Acceptor, Error> {
        match self {
            Self::Unix(path) => Acceptor::open(path, BACKLOG),
            Self::Tcp(address) => Acceptor::open_tcp(*address),
        }
    }

    /// Connects to it.
    ///
    /// # Errors
    /// Nobody listens on it.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(path) => connect_to(path).map(OwnedFd::from),
            Self::Tcp(address) => TcpStream::connect_timeout(address, PATIENCE).map(|stream| {
                // Requests are small, and each waits for its reply.
                let _ = stream.set_nodelay(true);
                stream.into()
            }),
        }
    }
}

/// Parses `unix:PATH`.
///
/// # Errors
/// The reason for which the text is invalid.
pub(crate) fn unix_path(text: &OsStr) -> Result<PathBuf, &'static str> {
    let path = text.as_bytes().strip_prefix(b"unix:").ok_or("it is not of the form unix:PATH")?;
    if path.is_empty() {
        return Err("the path after the ':' is missing");
    }
    Ok(OsStr::from_bytes(path).into())
}

impl fmt::Display for LocalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_or_a_port_of_this_host() {
        let parse = |text: &str| LocalAddress::parse(OsStr::new(text));
        assert_eq!(parse("unix:/a b"), Ok(LocalAddress::Unix("/a b".into())));
        for (text, shown) in [
            ("tcp:localhost:7", "tcp:127.0.0.1:7"),
            ("tcp:127.3.2.1:65535", "tcp:127.3.2.1:65535"),
            ("tcp:[::1]:0", "tcp:[::1]:0"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), shown);
        }
        for text in [
            "",
            "unix:",
            "/a",
            "tcp:7",
            "tcp:localhost",
            "tcp:localhost:x",
            "tcp:::1:7:",
            "tcp:host:7",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        for text in ["tcp:0.0.0.0:7", "tcp:10.0.0.1:7", "tcp:[::]:7", "tcp:[fe80::1]:7"] {
            assert!(parse(text).unwrap_err().contains("ssh -L"), "{text}");
        }
    }
}
