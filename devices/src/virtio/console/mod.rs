//! Console device (virtio 1.3, section 5.3): a console (`/dev/hvc0` in Linux), and named ports (`/dev/virtio-ports/NAME`).
//!
//! | file | contents |
//! |---|---|
//! | `settings.rs` | configuration |
//! | `port.rs` | a port: bytes in both directions |
//! | `control.rs` | control messages about ports |
//! | `lifecycle.rs` | pause, reset and save |
//!
//! The guest's output stays in its queue until the backend accepts it: a slow reader holds the guest back, and no output is lost.
//! Input is read only as the guest provides buffers. The size of the terminal, if the backend is one, is read on every
//! event of the console, and when the terminal signals a change.
//!
//! Left out: adding and removing ports while the guest runs.

use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DeviceType, VirtioDevice, VirtioError, Work};
use crate::catalog::{BuildError, Built, Device, Model, Placement, Wiring};
use crate::config::{FilePath, ModelConfig, Slot};
use crate::device::{Interest, Source};
use crate::link::{LAST_TOKEN, Link};
use crate::options::OptionError;

mod control;
mod lifecycle;
mod port;
mod settings;

use control::{Message, Pending, event};
use port::Port;
pub use settings::{ConsoleConfig, PortConfig, PortName};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "console",
    summary: "virtio console: a second console, hvc0 in Linux, and named ports",
    keys: settings::KEYS,
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// Queue sizes. The queues are the first port's two, two for control messages, and two for each further port (section 5.3.2).
const PORT_QUEUES: u16 = 64;
const CONTROL_QUEUES: u16 = 32;
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

const F_SIZE: u64 = 1;
const F_MULTIPORT: u64 = 1 << 1;
const F_EMERG_WRITE: u64 = 1 << 2;

/// Offsets of `max_nr_ports` and `emerg_wr` in the configuration space, and its length (section 5.3.4).
const MAX_NR_PORTS: usize = 4;
const EMERG_WRITE: usize = 8;
const CONFIG: usize = 12;

/// Maximum number of bytes of output moved in one pass, over all ports.
const MAX_OUTPUT: usize = 256 << 10;

/// The device's own token follows the first port's; those of the second port follow it.
const TOKEN_RESUME: u32 = LAST_TOKEN + 1;
const TOKENS: u32 = TOKEN_RESUME + 1;

struct Console {
    /// The console is the first one, if there is one.
    ports: Vec<Port>,
    queue_sizes: Box<[u16]>,
    /// Readable when a pass has left output in a queue.
    resume: EventFd,
    /// Features that are offered; the size only if the backend is a terminal.
    offered: u64,

    /// Negotiated features.
    taken: u64,
    config: [u8; CONFIG],
}

impl ModelConfig for ConsoleConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        self.endpoint_paths()
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn check(&self) -> Result<(), OptionError> {
        self.check()
    }

    fn build(&self, wiring: Wiring) -> Built {
        let failed =
            |source| BuildError::Host { model: MODEL.name, what: "event descriptors", source };
        let mut ports = Vec::new();
        for (number, (name, to)) in (0..).zip(self.ends()) {
            let backend = wiring
                .host
                .console(to)
                .map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
            let link = Link::new(MODEL.name, backend).map_err(failed)?;
            ports.push(Port::new(number, link, name.map(ToString::to_string)));
        }
        let mut console =
            Console::new(ports, EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?);
        console.update_size();
        Ok(Device::Virtio(Box::new(console)))
    }
}

impl Console {
    fn new(ports: Vec<Port>, resume: EventFd) -> Self {
        let has_size = ports.first().is_some_and(|port| port.is_console() && port.size().is_some());
        let has_ports = ports.len() > 1 || ports.iter().any(|port| !port.is_console());
        let mut queue_sizes = vec![PORT_QUEUES; 2];
        if has_ports {
            queue_sizes.extend([CONTROL_QUEUES; 2]);
            let further = ports.len().saturating_sub(1);
            queue_sizes.extend(std::iter::repeat_n(PORT_QUEUES, 2 * further));
        }
        let mut config = [0; CONFIG];
        if let Some(field) = config.get_mut(MAX_NR_PORTS) {
            *field = u8::try_from(ports.len()).unwrap_or(u8::MAX);
        }
        let flag = |is_on, bit| if is_on { bit } else { 0 };
        Self {
            ports,
            queue_sizes: queue_sizes.into(),
            resume,
            offered: flag(has_size, F_SIZE) | flag(has_ports, F_MULTIPORT) | F_EMERG_WRITE,
            taken: 0,
            config,
        }
    }

    fn is_multiport(&self) -> bool {
        self.taken & F_MULTIPORT != 0
    }

