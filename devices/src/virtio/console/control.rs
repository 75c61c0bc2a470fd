//! Control messages (virtio 1.3, section 5.3.6.2): the ports, their names, and their connection state.
//!
//! Pending messages to the driver are kept as flags and not as a list: a driver that sends requests without limit, or has no
//! buffers, costs no memory. Left out: removing ports.

use serde::{Deserialize, Serialize};

use crate::virtio::{Chain, GuestMemoryMmap};

/// Events of control messages.
pub(super) mod event {
    pub(in super::super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(in super::super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(in super::super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// A control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    /// Bytes of a message without a name or a size behind it.
    pub(super) const BYTES: u32 = 8;

    /// Reads the message in a chain; `None` if it is too short.
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

/// Messages about a port that are pending for the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pending {
    add: bool,
    console: bool,
    name: bool,
    size: bool,
    /// The driver has set up the port.
    is_ready: bool,
    is_connected: bool,
    sent_connected: bool,
}

impl Pending {
    /// The state after DEVICE_READY.
    pub(super) fn begin(is_ready: bool) -> Self {
        Self { add: is_ready, ..Self::default() }
    }

    /// Takes a PORT_READY: the driver has set up the port, or could not.
    pub(super) fn ready(&mut self, is_ready: bool, is_console: bool, has_size: bool) {
        self.is_ready = is_ready;
        self.sent_connected = false;
        self.console = is_ready && is_console;
        self.name = is_ready && !is_console;
        self.size = is_ready && has_size;
    }

    pub(super) fn resized(&mut self) {
        self.size = self.is_ready;
    }

    pub(super) fn set_connected(&mut self, is_connected: bool) {
        self.is_connected = is_connected;
    }

    /// True if a message is pending.
    pub(super) fn has_message(&self) -> bool {
        self.add
            || self.console
            || self.name
            || self.size
            || (self.is_ready && self.is_connected != self.sent_connected)
    }

    /// Takes the next message. A name precedes PORT_OPEN, since a driver names its files by it.
    pub(super) fn next(
        &mut self,
        id: u32,
        name: Option<&str>,
        size: Option<(u16, u16)>,
    ) -> Vec<u8> {
        let taken = std::mem::take::<bool>;
        let message = |event, value| Message { id, event, value }.bytes();
        if taken(&mut self.add) {
            message(event::PORT_ADD, 1)
        } else if taken(&mut self.console) {
            message(event::CONSOLE_PORT, 1)
        } else if taken(&mut self.name) {
            let mut bytes = message(event::PORT_NAME, 1);
            bytes.extend_from_slice(name.unwrap_or_default().as_bytes());
            bytes
        } else if taken(&mut self.size) {
            let (columns, rows) = size.unwrap_or_default();
            let mut bytes = message(event::RESIZE, 1);
            bytes.extend(columns.to_le_bytes());
            bytes.extend(rows.to_le_bytes());
            bytes
        } else {
            self.sent_connected = self.is_connected;
            message(event::PORT_OPEN, self.is_connected.into())
        }
    }
}
