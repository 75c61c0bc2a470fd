//! Socket device (virtio 1.3, section 5.10): streams between programs in the guest and programs on the host.
//!
//! | file | contents |
//! |---|---|
//! | `packet.rs` | the header of a packet |
//! | `connection.rs` | one stream: its states, its bytes, its end |
//! | `credit.rs` | the guest's credit |
//! | `socket.rs` | writes to a socket, and the check for a hang-up |
//! | `client.rs` | the line by which a client of the host asks for a port |
//! | `streams.rs` | all streams: their number, their order, their deadlines |
//!
//! On the host there are Unix sockets, as in Firecracker: rvmm listens on one, and a program that connects and writes
//! `CONNECT <port>\n` is connected to that port of the guest and reads `OK <port>\n`; a guest that connects to a port of
//! the host is connected to the program that listens on `<path>_<port>`. With `backend=kernel` the host uses AF_VSOCK, and the
//! device is that of `vhost_kernel/vsock.rs`.
//!
//! The event queue only reports that all streams have ended, after a restore. Left out: SEQPACKET, whose messages have no counterpart
//! in a stream socket.

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use self::packet::{HOST_CID, PacketHeader};
use self::streams::{Streams, VsockPlan};
use super::{Chain, DeviceType, VirtioDevice, VirtioError, VirtioLifecycle, Work};
use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::number::number;
use crate::config::{FilePath, ModelConfig, Slot};
use crate::device::Source;
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::options::OptionError;

mod client;
mod connection;
mod credit;
mod packet;
mod socket;
mod streams;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "vsock",
    summary: "virtio sockets: streams between guest and host, at Unix sockets or AF_VSOCK",
    keys: &[
        Key {
            name: "path",
            value: "PATH",
            help: "Unix socket to listen on; the guest connects to PATH_<port> (needed with backend=unix)",
        },
        Key { name: "cid", value: "N", help: "the guest's CID, from 3 (default: 3)" },
        Key {
            name: "timeout",
            value: "SECONDS",
            help: "time-out for the guest's reply to a program of the host, 1 to 86400 (default: 30)",
        },
        Key {
            name: "backend",
            value: "unix|kernel",
            help: "Unix sockets, or AF_VSOCK on the host through /dev/vhost-vsock (default: unix)",
        },
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// The event `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// `VIRTIO_VSOCK_F_STREAM`
const F_STREAM: u64 = 1;

/// Maximum length of a payload in bytes, in both directions.
const MAX_PAYLOAD: usize = 64 << 10;

/// Bytes that one pass moves in each direction; the last packet may exceed it. Bounds the time on the I/O thread.
const PASS: usize = 512 << 10;

/// Default time-out for the guest's reply: longer than a guest on a slow host takes to boot.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

struct Vsock {
    streams: Streams,
    /// Buffer for one packet's payload.
    payload: Box<[u8]>,
    guest_cid: u64,
    config: [u8; 8],
    /// The driver has to be told that all streams have ended.
    must_report_reset: bool,
}

number! {
    /// A CID that a guest may have: 0 to 2 and the last one are reserved (section 5.10.4).
    Cid(u32), 3, u32::MAX - 1, 1, "a number from 3 to 4294967294"
}

number! {
    /// A time-out in seconds.
    ReplyTimeout(u32), 1, 86_400, 1, "a number of seconds from 1 to 86400"
}

/// The host's side of the sockets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VsockBackend {
    /// Unix sockets.
    #[default]
    Unix,
    /// AF_VSOCK, through the host's kernel.
    Kernel,
}

/// The configuration of a socket device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VsockConfig {
    /// Unix socket to listen on; needed with [`VsockBackend::Unix`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<FilePath>,
    /// The guest's CID; `None` for 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cid: Option<Cid>,
    /// Time-out for the guest's reply to a program of the host; `None` for 30 seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<ReplyTimeout>,
    /// The host's side.
    pub backend: VsockBackend,
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

impl VsockConfig {
    fn guest_cid(&self) -> u32 {
        self.cid.map_or(3, Cid::get)
    }

    /// The socket to listen on; `None` with the kernel's backend.
    fn socket(&self) -> Result<Option<&FilePath>, OptionError> {
        if self.backend == VsockBackend::Unix {
            let missing = || OptionError::bad_value("path", "", "a path (write vsock,path=PATH)");
            return self.path.as_ref().map(Some).ok_or_else(missing);
        }
        let expected =
            "possible with backend=kernel, which has no Unix socket (leave one of them out)";
        match (&self.path, self.timeout) {
            (Some(path), _) => Err(OptionError::bad_value("path", path.display(), expected)),
            (None, Some(timeout)) => {
                Err(OptionError::bad_value("timeout", timeout.get(), expected))
            }
            (None, None) => Ok(None),
        }
    }
}

/// The state of a socket device, without its streams.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockState {
    /// The port of the next stream that the host requests, so that no stream of the saved device is taken for a new one.
    next_port: u32,
}

