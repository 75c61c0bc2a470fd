//! Sockets that another program serves (virtio 1.3, section 5.10): `vhost-device-vsock` and others. The event queue, which is
//! never used, stays with the front end.

use super::Kind;
use super::front::Front;
use super::peer::Peer;
use crate::catalog::{BuildError, Built, Key, Model, Placement, Wiring};
use crate::options::Options;
use crate::virtio::VirtioMmio;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "vhost-user-vsock",
    summary: "virtio sockets that another program serves",
    keys: &[Key {
        name: "socket",
        value: "PATH",
        help: "socket that the program listens on (needed)",
    }],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: true,
    build,
};

/// SEQPACKET, if the peer has it.
const FEATURES: u64 = 1 << 1;

/// Bytes of the configuration space: the guest's CID.
const CONFIG: usize = 8;

fn build(options: &Options, wiring: Wiring) -> Built {
    let bad = |source| BuildError::Option { model: MODEL.name, source };
    let socket = options.get("socket").filter(|path| !path.is_empty());
    let socket =
        socket.ok_or_else(|| bad(options.bad_value("socket", "a path (write socket=PATH)")))?;
    let end = |source| BuildError::Backend { model: MODEL.name, source };
    let peer = Peer::connect(wiring.host.as_ref(), socket.into(), CONFIG).map_err(end)?;
    let kind = Kind {
        model: MODEL.name,
        id: 19,
        features: FEATURES,
        own: 0,
        sizes: vec![256; 3],
        remote: 2,
        config: Vec::new(),
        asked: CONFIG,
        adapt: |_, _| {},
    };
    VirtioMmio::create(Box::new(Front::create(kind, peer, &wiring)?), wiring)
}
