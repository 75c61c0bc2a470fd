//! One connection to a peer: the order of requests, and the validation of replies.
//!
//! Nothing here blocks, except [`Session::complete`]: requests are sent at once, and replies are processed as they arrive, in the
//! order of their requests. Any other message of a peer ends the session.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::fcntl_get_seals;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::PeerError;
use super::link::Link;
use super::message::{MAX_CONFIG, Message, PROTOCOL_FEATURES, Reply, protocol, request};
use crate::virtio::remote::Remote;
use crate::virtio::{DmaMemory, Rings, feature};

/// The largest region for requests in flight.
const MAX_INFLIGHT: u64 = 16 << 20;

/// A region of guest RAM, as a peer maps it.
#[derive(Debug, Clone)]
pub(super) struct Region {
    /// Guest-physical.
    pub(super) base: u64,
    pub(super) size: u64,
    pub(super) file: Arc<File>,
    pub(super) offset: u64,
}

impl Region {
    /// All regions of guest RAM; empty if it cannot be shared.
    pub(super) fn all(memory: &dyn DmaMemory) -> Vec<Self> {
        let region = |region: &GuestRegionMmap| {
            let place = region.file_offset()?;
            Some(Self {
                base: region.start_addr().0,
                size: region.len(),
                file: Arc::clone(place.arc()),
                offset: place.start(),
            })
        };
        let regions: Option<Vec<Self>> = memory.view().iter().map(region).collect();
        // A message has at most 8 descriptors.
        regions.filter(|regions| regions.len() <= 8).unwrap_or_default()
    }
}

/// Memory in which a peer tracks its requests in flight, for the peer of the next connection.
#[derive(Debug, Clone)]
pub(super) struct Inflight {
    file: Arc<File>,
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl Inflight {
    /// Clears it.
    pub(super) fn clear(&self) {
        let zeroes = vec![0; 4096];
        let mut done = 0;
        while done < self.size {
            let part = usize::try_from((self.size - done).min(4096)).unwrap_or(4096);
            let part = zeroes.get(..part).unwrap_or_default();
            // A write to memory fails only if the peer has sealed it, at its own expense.
            if self.file.write_at(part, self.offset.saturating_add(done)).is_err() {
                return;
            }
            done += part.len() as u64;
        }
    }
}

/// A reply that is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Features,
    ProtocolFeatures,
    QueueCount,
    Config,
    Inflight,
    /// The index at which a queue was stopped.
    Stopped,
    /// The result of this request.
    Done(u32),
}

impl Expected {
    fn request(self) -> u32 {
        match self {
            Self::Features => request::GET_FEATURES,
            Self::ProtocolFeatures => request::GET_PROTOCOL_FEATURES,
            Self::QueueCount => request::GET_QUEUE_NUM,
            Self::Config => request::GET_CONFIG,
            Self::Inflight => request::GET_INFLIGHT_FD,
            Self::Stopped => request::GET_VRING_BASE,
            Self::Done(request) => request,
        }
    }
}

pub(super) struct Session {
    link: Link,
    expected: VecDeque<Expected>,
    /// Bytes of the configuration space to request.
    config_size: usize,
    features: u64,
    protocol: u64,
    queue_count: u16,
    config: Vec<u8>,
    inflight: Option<Inflight>,
}

impl Session {
    /// Begins the handshake, which requests the peer's features and `config_size` bytes of its configuration space.
    pub(super) fn begin(stream: UnixStream, config_size: usize) -> Result<Self, PeerError> {
        let mut new = Self {
            link: Link::new(stream).map_err(PeerError::Socket)?,
            expected: VecDeque::new(),
            config_size: config_size.min(MAX_CONFIG),
            features: 0,
            protocol: 0,
            queue_count: 1,
            config: Vec::new(),
            inflight: None,
        };
        new.link.send(Message::new(request::SET_OWNER))?;
        new.ask(Message::new(request::GET_FEATURES), Expected::Features)?;
        Ok(new)
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.link.raw_fd()
    }

    pub(super) fn wants_write(&self) -> bool {
        self.link.wants_write()
    }

    /// True if no reply and no queued message is outstanding.
    pub(super) fn is_quiescent(&self) -> bool {
        self.expected.is_empty() && !self.link.wants_write()
    }

    /// Virtio features that the peer has.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Transport features that are offered to the driver with this peer.
    pub(super) fn transport(&self) -> u64 {
        // The front end resets a queue by stopping it, whether the peer has this feature or not.
        feature::TRANSPORT & self.features | feature::RING_RESET
    }

