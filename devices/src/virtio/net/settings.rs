//! The configuration of a network device.

use std::fmt;
use std::hash::Hasher;
use std::io;

use fnv::FnvHasher;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::backend::NetworkSource;
use crate::catalog::Key;
use crate::config::number::number;
use crate::config::text::{Textual, text};
use crate::config::{ByteRate, Slot};
use crate::options::OptionError;
use crate::virtio::{Limit, Limiter};

pub(super) const KEYS: &[Key] = &[
    Key {
        name: "tap",
        value: "NAME",
        help: "the tap interface to connect to; created if it does not exist",
    },
    Key { name: "fd", value: "N", help: "instead of tap: inherited descriptor of an open tap" },
    Key {
        name: "mac",
        value: "ADDR",
        help: "MAC address (default: derived from the host and the tap's name)",
    },
    Key { name: "mtu", value: "N", help: "MTU that the guest is told, 68 to 65535 bytes" },
    Key {
        name: "pin",
        value: "on|off",
        help: "drop frames of the guest whose source is not its MAC address (default: off)",
    },
    Key {
        name: "queues",
        value: "N",
        help: "queue pairs, 1 to 8, for guests with several harts (default: 1)",
    },
    Key {
        name: "vhost",
        value: "on|off",
        help: "have the host's kernel move the frames, through /dev/vhost-net (default: off)",
    },
    Key {
        name: "rx_bps",
        value: "BYTES",
        help: "limit of bytes per second to the guest (default: no limit)",
    },
    Key {
        name: "tx_bps",
        value: "BYTES",
        help: "limit of bytes per second from the guest (default: no limit)",
    },
    Key {
        name: "rx_pps",
        value: "N",
        help: "limit of frames per second to the guest (default: no limit)",
    },
    Key {
        name: "tx_pps",
        value: "N",
        help: "limit of frames per second from the guest (default: no limit)",
    },
];

/// Maximum number of queue pairs.
pub(super) const MAX_PAIRS: u16 = 8;

number! {
    /// A number of queue pairs.
    QueuePairs(u16), 1, MAX_PAIRS, 1, "a number of queue pairs from 1 to 8"
}

number! {
    /// An MTU: at least the minimum of IPv4 (RFC 791).
    Mtu(u16), 68, u16::MAX, 1, "a number from 68 to 65535"
}

number! {
    /// A limit of frames per second.
    FrameRate(u64), 1, u64::MAX, 1, "a number of frames from 1"
}

number! {
    /// The number of an inherited descriptor.
    Descriptor(u16), 0, u16::MAX, 1, "a descriptor's number"
}

/// A unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// `None` for a group's address, and for the one of zeroes.
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let [first, ..] = bytes;
        (first & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// The six bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl Textual for MacAddress {
    const EXPECTED: &'static str = "a unicast MAC address, in hexadecimal (as 02:00:00:12:34:56)";

    fn textual(text: &str) -> Option<Self> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| {
                (1..=2).contains(&part.len()) && part.bytes().all(|c| c.is_ascii_hexdigit())
            })?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        parts.next().is_none().then_some(mac).and_then(Self::new)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(|byte| format!("{byte:02x}")).join(":"))
    }
}

text!(MacAddress, "^([0-9a-fA-F]{1,2}:){5}[0-9a-fA-F]{1,2}$");

/// The configuration of a network device on a tap interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// The tap interface; created if it does not exist. This or `fd` is needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Inherited descriptor of an open tap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<Descriptor>,
    /// The MAC address; `None` for one derived from the backend's identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The MTU that the driver is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Frames of the guest with a source other than the MAC address are dropped.
    pub pin: bool,
    /// Queue pairs, with one backend each; `None` for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<QueuePairs>,
    /// The host's kernel moves the frames.
    pub vhost: bool,
    /// Limit of bytes per second to the guest, over all pairs; `None` for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_bps: Option<ByteRate>,
    /// Limit of bytes per second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_bps: Option<ByteRate>,
    /// Limit of frames per second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_pps: Option<FrameRate>,
    /// Limit of frames per second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_pps: Option<FrameRate>,
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

impl NetConfig {
    /// Number of queue pairs.
    pub(super) fn pairs(&self) -> u16 {
        self.queues.map_or(1, QueuePairs::get)
    }

