//! Network device (virtio 1.3, section 5.1), one pair of queues and a control queue.
//!
//! | file | what |
//! |---|---|
//! | `receive.rs`, `transmit.rs` | the two directions |
//! | `header.rs` | the header before each frame, and what of it may pass |
//! | `control.rs` | commands of the driver |
//! | `backend.rs`, `port.rs` | the host's end, and what its errors mean |
//! | `settings.rs`, `counters.rs` | what a user sets and sees |
//!
//! Checksums and segmentation are negotiated end to end: the host's end gives the guest what the guest's driver takes, and
//! takes what it was offered. Left out: several pairs of queues (one thread works for all of them), UFO and USO, hashing,
//! VLAN filters, a MAC address that the driver sets.

use std::io;
use std::sync::Arc;

use super::{VirtioDevice, VirtioError, VirtioMmio, Work};
use crate::catalog::{BuildError, Built, Model, Placement, Wiring};
use crate::device::{Interest, Source};
use crate::options::Options;

mod backend;
mod control;
mod counters;
mod header;
mod port;
mod receive;
mod settings;
pub mod testing;
mod transmit;

pub use backend::{NetBackend, NetworkEnd};
pub use counters::{Counter, Counters};
pub use header::{HEADER, MAX_FRAME, MIN_FRAME, Offloads, bit};
pub use settings::{Rates, Settings};

use control::Order;
use port::Port;
use receive::Receiver;
use transmit::Transmitter;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "net",
    summary: "virtio network device on a tap interface (docs/networks.md)",
    keys: settings::KEYS,
    placement: Placement::Slot,
    irqs: 1,
    build,
};

/// The queue of buffers for frames to the guest.
pub const RX: u16 = 0;
/// The queue of frames from the guest.
pub const TX: u16 = 1;
/// The queue of commands.
pub const CTRL: u16 = 2;

const TOKEN_NETWORK: u32 = 0;
const TOKEN_RX_LIMIT: u32 = 1;
const TOKEN_TX_LIMIT: u32 = 2;

/// What every such device offers.
const FEATURES: u64 = bit::CSUM
    | bit::GUEST_CSUM
    | bit::CTRL_GUEST_OFFLOADS
    | bit::MAC
    | bit::GUEST_TSO4
    | bit::GUEST_TSO6
    | bit::GUEST_ECN
    | bit::HOST_TSO4
    | bit::HOST_TSO6
    | bit::HOST_ECN
    | bit::MRG_RXBUF
    | bit::STATUS
    | bit::CTRL_VQ
    | bit::CTRL_RX;

/// Bytes of the configuration space: `mac`, `status`, `max_virtqueue_pairs`, `mtu` (virtio 1.3, section 5.1.4).
const CONFIG: usize = 12;

/// `VIRTIO_NET_S_LINK_UP`
const LINK_UP: u8 = 1;

/// A network device.
pub struct Net {
    /// Features that only this one offers.
    extra: u64,
    port: Port,
    rx: Receiver,
    tx: Transmitter,
    config: [u8; CONFIG],
    /// What the driver has taken; nothing while there is none.
    taken: u64,
}

fn build(options: &Options, wiring: Wiring) -> Built {
    let settings = Settings::parse(options)
        .map_err(|source| BuildError::Option { model: MODEL.name, source })?;
    let end = settings::end(options)?;
    let backend = wiring
        .host
        .network(&end)
        .map_err(|source| BuildError::End { model: MODEL.name, source })?;
    let net = Net::new(backend, &settings).map_err(|source| BuildError::Host {
        model: MODEL.name,
        what: "timers",
        source,
    })?;
    VirtioMmio::create(Box::new(net), wiring)
}