    /// Number of queues of the peer; 1 if it does not report that.
    pub(super) fn queue_count(&self) -> u16 {
        self.queue_count
    }

    /// The configuration space; empty if the peer has none.
    pub(super) fn config(&self) -> &[u8] {
        &self.config
    }

    /// True if the peer can track its requests in flight.
    pub(super) fn tracks_inflight(&self) -> bool {
        self.protocol & protocol::INFLIGHT_SHMFD != 0
    }

    pub(super) fn take_inflight(&mut self) -> Option<Inflight> {
        self.inflight.take()
    }

    /// Processes all replies received, and sends queued messages.
    pub(super) fn process(&mut self) -> Result<(), PeerError> {
        self.link.flush()?;
        while let Some(reply) = self.link.receive()? {
            let Some(expected) = self.expected.pop_front() else {
                return Err(PeerError::UnexpectedReply { request: reply.request });
            };
            if expected.request() != reply.request {
                return Err(PeerError::UnexpectedReply { request: reply.request });
            }
            self.take(expected, reply)?;
        }
        Ok(())
    }

    /// Waits for all expected replies, until `deadline` at the latest.
    pub(super) fn complete(&mut self, deadline: Instant) -> Result<(), PeerError> {
        self.process()?;
        while !self.is_quiescent() {
            self.link.wait(deadline)?;
            self.process()?;
        }
        Ok(())
    }

    /// Requests memory in which the peer tracks its requests in flight.
    pub(super) fn ask_for_inflight(&mut self, queues: u16, size: u16) -> Result<(), PeerError> {
        let ask = inflight_message(request::GET_INFLIGHT_FD, (0, 0), queues, size);
        self.ask(ask, Expected::Inflight)
    }

    /// Sends guest RAM and the driver's `features`; queues can be started afterwards.
    pub(super) fn start(
        &mut self,
        features: u64,
        regions: &[Region],
        inflight: Option<&Inflight>,
    ) -> Result<(), PeerError> {
        let features = features & self.features | self.features & PROTOCOL_FEATURES;
        self.link.send(Message::new(request::SET_FEATURES).u64(features))?;
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let mut table = Message::new(request::SET_MEM_TABLE).u32(count).u32(0);
        for Region { base, size, file, offset } in regions {
            // The guest-physical address in place of the user address: the peer need not know addresses of this process.
            table = table.u64(*base).u64(*size).u64(*base).u64(*offset);
            table = table.with(Arc::clone(file) as _);
        }
        if self.protocol & protocol::REPLY_ACK != 0 {
            self.ask(table.acknowledged(), Expected::Done(request::SET_MEM_TABLE))?;
        } else {
            self.link.send(table)?;
        }
        if let (Some(inflight), true) = (inflight, self.tracks_inflight()) {
            let Inflight { file, size, offset, queues, queue_size } = inflight;
            let place = (*size, *offset);
            let message = inflight_message(request::SET_INFLIGHT_FD, place, *queues, *queue_size);
            self.link.send(message.with(Arc::clone(file) as _))?;
        }
        Ok(())
    }

    /// Has the peer start a queue, at index `base` of its available ring.
    pub(super) fn start_queue(&mut self, queue: &Remote, base: u16) -> Result<(), PeerError> {
        let Rings { queue: index, size, descriptors, driver, device, next: _ } = queue.rings;
        let index = u32::from(index);
        let state = |request, value: u16| Message::new(request).u32(index).u32(value.into());
        self.link.send(state(request::SET_VRING_NUM, size))?;
        self.link.send(state(request::SET_VRING_BASE, base))?;
        let rings = Message::new(request::SET_VRING_ADDR).u32(index).u32(0);
        self.link.send(rings.u64(descriptors).u64(device).u64(driver).u64(0))?;
        for (request, event) in
            [(request::SET_VRING_CALL, &queue.call), (request::SET_VRING_KICK, &queue.kick)]
        {
            let message = Message::new(request).u64(index.into());
            self.link.send(message.with(Arc::clone(event) as _))?;
        }
        if self.features & PROTOCOL_FEATURES != 0 {
            self.link.send(state(request::SET_VRING_ENABLE, 1))?;
        }
        Ok(())
    }

    /// Has the peer stop a queue. After the reply it no longer accesses guest memory for it.
    pub(super) fn stop_queue(&mut self, queue: u16) -> Result<(), PeerError> {
        let stop = Message::new(request::GET_VRING_BASE).u32(queue.into()).u32(0);
        self.ask(stop, Expected::Stopped)
    }

