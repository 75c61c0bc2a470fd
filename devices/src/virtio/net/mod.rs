//! Network device (virtio 1.3, section 5.1): queue pairs and a control queue.
//!
//! | file | contents |
//! |---|---|
//! | `pairs.rs` | the queue pairs, of which the driver uses the first ones |
//! | `receive.rs`, `transmit.rs` | the two directions of a pair |
//! | `header.rs` | the header before each frame, and its validation |
//! | `control.rs` | commands of the driver |
//! | `backend.rs`, `port.rs` | the host backend, and the handling of its errors |
//! | `lifecycle.rs` | pause, reset and save |
//! | `settings.rs`, `counters.rs` | options and statistics |
//!
//! Checksums and segmentation are negotiated end to end: the backend passes to the guest only what its driver accepts, and accepts
//! what the driver was offered. With several queue pairs the guest's harts do not wait for each other; in rvmm one thread serves
//! all of them, or with `vhost=on` the host's kernel, one thread for each pair (`vhost_kernel`): then the control queue and the
//! configuration stay here, and the kernel validates the frames. Left out: UFO and USO, hashing (the backend distributes frames by
//! its own rules), VLAN filters, a MAC address set by the driver.

use std::io;
use std::sync::Arc;

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::vhost_kernel::{FIRST_TOKEN, Kernel, KernelQueues};
use super::{DeviceType, DmaMemory, RemoteQueues, Rings, VirtioDevice, VirtioError, Work};
use crate::catalog::{BuildError, Built, Device, Model, Placement, Wiring};
use crate::config::{ModelConfig, Slot};
use crate::device::Source;
use crate::host::{Host, HostError};
use crate::irq::Interrupt;
use crate::options::OptionError;

mod backend;
mod control;
mod counters;
mod header;
mod lifecycle;
mod pairs;
mod port;
mod receive;
mod settings;
pub mod testing;
mod transmit;

pub use backend::{NetBackend, NetworkSource};
pub use counters::{Counter, Counters};
pub use header::{HEADER, MAX_FRAME, MIN_FRAME, Offloads, bit};
pub(super) use settings::mac_of;
pub use settings::{Descriptor, FrameRate, MacAddress, Mtu, NetConfig, QueuePairs};

use control::Action;
use pairs::Pairs;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "net",
    summary: "virtio network device on a tap interface (docs/networks.md)",
    keys: settings::KEYS,
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// The first receive queue: buffers for frames to the guest.
pub const RX: u16 = 0;
/// The first transmit queue: frames from the guest.
pub const TX: u16 = 1;
/// The control queue without `VIRTIO_NET_F_MQ`; with it, the control queue follows all pairs.
pub const CTRL: u16 = 2;

/// Features that every network device offers.
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
    /// Features offered besides [`FEATURES`].
    extra: u64,
    queue_sizes: Box<[u16]>,
    pairs: Pairs,
    config: [u8; CONFIG],
    /// The user has set the MAC address.
    has_chosen_mac: bool,
    /// Negotiated features; 0 while there is no driver.
    taken: u64,
    /// Serves the data queues in place of `pairs`.
    kernel: Option<Kernel>,
    /// Opens the backends again after they were lost.
    network: Option<Network>,
}

/// The network on the host.
struct Network {
    host: Arc<dyn Host>,
    source: NetworkSource,
    memory: Arc<dyn DmaMemory>,
}

impl ModelConfig for NetConfig {
    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn check(&self) -> Result<(), OptionError> {
        self.check()
    }

    fn build(&self, wiring: Wiring) -> Built {
        let refused = |source| BuildError::Option { model: MODEL.name, source };
        let end = self.source().ok_or_else(|| refused(OptionError::NoBackend))?;
        let network = Network { host: wiring.host, source: end, memory: wiring.memory };
        let (backends, queues) = network
            .open(self.pairs(), self.vhost)
            .map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
        let failed = |what| move |source| BuildError::Host { model: MODEL.name, what, source };
        let mut net = Net::with_queues(backends, self).map_err(failed("timers"))?;
        if self.vhost {
            net.serve_by_kernel(queues).map_err(failed("queues"))?;
        }
        net.network = Some(network);
        Ok(Device::Virtio(Box::new(net)))
    }
}

