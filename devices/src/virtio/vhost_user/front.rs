//! The virtio device in front of a peer: turns the driver's actions into requests, and the peer's signals into interrupts.
//!
//! A peer that listens on a socket may disconnect and is reconnected to: the queues stop meanwhile, and each continues at the index
//! of its used ring. Requests that the peer had begun are begun again, each once if the peer tracks them (INFLIGHT_SHMFD);
//! otherwise one that was completed out of order may be done twice or be lost. A program that was started for the device is not
//! started again: the device needs a reset and does not work after it.

use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::peer::{HANDSHAKE_TIMEOUT, Origin, Peer, deadline, unsuitable};
use super::session::{Inflight, Region, Session};
use super::{PeerError, PeerKind};
use crate::catalog::{BuildError, Wiring};
use crate::device::{Interest, Source};
use crate::host::{Host, HostError};
use crate::virtio::remote::{Calls, Remote};
use crate::virtio::{
    DeviceType, DmaMemory, RemoteQueues, Rings, VirtioDevice, VirtioError, Work, feature,
};

mod lifecycle;

/// Time for which a hart waits for a peer that stops its queues; after that the driver waits.
const HART_WAIT: Duration = Duration::from_secs(1);
/// Time-out for a peer to stop its queues.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Back-off between attempts to reconnect: the first delay, and the longest.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(3);

const TOKEN_TIMER: u32 = 0;
const TOKEN_DAEMON: u32 = 1;
/// The queues' interrupts.
const TOKEN_CALL: u32 = 0x1_0000;
/// The connection: a new token for each, since a descriptor's number may be reused.
const TOKEN_PEER: u32 = 0x100_0000;

/// The device.
pub(super) struct Front {
    kind: PeerKind,
    features: u64,
    transport: u64,
    memory: Arc<dyn DmaMemory>,
    regions: Vec<Region>,
    calls: Calls,

    host: Arc<dyn Host>,
    /// Closed before the program behind it is killed: most exit by themselves then.
    session: Option<Session>,
    origin: Origin,
    /// Number of connections so far.
    connections: u32,
    /// The handshake is complete, and the queues, if any, are started.
    is_ready: bool,
    /// The started program has ended.
    is_gone: bool,
    inflight: Option<Inflight>,
    timer: TimerFd,
    next_delay: Duration,
    has_warned: bool,

    /// Negotiated features, while the device runs.
    running: Option<u64>,
    queues: Vec<Remote>,
    /// Deadline for a peer that has been asked to stop queues.
    stopping: Option<Instant>,
    /// The peer has stopped all queues until the device is resumed.
    is_paused: bool,
}

impl Front {
    /// Creates a device of this `kind` in front of `peer`.
    pub(super) fn create(kind: PeerKind, peer: Peer, wiring: &Wiring) -> Result<Self, BuildError> {
        let model = kind.model;
        let end = |source| BuildError::Backend { model, source };
        let host = |what| move |source| BuildError::Host { model, what, source };
        let shown = peer.shown();
        let Peer { origin, mut session } = peer;
        let regions = Region::all(wiring.memory.as_ref());
        if regions.is_empty() {
            let what = "Guest RAM is not shared memory, which vhost-user needs";
            return Err(end(HostError::invalid(what)));
        }
        if session.tracks_inflight() {
            let size = kind.sizes.iter().copied().max().unwrap_or(0);
            session
                .ask_for_inflight(kind.remote, size)
                .and_then(|()| session.complete(deadline(HANDSHAKE_TIMEOUT)))
                .map_err(|error| end(unsuitable(&shown, &error)))?;
        }
        let calls = Calls::new(kind.remote, TOKEN_CALL);
        let timer = TimerFd::new().map_err(|error| host("timer")(error.into()))?;
        let mut new = Self {
            features: session.features() & kind.features | kind.own,
            transport: session.transport(),
            memory: Arc::clone(&wiring.memory),
            regions,
            calls: calls.map_err(host("event descriptors"))?,
            host: Arc::clone(&wiring.host),
            origin,
            inflight: session.take_inflight(),
            session: Some(session),
            connections: 0,
            is_ready: true,
            is_gone: false,
            timer,
            next_delay: FIRST_DELAY,
            has_warned: false,
            running: None,
            queues: Vec::new(),
            stopping: None,
            is_paused: false,
            kind,
        };
        new.take_config();
        Ok(new)
    }

