//! The control queue (virtio 1.3, section 5.1.6.5): commands, each validated as a whole and acknowledged with one byte.
//!
//! Receive filters are accepted and change nothing: the backend delivers every frame of its segment, and a driver has to
//! expect more than it asked for (5.1.6.5.2.1). Left out, and answered with an error: VLAN filters, a MAC address set by the
//! driver, announcements, hashing.

use super::header::bit;
use crate::virtio::{Chain, GuestMemoryMmap};

/// Class and command: the first two bytes.
mod command {
    pub(super) const RX_PROMISC: [u8; 2] = [0, 0];
    pub(super) const RX_ALLMULTI: [u8; 2] = [0, 1];
    pub(super) const MAC_TABLE_SET: [u8; 2] = [1, 0];
    pub(super) const MQ_VQ_PAIRS_SET: [u8; 2] = [4, 0];
    pub(super) const GUEST_OFFLOADS_SET: [u8; 2] = [5, 0];
}

/// `VIRTIO_NET_OK`
pub(super) const OK: u8 = 0;
/// `VIRTIO_NET_ERR`
pub(super) const ERR: u8 = 1;

/// Bytes of class and command.
const HEAD: u32 = 2;

/// The effect of a valid command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// None: the command is only acknowledged.
    Nothing,
    /// Sets the offloads of frames to the driver: feature bits.
    Offloads(u64),
    /// Sets the number of queue pairs in use: the first ones.
    Pairs(u16),
}

/// Parses a command; `None` if it is malformed or its feature was not negotiated.
pub(super) fn action(chain: &Chain, memory: &GuestMemoryMmap, features: u64) -> Option<Action> {
    let has = |bit| features & bit != 0;
    let mut head = [0; 2];
    chain.read_at(memory, 0, &mut head);
    let size = chain.readable_bytes().checked_sub(HEAD)?;
    match head {
        command::RX_PROMISC | command::RX_ALLMULTI if has(bit::CTRL_RX) => {
            let mut on = [0; 1];
            chain.read_at(memory, HEAD, &mut on);
            (size == 1 && on <= [1]).then_some(Action::Nothing)
        }
        command::MAC_TABLE_SET if has(bit::CTRL_RX) => {
            let end = past_table(chain, memory, HEAD)?;
            (past_table(chain, memory, end)? == chain.readable_bytes()).then_some(Action::Nothing)
        }
        command::GUEST_OFFLOADS_SET if has(bit::CTRL_GUEST_OFFLOADS) => {
            let mut offloads = [0; 8];
            chain.read_at(memory, HEAD, &mut offloads);
            let offloads = u64::from_le_bytes(offloads);
            let is_known = offloads & !(features & bit::GUEST_OFFLOADS) == 0;
            (size == 8 && is_known).then_some(Action::Offloads(offloads))
        }
        command::MQ_VQ_PAIRS_SET if has(bit::MQ) => {
            let mut pairs = [0; 2];
            chain.read_at(memory, HEAD, &mut pairs);
            (size == 2).then_some(Action::Pairs(u16::from_le_bytes(pairs)))
        }
        _ => None,
    }
}

/// End offset of the table of MAC addresses at `offset`; `None` if it exceeds the command.
fn past_table(chain: &Chain, memory: &GuestMemoryMmap, offset: u32) -> Option<u32> {
    let mut entries = [0; 4];
    if chain.read_at(memory, offset, &mut entries) < entries.len() {
        return None;
    }
    let end = u32::from_le_bytes(entries).checked_mul(6)?.checked_add(offset)?.checked_add(4)?;
    (end <= chain.readable_bytes()).then_some(end)
}
