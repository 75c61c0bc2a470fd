//! The queue pairs of a network device (virtio 1.3, sections 5.1.2 and 5.1.6.5.6): each has its own queue of the backend, and the
//! driver sets how many of them it uses, the first ones.
//!
//! The backend chooses the queue that a frame arrives in. Limits are those of the device, over all pairs.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::backend::NetBackend;
use super::counters::Counters;
use super::header::Offloads;
use super::port::Port;
use super::receive::{Receiver, ReceiverState};
use super::settings::{Mtu, NetConfig};
use super::transmit::{Transmitter, TransmitterState};
use crate::device::{Interest, Source};
use crate::lifecycle::RestoreError;
use crate::virtio::bucket::LimiterState;
use crate::virtio::{Limiter, VirtioError, Work};

const TOKEN_NETWORK: u32 = 0;
const TOKEN_RX_LIMIT: u32 = 1;
const TOKEN_TX_LIMIT: u32 = 2;
const TOKEN_LINK: u32 = 3;
/// The second pair's token; those of further pairs follow.
const TOKEN_FURTHER: u32 = 4;

/// All queue pairs of a device.
pub(super) struct Pairs {
    all: Vec<Pair>,
    rx_limit: Limiter,
    tx_limit: Limiter,
    counters: Arc<Counters>,
    /// Last known link state of the network's side.
    is_up: bool,
}

/// The state of all pairs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PairsState {
    /// The number of pairs that the driver uses.
    in_use: u16,
    all: Vec<PairState>,
    rx_limit: LimiterState,
    tx_limit: LimiterState,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PairState {
    rx: ReceiverState,
    tx: TransmitterState,
}

struct Pair {
    port: Port,
    rx: Receiver,
    tx: Transmitter,
}

impl Pairs {
    /// Creates a pair for each of `backends`; only the first is in use.
    ///
    /// # Errors
    /// The host has no timers left.
    pub(super) fn new(
        backends: Vec<Box<dyn NetBackend>>,
        config: &NetConfig,
        mac: [u8; 6],
    ) -> io::Result<Self> {
        let counters = Arc::default();
        let pair = |(number, backend): (u16, Box<dyn NetBackend>)| Pair {
            port: Port::new(backend, &counters),
            rx: Receiver::new(2 * number, config.mtu.map(Mtu::get)),
            tx: Transmitter::new(2 * number + 1, config.pin.then_some(mac)),
        };
        let all = (0..).zip(backends).map(pair).collect();
        let (rx_limit, tx_limit) = (config.rx_limiter()?, config.tx_limiter()?);
        let mut pairs = Self { all, rx_limit, tx_limit, counters, is_up: true };
        pairs.use_first(1);
        pairs.read_link();
        Ok(pairs)
    }

