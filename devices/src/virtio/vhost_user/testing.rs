//! A peer for tests: replies as the protocol requires, or as a test sets, and works on rings through the file of guest RAM.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{read, write};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::Daemon;
use super::message::{PROTOCOL_FEATURES, protocol, request};
use crate::virtio::feature;

/// A placeholder for a started program: it has no output.
#[derive(Debug, Clone, Copy)]
pub struct Quiet;

impl Daemon for Quiet {
    fn name(&self) -> &'static str {
        "a quiet program"
    }

    fn messages(&self) -> Option<RawFd> {
        None
    }

    fn forward_output(&mut self) {}

    fn kill(&mut self) {}

    fn last_output(&mut self) -> String {
        String::new()
    }
}

/// A request as the peer received it.
#[derive(Debug)]
pub struct Heard {
    /// Its number.
    pub request: u32,
    /// Flags of its header.
    pub flags: u32,
    /// The payload.
    pub payload: Vec<u8>,
    /// Descriptors received with it.
    pub fds: Vec<OwnedFd>,
}

impl Heard {
    /// The 32-bit word at `index` of the payload; 0 past its end.
    #[must_use]
    pub fn word(&self, index: usize) -> u32 {
        let word = self.payload.chunks_exact(4).nth(index);
        word.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
    }
}

/// The capabilities that a peer reports.
#[derive(Debug, Clone)]
pub struct Traits {
    /// Virtio features.
    pub features: u64,
    /// Protocol features.
    pub protocol: u64,
    /// Number of queues.
    pub queues: u64,
    /// The configuration space.
    pub config: Vec<u8>,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            features: feature::TRANSPORT & !feature::RING_RESET | PROTOCOL_FEATURES,
            protocol: protocol::OURS & !protocol::INFLIGHT_SHMFD,
            queues: 16,
            config: vec![0; 64],
        }
    }
}

/// Creates guest RAM that another program can map: `size` bytes from `base`.
///
/// # Errors
/// The system has no memory left, or the range is invalid.
pub fn shared_memory(base: u64, size: u64) -> io::Result<GuestMemoryMmap> {
    let file = File::from(memfd_create("test-ram", MemfdFlags::CLOEXEC)?);
    ftruncate(&file, size)?;
    let size = usize::try_from(size).map_err(io::Error::other)?;
    let range = (GuestAddress(base), size, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).map_err(io::Error::other)
}

/// Serves one connection on its own thread, until it is closed. The receiver gets all requests.
#[must_use]
pub fn serve(stream: UnixStream, traits: Traits) -> Receiver<Heard> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || answer_all(stream, &traits, &sender));
    receiver
}

/// Serves one connection after another at `path`, as long as the process runs.
///
/// # Errors
/// The socket cannot be created.
pub fn serve_at(path: &Path, traits: Traits) -> io::Result<Receiver<Heard>> {
    serve_so_many_at(path, usize::MAX, traits)
}

/// Serves `count` connections at `path`, one after another, and stops then.
///
/// # Errors
/// The socket cannot be created.
pub fn serve_so_many_at(path: &Path, count: usize, traits: Traits) -> io::Result<Receiver<Heard>> {
    let (sender, receiver) = mpsc::channel();
    let listener = UnixListener::bind(path)?;
    thread::spawn(move || {
        for stream in listener.incoming().take(count).map_while(Result::ok) {
            answer_all(stream, &traits, &sender);
        }
    });
    Ok(receiver)
}

fn answer_all(mut stream: UnixStream, traits: &Traits, heard: &Sender<Heard>) {
    while let Ok(request) = hear(&stream) {
        let reply = payload(&request, traits);
        if let Some(payload) = reply
            && stream.write_all(&answer(request.request, &payload)).is_err()
        {
            return;
        }
        // The receiver may be dropped.
        let _ = heard.send(request);
    }
}

/// The payload of the reply to a request, if there is a reply.
#[must_use]
pub fn payload(heard: &Heard, traits: &Traits) -> Option<Vec<u8>> {
    let number = |value: u64| Some(value.to_ne_bytes().to_vec());
    match heard.request {
        request::GET_FEATURES => number(traits.features),
        request::GET_PROTOCOL_FEATURES => number(traits.protocol),
        request::GET_QUEUE_NUM => number(traits.queues),
        request::GET_VRING_BASE => number(heard.word(0).into()),
        request::GET_CONFIG => {
            let mut payload = heard.payload.clone();
            for (to, from) in payload.iter_mut().skip(12).zip(&traits.config) {
                *to = *from;
            }
            Some(payload)
        }
        _ if heard.flags & 8 != 0 => number(0),
        _ => None,
    }
}

