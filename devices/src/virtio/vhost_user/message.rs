//! Messages of the vhost-user protocol (QEMU's documentation, "Vhost-user Protocol"): numbers and layout. Integers are in the
//! byte order of the machine that both sides run on.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::PeerError;

/// Requests of the front end.
pub(super) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
}

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the virtio features.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features.
pub(super) mod protocol {
    /// The peer reports its number of queues.
    pub(crate) const MQ: u64 = 1 << 0;
    /// A request can ask for a reply with its result.
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    /// The peer provides the device's configuration space.
    pub(crate) const CONFIG: u64 = 1 << 9;
    /// The peer tracks its requests in flight in memory that outlives it.
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Features that this front end uses.
    pub(crate) const OURS: u64 = MQ | REPLY_ACK | CONFIG | INFLIGHT_SHMFD;
}

/// Bytes of a header: request, flags, bytes of the payload.
pub(super) const HEADER: usize = 12;

/// The longest payload of a reply: a configuration space and its header.
pub(super) const MAX_PAYLOAD: usize = 12 + MAX_CONFIG;

/// The longest configuration space.
pub(super) const MAX_CONFIG: usize = 256;

/// Flags of a header: version 1, this is a reply, a reply is needed.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// A descriptor sent with a message: kept open until then.
pub(super) type Attached = Arc<dyn AsRawFd + Send + Sync>;

/// A request to be sent.
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<Attached>,
}

impl Message {
    pub(super) fn new(request: u32) -> Self {
        let mut new = Self { bytes: Vec::with_capacity(64), fds: Vec::new() };
        for word in [request, VERSION, 0] {
            new.bytes.extend(word.to_ne_bytes());
        }
        new
    }

    /// Asks for a reply with the result.
    pub(super) fn acknowledged(self) -> Self {
        self.set_word(1, VERSION | NEED_REPLY)
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.bytes.extend(value.to_ne_bytes());
        self.sized()
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.bytes.extend(value.to_ne_bytes());
        self.sized()
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.bytes.extend(value.to_ne_bytes());
        self.sized()
    }

    pub(super) fn with(mut self, fd: Attached) -> Self {
        self.fds.push(fd);
        self
    }

    /// Writes the payload's size into the header.
    pub(super) fn sized(self) -> Self {
        let size = u32::try_from(self.bytes.len().saturating_sub(HEADER)).unwrap_or(u32::MAX);
        self.set_word(2, size)
    }

    fn set_word(mut self, index: usize, value: u32) -> Self {
        if let Some(word) = self.bytes.chunks_exact_mut(4).nth(index) {
            word.copy_from_slice(&value.to_ne_bytes());
        }
        self
    }
}

/// The header of a reply, validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MessageHeader {
    pub(super) request: u32,
    /// Bytes of the payload, at most [`MAX_PAYLOAD`].
    pub(super) size: usize,
}

impl MessageHeader {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Result<Self, PeerError> {
        let mut words = bytes.chunks_exact(4).map(word);
        let mut next = || words.next().unwrap_or(0);
        let (request, flags, size) = (next(), next(), next());
        if flags & VERSION_MASK != VERSION || flags & REPLY == 0 {
            return Err(PeerError::InvalidHeader { request, flags });
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_PAYLOAD {
            return Err(PeerError::InvalidPayload { request, size });
        }
        Ok(Self { request, size })
    }
}

/// A reply.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) request: u32,
    pub(super) payload: Vec<u8>,
    /// The only descriptor; further ones are closed.
    pub(super) fd: Option<OwnedFd>,
}

impl Reply {
    /// The payload as one number.
    pub(super) fn number(&self) -> Result<u64, PeerError> {
        let bytes = <[u8; 8]>::try_from(self.payload.as_slice());
        bytes.map(u64::from_ne_bytes).map_err(|_| self.wrong_size())
    }

    /// The 32-bit word at `index` of the payload; 0 past its end.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.payload.chunks_exact(4).nth(index).map_or(0, word)
    }

    pub(super) fn wrong_size(&self) -> PeerError {
        PeerError::InvalidPayload { request: self.request, size: self.payload.len() }
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_ne_bytes)
}