impl ModelConfig for VsockConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        self.path.iter_mut().collect()
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn check(&self) -> Result<(), OptionError> {
        self.socket().map(|_| ())
    }

    fn build(&self, wiring: Wiring) -> Built {
        let refused = |source| BuildError::Option { model: MODEL.name, source };
        let Some(path) = self.socket().map_err(refused)? else {
            return super::vhost_kernel::vsock::build(self.guest_cid(), wiring);
        };
        let seconds = |timeout: ReplyTimeout| Duration::from_secs(timeout.get().into());
        let timeout = self.timeout.map_or(DEFAULT_TIMEOUT, seconds);
        let guest_cid = u64::from(self.guest_cid());
        let listener = wiring
            .host
            .listen(path)
            .map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
        let timer = TimerFd::new().map_err(|source| BuildError::Host {
            model: MODEL.name,
            what: "timer",
            source: source.into(),
        })?;
        let plan = VsockPlan { guest_cid, path: path.clone().into(), timeout };
        let streams = Streams::new(plan, wiring.host.clone(), listener, timer);
        let vsock = Vsock {
            streams,
            payload: vec![0; MAX_PAYLOAD].into(),
            guest_cid,
            config: guest_cid.to_le_bytes(),
            must_report_reset: false,
        };
        Ok(Device::Virtio(Box::new(vsock)))
    }
}

impl Vsock {
    fn serve(&mut self, work: &mut Work<'_>, now: Instant) -> Result<(), VirtioError> {
        loop {
            let is_held = self.take_packets(work, now)?;
            self.give_packets(work, now)?;
            if !is_held || !self.streams.takes_packets() {
                break;
            }
        }
        self.streams.set_timer(now);
        Ok(())
    }

    /// Sends the event that all streams have ended (section 5.10.6.7), once the driver has a buffer for it.
    fn report_reset(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while self.must_report_reset {
            let Some(chain) = work.pop(EVENT)? else { break };
            if (chain.writable_bytes() as usize) < TRANSPORT_RESET.len() {
                work.refuse(chain);
                continue;
            }
            let written = chain.write_at(work.memory(), 0, &TRANSPORT_RESET);
            work.complete(chain, u32::try_from(written).unwrap_or(0));
            self.must_report_reset = false;
        }
        Ok(())
    }

    /// Takes the guest's packets; true if some are left because the guest does not accept the replies.
    fn take_packets(&mut self, work: &mut Work<'_>, now: Instant) -> Result<bool, VirtioError> {
        let mut moved = 0;
        while self.streams.takes_packets() {
            if moved >= PASS {
                work.end_pass(TX);
                return Ok(false);
            }
            let Some(chain) = work.pop(TX)? else { return Ok(false) };
            moved += (chain.readable_bytes() as usize).min(MAX_PAYLOAD);
            if self.take(&chain, work, now) {
                work.complete(chain, 0);
            } else {
                work.refuse(chain);
            }
        }
        Ok(true)
    }

    /// Takes one packet; false if it is malformed, or not from this guest to this host.
    fn take(&mut self, chain: &Chain, work: &Work<'_>, now: Instant) -> bool {
        let mut raw = [0; PacketHeader::LEN];
        if chain.read_at(work.memory(), 0, &mut raw) < raw.len() {
            return false;
        }
        // The header is read only once: the guest may change it meanwhile.
        let header = PacketHeader::parse(&raw);
        let Some(payload) = self.payload.get_mut(..header.len as usize) else { return false };
        if chain.read_at(work.memory(), PacketHeader::END, payload) < payload.len() {
            return false;
        }
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return false;
        }
        self.streams.receive(&header, payload, now);
        true
    }

    /// Sends packets to the guest as long as it has buffers.
    fn give_packets(&mut self, work: &mut Work<'_>, now: Instant) -> Result<(), VirtioError> {
        let mut moved = 0;
        while self.streams.has_packets() {
            if moved >= PASS {
                work.end_pass(RX);
                break;
            }
            let Some(chain) = work.pop(RX)? else { break };
            let room = (chain.writable_bytes() as usize).saturating_sub(PacketHeader::LEN);
            let Some(room @ [_, ..]) = self.payload.get_mut(..room.min(MAX_PAYLOAD)) else {
                work.refuse(chain);
                continue;
            };
            let Some(header) = self.streams.next_packet(room, now) else {
                work.put_back(chain);
                break;
            };
            let payload = room.get(..header.len as usize).unwrap_or_default();
            moved += payload.len();
            let mut written = chain.write_at(work.memory(), 0, &header.bytes());
            written += chain.write_at(work.memory(), PacketHeader::END, payload);
            work.complete(chain, u32::try_from(written).unwrap_or(u32::MAX));
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::new(MODEL.name, 19, &[256, 256, 64], F_STREAM)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {
        self.streams.is_active = true;
    }

    fn kicked(&mut self, _queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.report_reset(work)?;
        self.serve(work, Instant::now())
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        self.streams.list_sources(list);
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let now = Instant::now();
        self.streams.ready(token, now);
        self.serve(work, now)
    }
}

impl VirtioLifecycle for Vsock {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.streams.reset();
        self.must_report_reset = false;
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, _queue: u16) {}

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        // The streams' sockets stay with this process: the guest of the restored device is told that its streams have ended.
        let Self { streams, payload: _, guest_cid: _, config: _, must_report_reset: _ } = self;
        SavedState::of(&VsockState { next_port: streams.next_port() })
    }

    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let VsockState { next_port } = state.read()?;
        self.streams.set_next_port(next_port);
        self.streams.is_active = features.is_some();
        self.must_report_reset = features.is_some();
        Ok(())
    }
}
