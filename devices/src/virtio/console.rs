//! Console device (virtio 1.3, section 5.3): one port, `/dev/hvc0` in Linux, beside the UART.
//!
//! What the guest prints stays in its queue until the other end takes it: a slow reader holds the guest back, and nothing is
//! lost. Input is read only as the guest makes room for it. The size of the terminal, where the other end is one, is
//! looked at whenever something happens on the console.
//!
//! Left out: further ports (MULTIPORT), whose names and resets are a protocol of their own.

use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Chain, VirtioDevice, VirtioError, VirtioMmio, Work};
use crate::catalog::{BuildError, Built, Key, Model, Placement, Wiring};
use crate::device::{Interest, Source};
use crate::link::{LAST_TOKEN, Link};
use crate::options::Options;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "console",
    summary: "virtio console: a second console, hvc0 in Linux",
    keys: &[Key {
        name: "to",
        value: "WHERE",
        help: "the other end: stdio, null, pty, file:PATH or unix:PATH (needed)",
    }],
    placement: Placement::Slot,
    irqs: 1,
    build,
};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

const F_SIZE: u64 = 1;
const F_EMERG_WRITE: u64 = 1 << 2;

/// Where `emerg_wr` is in the configuration space, and how long that is (section 5.3.4).
const EMERG_WRITE: usize = 8;
const CONFIG: usize = 12;

/// Bytes that are moved at once.
const CHUNK: usize = 4096;

/// Bytes of output that one pass moves at most.
const MOST_OUTPUT: usize = 256 << 10;

const TOKEN_AGAIN: u32 = LAST_TOKEN + 1;

struct Console {
    link: Link,
    /// Readable when a pass has left output behind.
    again: EventFd,
    /// Features that are offered: the size where the other end is a terminal.
    offered: u64,

    /// Features that the driver has taken.
    taken: u64,
    config: [u8; CONFIG],
    /// Output that the other end has not taken whole, and how much of it has.
    unfinished: Option<(Chain, u32)>,
}

fn build(options: &Options, wiring: Wiring) -> Built {
    let to = options.get("to").ok_or_else(|| BuildError::Option {
        model: MODEL.name,
        source: options.bad("to", "stdio, null, pty, file:PATH or unix:PATH"),
    })?;
    let backend =
        wiring.host.console(to).map_err(|source| BuildError::End { model: MODEL.name, source })?;
    let failed = |source| BuildError::Host { model: MODEL.name, what: "event descriptors", source };
    let size = if backend.size().is_some() { F_SIZE } else { 0 };
    let mut console = Console {
        link: Link::new(MODEL.name, backend).map_err(failed)?,
        offered: size | F_EMERG_WRITE,
        again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?,
        taken: 0,
        config: [0; CONFIG],
        unfinished: None,
    };
    console.look_at_size();
    VirtioMmio::create(Box::new(console), wiring)
}

impl Console {
    /// Puts the size of the terminal into the configuration space; true where it is another than before.
    fn look_at_size(&mut self) -> bool {
        let Some((columns, rows)) = self.link.size() else { return false };
        let size = u32::from(columns) | u32::from(rows) << 16;
        let Some(field) = self.config.first_chunk_mut() else { return false };
        std::mem::replace(field, size.to_le_bytes()) != *field
    }

    /// Reads input into the guest's next buffer, if something may be ready.
    fn receive(&mut self, token: Option<u32>, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let mut chain = None;
        while chain.is_none() {
            match work.pop(RECEIVE)? {
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

    /// Hands on output as long as the other end takes it.
    fn transmit(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let mut buffer = [0; CHUNK];
        let mut left = MOST_OUTPUT;
        while self.link.output_room() > 0 && left > 0 {
            let (chain, offset) = match self.unfinished.take() {
                Some(unfinished) => unfinished,
                None => match work.pop(TRANSMIT)? {
                    Some(chain) => (chain, 0),
                    None => return Ok(()),
                },
            };
            let room = CHUNK.min(self.link.output_room()).min(left);
            let read =
                chain.read_at(work.memory(), offset, buffer.get_mut(..room).unwrap_or_default());
            self.link.extend(buffer.get(..read).unwrap_or_default());
            left = left.saturating_sub(read.max(1));
            let offset = offset.saturating_add(u32::try_from(read).unwrap_or(u32::MAX));
            if read == 0 || offset >= chain.readable_bytes() {
                work.complete(chain, 0);
            } else {
                self.unfinished = Some((chain, offset));
            }
        }
        if left == 0 {
            // Refused means that it is readable already.
            let _ = self.again.write(1);
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn id(&self) -> u32 {
        3
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // One character before any queue works, for a driver that has said that it knows of this.
        if let (EMERG_WRITE, Some(byte)) = (offset, data.first())
            && self.taken & F_EMERG_WRITE != 0
        {
            self.link.push(*byte);
        }
    }

    fn activate(&mut self, features: u64) {
        self.taken = features;
    }

    fn kicked(&mut self, _queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.receive(None, work)?;
        self.transmit(work)
    }

    fn reset_queue(&mut self, queue: u16) {
        if queue == TRANSMIT {
            self.unfinished = None;
        }
    }

    fn reset(&mut self) {
        self.taken = 0;
        self.unfinished = None;
        self.link.set_room(0);
    }

    fn sources(&self) -> Vec<Source> {
        let again =
            Source { fd: self.again.as_raw_fd(), token: TOKEN_AGAIN, interest: Interest::Read };
        let mut sources = self.link.sources();
        sources.push(again);
        sources
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        if token == TOKEN_AGAIN {
            // Drained; empty if the event was stale.
            drop(self.again.read());
        }
        self.receive(Some(token), work)?;
        self.transmit(work)?;
        if self.look_at_size() && self.taken & F_SIZE != 0 {
            work.config_changed();
        }
        Ok(())
    }
}
