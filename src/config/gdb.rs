//! Where a debugger connects, and whether the guest waits for it: the value of `--gdb`.

use std::ffi::OsStr;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A machine's end for a debugger that speaks GDB's remote protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GdbConfig {
    /// Where rvmm listens.
    pub at: GdbAddress,
    /// Whether the guest waits before its first instruction until a debugger lets it go.
    #[serde(default = "yes")]
    pub wait: bool,
}

/// Where a debugger connects. Whoever can connect there owns the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum GdbAddress {
    /// A TCP port; 0 takes a free one.
    Tcp(SocketAddr),
    /// A Unix socket, for the user who runs rvmm.
    Unix(PathBuf),
}

const FORMS: &str =
    "it is none of tcp:PORT, tcp:HOST:PORT and unix:PATH, with ,wait=off behind it or not";

fn yes() -> bool {
    true
}

impl GdbConfig {
    /// Takes `tcp:PORT`, `tcp:HOST:PORT` or `unix:PATH`, each with `,wait=on` or `,wait=off` behind it or not. A HOST is
    /// `localhost` or an address, one of IPv6 in brackets; without one it is 127.0.0.1.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &OsStr) -> Result<Self, &'static str> {
        let bytes = text.as_bytes();
        let (bytes, wait) = match bytes.iter().position(|byte| *byte == b',') {
            None => (bytes, true),
            Some(at) => match bytes.split_at(at) {
                (bytes, b",wait=on") => (bytes, true),
                (bytes, b",wait=off") => (bytes, false),
                _ => return Err("behind the ',' stands neither wait=on nor wait=off"),
            },
        };
        if let Some(path) = bytes.strip_prefix(b"unix:") {
            if path.is_empty() {
                return Err("the path behind the ':' is missing");
            }
            return Ok(Self { at: GdbAddress::Unix(OsStr::from_bytes(path).into()), wait });
        }
        let place = bytes.strip_prefix(b"tcp:").and_then(|place| std::str::from_utf8(place).ok());
        Ok(Self { at: GdbAddress::Tcp(tcp(place.ok_or(FORMS)?)?), wait })
    }
}

fn tcp(place: &str) -> Result<SocketAddr, &'static str> {
    let (host, port) = place.rsplit_once(':').unwrap_or(("localhost", place));
    let port = port.parse().map_err(|_| "its port is not a number from 0 to 65535")?;
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = match literal {
        "localhost" => Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        // A name of the host's network would be asked for elsewhere, and may mean more than one address.
        literal => literal.parse().map_err(|_| "its host is neither localhost nor an address"),
    };
    Ok(SocketAddr::new(host?, port))
}

impl fmt::Display for GdbAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, bool) {
        let config = GdbConfig::parse(OsStr::new(text)).unwrap();
        (config.at.to_string(), config.wait)
    }

    #[test]
    fn a_place_is_a_port_an_address_with_a_port_or_a_path() {
        for (text, at, wait) in [
            ("tcp:1234", "tcp:127.0.0.1:1234", true),
            ("tcp:0,wait=off", "tcp:127.0.0.1:0", false),
            ("tcp:localhost:9", "tcp:127.0.0.1:9", true),
            ("tcp:0.0.0.0:65535,wait=on", "tcp:0.0.0.0:65535", true),
            ("tcp:[::1]:1", "tcp:[::1]:1", true),
            ("unix:/run/a=b:c", "unix:/run/a=b:c", true),
            ("unix:x,wait=off", "unix:x", false),
        ] {
            assert_eq!(parsed(text), (at.to_owned(), wait), "{text}");
        }
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in [
            "",
            "1234",
            "tcp:",
            "tcp:x",
            "tcp:65536",
            "tcp:-1",
            "tcp:host:1",
            "tcp:::1:1x",
            "unix:",
            "udp:1",
            "tcp:1,",
            "tcp:1,wait",
            "tcp:1,wait=no",
            "tcp:1,nowait",
            "unix:a,b",
            "tcp:1,wait=off,wait=off",
        ] {
            assert!(GdbConfig::parse(OsStr::new(text)).is_err(), "{text}");
        }
    }
}
