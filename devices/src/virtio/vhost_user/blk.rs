//! A disk that another program serves (virtio 1.3, section 5.2): `qemu-storage-daemon`, SPDK, and others.

use super::PeerKind;
use super::front::Front;
use super::peer::Peer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::number::number;
use crate::config::{FilePath, ModelConfig, Slot};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "vhost-user-blk",
    summary: "virtio disk that another program serves",
    keys: &[
        Key { name: "socket", value: "PATH", help: "socket that the program listens on (needed)" },
        Key { name: "queues", value: "N", help: "queues, 1 to 16 (default: 1)" },
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: true,
};

number! {
    /// A number of queues.
    ServedQueues(u16), 1, 16, 1, "a number from 1 to 16"
}

/// The configuration of a disk that another program serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VhostUserBlkConfig {
    /// The socket that the program listens on.
    pub socket: FilePath,
    /// Queues; `None` for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<ServedQueues>,
    /// The slot on the board; `None` for the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;

/// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES. Without CONFIG_WCE the
/// configuration space is read-only.
const FEATURES: u64 = 0b111 << 1 // sizes and geometry
    | 0b11 << 5
    | 0b11 << 9
    | MQ
    | 0b11 << 13;
const MQ: u64 = 1 << 12;

/// Bytes of `struct virtio_blk_config`, up to the fields for secure erase.
const CONFIG: usize = 60;
/// Offset of the number of queues in it.
const NUM_QUEUES: usize = 34;

impl ModelConfig for VhostUserBlkConfig {
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
        let has_many = peer.session.features() & MQ != 0;
        let has = if has_many { queues_of(peer.session.config()) } else { 1 };
        let has = has.min(peer.session.queue_count().max(1));
        let queues = self.queues.map_or(1, ServedQueues::get).min(has);
        let kind = PeerKind {
            model: MODEL.name,
            id: 2,
            features: FEATURES,
            own: 0,
            sizes: vec![QUEUE_SIZE; usize::from(queues)],
            remote: queues,
            config: Vec::new(),
            asked: CONFIG,
            adapt,
        };
        Ok(Device::Virtio(Box::new(Front::create(kind, peer, &wiring)?)))
    }
}

fn queues_of(config: &[u8]) -> u16 {
    let count = config.get(NUM_QUEUES..).and_then(|rest| rest.first_chunk());
    count.map_or(1, |count| u16::from_le_bytes(*count)).max(1)
}

fn adapt(config: &mut [u8], queues: u16) {
    if let Some(field) = config.get_mut(NUM_QUEUES..).and_then(|rest| rest.first_chunk_mut()) {
        *field = queues.to_le_bytes();
    }
}
