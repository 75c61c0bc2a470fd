//! All streams of a vsock device: their ports, their order, and their deadlines.
//!
//! Whatever a guest or a program of the host does, there are at most [`MAX_STREAMS`] of them, one list entry for each, and
//! [`MAX_REPLIES`] replies to packets outside any stream: the device takes no packets of a guest that does not accept those.

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

use super::client::{HostClient, RequestLine};
use super::connection::{Connection, Outcome};
use super::packet::{PacketHeader, STREAM, op};
use crate::device::{Interest, Source};
use crate::host::{Host, Listener};

/// Maximum number of streams, including clients that have not sent their line yet.
pub(super) const MAX_STREAMS: usize = 1023;

/// Number of replies waiting for buffers of the guest from which on its packets are not taken.
pub(super) const MAX_REPLIES: usize = 256;

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The first port of the host's end of streams that the host requests, as in Firecracker.
const FIRST_PORT: u32 = 1 << 30;

const TOKEN_TIMER: u32 = 0;
const TOKEN_LISTENER: u32 = 1;
/// Tokens of streams and clients: allocated in turn, so that a stale event of a closed one reaches no other.
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
    /// Time limit for a client's line, for the guest's reply, and for a socket to accept the rest of a stream.
    timeout: Duration,
    /// The guest has a driver.
    pub(super) is_active: bool,
    /// No client is accepted before.
    paused_until: Option<Instant>,
    connections: BTreeMap<u32, Connection>,
    /// Tokens, by the ports of host and guest.
    by_ports: HashMap<(u32, u32), u32>,
    clients: BTreeMap<u32, HostClient>,
    /// Streams with a packet for the guest, in the order of their turns.
    listed: VecDeque<u32>,
    replies: VecDeque<PacketHeader>,
    next_token: u32,
    next_port: u32,
    warned: Warned,
}

/// The parameters of a vsock device.
pub(super) struct VsockPlan {
    pub(super) guest_cid: u64,
    pub(super) path: PathBuf,
    pub(super) timeout: Duration,
}

/// Messages that have been logged: each only once.
#[derive(Debug, Default)]
struct Warned {
    full: bool,
    accept: bool,
    connect: bool,
}

impl Streams {
    pub(super) fn new(
        plan: VsockPlan,
        host: Arc<dyn Host>,
        listener: Box<dyn Listener>,
        timer: TimerFd,
    ) -> Self {
        let VsockPlan { guest_cid, path, timeout } = plan;
        Self {
            guest_cid,
            path,
            host,
            listener,
            timer,
            timeout,
            armed: None,
            is_active: false,
            paused_until: None,
            connections: BTreeMap::new(),
            by_ports: HashMap::new(),
            clients: BTreeMap::new(),
            listed: VecDeque::new(),
            replies: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_PORT,
            warned: Warned::default(),
        }
    }

    /// Ends all streams without notifying the guest. Called by harts: the timer makes the I/O thread update its sources.
    pub(super) fn reset(&mut self) {
        self.is_active = false;
        self.connections.clear();
        self.by_ports.clear();
        self.clients.clear();
        self.listed.clear();
        self.replies.clear();
        let is_set = self.timer.reset(Duration::from_millis(1), None).is_ok();
        self.armed = is_set.then(Instant::now);
    }

    /// The port of the next stream that the host requests.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Sets it, to one of the ports for such streams.
    pub(super) fn set_next_port(&mut self, port: u32) {
        self.next_port = FIRST_PORT | port & (FIRST_PORT - 1);
    }

    /// The descriptors to watch. Clients are not accepted until the guest has a driver and there is room.
    pub(super) fn list_sources(&self, list: &mut Vec<Source>) {
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        list.push(read(self.timer.as_raw_fd(), TOKEN_TIMER));
        if self.is_active && self.has_room() && self.paused_until.is_none() {
            list.push(read(self.listener.as_raw_fd(), TOKEN_LISTENER));
        }
        list.extend(self.clients.iter().map(|(token, client)| client.source(*token)));
        list.extend(self.connections.iter().filter_map(|(token, c)| c.source(*token)));
    }

    /// Takes an event: a source may be ready.
    pub(super) fn ready(&mut self, token: u32, now: Instant) {
        match token {
            TOKEN_TIMER => self.expire(now),
            TOKEN_LISTENER => self.accept(now),
            _ if self.clients.contains_key(&token) => self.read_line(token, now),
            _ => {
                let outcome = self.connections.get_mut(&token).map(|c| c.ready(now));
                self.update(token, outcome.unwrap_or(Outcome::Continue));
            }
        }
    }

    /// True if another packet of the guest may be taken.
    pub(super) fn takes_packets(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// True if there are packets for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.listed.is_empty()
    }

    /// Takes a packet of the guest, with its payload; its CIDs are checked already.
    pub(super) fn receive(&mut self, header: &PacketHeader, payload: &[u8], now: Instant) {
        let ports = (header.dst_port, header.src_port);
        let token = self.by_ports.get(&ports).copied().filter(|_| header.kind == STREAM);
        if let Some((token, connection)) =
            token.and_then(|token| Some((token, self.connections.get_mut(&token)?)))
        {
            let outcome = connection.receive(header, payload, now);
            self.update(token, outcome);
        } else if header.kind == STREAM && header.op == op::REQUEST {
            self.connect(header);
        } else if header.op != op::RST {
            self.replies.push_back(header.refusal());
        }
    }

