//! The address a debugger connects to, and if the guest waits for it: the value of `--gdb`.

use std::ffi::OsStr;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;

use rvmm_devices::{FilePath, options};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The settings of a machine's server for GDB's remote protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GdbConfig {
    /// The address rvmm listens on.
    pub at: GdbAddress,
    /// True if the guest waits before its first instruction until a debugger continues it.
    #[serde(default = "yes")]
    pub wait: bool,
}

/// The address a debugger connects to. Anyone who can connect to it controls the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum GdbAddress {
    /// A TCP port; 0 takes a free one.
    Tcp(SocketAddr),
    /// A Unix socket, for the user who runs rvmm.
    Unix(FilePath),
}

const FORMS: &str =
    "it is not one of tcp:PORT, tcp:HOST:PORT and unix:PATH, optionally followed by ,wait=off";

fn yes() -> bool {
    true
}

impl GdbConfig {
    /// Parses `tcp:PORT`, `tcp:HOST:PORT` or `unix:PATH`, each optionally followed by `,wait=on` or `,wait=off`. A comma in PATH
    /// is written twice. A HOST is `localhost` or an address, an IPv6 address in brackets; the default is 127.0.0.1.
    ///
    /// # Errors
    /// The reason for which the text is invalid.
    pub fn parse(text: &OsStr) -> Result<Self, &'static str> {
        let parts = options::split(text);
        let (address, wait) = match parts.as_slice() {
            [address] => (address, true),
            [address, wait] if wait == "wait=on" => (address, true),
            [address, wait] if wait == "wait=off" => (address, false),
            _ => return Err("the option after the ',' is neither wait=on nor wait=off"),
        };
        let bytes = address.as_bytes();
        if let Some(path) = bytes.strip_prefix(b"unix:") {
            if path.is_empty() {
                return Err("the path after the ':' is missing");
            }
            return Ok(Self { at: GdbAddress::Unix(OsStr::from_bytes(path).into()), wait });
        }
        let text = bytes.strip_prefix(b"tcp:").and_then(|text| std::str::from_utf8(text).ok());
        Ok(Self { at: GdbAddress::Tcp(tcp(text.ok_or(FORMS)?)?), wait })
    }
}

fn tcp(text: &str) -> Result<SocketAddr, &'static str> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("localhost", text));
    let port = port.parse().map_err(|_| "its port is not a number from 0 to 65535")?;
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = match literal {
        "localhost" => Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        // Any other host name needs a resolver, and may have more than one address.
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
    fn an_address_is_a_port_a_host_with_a_port_or_a_path() {
        for (text, at, wait) in [
            ("tcp:1234", "tcp:127.0.0.1:1234", true),
            ("tcp:0,wait=off", "tcp:127.0.0.1:0", false),
            ("tcp:localhost:9", "tcp:127.0.0.1:9", true),
            ("tcp:0.0.0.0:65535,wait=on", "tcp:0.0.0.0:65535", true),
            ("tcp:[::1]:1", "tcp:[::1]:1", true),
            ("unix:/run/a=b:c", "unix:/run/a=b:c", true),
            ("unix:x,wait=off", "unix:x", false),
            ("unix:a,,b,wait=off", "unix:a,b", false),
        ] {
            assert_eq!(parsed(text), (at.to_owned(), wait), "{text}");
        }
    }

    #[test]
    fn invalid_addresses_are_refused() {
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
