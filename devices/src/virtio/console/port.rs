//! A port of a console device: bytes in both directions, between two queues and the backend.

use serde::{Deserialize, Serialize};

use super::control::Pending;
use crate::device::Source;
use crate::lifecycle::RestoreError;
use crate::link::Link;
use crate::virtio::{Chain, SavedChain, VirtioError, Work};

/// Maximum number of bytes moved at once.
const CHUNK: usize = 4096;

/// A port.
pub(super) struct Port {
    number: u32,
    receive: u16,
    transmit: u16,
    link: Link,
    /// `None` for the console.
    name: Option<String>,

    /// A program in the guest has it open; the console is always open.
    is_open: bool,
    /// A chain of output that is partly written, and the number of bytes written.
    unfinished: Option<(Chain, u32)>,
    /// Control messages about it for the driver.
    pub(super) pending: Pending,
}

/// The state of a port.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PortState {
    is_open: bool,
    unfinished: Option<(SavedChain, u32)>,
    pending: Pending,
    /// Output that the host has not accepted.
    output: Vec<u8>,
}

impl Port {
    /// Creates port `number` of its device.
    pub(super) fn new(number: u16, link: Link, name: Option<String>) -> Self {
        // The control queues follow the first port's.
        let first = if number == 0 { 0 } else { 2 * number + 2 };
        Self {
            number: number.into(),
            receive: first,
            transmit: first + 1,
            link,
            is_open: name.is_none(),
            name,
            unfinished: None,
            pending: Pending::default(),
        }
    }

    pub(super) fn is_console(&self) -> bool {
        self.name.is_none()
    }

    /// Columns and rows, if the backend is a terminal.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        self.link.size()
    }

    /// True if a client is connected to the backend.
    pub(super) fn is_connected(&self) -> bool {
        self.link.is_connected()
    }

    pub(super) fn push(&mut self, byte: u8) {
        self.link.push(byte);
    }

    /// Notes that the guest has opened or closed the port. A driver drops input for a closed port, so none is read until it is open.
    pub(super) fn set_open(&mut self, is_open: bool) {
        self.is_open = is_open || self.is_console();
    }

    /// Takes the next control message for the driver.
    pub(super) fn next_message(&mut self) -> Vec<u8> {
        self.pending.next(self.number, self.name.as_deref(), self.link.size())
    }

    pub(super) fn list_sources(&self, list: &mut Vec<Source>) {
        self.link.list_sources(list);
    }

    /// Writes as much output as the host accepts.
    pub(super) fn flush(&mut self) {
        self.link.flush();
    }

    pub(super) fn save(&self) -> PortState {
        let Self {
            number: _,
            receive: _,
            transmit: _,
            link,
            name: _,
            is_open,
            unfinished,
            pending,
        } = self;
        PortState {
            is_open: *is_open,
            unfinished: unfinished.as_ref().map(|(chain, offset)| (chain.saved(), *offset)),
            pending: *pending,
            output: link.pending_output(),
        }
    }

    pub(super) fn restore(
        &mut self,
        state: PortState,
        work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let PortState { is_open, unfinished, pending, output } = state;
        self.set_open(is_open);
        self.pending = pending;
        if let Some((chain, offset)) = unfinished {
            self.unfinished = work.retake(chain)?.map(|chain| (chain, offset));
        }
        self.link.restore_output(&output, false)
    }

    pub(super) fn forget_output(&mut self) {
        self.unfinished = None;
    }

    pub(super) fn reset(&mut self) {
        self.unfinished = None;
        self.is_open = self.is_console();
        self.pending = Pending::default();
        self.link.set_room(0);
    }

    /// Reads input into the guest's next buffer, if `token` may be ready.
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
            // It is the next one to be filled.
            work.put_back(chain);
            return Ok(());
        }
        let written = chain.write_at(work.memory(), 0, input);
        work.complete(chain, u32::try_from(written).unwrap_or(u32::MAX));
        // Sets the link's room: more input is read only if there is another buffer.
        self.receive(None, work)
    }

    /// Moves output as long as the backend accepts it, at most `left` bytes, which decreases.
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
