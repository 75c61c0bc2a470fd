//! From the host to the guest (virtio 1.3, section 5.1.6.3).
//!
//! A frame is read straight into as many buffers of the guest as the last one filled, and what does not fit there into memory of
//! rvmm, from where it fills further buffers. The header is kept aside until it is judged: the guest cannot change it under the judge.
//! Without a buffer nothing is read, and the host's end is not watched until there is one.

use super::header::{HEADER, HEADER_LEN, Header, Offloads, bit};
use super::port::{Port, Received};
use crate::virtio::{Chain, Limiter, Segment, VirtioError, Work, pieces};

/// Frames that one pass moves.
const FRAMES: u32 = 64;

/// Bytes that are read at most: the largest frame, VLAN tags, and something to see that there was more.
const ROOM: usize = 65_664;

/// Buffers that must be left in a pass for a frame to be begun, where it may fill several: 43 of a page's half hold the
/// largest one.
const MANY: u16 = 64;

/// Buffers, and pieces of them, that are gathered for a frame: fewer than a pass has to have left, and than the host takes at once.
const GATHERED: usize = 48;
const PIECES: usize = 512;

/// Bytes of an Ethernet header with a VLAN tag.
const LINK_HEADER: usize = 18;

/// This direction of a pair of queues.
pub(super) struct Receiver {
    queue: u16,
    /// What a frame may have without being one large segment.
    most: Option<usize>,
    /// Bytes of the last frame, which the limit has not seen. Frames are paid for afterwards: their size is not known before.
    owed: Option<u64>,
    /// What did not fit into the buffers that were gathered for it.
    rest: Vec<u8>,
    /// Bytes of the last frame: the next one is likely to be as large.
    expected: usize,
    segments: Vec<Segment>,
    parts: Vec<(Chain, u32)>,
    /// The driver takes these, or this device runs without a driver.
    pub(super) offloads: Offloads,
    is_mergeable: bool,
    /// There was no buffer, and the driver has not said that there are new ones.
    is_starved: bool,
}

impl Receiver {
    /// Of this queue; `mtu` is what the driver is told.
    pub(super) fn new(queue: u16, mtu: Option<u16>) -> Self {
        Self {
            queue,
            most: mtu.map(|mtu| usize::from(mtu) + LINK_HEADER),
            owed: None,
            rest: vec![0; ROOM],
            expected: 0,
            segments: Vec::new(),
            parts: Vec::new(),
            offloads: Offloads::default(),
            is_mergeable: false,
            is_starved: true,
        }
    }

    pub(super) fn start(&mut self, features: u64) {
        self.is_mergeable = features & bit::MRG_RXBUF != 0;
        self.is_starved = true;
    }

    pub(super) fn stop(&mut self) {
        self.offloads = Offloads::default();
        self.starve();
    }

    /// There are no buffers until the driver says so.
    pub(super) fn starve(&mut self) {
        self.is_starved = true;
    }

    /// There are buffers, or may be.
    pub(super) fn feed(&mut self) {
        self.is_starved = false;
    }

    /// A frame could be given to the guest if there was one.
    pub(super) fn can_take(&self, limit: &Limiter) -> bool {
        !self.is_starved && !limit.is_waiting()
    }

    /// Moves frames until there are no more, or no more buffers, or enough for now.
    pub(super) fn pass(
        &mut self,
        limit: &mut Limiter,
        port: &mut Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        for _ in 0..FRAMES {
            if !port.can_move() || !self.can_take(limit) || !self.has_paid(limit) {
                break;
            }
            if work.budget() < if self.is_mergeable { MANY } else { 1 } {
                work.leave(self.queue);
                break;
            }
            let Some(first) = self.next_buffer(work)? else { break };
            if !self.receive(first, port, work)? {
                break;
            }
        }
        Ok(())
    }

    fn has_paid(&mut self, limit: &mut Limiter) -> bool {
        let is_paid = self.owed.is_none_or(|bytes| limit.allows(bytes));
        if is_paid {
            self.owed = None;
        }
        is_paid
    }

    /// A chain with room for a header. Others go back.
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

    /// Takes buffers until there is room for the frame that is expected, and gives the room. Behind them comes the rest.
    fn gather(&mut self, first: Chain, work: &mut Work<'_>) -> Result<usize, VirtioError> {
        self.segments.clear();
        self.segments.extend(pieces(first.writable(), HEADER_LEN, ROOM));
        let mut room = chain_room(&first, HEADER_LEN);
        self.parts.clear();
        self.parts.push((first, 0));
        while self.is_mergeable
            && room < self.expected
            && self.parts.len() < GATHERED
            && self.segments.len() < PIECES
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

    /// Reads a frame and delivers it; false where there was none.
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
                self.owed = Some(len as u64);
                self.expected = len.min(ROOM);
                self.deliver(room, Header::parse(header), len, port, work)?;
                Ok(true)
            }
            Received::Nothing => {
                self.put_back_from(0, work);
                Ok(false)
            }
            Received::Lost => {
                self.put_back_from(0, work);
                Ok(true)
            }
        }
    }

    /// A frame of `len` bytes is in the buffers that were gathered, which have `room` for so many, and in the rest.
    fn deliver(
        &mut self,
        room: usize,
        header: Header,
        len: usize,
        port: &Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let judged =
            u32::try_from(len).ok().and_then(|len| header.sent_by_host(len, self.offloads));
        let Some(mut header) = judged else {
            port.counters.rx_unfit.add();
            self.put_back_from(0, work);
            return Ok(());
        };
        let most = if header.is_segmented() { None } else { self.most };
        let fits = len <= most.unwrap_or(ROOM).min(ROOM);
        self.fill(len, work);
        if !fits || !self.spread(len.saturating_sub(room), work)? {
            port.counters.rx_too_large.add();
            self.put_back_from(0, work);
            return Ok(());
        }
        header.num_buffers = u16::try_from(self.parts.len()).unwrap_or(u16::MAX);
        if let Some((first, _)) = self.parts.first() {
            first.write_at(work.memory(), 0, &header.bytes());
        }
        work.complete_together(self.queue, self.parts.drain(..));
        // The next frames are copied while the driver's hart sees to this one.
        work.tell(self.queue);
        port.counters.rx_frames.add();
        Ok(())
    }

    /// Notes how much of each buffer a frame of `len` bytes has filled; those that it has not reached go back.
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

    /// Gives the buffers from the `from`th on back as if they had not been taken.
    fn put_back_from(&mut self, from: usize, work: &mut Work<'_>) {
        self.parts.drain(from..).rev().for_each(|(chain, _)| work.put_back(chain));
    }

    /// Puts the first `count` bytes of the rest into further buffers; false where there are not enough.
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

/// Bytes that a chain has for a frame, behind `header` bytes for its header.
fn chain_room(chain: &Chain, header: u32) -> usize {
    (chain.writable_bytes().saturating_sub(header) as usize).min(ROOM)
}

fn written(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