    /// Takes the peer's configuration space; true if it has changed.
    fn take_config(&mut self) -> bool {
        let Some(session) = self.session.as_ref().filter(|_| self.kind.asked > 0) else {
            return false;
        };
        let mut config = session.config().to_vec();
        (self.kind.adapt)(&mut config, self.kind.remote);
        mem::replace(&mut self.kind.config, config) != self.kind.config
    }

    /// Wakes the I/O thread after this time; it also updates its sources then.
    fn wake(&mut self, after: Duration) {
        // A valid timer and a valid time: the kernel has no reason to refuse.
        let _ = self.timer.reset(after, None);
    }

    /// Drops the connection: reconnects later to a socket; after the end of a started program the device is gone.
    fn disconnect(&mut self, why: &PeerError) {
        if self.session.take().is_none() {
            return;
        }
        self.is_ready = false;
        // The peer has ended, or may harm only its own device.
        self.stopping = None;
        let model = self.kind.model;
        match (&mut self.origin, mem::replace(&mut self.has_warned, true)) {
            (Origin::Socket(path), has_warned) => {
                let shown = path.display();
                let what = format!(
                    "{model}: {shown}: {why}: the device stops until rvmm can connect again"
                );
                if has_warned { info!("{what}") } else { warn!("{what}") }
            }
            (Origin::Started(daemon, _), _) => {
                self.is_gone = true;
                daemon.forward_output();
                daemon.kill();
                let shown = daemon.name();
                warn!("{model}: {shown}: {why}: the device is lost until the machine restarts");
            }
        }
        let after = if self.is_gone { Duration::from_millis(1) } else { self.next_delay };
        self.next_delay = (self.next_delay * 2).min(MAX_DELAY);
        self.wake(after);
    }

    /// Runs `task` with the peer, and disconnects it on an error.
    fn with_peer(&mut self, task: impl FnOnce(&mut Session) -> Result<(), PeerError>) {
        let Some(session) = self.session.as_mut().filter(|_| self.is_ready) else { return };
        match task(session) {
            Ok(()) if session.wants_write() => self.wake(Duration::from_millis(1)),
            Ok(()) => {}
            Err(error) => self.disconnect(&error),
        }
    }

    /// Sends the driver's whole setup to the peer. Rings begin at 0 if `is_new`, else at the index of their used ring.
    fn start_all(&mut self, is_new: bool) {
        let Some(features) = self.running else { return };
        let features = features & !self.kind.own;
        let inflight = self.inflight.clone();
        if let (Some(inflight), true) = (&inflight, is_new) {
            inflight.clear();
        }
        let (regions, queues) = (self.regions.clone(), mem::take(&mut self.queues));
        let memory = Arc::clone(&self.memory);
        self.with_peer(|session| {
            session.start(features, &regions, inflight.as_ref())?;
            for queue in &queues {
                let base = if is_new { 0 } else { queue.used_index(memory.as_ref()) };
                session.start_queue(queue, base)?;
            }
            Ok(())
        });
        self.queues = queues;
    }

    /// Has the peer stop queues, and waits at most [`HART_WAIT`] for that.
    fn stop(&mut self, queues: &[Remote]) {
        if !queues.is_empty() && !self.stop_within(queues, HART_WAIT) {
            self.stopping = Some(deadline(STOP_TIMEOUT));
            self.wake(STOP_TIMEOUT);
        }
    }

    /// Has the peer stop queues, and waits for that and for its other replies, for `limit` at most. False if it is still working.
    fn stop_within(&mut self, queues: &[Remote], limit: Duration) -> bool {
        let mut is_late = false;
        self.with_peer(|session| {
            for queue in queues {
                session.stop_queue(queue.rings.queue)?;
            }
            match session.complete(deadline(limit)) {
                Err(PeerError::Timeout) => is_late = true,
                other => other?,
            }
            Ok(())
        });
        !(is_late && self.is_ready)
    }

    /// Checks if the peer has stopped its queues; disconnects it at the deadline.
    fn await_stop(&mut self) {
        let (Some(until), Some(session)) = (self.stopping, &self.session) else { return };
        let left = until.saturating_duration_since(Instant::now());
        if session.is_quiescent() {
            self.stopping = None;
        } else if left.is_zero() {
            self.disconnect(&PeerError::Timeout);
        } else {
            self.wake(left);
        }
    }

