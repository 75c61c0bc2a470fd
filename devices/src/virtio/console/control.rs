//! Control messages (virtio 1.3, section 5.3.6.2): which ports there are, what they are called, who is there.
//!
//! What the driver has to be told is kept as facts and not as messages: a driver that asks without end, or has no buffers,
//! costs nothing. Left out: removing ports.

use crate::virtio::{Chain, GuestMemoryMmap};

/// Kinds of messages.
pub(super) mod event {
    pub(in super::super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(in super::super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(in super::super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    /// What it takes without a name or a size behind it.
    pub(super) const BYTES: u32 = 8;

    /// The message in a chain; `None` where it is too short for one.
    pub(super) fn read(chain: &Chain, memory: &GuestMemoryMmap) -> Option<Self> {
        let mut bytes = [0; Self::BYTES as usize];
        if chain.read_at(memory, 0, &mut bytes) < bytes.len() {
            return None;
        }
        let [a, b, c, d, e, f, g, h] = bytes;
        Some(Self {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        })
    }

    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

/// What the driver has been told of a port, and what it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Talk {
    owes_add: bool,
    owes_console: bool,
    owes_name: bool,
    owes_size: bool,
    /// The driver has the port.
    is_ready: bool,
    is_connected: bool,
    told_connected: bool,
}

impl Talk {
    /// The driver is there, or has given up.
    pub(super) fn begin(is_ready: bool) -> Self {
        Self { owes_add: is_ready, ..Self::default() }
    }

    /// The driver has the port, or could not take it.
    pub(super) fn ready(&mut self, is_ready: bool, is_console: bool, has_size: bool) {
        self.is_ready = is_ready;
        self.told_connected = false;
        self.owes_console = is_ready && is_console;
        self.owes_name = is_ready && !is_console;
        self.owes_size = is_ready && has_size;
    }

    pub(super) fn owes_size(&mut self) {
        self.owes_size = self.is_ready;
    }

    pub(super) fn set_connected(&mut self, is_connected: bool) {
        self.is_connected = is_connected;
    }

    /// There is something to tell.
    pub(super) fn owes(&self) -> bool {
        self.owes_add
            || self.owes_console
            || self.owes_name
            || self.owes_size
            || (self.is_ready && self.is_connected != self.told_connected)
    }

    /// The next thing to tell, which counts as told then. Names come before news, for a driver makes its files by them.
    pub(super) fn next(
        &mut self,
        id: u32,
        name: Option<&str>,
        size: Option<(u16, u16)>,
    ) -> Vec<u8> {
        let taken = std::mem::take::<bool>;
        let message = |event, value| Message { id, event, value }.bytes();
        if taken(&mut self.owes_add) {
            message(event::PORT_ADD, 1)
        } else if taken(&mut self.owes_console) {
            message(event::CONSOLE_PORT, 1)
        } else if taken(&mut self.owes_name) {
            let mut bytes = message(event::PORT_NAME, 1);
            bytes.extend_from_slice(name.unwrap_or_default().as_bytes());
            bytes
        } else if taken(&mut self.owes_size) {
            let (columns, rows) = size.unwrap_or_default();
            let mut bytes = message(event::RESIZE, 1);
            bytes.extend(columns.to_le_bytes());
            bytes.extend(rows.to_le_bytes());
            bytes
        } else {
            self.told_connected = self.is_connected;
            message(event::PORT_OPEN, self.is_connected.into())
        }
    }
}
