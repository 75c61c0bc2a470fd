//! A port of a console device: bytes in both directions, between two queues and the host's end.

use super::control::Talk;
use crate::device::Source;
use crate::link::Link;
use crate::virtio::{Chain, VirtioError, Work};

/// Bytes that are moved at once.
const CHUNK: usize = 4096;

/// A port.
pub(super) struct Port {
    number: u32,
    receive: u16,
    transmit: u16,
    link: Link,
    /// None for the console.
    name: Option<String>,

    /// A program in the guest has it open; the console always is.
    is_open: bool,
    /// Output that the other end has not taken whole, and how much of it has.
    unfinished: Option<(Chain, u32)>,
    /// What driver and device tell each other about it.
    pub(super) talk: Talk,
}

impl Port {
    /// The port `number` of its device.
    pub(super) fn new(number: u16, link: Link, name: Option<String>) -> Self {
        // The queues of control messages lie behind the first port's.
        let first = if number == 0 { 0 } else { 2 * number + 2 };
        Self {
            number: number.into(),
            receive: first,
            transmit: first + 1,
            link,
            is_open: name.is_none(),
            name,
            unfinished: None,
            talk: Talk::default(),
        }
    }

    pub(super) fn is_console(&self) -> bool {
        self.name.is_none()
    }

    /// Columns and rows, where the other end is a terminal.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        self.link.size()
    }

    /// Somebody is at the other end.
    pub(super) fn is_connected(&self) -> bool {
        self.link.is_connected()
    }

    pub(super) fn push(&mut self, byte: u8) {
        self.link.push(byte);
    }

    /// A driver drops what comes for a port that nobody has open: it stays outside until then.
    pub(super) fn set_open(&mut self, is_open: bool) {
        self.is_open = is_open || self.is_console();
    }

    /// The next message to the driver.
    pub(super) fn next_message(&mut self) -> Vec<u8> {
        self.talk.next(self.number, self.name.as_deref(), self.link.size())
    }

    pub(super) fn sources(&self) -> Vec<Source> {
        self.link.sources()
    }

    pub(super) fn forget_output(&mut self) {
        self.unfinished = None;
    }

    pub(super) fn reset(&mut self) {
        self.unfinished = None;
        self.is_open = self.is_console();
        self.talk = Talk::default();
        self.link.set_room(0);
    }

    /// Reads input into the guest's next buffer, if something may be ready.
    pub(super) fn receive(
        &mut self,
        token: Option<u32>,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let mut chain = None;
        while chain.is_none() && self.is_open {
            match work.pop(self.receive)? {
                Some(short) if short.writable_bytes() == 0 => work.refuse(short),
                Some(next) => chain = Some(next),
                None => break,
            }
        }
        self.link.set_room(if chain.is_some() { CHUNK } else { 0 });
        let mut buffer = [0; CHUNK];
        let room = chain.as_ref().map_or(0, |chain| CHUNK.min(chain.writable_bytes() as usize));
        let room = buffer.get_mut(..room).unwrap_or_default();
        let input = token.map_or(&[][..], |token| self.link.ready(token, room));
        let Some(chain) = chain else { return Ok(()) };
        if input.is_empty() {
            // The next to be filled, when there is something.
            work.put_back(chain);
            return Ok(());
        }
        let written = chain.write_at(work.memory(), 0, input);
        work.complete(chain, u32::try_from(written).unwrap_or(u32::MAX));
        // Whether there is another buffer decides whether more input is wanted.
        self.receive(None, work)
    }

    /// Hands on output as long as the other end takes it, `left` bytes at most.
    pub(super) fn transmit(
        &mut self,
        left: &mut usize,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let mut buffer = [0; CHUNK];
        while self.link.output_room() > 0 && *left > 0 {
            let (chain, offset) = match self.unfinished.take() {
                Some(unfinished) => unfinished,
                None => match work.pop(self.transmit)? {
                    Some(chain) => (chain, 0),
                    None => return Ok(()),
                },
            };
            let room = CHUNK.min(self.link.output_room()).min(*left);
            let read =
                chain.read_at(work.memory(), offset, buffer.get_mut(..room).unwrap_or_default());
            self.link.extend(buffer.get(..read).unwrap_or_default());
            *left = left.saturating_sub(read.max(1));
            let offset = offset.saturating_add(u32::try_from(read).unwrap_or(u32::MAX));
            if read == 0 || offset >= chain.readable_bytes() {
                work.complete(chain, 0);
            } else {
                self.unfinished = Some((chain, offset));
            }
        }
        Ok(())
    }
}
