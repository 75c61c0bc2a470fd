//! Frames from the host to the guest (virtio 1.3, section 5.1.6.3).
//!
//! A frame is read directly into as many buffers of the guest as the last one filled, and the remainder into memory of rvmm, from
//! where it is copied into further buffers. The header stays in rvmm until it is validated, so that the guest cannot change it
//! meanwhile. Without a buffer nothing is read, and the backend is not watched until there is one.

use serde::{Deserialize, Serialize};

use super::header::{FrameHeader, HEADER, HEADER_LEN, Offloads, bit};
use super::port::{Port, Received};
use crate::virtio::{Chain, Limiter, Segment, VirtioError, Work, pieces};

/// Frames that one pass moves.
const FRAMES: u32 = 64;

/// Maximum number of bytes read: the largest frame, VLAN tags, and a margin to detect larger ones.
const ROOM: usize = 65_664;

/// Minimum budget left in a pass to begin a frame that may fill several buffers: 43 of half a page hold the largest one.
const MIN_BUDGET: u16 = 64;

/// Maximum number of buffers, and of their segments, gathered for a frame: below [`MIN_BUDGET`], and the host's limit for one call.
const MAX_GATHERED: usize = 48;
const MAX_SEGMENTS: usize = 512;

/// Bytes of an Ethernet header with a VLAN tag.
const LINK_HEADER: usize = 18;

/// The receive queue of a pair.
pub(super) struct Receiver {
    queue: u16,
    /// Maximum length of a frame that is not to be segmented.
    most: Option<usize>,
    /// Bytes of the last frame, not yet charged to the limit: the size of a frame is only known after reading it.
    uncharged: Option<u64>,
    /// The part of a frame that did not fit into the buffers gathered for it.
    rest: Vec<u8>,
    /// Bytes of the last frame: the next one is likely to be as large.
    expected: usize,
    segments: Vec<Segment>,
    parts: Vec<(Chain, u32)>,
    /// Offloads that the driver accepts.
    pub(super) offloads: Offloads,
    is_mergeable: bool,
    /// The queue was empty, and the driver has not kicked it since.
    is_starved: bool,
}

/// The state of a receive queue.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReceiverState {
    uncharged: Option<u64>,
    pub(super) offloads: Offloads,
}

impl Receiver {
    /// Creates the receiver of this queue; `mtu` is the MTU that the driver is told.
    pub(super) fn new(queue: u16, mtu: Option<u16>) -> Self {
        Self {
            queue,
            most: mtu.map(|mtu| usize::from(mtu) + LINK_HEADER),
            uncharged: None,
            rest: vec![0; ROOM],
            expected: 0,
            segments: Vec::new(),
            parts: Vec::new(),
            offloads: Offloads::default(),
            is_mergeable: false,
            is_starved: true,
        }
    }

    pub(super) fn save(&self) -> ReceiverState {
        let Self {
            queue: _,
            most: _,
            uncharged,
            // Buffers, and the expectation for the next frame.
            rest: _,
            expected: _,
            segments: _,
            parts: _,
            offloads,
            // Negotiated.
            is_mergeable: _,
            // The queue is kicked when the device is resumed.
            is_starved: _,
        } = self;
        ReceiverState { uncharged: *uncharged, offloads: *offloads }
    }

    pub(super) fn restore(&mut self, state: &ReceiverState) {
        let ReceiverState { uncharged, offloads } = *state;
        (self.uncharged, self.offloads) = (uncharged, offloads);
    }

    pub(super) fn start(&mut self, features: u64) {
        self.is_mergeable = features & bit::MRG_RXBUF != 0;
        self.is_starved = true;
    }

    pub(super) fn stop(&mut self) {
        self.offloads = Offloads::default();
        self.await_kick();
    }

    /// Assumes an empty queue until the driver's next kick.
    pub(super) fn await_kick(&mut self) {
        self.is_starved = true;
    }

    /// Notes a kick: there may be buffers.
    pub(super) fn kicked(&mut self) {
        self.is_starved = false;
    }

    /// True if a frame could be delivered to the guest now.
    pub(super) fn can_take(&self, limit: &Limiter) -> bool {
        !self.is_starved && !limit.is_waiting()
    }

    /// Delivers frames until there are no more, the queue is empty, or the limit of a pass is reached.
    pub(super) fn pass(
        &mut self,
        limit: &mut Limiter,
        port: &mut Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        for _ in 0..FRAMES {
            if !port.can_move() || !self.can_take(limit) || !self.charge(limit) {
                break;
            }
            if work.budget() < if self.is_mergeable { MIN_BUDGET } else { 1 } {
                work.end_pass(self.queue);
                break;
            }
            let Some(first) = self.next_buffer(work)? else { break };
            if !self.receive(first, port, work)? {
                break;
            }
        }
        Ok(())
    }

    /// Charges the last frame to the limit; false if that has to wait.
    fn charge(&mut self, limit: &mut Limiter) -> bool {
        let is_charged = self.uncharged.is_none_or(|bytes| limit.allows(bytes));
        if is_charged {
            self.uncharged = None;
        }
        is_charged
    }

    /// The next chain with room for a header. Shorter ones are returned to the driver.
    fn next_buffer(&mut self, work: &mut Work<'_>) -> Result<Option<Chain>, VirtioError> {
        while let Some(chain) = work.pop(self.queue)? {
            if chain.writable_bytes() >= HEADER_LEN {
                return Ok(Some(chain));
            }
            work.refuse(chain);
        }
        self.is_starved = true;
        Ok(None)
    }