    fn ask(&mut self, message: Message, expected: Expected) -> Result<(), PeerError> {
        self.expected.push_back(expected);
        self.link.send(message)
    }

    fn take(&mut self, expected: Expected, reply: Reply) -> Result<(), PeerError> {
        match expected {
            Expected::Features => {
                self.features = reply.number()?;
                if self.features & PROTOCOL_FEATURES != 0 {
                    let ask = Message::new(request::GET_PROTOCOL_FEATURES);
                    self.ask(ask, Expected::ProtocolFeatures)?;
                }
            }
            Expected::ProtocolFeatures => self.negotiate(reply.number()?)?,
            Expected::QueueCount => {
                self.queue_count = u16::try_from(reply.number()?).unwrap_or(u16::MAX);
            }
            Expected::Config => self.take_config(&reply)?,
            Expected::Inflight => self.inflight = Some(inflight(reply)?),
            Expected::Stopped if reply.payload.len() == 8 => {}
            Expected::Stopped => return Err(reply.wrong_size()),
            Expected::Done(request) => {
                if reply.number()? != 0 {
                    return Err(PeerError::Refused { request });
                }
            }
        }
        Ok(())
    }

    /// Negotiates protocol features, and sends the requests that they allow.
    fn negotiate(&mut self, offered: u64) -> Result<(), PeerError> {
        self.protocol = offered & protocol::OURS;
        self.link.send(Message::new(request::SET_PROTOCOL_FEATURES).u64(self.protocol))?;
        if self.protocol & protocol::MQ != 0 {
            self.ask(Message::new(request::GET_QUEUE_NUM), Expected::QueueCount)?;
        }
        if self.config_size > 0 && self.protocol & protocol::CONFIG != 0 {
            let size = u32::try_from(self.config_size).unwrap_or(0);
            let mut ask = Message::new(request::GET_CONFIG).u32(0).u32(size).u32(0);
            // The request has the size of the reply.
            ask.bytes.resize(ask.bytes.len() + self.config_size, 0);
            self.ask(ask.sized(), Expected::Config)?;
        }
        Ok(())
    }

    fn take_config(&mut self, reply: &Reply) -> Result<(), PeerError> {
        let config = reply.payload.get(12..).unwrap_or_default();
        let is_whole = config.len() == self.config_size
            && reply.word(0) == 0
            && usize::try_from(reply.word(1)).is_ok_and(|size| size == self.config_size);
        if !is_whole {
            return Err(reply.wrong_size());
        }
        self.config = config.to_vec();
        Ok(())
    }
}

/// `VhostUserInflight`: size and offset of the memory, queues, entries of a queue, padding.
fn inflight_message(request: u32, place: (u64, u64), queues: u16, size: u16) -> Message {
    Message::new(request).u64(place.0).u64(place.1).u16(queues).u16(size).u32(0)
}

fn inflight(reply: Reply) -> Result<Inflight, PeerError> {
    let size = u64::from(reply.word(0)) | u64::from(reply.word(1)) << 32;
    let offset = u64::from(reply.word(2)) | u64::from(reply.word(3)) << 32;
    if cfg!(target_endian = "big") || !matches!(reply.payload.len(), 20 | 24) {
        return Err(reply.wrong_size());
    }
    let [a, b, c, d] = reply.word(4).to_le_bytes();
    let [queues, queue_size] = [[a, b], [c, d]].map(u16::from_le_bytes);
    let request = reply.request;
    let file = File::from(reply.fd.ok_or(PeerError::NoDescriptor { request })?);
    // Only a memfd has seals. A write to anything else could block.
    let is_memory = fcntl_get_seals(&file).is_ok();
    let fits = file.metadata().is_ok_and(|file| {
        offset.checked_add(size).is_some_and(|end| end <= file.len()) && size <= MAX_INFLIGHT
    });
    if !is_memory || !fits {
        return Err(PeerError::NoDescriptor { request });
    }
    Ok(Inflight { file: Arc::new(file), size, offset, queues, queue_size })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_peer_that_sends_nothing_is_not_waited_for_for_ever() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut session = Session::begin(near, 60).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        assert!(matches!(session.complete(deadline), Err(PeerError::Timeout)));
    }

    #[test]
    fn a_peer_that_reads_nothing_costs_a_bounded_amount_of_memory() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut session = Session::begin(near, 60).unwrap();
        let refused = (0..100_000).find_map(|_| session.stop_queue(0).err());
        assert!(matches!(refused, Some(PeerError::Timeout)));
    }
}
