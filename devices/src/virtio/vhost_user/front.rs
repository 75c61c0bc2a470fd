//! The virtio device in front of a peer: what the driver does becomes requests, what the peer signals becomes interrupts.
//!
//! A peer that listens on a socket may go and come again: the queues stand still meanwhile, and each goes on from what its used
//! ring says is done. Requests that the peer had begun are begun again, each once where the peer keeps notes (INFLIGHT_SHMFD);
//! without them one that was finished out of turn may be done twice or be lost. A program that was started for the device does
//! not come again: the device needs a reset and does not survive it.

use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::peer::{GREETING, Origin, Peer, deadline, unfit};
use super::session::{Inflight, Region, Session};
use super::{Kind, PeerError};
use crate::catalog::{BuildError, Wiring};
use crate::device::{Interest, Source};
use crate::host::{Host, HostError};
use crate::virtio::remote::{Calls, Remote};
use crate::virtio::{DmaMemory, Rings, VirtioDevice, VirtioError, Work, feature};

/// How long a hart waits for a peer that stops its queues; from then on the driver waits.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a peer may take for that.
const STOPPING: Duration = Duration::from_secs(30);
/// How soon a lost peer is looked for, and how long it takes at most between two looks.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_secs(3);

const TOKEN_TIMER: u32 = 0;
const TOKEN_DAEMON: u32 = 1;
/// The queues' interrupts.
const TOKEN_CALL: u32 = 0x1_0000;
/// The connection: another token for each, since a descriptor's number may come again.
const TOKEN_PEER: u32 = 0x100_0000;

/// The device.
pub(super) struct Front {
    kind: Kind,
    features: u64,
    transport: u64,
    memory: Arc<dyn DmaMemory>,
    regions: Vec<Region>,
    calls: Calls,

    host: Arc<dyn Host>,
    /// Closed before the program behind it is ended: most end by themselves then.
    session: Option<Session>,
    origin: Origin,
    /// Connections so far.
    connections: u32,
    /// The peer has answered, and has the queues if there are any.
    is_ready: bool,
    /// A program that was started has ended.
    is_gone: bool,
    inflight: Option<Inflight>,
    timer: TimerFd,
    next_look: Duration,
    has_warned: bool,

    /// Features that the driver has taken, while the device runs.
    running: Option<u64>,
    queues: Vec<Remote>,
    /// The peer has been asked to stop queues, and may take until then.
    stopping: Option<Instant>,
}

impl Front {
    /// A device of this `kind` in front of `peer`.
    pub(super) fn create(kind: Kind, peer: Peer, wiring: &Wiring) -> Result<Self, BuildError> {
        let model = kind.model;
        let end = |source| BuildError::End { model, source };
        let host = |what| move |source| BuildError::Host { model, what, source };
        let shown = peer.shown();
        let Peer { origin, mut session } = peer;
        let regions = Region::all(wiring.memory.as_ref());
        if regions.is_empty() {
            let what = "Guest RAM is not shared memory, which another program needs";
            return Err(end(HostError::mistake(what)));
        }
        if session.notes_inflight() {
            let size = kind.sizes.iter().copied().max().unwrap_or(0);
            session
                .ask_for_inflight(kind.remote, size)
                .and_then(|()| session.complete(deadline(GREETING)))
                .map_err(|error| end(unfit(&shown, &error)))?;
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
            next_look: FIRST_LOOK,
            has_warned: false,
            running: None,
            queues: Vec::new(),
            stopping: None,
            kind,
        };
        new.take_config();
        Ok(new)
    }

    /// Takes the peer's configuration space; true where that is another than before.
    fn take_config(&mut self) -> bool {
        let Some(session) = self.session.as_ref().filter(|_| self.kind.asked > 0) else {
            return false;
        };
        let mut config = session.config().to_vec();
        (self.kind.adapt)(&mut config, self.kind.remote);
        mem::replace(&mut self.kind.config, config) != self.kind.config
    }

    /// Wakes the I/O thread, which then looks at what there is to watch.
    fn wake(&mut self, after: Duration) {
        // A valid timer and a valid time: the kernel has no reason to refuse.
        let _ = self.timer.reset(after, None);
    }

    /// The peer is lost: it is looked for again where it may come, else the device is broken.
    fn lose(&mut self, why: &PeerError) {
        if self.session.take().is_none() {
            return;
        }
        self.is_ready = false;
        // Whatever it did to memory is over, or is its own doing.
        self.stopping = None;
        let model = self.kind.model;
        match (&mut self.origin, mem::replace(&mut self.has_warned, true)) {
            (Origin::Socket(path), has_warned) => {
                let shown = path.display();
                let what = format!(
                    "{model}: {shown}: {why}: the device stands still until it is there again"
                );
                if has_warned { info!("{what}") } else { warn!("{what}") }
            }
            (Origin::Started(daemon), _) => {
                self.is_gone = true;
                daemon.attend();
                daemon.kill();
                let shown = daemon.name();
                warn!("{model}: {shown}: {why}: the device is lost until the machine restarts");
            }
        }
        let after = if self.is_gone { Duration::from_millis(1) } else { self.next_look };
        self.next_look = (self.next_look * 2).min(LAST_LOOK);
        self.wake(after);
    }