/// The backends of a card's queue pairs, and with vhost the kernel's end of each.
type Ends = (Vec<Box<dyn NetBackend>>, Vec<Box<dyn KernelQueues>>);

impl Network {
    /// Opens the backends of `pairs` queue pairs.
    fn open(&self, pairs: u16, vhost: bool) -> Result<Ends, HostError> {
        let backends = self.host.network_queues(&self.source, pairs)?;
        let served = backends.iter().filter(|_| vhost);
        let queues = served.map(|backend| backend.kernel_queues(self.memory.clone()));
        let queues = queues.collect::<Result<_, _>>()?;
        Ok((backends, queues))
    }
}

/// The MAC address: the user's, else the one that the backend requires, else one derived from the backend's identity.
fn address(config: &NetConfig, end: Option<&dyn NetBackend>) -> [u8; 6] {
    let needed = end.and_then(NetBackend::address);
    let wanted = config.mac.map(MacAddress::bytes);
    if let (Some(wanted), Some(needed)) = (wanted, needed)
        && wanted != needed
    {
        warn!(
            "net: the host's interface has the address {} and drops frames for mac={}: the guest receives next to nothing (leave out mac=, or give the interface this address)",
            shown(needed),
            shown(wanted)
        );
    }
    let made = || mac_of(end.map_or("", NetBackend::identity).as_bytes());
    wanted.or(needed).unwrap_or_else(made)
}

