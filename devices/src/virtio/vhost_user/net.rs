//! Networks that another program serves (virtio 1.3, section 5.1): passt, which rvmm starts (`net-user`), or any that listens on
//! a socket (`vhost-user-net`). One queue pair, no control queue: the protocol has no receive filters.

use super::front::Front;
use super::peer::Peer;
use super::{Kind, Service};
use crate::catalog::{BuildError, Built, Key, Model, Placement, Wiring};
use crate::host::HostError;
use crate::options::{OptionError, Options};
use crate::virtio::VirtioMmio;
use crate::virtio::net::{mac_of, parse_mac};

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
    build: build_user,
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
    build,
};

/// CSUM, GUEST_CSUM, GUEST_TSO4 to HOST_UFO, MRG_RXBUF.
const FEATURES: u64 = 0b11 | 0x1ff << 7;
/// `VIRTIO_NET_F_MAC`: the driver reads its address from the configuration space.
const HAS_MAC: u64 = 1 << 5;

/// Maximum number of forwarded ports.
const MAX_FORWARDS: usize = 64;

fn build_user(options: &Options, wiring: Wiring) -> Built {
    let bad = |source| BuildError::Option { model: USER.name, source };
    let forwards = forwards(options).map_err(bad)?;
    let mac = mac(options, "passt").map_err(bad)?;
    let peer = Peer::start(wiring.host.as_ref(), &Service::Network { forwards });
    create(USER.name, mac, peer, wiring)
}

fn build(options: &Options, wiring: Wiring) -> Built {
    let bad = |source| BuildError::Option { model: MODEL.name, source };
    let socket = options.get("socket").filter(|path| !path.is_empty());
    let socket =
        socket.ok_or_else(|| bad(options.bad_value("socket", "a path (write socket=PATH)")))?;
    let mac = mac(options, socket).map_err(bad)?;
    let peer = Peer::connect(wiring.host.as_ref(), socket.into(), 0);
    create(MODEL.name, mac, peer, wiring)
}

fn create(
    model: &'static str,
    mac: [u8; 6],
    peer: Result<Peer, HostError>,
    wiring: Wiring,
) -> Built {
    let peer = peer.map_err(|source| BuildError::Backend { model, source })?;
    let kind = Kind {
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
    VirtioMmio::create(Box::new(Front::create(kind, peer, &wiring)?), wiring)
}

/// The MAC address given, else one derived from `identity`.
fn mac(options: &Options, identity: &str) -> Result<[u8; 6], OptionError> {
    let expected = "a unicast MAC address, in hexadecimal (as 02:00:00:12:34:56)";
    match options.get("mac") {
        None => Ok(mac_of(identity)),
        Some(text) => parse_mac(text).ok_or_else(|| options.bad_value("mac", expected)),
    }
}

fn forwards(options: &Options) -> Result<Vec<(u16, u16)>, OptionError> {
    let expected = "a list of at most 64 ports HOST:GUEST, separated by '+' (as 2222:22+8080:80)";
    let Some(text) = options.get("forward") else { return Ok(Vec::new()) };
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    let pair = |part: &str| {
        let (host, guest) = part.split_once(':')?;
        Some((port(host)?, port(guest)?))
    };
    let pairs: Option<Vec<(u16, u16)>> = text.split('+').map(pair).collect();
    pairs
        .filter(|pairs| pairs.len() <= MAX_FORWARDS)
        .ok_or_else(|| options.bad_value("forward", expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_forwarded_in_pairs() {
        let forwards = |text: &str| forwards(&Options::parse(text).unwrap());
        assert_eq!(forwards("net-user"), Ok(vec![]));
        assert_eq!(forwards("net-user,forward=2222:22"), Ok(vec![(2222, 22)]));
        assert_eq!(forwards("net-user,forward=1:2+3:4"), Ok(vec![(1, 2), (3, 4)]));
        for text in ["", "22", "22:", ":22", "0:22", "22:0", "65536:1", "1:2+", "1:2:3", "-1:2"] {
            assert!(forwards(&format!("net-user,forward={text}")).is_err(), "{text}");
        }
    }

    #[test]
    fn a_card_has_the_same_address_at_every_start() {
        let mac = |text: &str, identity| mac(&Options::parse(text).unwrap(), identity);
        assert_eq!(mac("net-user", "passt"), mac("net-user", "passt"));
        assert_ne!(mac("net-user", "/a"), mac("net-user", "/b"));
        assert_eq!(mac("net-user,mac=02:00:00:00:00:07", ""), Ok([2, 0, 0, 0, 0, 7]));
        assert!(mac("net-user,mac=01:00:00:00:00:07", "").is_err(), "a group");
    }
}
