//! From the host to the guest (virtio 1.3, section 5.1.6.3).
//!
//! A frame is read straight into the first buffer of the guest, and what does not fit there into memory of rvmm, from where
//! it fills further buffers. The header is kept aside until it is judged: the guest cannot change it under the judge.
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

/// Bytes of an Ethernet header with a VLAN tag.
const LINK_HEADER: usize = 18;

/// This direction of a pair of queues.
pub(super) struct Receiver {
    queue: u16,
    /// What a frame may have without being one large segment.
    most: Option<usize>,
    /// Bytes of the last frame, which the limit has not seen. Frames are paid for afterwards: their size is not known before.
    owed: Option<u64>,
    /// What did not fit into the first buffer.
    rest: Vec<u8>,
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

    /// Reads a frame and delivers it; false where there was none.
    fn receive(
        &mut self,
        first: Chain,
        port: &mut Port,
        work: &mut Work<'_>,
    ) -> Result<bool, VirtioError> {
        self.segments.clear();
        self.segments.extend(pieces(first.writable(), HEADER_LEN, ROOM));
        let mut header = [0; HEADER];
        let rest = self.rest.as_mut_slice();
        match port.receive(work.memory(), &mut header, &self.segments, rest) {
            Received::Frame(len) => {
                self.owed = Some(len as u64);
                self.parts.clear();
                self.deliver(first, Header::parse(header), len, port, work)?;
                Ok(true)
            }
            Received::Nothing => {
                work.put_back(first);
                Ok(false)
            }
            Received::Lost => {
                work.put_back(first);
                Ok(true)
            }
        }
    }

    fn deliver(
        &mut self,
        first: Chain,
        header: Header,
        len: usize,
        port: &Port,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let judged =
            u32::try_from(len).ok().and_then(|len| header.sent_by_host(len, self.offloads));
        let Some(mut header) = judged else {
            port.counters.rx_unfit.add();
            work.put_back(first);
            return Ok(());
        };
        let most = if header.is_segmented() { None } else { self.most };
        if len > most.unwrap_or(ROOM).min(ROOM) {
            port.counters.rx_too_large.add();
            work.put_back(first);
            return Ok(());
        }
        let room: usize = self.segments.iter().map(|segment| segment.len as usize).sum();
        let beyond = len.saturating_sub(room);
        self.parts.push((first, written(HEADER + len - beyond)));
        if !self.spread(beyond, work)? {
            port.counters.rx_too_large.add();
            self.parts.drain(..).rev().for_each(|(chain, _)| work.put_back(chain));
            return Ok(());
        }
        header.num_buffers = u16::try_from(self.parts.len()).unwrap_or(u16::MAX);
        if let Some((first, _)) = self.parts.first() {
            first.write_at(work.memory(), 0, &header.bytes());
        }
        work.complete_together(self.queue, self.parts.drain(..));
        port.counters.rx_frames.add();
        Ok(())
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

fn written(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