    /// Takes an expiry of the timer: reconnects to a peer, or disconnects one that does not complete the handshake.
    fn timer_expired(&mut self) {
        match (&self.origin, self.session.is_some(), self.is_ready) {
            (_, true, true) => {
                self.with_peer(Session::process);
                self.await_stop();
            }
            (_, true, false) => self.disconnect(&PeerError::Timeout),
            (Origin::Socket(path), false, _) => {
                let stream = self.host.connect(path).map_err(PeerError::Socket);
                match stream.and_then(|stream| Session::begin(stream, self.kind.asked)) {
                    Ok(session) => {
                        self.session = Some(session);
                        self.connections = self.connections.wrapping_add(1);
                        self.wake(HANDSHAKE_TIMEOUT);
                    }
                    Err(_) => {
                        self.next_delay = (self.next_delay * 2).min(MAX_DELAY);
                        self.wake(self.next_delay);
                    }
                }
            }
            (Origin::Started(..), false, _) => {}
        }
    }

    /// True if the peer has everything that the driver was offered.
    fn suits(&self) -> bool {
        let features = self.features & !self.kind.own | self.transport & !feature::RING_RESET;
        let queues = if self.kind.asked > 0 { self.kind.remote } else { 1 };
        self.session.as_ref().is_some_and(|session| {
            session.features() & features == features
                && session.config().len() >= self.kind.asked
                && session.queue_count() >= queues
        })
    }

    /// Takes an event of the connection: it is readable or writable.
    fn process(&mut self, work: &mut Work<'_>) {
        let Some(session) = &mut self.session else { return };
        if let Err(error) = session.process() {
            return self.disconnect(&error);
        }
        if self.is_ready {
            return self.await_stop();
        }
        if !session.is_quiescent() {
            return;
        }
        if !self.suits() {
            return self.disconnect(&PeerError::Unsuitable("it is another device than before"));
        }
        let _ = self.timer.clear();
        self.is_ready = true;
        self.next_delay = FIRST_DELAY;
        info!("{}: reconnected to its peer", self.kind.model);
        if self.take_config() {
            work.config_changed();
        }
        self.start_all(false);
    }
}

impl VirtioDevice for Front {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            transport_features: self.transport,
            remote: RemoteQueues::First(self.kind.remote),
            ..DeviceType::new(self.kind.model, self.kind.id, &self.kind.sizes, self.features)
        }
    }

    fn config(&self) -> &[u8] {
        &self.kind.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn start_remote(&mut self, rings: Rings, kick: &EventFd) {
        let Some(queue) = self.calls.queue(rings, kick) else { return };
        if self.running.is_some() {
            self.with_peer(|session| session.start_queue(&queue, 0));
        }
        self.queues.push(queue);
    }

    fn activate(&mut self, features: u64) {
        self.running = Some(features);
        self.start_all(true);
        if self.is_gone {
            self.wake(Duration::from_millis(1));
        }
    }

    fn kicked(&mut self, _queue: u16, _work: &mut Work<'_>) -> Result<(), VirtioError> {
        // A queue that the device does not use.
        Ok(())
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        list.push(read(self.timer.as_raw_fd(), TOKEN_TIMER));
        list.extend(self.calls.sources());
        if let Origin::Started(daemon, _) = &self.origin {
            list.extend(daemon.messages().map(|fd| read(fd, TOKEN_DAEMON)));
        }
        if let Some(session) = &self.session {
            let token = TOKEN_PEER | self.connections & (TOKEN_PEER - 1);
            let interest = if session.wants_write() { Interest::ReadWrite } else { Interest::Read };
            list.push(Source { fd: session.raw_fd(), token, interest });
        }
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_TIMER => {
                // Clearing the timer also clears its expiry, so a stale event does not block.
                let _ = self.timer.clear();
                self.timer_expired();
            }
            TOKEN_DAEMON => {
                if let Origin::Started(daemon, _) = &mut self.origin {
                    daemon.forward_output();
                }
            }
            TOKEN_PEER.. => self.process(work),
            call => self.calls.ready(call, work),
        }
        if self.is_gone && self.running.is_some() { Err(VirtioError::BackendGone) } else { Ok(()) }
    }
}