    /// The limits on frames to the guest.
    pub(super) fn rx_limiter(&self) -> io::Result<Limiter> {
        limiter(self.rx_bps, self.rx_pps)
    }

    /// The limits on frames from the guest.
    pub(super) fn tx_limiter(&self) -> io::Result<Limiter> {
        limiter(self.tx_bps, self.tx_pps)
    }

    /// The host end.
    pub(super) fn source(&self) -> Option<NetworkSource> {
        let tap = || self.tap.clone().map(NetworkSource::Tap);
        self.fd.map(|fd| NetworkSource::Descriptor(fd.get().into())).or_else(tap)
    }

    pub(super) fn check(&self) -> Result<(), OptionError> {
        match (&self.tap, self.fd) {
            (Some(_), Some(fd)) => {
                return Err(OptionError::bad_value(
                    "fd",
                    fd.get(),
                    "possible with tap (leave one out)",
                ));
            }
            (None, None) => return Err(OptionError::NoBackend),
            _ => {}
        }
        if self.pairs() > 1 && self.fd.is_some() {
            return Err(OptionError::bad_value(
                "queues",
                self.pairs(),
                "1: a descriptor has one queue pair (use tap=NAME)",
            ));
        }
        let rates = [
            ("pin", self.pin.then(|| "on".to_owned())),
            ("rx_bps", self.rx_bps.map(|rate| rate.get().to_string())),
            ("tx_bps", self.tx_bps.map(|rate| rate.get().to_string())),
            ("rx_pps", self.rx_pps.map(|rate| rate.get().to_string())),
            ("tx_pps", self.tx_pps.map(|rate| rate.get().to_string())),
        ];
        let refused = rates.into_iter().find_map(|(key, value)| Some((key, value?)));
        match refused.filter(|_| self.vhost) {
            None => Ok(()),
            Some((key, value)) => Err(OptionError::bad_value(
                key,
                value,
                "possible with vhost=on, where the kernel moves the frames (leave one of them out)",
            )),
        }
    }
}

fn limiter(bytes: Option<ByteRate>, frames: Option<FrameRate>) -> io::Result<Limiter> {
    let bytes = bytes.map(|rate| Limit::per_second(rate.get()));
    Limiter::new(bytes, frames.map(|rate| Limit::per_second(rate.get())))
}

/// Derives a locally administered address from an identity: `02:` and 40 bits of its FNV-1a hash.
pub(in crate::virtio) fn mac_of(identity: &[u8]) -> [u8; 6] {
    let mut hasher = FnvHasher::default();
    hasher.write(identity);
    let [a, b, c, d, e, f, g, h] = hasher.finish().to_be_bytes();
    // The high bytes of the hash depend on all of the text, the low ones hardly on its beginning.
    [2, a ^ f, b ^ g, c ^ h, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_is_six_bytes_of_one_station() {
        let parse_mac = |text| MacAddress::textual(text).map(MacAddress::bytes);
        assert_eq!(parse_mac("02:0:fF:12:34:56"), Some([2, 0, 0xff, 0x12, 0x34, 0x56]));
        for text in [
            "",
            "02:00:00:12:34",
            "02:00:00:12:34:56:78",
            "01:00:00:12:34:56",
            "0:0:0:0:0:0",
            "02-00-00-12-34-56",
            "+2:00:00:12:34:56",
            "002:00:00:12:34:56",
            "02:00:00:12:34:",
            "ff:ff:ff:ff:ff:ff",
            "02:00:00:12:34:5g",
        ] {
            assert_eq!(parse_mac(text), None, "{text:?}");
        }
    }

    #[test]
    fn an_address_made_from_a_name_is_stable_local_and_its_own() {
        assert_eq!(mac_of(b"host/tap0"), mac_of(b"host/tap0"));
        let names = ["host/tap0", "host/tap1", "tsoh/tap0", "", "a", "host/tap00"];
        let all: std::collections::HashSet<_> =
            names.iter().map(|name| mac_of(name.as_bytes())).collect();
        assert_eq!(all.len(), names.len());
        assert!(all.iter().all(|mac| mac.starts_with(&[2])), "locally administered, one station");
    }
}