/// A complete reply.
#[must_use]
pub fn answer(request: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes: Vec<u8> =
        [request, 5, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(payload);
    bytes
}

/// Waits for the next request.
///
/// # Errors
/// The connection is closed, or the message is no request.
pub fn hear(stream: &UnixStream) -> io::Result<Heard> {
    let mut fds = Vec::new();
    let header = take(stream, 12, &mut fds)?;
    let mut words = header.chunks_exact(4).map(|b| b.try_into().map_or(0, u32::from_ne_bytes));
    let mut next = || words.next().unwrap_or(0);
    let (request, flags, size) = (next(), next(), next());
    let payload = take(stream, usize::try_from(size).map_err(io::Error::other)?, &mut fds)?;
    Ok(Heard { request, flags, payload, fds })
}

fn take(stream: &UnixStream, size: usize, fds: &mut Vec<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    let mut done = 0;
    while done < size {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let part = bytes.get_mut(done..).unwrap_or_default();
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(stream, &mut [IoSliceMut::new(part)], &mut control, flags)?.bytes;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(new) = message {
                fds.extend(new);
            }
        }
        done += count;
    }
    Ok(bytes)
}

/// A queue as set up in the peer.
#[derive(Debug, Default)]
pub struct Taken {
    /// Entries.
    pub size: u32,
    /// First index of the available ring.
    pub base: u32,
    /// Descriptors, used ring, available ring.
    pub addresses: [u64; 3],
    /// Written to by the driver.
    pub kick: Option<OwnedFd>,
    /// Written to for an interrupt.
    pub call: Option<OwnedFd>,
    /// True if it is enabled.
    pub enabled: bool,
}

/// The state set up in a peer: RAM and queues.
#[derive(Debug, Default)]
pub struct Holdings {
    /// The file of guest RAM.
    pub ram: Option<File>,
    /// Guest-physical, size, address in the front end, offset in the file.
    pub region: [u64; 4],
    /// By number.
    pub queues: Vec<Taken>,
}

impl Holdings {
    /// Applies a request.
    pub fn take(&mut self, mut heard: Heard) {
        let index = usize::try_from(heard.word(0) & 0xff).unwrap_or(0);
        let long = |at: usize| u64::from(heard.word(at)) | u64::from(heard.word(at + 1)) << 32;
        if heard.request == request::SET_MEM_TABLE {
            self.region = [long(2), long(4), long(6), long(8)];
            self.ram = heard.fds.pop().map(File::from);
            return;
        }
        let is_queues = matches!(
            heard.request,
            request::SET_VRING_NUM..=request::SET_VRING_BASE
                | request::SET_VRING_KICK..=request::SET_VRING_CALL
                | request::SET_VRING_ENABLE
        );
        if !is_queues {
            return;
        }
        let addresses = [long(2), long(4), long(6)];
        let value = heard.word(1);
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, Taken::default);
        }
        let Some(queue) = self.queues.get_mut(index) else { return };
        match heard.request {
            request::SET_VRING_NUM => queue.size = value,
            request::SET_VRING_BASE => queue.base = value,
            request::SET_VRING_ADDR => queue.addresses = addresses,
            request::SET_VRING_KICK => queue.kick = heard.fds.pop(),
            request::SET_VRING_CALL => queue.call = heard.fds.pop(),
            request::SET_VRING_ENABLE => queue.enabled = value == 1,
            _ => {}
        }
    }

    /// Reads guest RAM at an address of the front end.
    #[must_use]
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = address.wrapping_sub(self.region[2]).wrapping_add(self.region[3]);
        let done = self.ram.as_ref().is_some_and(|ram| ram.read_exact_at(&mut bytes, at).is_ok());
        if done { bytes } else { Vec::new() }
    }

    /// Writes guest RAM at an address of the front end.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let at = address.wrapping_sub(self.region[2]).wrapping_add(self.region[3]);
        let _ = self.ram.as_ref().map(|ram| ram.write_all_at(bytes, at));
    }

    /// Waits for a kick of a queue.
    pub fn wait_for_kick(&self, queue: usize) {
        let kick = self.queues.get(queue).and_then(|queue| queue.kick.as_ref());
        // The driver's eventfd is non-blocking.
        while let Some(kick) = kick
            && read(kick, &mut [0; 8]).is_err()
        {
            thread::yield_now();
        }
    }

    /// Interrupts the driver for a queue.
    pub fn call(&self, queue: usize) {
        let call = self.queues.get(queue).and_then(|queue| queue.call.as_ref());
        let _ = call.map(|call| write(call, &1_u64.to_ne_bytes()));
    }
}