    /// Writes the size of the terminal into the configuration space; true if it has changed.
    fn update_size(&mut self) -> bool {
        let console = self.ports.first().filter(|port| port.is_console());
        let Some((columns, rows)) = console.and_then(Port::size) else { return false };
        let size = u32::from(columns) | u32::from(rows) << 16;
        let Some(field) = self.config.first_chunk_mut() else { return false };
        std::mem::replace(field, size.to_le_bytes()) != *field
    }

    /// The index of the port that a queue belongs to; `None` for the control queues.
    fn port_of(&self, queue: u16) -> Option<usize> {
        match queue {
            0 | 1 => Some(0),
            CONTROL_RECEIVE | CONTROL_TRANSMIT => None,
            further if self.is_multiport() => Some(usize::from(further / 2) - 1),
            _ => None,
        }
    }

    /// Moves bytes of a port; `token` is the source of it that may be ready, if any.
    fn serve(
        &mut self,
        number: usize,
        token: Option<u32>,
        work: &mut Work<'_>,
    ) -> Result<(), VirtioError> {
        let Some(port) = self.ports.get_mut(number) else { return Ok(()) };
        port.receive(token, work)?;
        let mut left = MAX_OUTPUT;
        port.transmit(&mut left, work)?;
        if left == 0 {
            // An error means that it is readable already.
            let _ = self.resume.write(1);
        }
        if self.update_size() && self.taken & F_SIZE != 0 {
            work.config_changed();
            // Drivers with MULTIPORT ignore the configuration space.
            self.ports.iter_mut().take(1).for_each(|console| console.pending.resized());
        }
        self.send_messages(work)
    }

    /// Takes the driver's control messages.
    fn receive_messages(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some(chain) = work.pop(CONTROL_TRANSMIT)? {
            if let Some(message) = Message::read(&chain, work.memory()) {
                self.apply(message);
            }
            work.complete(chain, 0);
        }
        Ok(())
    }

    fn apply(&mut self, Message { id, event, value }: Message) {
        if event == event::DEVICE_READY {
            let ports = self.ports.iter_mut();
            return ports.for_each(|port| port.pending = Pending::begin(value == 1));
        }
        let port = usize::try_from(id).ok().and_then(|id| self.ports.get_mut(id));
        let Some(port) = port else { return };
        match event {
            event::PORT_READY => {
                let has_size = port.is_console() && port.size().is_some();
                port.pending.ready(value == 1, port.is_console(), has_size);
            }
            event::PORT_OPEN => port.set_open(value == 1),
            _ => {}
        }
    }

    /// Sends pending control messages, as far as the driver has buffers.
    fn send_messages(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        if !self.is_multiport() {
            return Ok(());
        }
        for port in &mut self.ports {
            port.pending.set_connected(port.is_connected());
            while port.pending.has_message() {
                let Some(chain) = work.pop(CONTROL_RECEIVE)? else { return Ok(()) };
                if chain.writable_bytes() < Message::BYTES {
                    work.refuse(chain);
                    continue;
                }
                let message = port.next_message();
                let written = chain.write_at(work.memory(), 0, &message);
                work.complete(chain, u32::try_from(written).unwrap_or(0));
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            // Bytes and messages are the same without VERSION_1.
            version_1_is_optional: true,
            ..DeviceType::new(MODEL.name, 3, &self.queue_sizes, self.offered)
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // One character, without any queue, for a driver that has negotiated this.
        if let (EMERG_WRITE, Some(byte), Some(port)) =
            (offset, data.first(), self.ports.first_mut())
            && self.taken & F_EMERG_WRITE != 0
        {
            port.push(*byte);
        }
    }

    fn activate(&mut self, features: u64) {
        self.taken = features;
    }

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match self.port_of(queue) {
            Some(number) => self.serve(number, None, work),
            None if self.is_multiport() => {
                self.receive_messages(work)?;
                // A port that was opened may have input waiting.
                (0..self.ports.len()).try_for_each(|number| self.serve(number, None, work))
            }
            None => Ok(()),
        }
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let resume =
            Source { fd: self.resume.as_raw_fd(), token: TOKEN_RESUME, interest: Interest::Read };
        for (number, port) in (0..).zip(&self.ports) {
            let first = list.len();
            port.list_sources(list);
            let own = list.iter_mut().skip(first);
            own.for_each(|source| source.token += TOKENS * number);
        }
        list.push(resume);
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        if token == TOKEN_RESUME {
            // Fails if the event was stale.
            drop(self.resume.read());
            return (0..self.ports.len()).try_for_each(|number| self.serve(number, None, work));
        }
        self.serve((token / TOKENS) as usize, Some(token % TOKENS), work)
    }
}
