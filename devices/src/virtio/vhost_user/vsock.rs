//! Sockets that another program serves (virtio 1.3, section 5.10): `vhost-device-vsock` and others. The event queue, which is
//! never used, stays with the front end.

use super::PeerKind;
use super::front::Front;
use super::peer::Peer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::{FilePath, ModelConfig, Slot};

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
};

/// The configuration of sockets that another program serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VhostUserVsockConfig {
    /// The socket that the program listens on.
    pub socket: FilePath,
    /// The slot on the board; `None` for the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// SEQPACKET, if the peer has it.
const FEATURES: u64 = 1 << 1;

/// Bytes of the configuration space: the guest's CID.
const CONFIG: usize = 8;

impl ModelConfig for VhostUserVsockConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        vec![&mut self.socket]
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, wiring: Wiring) -> Built {
        let end = |source| BuildError::Backend { model: MODEL.name, source };
        let peer = Peer::connect(wiring.host.as_ref(), self.socket.clone().into(), CONFIG);
        let peer = peer.map_err(end)?;
        let kind = PeerKind {
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
        Ok(Device::Virtio(Box::new(Front::create(kind, peer, &wiring)?)))
    }
}