impl Net {
    /// A device whose other end is `backend`.
    ///
    /// # Errors
    /// The host has no timers left.
    pub fn new(backend: Box<dyn NetBackend>, settings: &Settings) -> io::Result<Self> {
        let mac = settings.mac.unwrap_or_else(|| settings::mac_of(backend.identity()));
        let mtu = settings.mtu.unwrap_or(0).to_le_bytes();
        let mut config = [0; CONFIG];
        let fields = mac.into_iter().chain([LINK_UP, 0, 1, 0]).chain(mtu);
        config.iter_mut().zip(fields).for_each(|(byte, value)| *byte = value);
        Ok(Self {
            extra: if settings.mtu.is_some() { bit::MTU } else { 0 },
            port: Port::new(backend),
            rx: Receiver::new(settings.rx, settings.mtu)?,
            tx: Transmitter::new(settings.tx, settings.pin.then_some(mac))?,
            config,
            taken: 0,
        })
    }

    /// What it has let through and dropped; counts on while the device runs.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.port.counters)
    }

    fn command(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some(chain) = work.pop(CTRL)? {
            if chain.writable_bytes() == 0 {
                work.refuse(chain);
                continue;
            }
            let order = control::order(&chain, work.memory(), self.taken);
            let is_done = match order {
                None => false,
                Some(Order::Nothing) => true,
                Some(Order::Offloads(features)) => self.set_offloads(features),
            };
            let answer = if is_done { control::OK } else { control::ERR };
            chain.write_at(work.memory(), 0, &[answer]);
            work.complete(chain, 1);
        }
        Ok(())
    }

    /// Frames may leave to the driver from now on what these features say, and nothing else reaches it; false, and nothing
    /// has changed, where the host refuses.
    fn set_offloads(&mut self, features: u64) -> bool {
        let offloads = Offloads::of_driver(features);
        let is_done = self.port.set_offloads(offloads) == offloads || self.port.is_gone;
        if is_done {
            self.rx.offloads = offloads;
        }
        is_done
    }

    /// Takes the link down when the host's end is gone.
    fn watch_link(&mut self, work: &mut Work<'_>) {
        let [_, _, _, _, _, _, status, ..] = &mut self.config;
        if self.port.is_gone && *status & LINK_UP != 0 {
            *status &= !LINK_UP;
            work.config_changed();
        }
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn id(&self) -> u32 {
        1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn features(&self) -> u64 {
        FEATURES | self.extra
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    // The MAC address is the driver's to write in legacy devices only (section 5.1.4.1).
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64) {
        self.taken = features;
        self.rx.start(features);
        self.tx.start(features);
        if !self.set_offloads(features) {
            // Frames come as they did; those that this driver does not take are dropped.
            self.rx.offloads = Offloads::of_driver(features);
        }
    }

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match queue {
            RX => {
                self.rx.feed();
                self.rx.pass(&mut self.port, work)?;
            }
            TX => self.tx.pass(&mut self.port, work)?,
            CTRL => self.command(work)?,
            _ => {}
        }
        self.watch_link(work);
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16) {
        match queue {
            RX => self.rx.starve(),
            TX => self.tx.stop(),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.taken = 0;
        self.rx.stop();
        self.tx.stop();
        // What waits at the host's end is dropped where the next driver does not take it.
        self.port.set_offloads(Offloads::default());
    }

    fn sources(&self) -> Vec<Source> {
        let limit = |fd, token| Source { fd, token, interest: Interest::Read };
        let mut sources = vec![
            limit(self.rx.limit.fd(), TOKEN_RX_LIMIT),
            limit(self.tx.limit.fd(), TOKEN_TX_LIMIT),
        ];
        let interest = Interest::of(self.rx.can_take(), self.tx.is_blocked);
        if let (Some(interest), false) = (interest, self.port.is_gone) {
            sources.push(Source { fd: self.port.fd(), token: TOKEN_NETWORK, interest });
        }
        sources
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_NETWORK => {
                self.tx.is_blocked = false;
                self.rx.pass(&mut self.port, work)?;
                self.tx.pass(&mut self.port, work)?;
            }
            TOKEN_RX_LIMIT => {
                self.rx.limit.expired();
                self.rx.pass(&mut self.port, work)?;
            }
            TOKEN_TX_LIMIT => {
                self.tx.limit.expired();
                self.tx.pass(&mut self.port, work)?;
            }
            _ => {}
        }
        self.watch_link(work);
        Ok(())
    }
}