    /// Does something with the peer, and loses it where that fails.
    fn with_peer(&mut self, task: impl FnOnce(&mut Session) -> Result<(), PeerError>) {
        let Some(session) = self.session.as_mut().filter(|_| self.is_ready) else { return };
        match task(session) {
            Ok(()) if session.wants_write() => self.wake(Duration::from_millis(1)),
            Ok(()) => {}
            Err(error) => self.lose(&error),
        }
    }

    /// Hands all that the driver has set up to the peer. Rings are worked on from the start, or from where they are done.
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

    /// Has the peer stop queues and waits for that, not for long.
    fn stop(&mut self, queues: &[Remote]) {
        if queues.is_empty() {
            return;
        }
        let mut is_late = false;
        self.with_peer(|session| {
            for queue in queues {
                session.stop_queue(queue.rings.queue)?;
            }
            match session.complete(deadline(PATIENCE)) {
                Err(PeerError::Late) => is_late = true,
                other => other?,
            }
            Ok(())
        });
        if is_late && self.is_ready {
            self.stopping = Some(deadline(STOPPING));
            self.wake(STOPPING);
        }
    }

    /// Asks a peer whether it has stopped its queues; one that takes too long is given up.
    fn await_stop(&mut self) {
        let (Some(until), Some(session)) = (self.stopping, &self.session) else { return };
        let left = until.saturating_duration_since(Instant::now());
        if session.is_settled() {
            self.stopping = None;
        } else if left.is_zero() {
            self.lose(&PeerError::Late);
        } else {
            self.wake(left);
        }
    }

    /// Looks for a peer that is gone, and gives up one that says nothing.
    fn look(&mut self) {
        match (&self.origin, self.session.is_some(), self.is_ready) {
            (_, true, true) => {
                self.with_peer(Session::process);
                self.await_stop();
            }
            (_, true, false) => self.lose(&PeerError::Late),
            (Origin::Socket(path), false, _) => {
                let stream = self.host.connect(path).map_err(PeerError::Socket);
                match stream.and_then(|stream| Session::begin(stream, self.kind.asked)) {
                    Ok(session) => {
                        self.session = Some(session);
                        self.connections = self.connections.wrapping_add(1);
                        self.wake(GREETING);
                    }
                    Err(_) => {
                        self.next_look = (self.next_look * 2).min(LAST_LOOK);
                        self.wake(self.next_look);
                    }
                }
            }
            (Origin::Started(_), false, _) => {}
        }
    }

    /// The peer has said something, or takes requests again.
    fn hear(&mut self, work: &mut Work<'_>) {
        let Some(session) = &mut self.session else { return };
        if let Err(error) = session.process() {
            return self.lose(&error);
        }
        if self.is_ready {
            return self.await_stop();
        }
        if !session.is_settled() {
            return;
        }
        let features = self.features & !self.kind.own | self.transport & !feature::RING_RESET;
        let queues = if self.kind.asked > 0 { self.kind.remote } else { 1 };
        let is_fit = session.features() & features == features
            && session.config().len() >= self.kind.asked
            && session.queue_count() >= queues;
        if !is_fit {
            return self.lose(&PeerError::Unfit("it is another device than before"));
        }
        let _ = self.timer.clear();
        self.is_ready = true;
        self.next_look = FIRST_LOOK;
        info!("{}: its peer is there again", self.kind.model);
        if self.take_config() {
            work.config_changed();
        }
        self.start_all(false);
    }
}

impl VirtioDevice for Front {
    fn name(&self) -> &'static str {
        self.kind.model
    }

    fn id(&self) -> u32 {
        self.kind.id
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.kind.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn transport_features(&self) -> u64 {
        self.transport
    }

    fn is_remote(&self, queue: u16, _features: u64) -> bool {
        queue < self.kind.remote
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
        // Of a queue that the device does not use.
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16) {
        let (stopped, kept) =
            mem::take(&mut self.queues).into_iter().partition(|q| q.rings.queue == queue);
        self.queues = kept;
        self.stop(&stopped);
    }

    fn reset(&mut self) {
        let queues = mem::take(&mut self.queues);
        self.running = None;
        self.stop(&queues);
    }

    fn is_settled(&self) -> bool {
        self.stopping.is_none()
    }

    fn sources(&self) -> Vec<Source> {
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        let mut sources = vec![read(self.timer.as_raw_fd(), TOKEN_TIMER)];
        sources.extend(self.calls.sources());
        if let Origin::Started(daemon) = &self.origin {
            sources.extend(daemon.messages().map(|fd| read(fd, TOKEN_DAEMON)));
        }
        if let Some(session) = &self.session {
            let token = TOKEN_PEER | self.connections & (TOKEN_PEER - 1);
            let interest = if session.wants_write() { Interest::ReadWrite } else { Interest::Read };
            sources.push(Source { fd: session.raw_fd(), token, interest });
        }
        sources
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_TIMER => {
                // Setting the timer takes back its expiry, so a stale event cannot block.
                let _ = self.timer.clear();
                self.look();
            }
            TOKEN_DAEMON => {
                if let Origin::Started(daemon) = &mut self.origin {
                    daemon.attend();
                }
            }
            TOKEN_PEER.. => self.hear(work),
            call => self.calls.ready(call, work),
        }
        if self.is_gone && self.running.is_some() { Err(VirtioError::Gone) } else { Ok(()) }
    }
}
