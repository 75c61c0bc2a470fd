//! The options of `--device net`: `tap=NAME,mac=...`.

use std::hash::Hasher;
use std::num::NonZeroU64;

use fnv::FnvHasher;

use super::MODEL;
use super::backend::NetworkSource;
use crate::catalog::{BuildError, Key};
use crate::host::HostError;
use crate::options::{OptionError, Options};
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

/// The minimum MTU of IPv4 (RFC 791).
const MIN_MTU: u16 = 68;

/// The settings of a network device, except its host end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetSettings {
    /// The MAC address; `None` for one derived from the backend's identity.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the driver is told.
    pub mtu: Option<u16>,
    /// Frames of the guest with a source other than the MAC address are dropped.
    pub pin: bool,
    /// Queue pairs, with one backend each. Zero means one.
    pub pairs: u16,
    /// Limits on frames to the guest, over all pairs.
    pub rx: Rates,
    /// Limits on frames from the guest, over all pairs.
    pub tx: Rates,
}

/// Limits of one direction; `None` for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Bytes per second.
    pub bps: Option<NonZeroU64>,
    /// Frames per second.
    pub pps: Option<NonZeroU64>,
}

impl Rates {
    pub(super) fn limiter(self) -> std::io::Result<Limiter> {
        let limit = |rate: NonZeroU64| Limit::per_second(rate.get());
        Limiter::new(self.bps.map(limit), self.pps.map(limit))
    }

    fn parse(options: &Options, bps: &'static str, pps: &'static str) -> Result<Self, OptionError> {
        Ok(Self {
            bps: options.parsed(bps, "a number of bytes from 1")?,
            pps: options.parsed(pps, "a number of frames from 1")?,
        })
    }
}

impl NetSettings {
    pub(super) fn parse(options: &Options) -> Result<Self, OptionError> {
        let expected = "a number from 68 to 65535";
        let mtu = options.parsed::<u16>("mtu", expected)?;
        if mtu.is_some_and(|mtu| mtu < MIN_MTU) {
            return Err(options.bad_value("mtu", expected));
        }
        let mac = |text| {
            let what = "a unicast MAC address, in hexadecimal (as 02:00:00:12:34:56)";
            parse_mac(text).ok_or_else(|| options.bad_value("mac", what))
        };
        let expected = "a number of queue pairs from 1 to 8";
        let pairs = options.parsed("queues", expected)?.unwrap_or(1);
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(options.bad_value("queues", expected));
        }
        if pairs > 1 && options.get("fd").is_some() {
            return Err(
                options.bad_value("queues", "1: a descriptor has one queue pair (use tap=NAME)")
            );
        }
        let pin = options.flag("pin", false)?;
        Ok(Self {
            mac: options.get("mac").map(mac).transpose()?,
            mtu,
            pin,
            pairs,
            rx: Rates::parse(options, "rx_bps", "rx_pps")?,
            tx: Rates::parse(options, "tx_bps", "tx_pps")?,
        })
    }
}

/// True if the host's kernel is to serve the data queues; an error with options that need to inspect each frame.
pub(super) fn in_kernel(options: &Options) -> Result<bool, OptionError> {
    let in_kernel = options.flag("vhost", false)?;
    let is_pinned = options.flag("pin", false)?;
    for key in ["pin", "rx_bps", "tx_bps", "rx_pps", "tx_pps"] {
        let is_asked_for = if key == "pin" { is_pinned } else { options.get(key).is_some() };
        if in_kernel && is_asked_for {
            let expected =
                "possible with vhost=on, where the kernel moves the frames (leave one of them out)";
            return Err(options.bad_value(key, expected));
        }
    }
    Ok(in_kernel)
}

/// The host end that the options name: exactly one.
pub(super) fn end(options: &Options) -> Result<NetworkSource, BuildError> {
    let expected = "a descriptor's number";
    let bad = |source| BuildError::Option { model: MODEL.name, source };
    let fd = options.parsed::<u16>("fd", expected).map_err(bad)?;
    match (options.get("tap"), fd) {
        (Some(name), None) => Ok(NetworkSource::Tap(name.to_owned())),
        (None, Some(fd)) => Ok(NetworkSource::Descriptor(fd.into())),
        (Some(_), Some(_)) => {
            Err(bad(options.bad_value("fd", "possible with tap (leave one out)")))
        }
        (None, None) => Err(BuildError::Backend {
            model: MODEL.name,
            source: HostError::invalid("The host interface is missing (add tap=NAME or fd=N)"),
        }),
    }
}

/// Parses six bytes in hexadecimal: a unicast address that is not all zero.
pub(in crate::virtio) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| {
            (1..=2).contains(&part.len()) && part.bytes().all(|c| c.is_ascii_hexdigit())
        })?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let is_group = mac.first()? & 1 != 0;
    (parts.next().is_none() && !is_group && mac != [0; 6]).then_some(mac)
}

/// Derives a locally administered address from an identity: `02:` and 40 bits of its FNV-1a hash.
pub(in crate::virtio) fn mac_of(identity: &str) -> [u8; 6] {
    let mut hasher = FnvHasher::default();
    hasher.write(identity.as_bytes());
    let [a, b, c, d, e, f, g, h] = hasher.finish().to_be_bytes();
    // The high bytes of the hash depend on all of the text, the low ones hardly on its beginning.
    [2, a ^ f, b ^ g, c ^ h, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_is_six_bytes_of_one_station() {
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
        assert_eq!(mac_of("host/tap0"), mac_of("host/tap0"));
        let names = ["host/tap0", "host/tap1", "tsoh/tap0", "", "a", "host/tap00"];
        let all: std::collections::HashSet<_> = names.iter().map(|name| mac_of(name)).collect();
        assert_eq!(all.len(), names.len());
        assert!(all.iter().all(|mac| mac.starts_with(&[2])), "locally administered, one station");
    }
}