    /// Takes the next packet for the guest; its payload is at the front of `room` (at least 1 byte).
    pub(super) fn next_packet(&mut self, room: &mut [u8], now: Instant) -> Option<PacketHeader> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(token) = self.listed.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.is_listed = false;
            let packet = connection.next_packet(room, now);
            let (buf_alloc, fwd_cnt) = packet.map_or((0, 0), |_| connection.own_credit());
            let address = connection.address(self.guest_cid);
            self.update(token, Outcome::Continue);
            if let Some(super::connection::Packet { op, flags, len }) = packet {
                return Some(PacketHeader { op, flags, len, buf_alloc, fwd_cnt, ..address });
            }
        }
        None
    }

    /// Sets the timer to the next deadline. To be called at the end of every pass.
    pub(super) fn set_timer(&mut self, now: Instant) {
        let streams = self.connections.values().filter_map(|connection| connection.deadline);
        let clients = self.clients.values().map(|client| client.deadline);
        let next = streams.chain(clients).chain(self.paused_until).min();
        if next == self.armed {
            return;
        }
        // Setting the timer clears its expiry, so it need not be read.
        self.armed = match next {
            None => self.timer.clear().map(|()| None).unwrap_or(self.armed),
            Some(next) => {
                let wait = next.saturating_duration_since(now).max(Duration::from_millis(1));
                self.timer.reset(wait, None).is_ok().then_some(next)
            }
        };
    }

    fn has_room(&self) -> bool {
        self.connections.len() + self.clients.len() < MAX_STREAMS
    }

    fn new_token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = if token == LAST_TOKEN { FIRST_TOKEN } else { token + 1 };
            if !self.connections.contains_key(&token) && !self.clients.contains_key(&token) {
                return token;
            }
        }
    }

    fn insert(&mut self, connection: Connection) {
        let token = self.new_token();
        self.by_ports.insert((connection.host_port, connection.guest_port), token);
        self.connections.insert(token, connection);
        self.update(token, Outcome::Continue);
    }

    /// Lists a stream that has a packet for the guest, or removes one that has ended.
    fn update(&mut self, token: u32, outcome: Outcome) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if outcome == Outcome::Continue {
            if connection.has_packet() && !std::mem::replace(&mut connection.is_listed, true) {
                self.listed.push_back(token);
            }
            return;
        }
        if outcome == Outcome::Reset && connection.is_known() {
            let address = connection.address(self.guest_cid);
            self.replies.push_back(PacketHeader { op: op::RST, ..address });
        }
        if connection.is_listed {
            self.listed.retain(|listed| *listed != token);
        }
        self.by_ports.remove(&(connection.host_port, connection.guest_port));
        self.connections.remove(&token);
    }

    /// Connects the guest to the program that listens on `<path>_<port>`.
    fn connect(&mut self, request: &PacketHeader) {
        if !self.has_room() {
            if !std::mem::replace(&mut self.warned.full, true) {
                warn!("vsock: the guest has {MAX_STREAMS} streams: further ones are refused");
            }
            self.replies.push_back(request.refusal());
            return;
        }
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", request.dst_port));
        match self.host.connect(path.as_ref()) {
            Ok(stream) => self.insert(Connection::accepted(stream, request, self.timeout)),
            Err(error) => {
                if !std::mem::replace(&mut self.warned.connect, true) {
                    info!("vsock: cannot connect the guest to {}: {error}", path.display());
                }
                self.replies.push_back(request.refusal());
            }
        }
    }

    /// Accepts one client.
    fn accept(&mut self, now: Instant) {
        if !self.is_active || !self.has_room() || self.paused_until.is_some() {
            return;
        }
        match self.listener.accept() {
            Ok(stream) => {
                let token = self.new_token();
                self.clients.insert(token, HostClient::new(stream, now + self.timeout));
                self.read_line(token, now);
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                // Another attempt would fail at once.
                if !std::mem::replace(&mut self.warned.accept, true) {
                    warn!("vsock: cannot accept a client at {}: {error}", self.path.display());
                }
                self.paused_until = Some(now + ACCEPT_PAUSE);
            }
        }
    }

    fn read_line(&mut self, token: u32, now: Instant) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        let line = client.read_line();
        if line == RequestLine::Incomplete {
            return;
        }
        let Some(HostClient { stream, .. }) = self.clients.remove(&token) else { return };
        if let RequestLine::Port(port) = line {
            self.request(stream, port, now);
        }
    }

    /// Requests a stream to a port of the guest.
    fn request(&mut self, stream: UnixStream, guest_port: u32, now: Instant) {
        let host_port = loop {
            let port = self.next_port;
            self.next_port = FIRST_PORT | port.wrapping_add(1) & (FIRST_PORT - 1);
            if !self.by_ports.contains_key(&(port, guest_port)) {
                break port;
            }
        };
        self.insert(Connection::requesting(stream, host_port, guest_port, now, self.timeout));
    }

    fn expire(&mut self, now: Instant) {
        self.armed = None;
        // Clears the expiry, for the case that no deadline is left.
        let _ = self.timer.clear();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        self.clients.retain(|_, client| client.deadline > now);
        let is_due = |c: &Connection| c.deadline.is_some_and(|deadline| deadline <= now);
        let due: Vec<u32> =
            self.connections.iter().filter(|(_, c)| is_due(c)).map(|(token, _)| *token).collect();
        for token in due {
            let outcome = self.connections.get_mut(&token).map(|c| c.expired(now));
            self.update(token, outcome.unwrap_or(Outcome::Continue));
        }
    }
}
