//! All streams of a vsock device: who they are, whose turn it is, and which of them have to go.
//!
//! Whatever a guest or a program of the host does, there are at most [`MAX_STREAMS`] of them, one list entry for each, and
//! [`MAX_REPLIES`] answers to packets of none: the device takes no further packets of a guest that does not take those.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use vmm_sys_util::timerfd::TimerFd;

use super::caller::{Caller, Heard};
use super::connection::{Connection, Fate};
use super::packet::{Header, STREAM, op};
use crate::device::{Interest, Source};
use crate::host::{Host, Listener};

/// Streams at most, with the callers that are to become some.
pub(super) const MAX_STREAMS: usize = 1023;

/// Answers that wait for buffers of the guest, from which on no packet of its is taken.
pub(super) const MAX_REPLIES: usize = 256;

/// How long nobody is let in after the host could not let anybody in.
const RECOVERY: Duration = Duration::from_secs(1);

/// Ports of the host's end of streams that the host asks for begin here, as Firecracker's do.
const FIRST_PORT: u32 = 1 << 30;

const TOKEN_TIMER: u32 = 0;
const TOKEN_LISTENER: u32 = 1;
/// Tokens of streams and callers: each gets its own, so that an event of a closed one is nobody else's.
const FIRST_TOKEN: u32 = 16;
const LAST_TOKEN: u32 = crate::virtio::mmio::KICK - 1;

/// The streams of a device.
pub(super) struct Streams {
    guest_cid: u64,
    path: PathBuf,
    host: Arc<dyn Host>,
    listener: Box<dyn Listener>,
    timer: TimerFd,
    armed: Option<Instant>,
    /// How long a caller may take to say where it wants to, the guest to answer, and a socket to take the rest of a stream.
    patience: Duration,
    /// The guest has a driver.
    pub(super) is_active: bool,
    /// Nobody is let in before.
    deaf_until: Option<Instant>,
    connections: BTreeMap<u32, Connection>,
    /// Tokens, by the ports of host and guest.
    by_ports: HashMap<(u32, u32), u32>,
    callers: BTreeMap<u32, Caller>,
    /// Those that have a packet for the guest, in the order of their turns.
    listed: VecDeque<u32>,
    replies: VecDeque<Header>,
    next_token: u32,
    next_port: u32,
    warned: Warned,
}

/// What a user asks for.
pub(super) struct Wanted {
    pub(super) guest_cid: u64,
    pub(super) path: PathBuf,
    pub(super) patience: Duration,
}

/// What has been said once.
#[derive(Debug, Default)]
struct Warned {
    full: bool,
    deaf: bool,
    nobody: bool,
}

impl Streams {
    pub(super) fn new(
        wanted: Wanted,
        host: Arc<dyn Host>,
        listener: Box<dyn Listener>,
        timer: TimerFd,
    ) -> Self {
        let Wanted { guest_cid, path, patience } = wanted;
        Self {
            guest_cid,
            path,
            host,
            listener,
            timer,
            patience,
            armed: None,
            is_active: false,
            deaf_until: None,
            connections: BTreeMap::new(),
            by_ports: HashMap::new(),
            callers: BTreeMap::new(),
            listed: VecDeque::new(),
            replies: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_PORT,
            warned: Warned::default(),
        }
    }

    /// Ends all streams, without a word to the guest. Called by harts: the timer has the I/O thread look at what is left to watch.
    pub(super) fn reset(&mut self) {
        self.is_active = false;
        self.connections.clear();
        self.by_ports.clear();
        self.callers.clear();
        self.listed.clear();
        self.replies.clear();
        let is_set = self.timer.reset(Duration::from_millis(1), None).is_ok();
        self.armed = is_set.then(Instant::now);
    }

    /// What to watch. Callers wait outside until the guest has a driver and there is room.
    pub(super) fn sources(&self) -> Vec<Source> {
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        let mut sources = vec![read(self.timer.as_raw_fd(), TOKEN_TIMER)];
        if self.is_active && self.has_room() && self.deaf_until.is_none() {
            sources.push(read(self.listener.as_raw_fd(), TOKEN_LISTENER));
        }
        sources.extend(self.callers.iter().map(|(token, caller)| caller.source(*token)));
        sources.extend(self.connections.iter().filter_map(|(token, c)| c.source(*token)));
        sources
    }

    /// A source may be ready.
    pub(super) fn ready(&mut self, token: u32, now: Instant) {
        match token {
            TOKEN_TIMER => self.expire(now),
            TOKEN_LISTENER => self.accept(now),
            _ if self.callers.contains_key(&token) => self.hear(token, now),
            _ => {
                let fate = self.connections.get_mut(&token).map(|c| c.ready(now));
                self.settle(token, fate.unwrap_or(Fate::GoesOn));
            }
        }
    }

    /// Whether another packet of the guest may be taken.
    pub(super) fn takes_packets(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// Whether there is something for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.listed.is_empty()
    }

