//! Networks that another program serves (virtio 1.3, section 5.1): passt, which rvmm starts (`net-user`), or any that listens on
//! a socket (`vhost-user-net`). One queue pair, no control queue: the protocol has no receive filters.

use super::front::Front;
use super::peer::Peer;
use super::{PeerKind, Service};
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::text::{Textual, text};
use crate::config::{FilePath, ModelConfig, Slot};
use crate::host::HostError;
use crate::virtio::net::{MacAddress, mac_of};

const MAC: Key =
    Key { name: "mac", value: "ADDR", help: "MAC address (default: the same one at every start)" };

/// The catalog's entry of a network through passt.
pub(crate) const USER: Model = Model {
    name: "net-user",
    summary: "virtio network card on the host's networks, without privileges, through passt",
    keys: &[
        MAC,
        Key {
            name: "forward",
            value: "HOST:GUEST",
            help: "TCP ports of the host's loopback interface to forward to ports of the guest: 2222:22+8080:80",
        },
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: true,
};

/// The catalog's entry of a network on a socket.
pub(crate) const MODEL: Model = Model {
    name: "vhost-user-net",
    summary: "virtio network card that another program serves",
    keys: &[
        Key { name: "socket", value: "PATH", help: "socket that the program listens on (needed)" },
        MAC,
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: true,
};

/// Forwarded ports: (host, guest), at most 64. As text `2222:22+8080:80`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forwards(Vec<(u16, u16)>);

impl Forwards {
    /// `None` for more than 64 pairs, none, or port 0.
    #[must_use]
    pub fn new(pairs: Vec<(u16, u16)>) -> Option<Self> {
        let is_good = (1..=MAX_FORWARDS).contains(&pairs.len())
            && pairs.iter().all(|(host, guest)| *host != 0 && *guest != 0);
        is_good.then_some(Self(pairs))
    }
}

impl Textual for Forwards {
    const EXPECTED: &'static str =
        "a list of at most 64 ports HOST:GUEST, separated by '+' (as 2222:22+8080:80)";

    fn textual(text: &str) -> Option<Self> {
        let pair = |part: &str| {
            let (host, guest) = part.split_once(':')?;
            Some((host.parse().ok()?, guest.parse().ok()?))
        };
        text.split('+').map(pair).collect::<Option<Vec<_>>>().and_then(Self::new)
    }
}

impl fmt::Display for Forwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.0.iter().map(|(host, guest)| format!("{host}:{guest}")).collect();
        f.write_str(&pairs.join("+"))
    }
}

text!(Forwards, "^[0-9]+:[0-9]+([+][0-9]+:[0-9]+){0,63}$");

/// The configuration of a network card through passt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetUserConfig {
    /// The MAC address; `None` for the same one at every start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// TCP ports of the host's loopback interface to forward to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward: Option<Forwards>,
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// The configuration of a network card that another program serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VhostUserNetConfig {
    /// The socket that the program listens on.
    pub socket: FilePath,
    /// The MAC address; `None` for the same one at every start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The slot on the board; `None` for the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// CSUM, GUEST_CSUM, GUEST_TSO4 to HOST_UFO, MRG_RXBUF.
const FEATURES: u64 = 0b11 | 0x1ff << 7;
/// `VIRTIO_NET_F_MAC`: the driver reads its address from the configuration space.
const HAS_MAC: u64 = 1 << 5;

/// Maximum number of forwarded ports.
const MAX_FORWARDS: usize = 64;

impl ModelConfig for NetUserConfig {
    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, wiring: Wiring) -> Built {
        let forwards = self.forward.clone().unwrap_or_default().0;
        let peer = Peer::start(wiring.host.as_ref(), &Service::Network { forwards });
        create(USER.name, mac(self.mac, b"passt"), peer, wiring)
    }
}

impl ModelConfig for VhostUserNetConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        vec![&mut self.socket]
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, wiring: Wiring) -> Built {
        let mac = mac(self.mac, self.socket.as_bytes());
        let peer = Peer::connect(wiring.host.as_ref(), self.socket.clone().into(), 0);
        create(MODEL.name, mac, peer, wiring)
    }
}

fn create(
    model: &'static str,
    mac: [u8; 6],
    peer: Result<Peer, HostError>,
    wiring: Wiring,
) -> Built {
    let peer = peer.map_err(|source| BuildError::Backend { model, source })?;
    let kind = PeerKind {
        model,
        id: 1,
        features: FEATURES,
        own: HAS_MAC,
        sizes: vec![256; 2],
        remote: 2,
        config: mac.to_vec(),
        asked: 0,
        adapt: |_, _| {},
    };
    Ok(Device::Virtio(Box::new(Front::create(kind, peer, &wiring)?)))
}

/// The MAC address given, else one derived from `identity`.
fn mac(given: Option<MacAddress>, identity: &[u8]) -> [u8; 6] {
    given.map_or_else(|| mac_of(identity), MacAddress::bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_forwarded_in_pairs() {
        let forwards = |text: &str| Forwards::textual(text).map(|forwards| forwards.0);
        assert_eq!(forwards("2222:22"), Some(vec![(2222, 22)]));
        assert_eq!(forwards("1:2+3:4"), Some(vec![(1, 2), (3, 4)]));
        for text in ["", "22", "22:", ":22", "0:22", "22:0", "65536:1", "1:2+", "1:2:3", "-1:2"] {
            assert_eq!(forwards(text), None, "{text}");
        }
        assert_eq!(forwards(&["1:1"; 65].join("+")), None);
    }

    #[test]
    fn a_card_has_the_same_address_at_every_start() {
        assert_eq!(mac(None, b"passt"), mac(None, b"passt"));
        assert_ne!(mac(None, b"/a"), mac(None, b"/b"));
        let given = MacAddress::new([2, 0, 0, 0, 0, 7]);
        assert_eq!(mac(given, b""), [2, 0, 0, 0, 0, 7]);
        assert_eq!(MacAddress::new([1, 0, 0, 0, 0, 7]), None, "a group");
    }
}