fn shown(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Net {
    /// Creates a device with one queue pair on `backend`.
    ///
    /// # Errors
    /// The host has no timers left.
    pub fn new(backend: Box<dyn NetBackend>, config: &NetConfig) -> io::Result<Self> {
        Self::with_queues(vec![backend], config)
    }

    /// Creates a device with a queue pair for each of `backends`, 1 to 8 queues of the same network.
    ///
    /// # Errors
    /// The host has no timers left.
    pub fn with_queues(backends: Vec<Box<dyn NetBackend>>, config: &NetConfig) -> io::Result<Self> {
        let mac = address(config, backends.first().map(AsRef::as_ref));
        let has_chosen_mac = config.mac.is_some();
        let mtu = config.mtu.map_or(0, Mtu::get).to_le_bytes();
        let pairs = Pairs::new(backends, config, mac)?;
        let has_mtu = config.mtu.is_some();
        let mut config = [0; CONFIG];
        let [low, high] = pairs.count().to_le_bytes();
        let status = if pairs.is_link_up() { LINK_UP } else { 0 };
        let fields = mac.into_iter().chain([status, 0, low, high]).chain(mtu);
        config.iter_mut().zip(fields).for_each(|(byte, value)| *byte = value);
        let mut queue_sizes = vec![256; 2 * usize::from(pairs.count())];
        queue_sizes.push(64);
        let mtu = if has_mtu { bit::MTU } else { 0 };
        let queues = if pairs.count() > 1 { bit::MQ } else { 0 };
        let queue_sizes = queue_sizes.into();
        Ok(Self {
            extra: mtu | queues,
            queue_sizes,
            pairs,
            config,
            has_chosen_mac,
            taken: 0,
            kernel: None,
            network: None,
        })
    }

    /// Has the host's kernel serve the data queues, one end for each pair.
    ///
    /// # Errors
    /// The host has no event descriptors left, or its kernel does not support virtio 1.
    fn serve_by_kernel(&mut self, ends: Vec<Box<dyn KernelQueues>>) -> io::Result<()> {
        self.kernel = Some(Kernel::new(MODEL.name, ends, bit::MRG_RXBUF)?);
        Ok(())
    }

    /// Counters of frames passed and dropped, live. Frames that the kernel moves are not counted.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.pairs.counters()
    }

    /// The MAC address.
    fn mac(&self) -> [u8; 6] {
        self.config.first_chunk().copied().unwrap_or_default()
    }

    fn set_mac(&mut self, mac: [u8; 6]) {
        self.config.iter_mut().zip(mac).for_each(|(byte, value)| *byte = value);
        self.pairs.set_mac(mac);
    }

    /// Number of the control queue (section 5.1.2).
    fn control(&self) -> u16 {
        if self.taken & bit::MQ == 0 { CTRL } else { 2 * self.pairs.count() }
    }

    fn command(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some(chain) = work.pop(self.control())? {
            if chain.writable_bytes() == 0 {
                work.refuse(chain);
                continue;
            }
            let action = control::action(&chain, work.memory(), self.taken);
            let is_done = match action {
                None => false,
                Some(Action::Nothing) => true,
                Some(Action::Offloads(features)) => self.set_offloads(features),
                Some(Action::Pairs(count)) => self.pairs.use_first(count),
            };
            let ack = if is_done { control::OK } else { control::ERR };
            chain.write_at(work.memory(), 0, &[ack]);
            work.complete(chain, 1);
        }
        if self.kernel.is_some() {
            return Ok(());
        }
        // Frames in queues that were not in use until now.
        self.pairs.transmit_all(work)
    }

    /// Sets the offloads of frames to the driver to those of these features; frames that need others are dropped. False, with
    /// nothing changed, if the host refuses.
    fn set_offloads(&mut self, features: u64) -> bool {
        self.pairs.set_offloads(Offloads::of_driver(features))
    }

    /// Sets the offloads of frames to the driver to those that it has accepted.
    fn require_offloads(&mut self, offloads: Offloads) {
        if !self.pairs.set_offloads(offloads) {
            // The backend keeps its offloads; frames that need one that this driver has not accepted are dropped.
            self.pairs.take_only(offloads);
            if let Some(kernel) = &mut self.kernel {
                kernel.fail(&io::Error::other("the offloads cannot be set"));
            }
        }
    }

    /// Reports a change of the link state to the driver; the link is down, too, once the backend is gone.
    fn update_link(&mut self, work: &mut Work<'_>) {
        let [_, _, _, _, _, _, status, ..] = &mut self.config;
        let now = if self.pairs.is_link_up() { LINK_UP } else { 0 };
        if std::mem::replace(status, now) != now {
            work.config_changed();
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        let all = FEATURES | self.extra;
        let kind = DeviceType::new(MODEL.name, 1, &self.queue_sizes, all);
        let Some(kernel) = &self.kernel else { return kind };
        DeviceType {
            features: all & (kernel.features() | !bit::MRG_RXBUF),
            transport_features: kernel.features(),
            remote: RemoteQueues::Pairs(self.pairs.count()),
            ..kind
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    // The driver may write the MAC address in legacy devices only (section 5.1.4.1).
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn attach_interrupt(&mut self, interrupt: &Interrupt) -> bool {
        self.kernel.as_mut().is_some_and(|kernel| kernel.attach(interrupt))
    }

    fn start_remote(&mut self, rings: Rings, kick: &EventFd) {
        let _ = self.kernel.as_mut().map(|kernel| kernel.add(rings, kick));
    }

    fn activate(&mut self, features: u64) {
        self.taken = features;
        self.pairs.start(features);
        self.require_offloads(Offloads::of_driver(features));
        if let Some(kernel) = &mut self.kernel {
            kernel.activate(features);
            if features & bit::MQ == 0 {
                // The control queue may be another one than with the last driver.
                kernel.wake();
            }
        }
    }

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        if queue == self.control() {
            self.command(work)?;
        } else if self.kernel.is_none() {
            self.pairs.kicked(queue, work)?;
        }
        self.update_link(work);
        Ok(())
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        self.pairs.list_sources(list);
        list.extend(self.kernel.iter().flat_map(Kernel::sources));
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match &self.kernel {
            Some(kernel) if token >= FIRST_TOKEN => kernel.ready(token, work)?,
            _ => self.pairs.ready(token, work)?,
        }
        self.update_link(work);
        Ok(())
    }
}