    /// A packet of the guest's, with what is behind its header; its addresses are right.
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8], now: Instant) {
        let ports = (header.dst_port, header.src_port);
        let token = self.by_ports.get(&ports).copied().filter(|_| header.kind == STREAM);
        if let Some((token, connection)) =
            token.and_then(|token| Some((token, self.connections.get_mut(&token)?)))
        {
            let fate = connection.receive(header, payload, now);
            self.settle(token, fate);
        } else if header.kind == STREAM && header.op == op::REQUEST {
            self.connect(header);
        } else if header.op != op::RST {
            self.replies.push_back(header.refusal());
        }
    }

    /// The next packet for the guest; its payload is in the front of `room` (at least 1 byte).
    pub(super) fn next_packet(&mut self, room: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(token) = self.listed.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.is_listed = false;
            let packet = connection.next_packet(room, now);
            let (buf_alloc, fwd_cnt) = packet.map_or((0, 0), |_| connection.own_credit());
            let address = connection.address(self.guest_cid);
            self.settle(token, Fate::GoesOn);
            if let Some(super::connection::Packet { op, flags, len }) = packet {
                return Some(Header { op, flags, len, buf_alloc, fwd_cnt, ..address });
            }
        }
        None
    }

    /// Sets the timer to the next deadline. To be called at the end of every pass.
    pub(super) fn set_timer(&mut self, now: Instant) {
        let streams = self.connections.values().filter_map(|connection| connection.deadline);
        let callers = self.callers.values().map(|caller| caller.deadline);
        let next = streams.chain(callers).chain(self.deaf_until).min();
        if next == self.armed {
            return;
        }
        // Setting the timer takes back its expiry, so it need not be read.
        self.armed = match next {
            None => self.timer.clear().map(|()| None).unwrap_or(self.armed),
            Some(next) => {
                let wait = next.saturating_duration_since(now).max(Duration::from_millis(1));
                self.timer.reset(wait, None).is_ok().then_some(next)
            }
        };
    }

    fn has_room(&self) -> bool {
        self.connections.len() + self.callers.len() < MAX_STREAMS
    }

    fn new_token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = if token == LAST_TOKEN { FIRST_TOKEN } else { token + 1 };
            if !self.connections.contains_key(&token) && !self.callers.contains_key(&token) {
                return token;
            }
        }
    }

    fn insert(&mut self, connection: Connection) {
        let token = self.new_token();
        self.by_ports.insert((connection.host_port, connection.guest_port), token);
        self.connections.insert(token, connection);
        self.settle(token, Fate::GoesOn);
    }

    /// Draws the consequences of what has happened to a stream.
    fn settle(&mut self, token: u32, fate: Fate) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if fate == Fate::GoesOn {
            if connection.has_packet() && !std::mem::replace(&mut connection.is_listed, true) {
                self.listed.push_back(token);
            }
            return;
        }
        if fate == Fate::Over && connection.is_known() {
            let address = connection.address(self.guest_cid);
            self.replies.push_back(Header { op: op::RST, ..address });
        }
        if connection.is_listed {
            self.listed.retain(|listed| *listed != token);
        }
        self.by_ports.remove(&(connection.host_port, connection.guest_port));
        self.connections.remove(&token);
    }

    /// The guest asks for a stream to the program that listens on `<path>_<port>`.
    fn connect(&mut self, request: &Header) {
        if !self.has_room() {
            if !std::mem::replace(&mut self.warned.full, true) {
                warn!("vsock: the guest has {MAX_STREAMS} streams and gets no more");
            }
            self.replies.push_back(request.refusal());
            return;
        }
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", request.dst_port));
        match self.host.connect(path.as_ref()) {
            Ok(stream) => self.insert(Connection::accepted(stream, request, self.patience)),
            Err(error) => {
                if !std::mem::replace(&mut self.warned.nobody, true) {
                    info!("vsock: the guest cannot reach {}: {error}", path.display());
                }
                self.replies.push_back(request.refusal());
            }
        }
    }

    /// Lets one caller in.
    fn accept(&mut self, now: Instant) {
        if !self.is_active || !self.has_room() || self.deaf_until.is_some() {
            return;
        }
        match self.listener.accept() {
            Ok(stream) => {
                let token = self.new_token();
                self.callers.insert(token, Caller::new(stream, now + self.patience));
                self.hear(token, now);
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                // It would be refused again at once.
                if !std::mem::replace(&mut self.warned.deaf, true) {
                    warn!("vsock: cannot let a program in at {}: {error}", self.path.display());
                }
                self.deaf_until = Some(now + RECOVERY);
            }
        }
    }

    fn hear(&mut self, token: u32, now: Instant) {
        let Some(caller) = self.callers.get_mut(&token) else { return };
        let heard = caller.listen();
        if heard == Heard::More {
            return;
        }
        let Some(Caller { stream, .. }) = self.callers.remove(&token) else { return };
        if let Heard::Port(port) = heard {
            self.ask(stream, port, now);
        }
    }

    /// Asks the guest for a stream to its port.
    fn ask(&mut self, stream: UnixStream, guest_port: u32, now: Instant) {
        let host_port = loop {
            let port = self.next_port;
            self.next_port = FIRST_PORT | port.wrapping_add(1) & (FIRST_PORT - 1);
            if !self.by_ports.contains_key(&(port, guest_port)) {
                break port;
            }
        };
        self.insert(Connection::asking(stream, host_port, guest_port, now, self.patience));
    }

    fn expire(&mut self, now: Instant) {
        self.armed = None;
        // Takes back the expiry, where no deadline is left.
        let _ = self.timer.clear();
        self.deaf_until = self.deaf_until.filter(|until| *until > now);
        self.callers.retain(|_, caller| caller.deadline > now);
        let is_due = |c: &Connection| c.deadline.is_some_and(|deadline| deadline <= now);
        let due: Vec<u32> =
            self.connections.iter().filter(|(_, c)| is_due(c)).map(|(token, _)| *token).collect();
        for token in due {
            let fate = self.connections.get_mut(&token).map(|c| c.expired(now));
            self.settle(token, fate.unwrap_or(Fate::GoesOn));
        }
    }
}