    /// Sets the source address of the guest's frames, where it is checked.
    pub(super) fn set_mac(&mut self, mac: [u8; 6]) {
        self.all.iter_mut().for_each(|pair| pair.tx.set_mac(mac));
    }

    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.all.len()).unwrap_or(u16::MAX)
    }

    pub(super) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// True if the network is gone for good.
    pub(super) fn is_gone(&self) -> bool {
        // All queues belong to one network: if one is gone for good, all are.
        self.all.iter().any(|pair| pair.port.is_gone)
    }

    /// Connects the pairs to new backends, of which the first is in use.
    pub(super) fn connect(&mut self, backends: Vec<Box<dyn NetBackend>>) {
        for (pair, backend) in self.all.iter_mut().zip(backends) {
            pair.port.connect(backend);
        }
        self.use_first(1);
        self.read_link();
    }

    /// True if the backend is there and its link is up.
    pub(super) fn is_link_up(&self) -> bool {
        self.is_up && !self.is_gone()
    }

    fn read_link(&mut self) {
        self.is_up = self.all.first_mut().is_none_or(|first| first.port.is_link_up());
    }

    /// Sets the number of pairs in use; false, with nothing changed, if there are fewer or the host refuses.
    pub(super) fn use_first(&mut self, count: u16) -> bool {
        if !(1..=self.count()).contains(&count) {
            return false;
        }
        let before = self.all.iter().filter(|pair| pair.port.is_in_use).count();
        let set = |pairs: &mut [Pair], count: usize| {
            let mut numbered = pairs.iter_mut().enumerate();
            numbered.all(|(number, pair)| pair.port.set_in_use(number < count))
        };
        let is_done = set(&mut self.all, count.into());
        if !is_done {
            set(&mut self.all, before);
        }
        is_done
    }

    pub(super) fn start(&mut self, features: u64) {
        for Pair { rx, tx, .. } in &mut self.all {
            rx.start(features);
            tx.start(features);
        }
    }

    /// Sets the offloads of frames to the driver; false, with nothing changed, if the host refuses.
    pub(super) fn set_offloads(&mut self, offloads: Offloads) -> bool {
        // Offloads belong to the network; setting them on one queue is enough.
        let Some(first) = self.all.first_mut() else { return false };
        let is_done = first.port.set_offloads(offloads) == offloads || first.port.is_gone;
        if is_done {
            self.take_only(offloads);
        }
        is_done
    }

    /// Drops frames that need other offloads from now on.
    pub(super) fn take_only(&mut self, offloads: Offloads) {
        self.all.iter_mut().for_each(|pair| pair.rx.offloads = offloads);
    }

    pub(super) fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let Some(Pair { port, rx, tx }) = self.all.get_mut(usize::from(queue / 2)) else {
            return Ok(());
        };
        if queue.is_multiple_of(2) {
            rx.kicked();
            rx.pass(&mut self.rx_limit, port, work)
        } else {
            tx.pass(&mut self.tx_limit, port, work)
        }
    }

    pub(super) fn transmit_all(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let limit = &mut self.tx_limit;
        self.all.iter_mut().try_for_each(|pair| pair.tx.pass(limit, &mut pair.port, work))
    }

    fn receive_all(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let limit = &mut self.rx_limit;
        self.all.iter_mut().try_for_each(|pair| pair.rx.pass(limit, &mut pair.port, work))
    }

    pub(super) fn reset_queue(&mut self, queue: u16) {
        let Some(pair) = self.all.get_mut(usize::from(queue / 2)) else { return };
        if queue.is_multiple_of(2) { pair.rx.await_kick() } else { pair.tx.stop() }
    }

    pub(super) fn reset(&mut self) {
        for Pair { rx, tx, .. } in &mut self.all {
            rx.stop();
            tx.stop();
        }
        // Frames queued in the backend are dropped if the next driver does not accept them.
        if let Some(first) = self.all.first_mut() {
            first.port.set_offloads(Offloads::default());
        }
        self.use_first(1);
    }

    /// Offloads that the driver accepts now.
    pub(super) fn offloads(&self) -> Offloads {
        self.all.first().map_or(Offloads::default(), |first| first.rx.offloads)
    }

    pub(super) fn save(&self) -> PairsState {
        // Counters belong to the process, and the link's state to the backend.
        let Self { all, rx_limit, tx_limit, counters: _, is_up: _ } = self;
        let in_use = all.iter().filter(|pair| pair.port.is_in_use).count();
        let pair = |Pair { port: _, rx, tx }: &Pair| PairState { rx: rx.save(), tx: tx.save() };
        PairsState {
            in_use: u16::try_from(in_use).unwrap_or(u16::MAX),
            all: all.iter().map(pair).collect(),
            rx_limit: rx_limit.save(),
            tx_limit: tx_limit.save(),
        }
    }

    /// Takes over a state, but for the backend's offloads; 0 for `features` if there was no driver.
    pub(super) fn restore(
        &mut self,
        state: &PairsState,
        features: u64,
    ) -> Result<(), RestoreError> {
        let PairsState { in_use, all, rx_limit, tx_limit } = state;
        if all.len() != self.all.len() {
            return Err(RestoreError::invalid("the number of queue pairs"));
        }
        self.start(features);
        for (Pair { rx, tx, port: _ }, saved) in self.all.iter_mut().zip(all) {
            rx.restore(&saved.rx);
            tx.restore(&saved.tx);
        }
        self.rx_limit.restore(*rx_limit)?;
        self.tx_limit.restore(*tx_limit)?;
        if !self.use_first(*in_use) {
            return Err(RestoreError("its network does not provide the queues in use".into()));
        }
        Ok(())
    }

    pub(super) fn list_sources(&self, list: &mut Vec<Source>) {
        let limit = |fd, token| Source { fd, token, interest: Interest::Read };
        list.extend([
            limit(self.rx_limit.fd(), TOKEN_RX_LIMIT),
            limit(self.tx_limit.fd(), TOKEN_TX_LIMIT),
        ]);
        let link = self.all.first().and_then(|first| first.port.link_fd());
        list.extend(link.map(|fd| limit(fd, TOKEN_LINK)));
        let tokens = std::iter::once(TOKEN_NETWORK).chain(TOKEN_FURTHER..);
        for (token, Pair { port, rx, tx }) in tokens.zip(&self.all) {
            let interest = Interest::of(rx.can_take(&self.rx_limit), tx.is_blocked);
            if let (Some(interest), true) = (interest, port.can_move()) {
                list.push(Source { fd: port.fd(), token, interest });
            }
        }
    }

    pub(super) fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let number = match token {
            TOKEN_RX_LIMIT => {
                self.rx_limit.expired();
                return self.receive_all(work);
            }
            TOKEN_TX_LIMIT => {
                self.tx_limit.expired();
                return self.transmit_all(work);
            }
            TOKEN_LINK => {
                self.read_link();
                return Ok(());
            }
            TOKEN_NETWORK => 0,
            further => (further - TOKEN_FURTHER + 1) as usize,
        };
        let Some(Pair { port, rx, tx }) = self.all.get_mut(number) else { return Ok(()) };
        tx.is_blocked = false;
        rx.pass(&mut self.rx_limit, port, work)?;
        tx.pass(&mut self.tx_limit, port, work)
    }
}