    /// Takes buffers until there is room for the expected frame, and returns their room in bytes.
    fn gather(&mut self, first: Chain, work: &mut Work<'_>) -> Result<usize, VirtioError> {
        self.segments.clear();
        self.segments.extend(pieces(first.writable(), HEADER_LEN, ROOM));
        let mut room = chain_room(&first, HEADER_LEN);
        self.parts.clear();
        self.parts.push((first, 0));
        while self.is_mergeable
            && room < self.expected
            && self.parts.len() < MAX_GATHERED
            && self.segments.len() < MAX_SEGMENTS
        {
            let Some(next) = work.pop(self.queue)? else { break };
            if next.writable_bytes() == 0 {
                work.refuse(next);
                continue;
            }
            self.segments.extend(pieces(next.writable(), 0, ROOM));
            room += chain_room(&next, 0);
            self.parts.push((next, 0));
        }
        Ok(room)
    }

    /// Reads a frame and delivers it; false if there was none.
    fn receive(
        &mut self,
        first: Chain,
        port: &mut Port,
        work: &mut Work<'_>,
    ) -> Result<bool, VirtioError> {
        let room = self.gather(first, work)?;
        let mut header = [0; HEADER];
        let rest = self.rest.as_mut_slice();
        match port.receive(work.memory(), &mut header, &self.segments, rest) {
            Received::Frame(len) => {
                self.uncharged = Some(len as u64);
                self.expected = len.min(ROOM);
                self.deliver(room, FrameHeader::parse(header), len, port, work)?;
                Ok(true)
            }
            Received::Nothing => {
                self.put_back_from(0, work);
                Ok(false)
            }
            Received::Lost => {
                // A part of it may be in the buffers.
                self.fill(room, work);
                self.put_back_from(0, work);
                Ok(true)
            }
        }
    }

    /// Delivers a frame of `len` bytes, which is in the gathered buffers (`room` bytes) and in `rest`.
    fn deliver(
        &mut self,
        room: usize,
        header: FrameHeader,
        len: usize,
        port: &Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        self.fill(len, work);
        let valid = u32::try_from(len).ok().and_then(|len| header.sent_by_host(len, self.offloads));
        let Some(mut header) = valid else {
            port.counters.rx_unfit.add();
            self.put_back_from(0, work);
            return Ok(());
        };
        let most = if header.is_segmented() { None } else { self.most };
        let fits = len <= most.unwrap_or(ROOM).min(ROOM);
        let is_spread = if fits { self.spread(len.saturating_sub(room), work) } else { Ok(false) };
        match is_spread {
            Ok(true) => {}
            Ok(false) => {
                port.counters.rx_too_large.add();
                self.put_back_from(0, work);
                return Ok(());
            }
            Err(error) => {
                // The queue stops, with what is in its buffers.
                for (chain, filled) in self.parts.drain(..) {
                    work.note_written(&chain, 0, filled);
                }
                return Err(error);
            }
        }
        header.num_buffers = u16::try_from(self.parts.len()).unwrap_or(u16::MAX);
        if let Some((first, _)) = self.parts.first() {
            first.write_at(work.memory(), 0, &header.bytes());
        }
        work.complete_together(self.queue, self.parts.drain(..));
        // The driver's hart handles this frame while the next ones are copied.
        work.interrupt_driver(self.queue);
        port.counters.rx_frames.add();
        Ok(())
    }

    /// Notes how much of each buffer a frame of `len` bytes has filled, and puts unused ones back.
    fn fill(&mut self, len: usize, work: &mut Work<'_>) {
        let (mut left, mut used, mut header) = (len, 0, HEADER_LEN);
        for (chain, filled) in &mut self.parts {
            if used > 0 && left == 0 {
                break;
            }
            let part = left.min(chain_room(chain, header));
            *filled = written(part).saturating_add(header);
            (left, used, header) = (left - part, used + 1, 0);
        }
        self.put_back_from(used, work);
    }

    /// Puts the buffers from the `from`th on back into the queue, with what is in them.
    fn put_back_from(&mut self, from: usize, work: &mut Work<'_>) {
        for (chain, filled) in self.parts.drain(from..).rev() {
            work.note_written(&chain, 0, filled);
            work.put_back(chain);
        }
    }

    /// Copies the first `count` bytes of `rest` into further buffers; false if there are not enough.
    fn spread(&mut self, count: usize, work: &mut Work<'_>) -> Result<bool, VirtioError> {
        let mut left = self.rest.get(..count).unwrap_or_default();
        while !left.is_empty() {
            let next = if self.is_mergeable { work.pop(self.queue)? } else { None };
            let Some(chain) = next else { return Ok(false) };
            let taken = chain.write_at(work.memory(), 0, left);
            if taken == 0 {
                work.refuse(chain);
                continue;
            }
            left = left.get(taken..).unwrap_or_default();
            self.parts.push((chain, written(taken)));
        }
        Ok(true)
    }
}

/// Room of a chain for a frame, behind `header` bytes for its header.
fn chain_room(chain: &Chain, header: u32) -> usize {
    (chain.writable_bytes().saturating_sub(header) as usize).min(ROOM)
}

fn written(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
