//! vhost-user devices with a correct peer and with faulty ones.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rvmm_devices::testing::{turn, wiring};
use rvmm_devices::virtio::feature;
use rvmm_devices::virtio::testing::{Buffer, Rig, status};
use rvmm_devices::virtio::vhost_user::testing::{
    Heard, Holdings, Quiet, Traits, answer, hear, payload, serve, serve_at,
};
use rvmm_devices::virtio::vhost_user::{Daemon, Service};
use rvmm_devices::{Host, HostError, Wiring};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const SET_FEATURES: u32 = 2;
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

const INFLIGHT: u64 = 1 << 12;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;

/// A disk with four queues and some sectors.
fn disk() -> Traits {
    let mut traits = Traits::default();
    traits.features |= FLUSH | MQ;
    traits.config[..8].copy_from_slice(&1000_u64.to_le_bytes());
    traits.config[34] = 4;
    traits
}

fn build(text: &str) -> Rig {
    Rig::build(|wiring| create(text, wiring))
}

fn create(text: &str, wiring: Wiring) -> Box<dyn rvmm_devices::MmioDevice> {
    rvmm_devices::testing::create(text, wiring).unwrap()
}

struct Place {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peer.sock");
    Place { _folder: folder, path }
}

/// Collects the peer's requests, up to and including the start of the last queue.
fn holdings(heard: &Receiver<Heard>, queues: usize) -> (Holdings, Vec<u32>) {
    let (mut holdings, mut requests) = (Holdings::default(), Vec::new());
    while holdings.queues.len() < queues || !holdings.queues.iter().all(|queue| queue.enabled) {
        let request = heard.recv().unwrap();
        requests.push(request.request);
        holdings.take(request);
    }
    (holdings, requests)
}

/// Serves the next request of queue 0 as a peer would: copies the readable buffers, in capitals, to the writable ones.
fn shout(holdings: &Holdings, done: u16) {
    let [table, used, available] = holdings.queues[0].addresses;
    let word = |bytes: Vec<u8>| u16::from_le_bytes(bytes.try_into().unwrap());
    let long = |bytes: Vec<u8>| u64::from_le_bytes(bytes.try_into().unwrap());
    assert_eq!(word(holdings.read(available + 2, 2)), done + 1, "one request more is there");
    let size = u16::try_from(holdings.queues[0].size).unwrap();
    let slot = u64::from(done % size);
    let head = word(holdings.read(available + 4 + 2 * slot, 2));
    let descriptor = |index: u16| table + 16 * u64::from(index);
    let next = word(holdings.read(descriptor(head) + 14, 2));
    let from = long(holdings.read(descriptor(head), 8));
    let to = long(holdings.read(descriptor(next), 8));
    holdings.write(to, &holdings.read(from, 5).to_ascii_uppercase());
    let element = u64::from(head) | 5 << 32;
    holdings.write(used + 4 + 8 * slot, &element.to_le_bytes());
    holdings.write(used + 2, &(done + 1).to_le_bytes());
    holdings.call(0);
}

#[test]
fn a_peer_gets_ram_and_queues_and_serves_the_driver_without_rvmm() {
    let place = place();
    let heard = serve_at(&place.path, disk()).unwrap();
    let mut rig = build(&format!("vhost-user-blk,socket={}", place.path.display()));
    assert_eq!(rig.offered(), FLUSH | MQ | feature::TRANSPORT);
    rig.start(FLUSH | feature::RING_RESET);
    let (holdings, requests) = holdings(&heard, 1);
    assert!(requests.contains(&SET_MEM_TABLE) && requests.contains(&SET_FEATURES));
    assert_eq!(holdings.queues[0].addresses[0], rig.rings(0)[0]);
    assert_eq!(rig.device.sources().len(), 3, "a timer, a call, a connection, and no kick");
    for done in 0..40 {
        let head = rig.add(0, &[Buffer::Read(b"hello"), Buffer::Write(5)]);
        rig.write(0x50, 0);
        holdings.wait_for_kick(0);
        shout(&holdings, done);
        while !rig.irq.is_high() {
            turn(rig.device.as_mut(), 10_000).unwrap();
        }
        assert_eq!(rig.take_used(0), Some((head, 5)));
        assert_eq!(rig.written(0, head), b"HELLO");
        assert_eq!(rig.acknowledge(), 1);
        assert!(!rig.irq.is_high(), "a level");
    }
}

#[test]
fn the_driver_sees_the_peers_configuration_with_the_queues_that_there_are() {
    for (asked, got) in [("", 1), (",queues=3", 3), (",queues=16", 4)] {
        let place = place();
        let _heard = serve_at(&place.path, disk()).unwrap();
        let mut rig = build(&format!("vhost-user-blk,socket={}{asked}", place.path.display()));
        assert_eq!(rig.read(0x100), 1000);
        assert_eq!(rig.read(0x120) >> 16, got, "num_queues");
        let queues = (0..20).filter(|queue| {
            rig.write(0x30, *queue);
            rig.read(0x34) != 0
        });
        assert_eq!(queues.count(), got as usize);
        rig.device.write(0x100, &[0; 4]).unwrap();
        assert_eq!(rig.read(0x100), 1000, "nothing there is the driver's");
    }
}

#[test]
fn a_reset_returns_when_the_peer_has_stopped_and_a_queue_can_be_reset_alone() {
    let place = place();
    let heard = serve_at(&place.path, disk()).unwrap();
    let mut rig = build(&format!("vhost-user-blk,queues=2,socket={}", place.path.display()));
    rig.start(feature::RING_RESET);
    holdings(&heard, 2);
    rig.write(0x30, 1);
    assert!(rig.write(0xc0, 1));
    let stops = |heard: &Receiver<Heard>| -> Vec<u32> {
        let all = heard.try_iter().filter(|heard| heard.request == GET_VRING_BASE);
        all.map(|heard| heard.word(0)).collect()
    };
    // The peer records a request after its reply.
    let mut stopped = Vec::new();
    while stopped.is_empty() {
        stopped = stops(&heard);
    }
    assert_eq!(stopped, [1]);
    assert!(rig.set_up(1));
    let start = loop {
        let heard = heard.recv().unwrap();
        if heard.request == SET_VRING_ENABLE {
            break heard;
        }
    };
    assert_eq!((start.word(0), start.word(1)), (1, 1));

    rig.write(0x70, 0);
    assert_eq!(rig.status(), 0);
    let mut stopped = Vec::new();
    while stopped.len() < 2 {
        stopped.extend(stops(&heard));
    }
    assert_eq!(stopped, [0, 1]);
    rig.start(0);
    holdings(&heard, 2);
}

/// Replies correctly to all requests that a device makes when it is built.
fn greet(stream: &UnixStream, traits: &Traits, last: u32) {
    loop {
        let heard = hear(stream).unwrap();
        if let Some(payload) = payload(&heard, traits) {
            (&*stream).write_all(&answer(heard.request, &payload)).unwrap();
        }
        if heard.request == last {
            return;
        }
    }
}

/// A device, and the peer's end of the connection.
fn build_by_hand(listener: &UnixListener, text: &str, traits: &Traits) -> (Rig, UnixStream) {
    let (listener, traits) = (listener.try_clone().unwrap(), traits.clone());
    let peer = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        greet(&stream, &traits, GET_CONFIG);
        if traits.protocol & INFLIGHT != 0 {
            lend(&stream, &notes());
        }
        stream
    });
    (build(text), peer.join().unwrap())
}

/// An in-flight buffer.
fn notes() -> File {
    let file = File::from(memfd_create("notes", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, 8192).unwrap();
    file
}

/// Replies to GET_INFLIGHT_FD with this buffer.
fn lend(stream: &UnixStream, file: &File) {
    let heard = hear(stream).unwrap();
    assert_eq!(heard.request, GET_INFLIGHT_FD);
    let mut payload = 8192_u64.to_ne_bytes().to_vec();
    payload.extend([0; 16]);
    let bytes = answer(heard.request, &payload);
    stream.send_with_fd(&bytes[..], file.as_raw_fd()).unwrap();
}

/// Serves a device that is being started, up to and including the start of its queue.
fn serve_start(rig: &mut Rig, stream: &UnixStream, traits: &Traits) -> Vec<Heard> {
    let mut all = Vec::new();
    loop {
        let heard = hear(stream).unwrap();
        if let Some(payload) = payload(&heard, traits) {
            (&*stream).write_all(&answer(heard.request, &payload)).unwrap();
            turn(rig.device.as_mut(), 10_000).unwrap();
        }
        let is_last = heard.request == SET_VRING_ENABLE;
        all.push(heard);
        if is_last {
            return all;
        }
    }
}

/// Waits until the I/O loop has received the reply of a peer that was slower than the time-out of a hart.
fn await_reset(rig: &mut Rig) {
    while rig.status() != 0 {
        turn(rig.device.as_mut(), 10_000).unwrap();
    }
}

#[test]
fn a_peer_that_reconnects_continues_at_the_used_index() {
    let place = place();
    let listener = UnixListener::bind(&place.path).unwrap();
    let mut traits = disk();
    let text = format!("vhost-user-blk,socket={}", place.path.display());
    let (mut rig, peer) = build_by_hand(&listener, &text, &traits);
    rig.start(FLUSH);
    serve_start(&mut rig, &peer, &traits);
    let used = rig.rings(0)[2];
    vm_memory::Bytes::write_obj(&rig.memory, 5_u16, vm_memory::GuestAddress(used + 2)).unwrap();
    drop(peer);
    listener.set_nonblocking(true).unwrap();
    // The device's size has changed meanwhile.
    traits.config[..8].copy_from_slice(&2000_u64.to_le_bytes());
    let peer = loop {
        turn(rig.device.as_mut(), 10_000).unwrap();
        if let Ok((stream, _)) = listener.accept() {
            break stream;
        }
    };
    peer.set_nonblocking(false).unwrap();
    let heard = serve_start(&mut rig, &peer, &traits);
    let base = heard.iter().find(|heard| heard.request == SET_VRING_BASE).unwrap();
    assert_eq!((base.word(0), base.word(1)), (0, 5));
    assert_eq!(rig.status(), status::RUNNING, "the driver has not noticed");
    assert_eq!((rig.read(0x100), rig.acknowledge()), (2000, 2), "but for the size");
    // After a reset by the driver, the ring starts at 0.
    let answering = thread::spawn(move || {
        greet(&peer, &disk(), GET_VRING_BASE);
        peer
    });
    rig.write(0x70, 0);
    let peer = answering.join().unwrap();
    await_reset(&mut rig);
    rig.start(FLUSH);
    let heard = serve_start(&mut rig, &peer, &traits);
    let base = heard.iter().find(|heard| heard.request == SET_VRING_BASE).unwrap();
    assert_eq!(base.word(1), 0);
}

#[test]
fn a_slow_peer_delays_the_drivers_reset_and_not_its_hart() {
    let place = place();
    let listener = UnixListener::bind(&place.path).unwrap();
    let traits = disk();
    let text = format!("vhost-user-blk,socket={}", place.path.display());
    let (mut rig, peer) = build_by_hand(&listener, &text, &traits);
    rig.start(FLUSH);
    serve_start(&mut rig, &peer, &traits);
    for value in [0, 1, 3, 11, 15, 0] {
        rig.write(0x70, value);
        assert_eq!(rig.status(), status::NEEDS_RESET, "after {value}: the reset is not over");
    }
    greet(&peer, &traits, GET_VRING_BASE);
    while rig.status() != 0 {
        turn(rig.device.as_mut(), 10_000).unwrap();
    }
    rig.start(FLUSH);
    let heard = serve_start(&mut rig, &peer, &traits);
    assert!(heard.iter().all(|heard| heard.request != GET_VRING_BASE), "asked once");
}

#[test]
fn the_inflight_buffer_survives_the_peer_but_not_a_reset() {
    let place = place();
    let listener = UnixListener::bind(&place.path).unwrap();
    let mut traits = disk();
    traits.protocol |= INFLIGHT;
    let text = format!("vhost-user-blk,socket={}", place.path.display());
    let (mut rig, peer) = build_by_hand(&listener, &text, &traits);
    rig.start(FLUSH);
    let notes = |heard: Vec<Heard>| -> File {
        let heard = heard.into_iter().find(|heard| heard.request == SET_INFLIGHT_FD);
        heard.unwrap().fds.pop().unwrap().into()
    };
    let first = notes(serve_start(&mut rig, &peer, &traits));
    first.write_all_at(b"noted", 100).unwrap();
    drop(peer);
    listener.set_nonblocking(true).unwrap();
    let peer = loop {
        turn(rig.device.as_mut(), 10_000).unwrap();
        if let Ok((stream, _)) = listener.accept() {
            break stream;
        }
    };
    peer.set_nonblocking(false).unwrap();
    let again = notes(serve_start(&mut rig, &peer, &traits));
    let mut bytes = [0; 5];
    again.read_exact_at(&mut bytes, 100).unwrap();
    assert_eq!(&bytes, b"noted");
    let (given, answering) = (traits.clone(), peer.try_clone().unwrap());
    let answering = thread::spawn(move || greet(&answering, &given, GET_VRING_BASE));
    rig.write(0x70, 0);
    answering.join().unwrap();
    await_reset(&mut rig);
    rig.start(FLUSH);
    serve_start(&mut rig, &peer, &traits);
    again.read_exact_at(&mut bytes, 100).unwrap();
    assert_eq!(bytes, [0; 5]);
}

/// A host whose peers are threads of the test.
#[derive(Default)]
struct Programs(Mutex<Vec<UnixStream>>);

impl Host for Programs {
    fn serve(&self, _: &Service) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
        let (near, far) = UnixStream::pair().unwrap();
        drop(serve(far.try_clone().unwrap(), Traits::default()));
        self.0.lock().unwrap().push(far);
        Ok((near, Box::new(Quiet)))
    }
}

#[test]
fn a_peer_that_exits_breaks_only_its_device() {
    let programs = Arc::new(Programs::default());
    let host: Arc<dyn Host> = Arc::clone(&programs) as _;
    let mut rig = Rig::build(|wiring| create("fs,tag=home,path=/", Wiring { host, ..wiring }));
    assert_eq!(rig.read(0x100), u32::from_le_bytes(*b"home"));
    rig.start(0);
    programs.0.lock().unwrap()[0].shutdown(std::net::Shutdown::Both).unwrap();
    while rig.status() & status::NEEDS_RESET == 0 {
        turn(rig.device.as_mut(), 10_000).unwrap();
    }
    assert!(rig.irq.is_high());
    assert_eq!(rig.acknowledge(), 2);
    rig.run();
    // A driver that tries again gets the same error.
    rig.write(0x70, 0);
    assert_eq!(rig.status(), 0);
    assert!(rig.negotiate(0) && rig.set_up(0));
    rig.write(0x70, status::RUNNING);
    while rig.status() & status::NEEDS_RESET == 0 {
        turn(rig.device.as_mut(), 10_000).unwrap();
    }
    // A reset of the whole machine starts the program again.
    rig.device.pause().unwrap();
    rig.device.reset();
    rig.device.resume();
    assert_eq!(programs.0.lock().unwrap().len(), 2);
    rig.start(0);
    rig.run();
    assert_eq!(rig.status(), status::RUNNING);
    rig.device.reset();
    assert_eq!(programs.0.lock().unwrap().len(), 2, "one that works is not started again");
}

/// The reaction of a hostile peer to one request.
type Fault = fn(&UnixStream, &Heard);

/// Builds a disk with a peer that replies to `request` with `fault`, and returns the error's text.
fn refusal(request: u32, protocol: u64, fault: Fault) -> String {
    let place = place();
    let listener = UnixListener::bind(&place.path).unwrap();
    let mut traits = disk();
    traits.protocol |= protocol;
    let peer = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        while let Ok(heard) = hear(&stream) {
            if heard.request == request {
                fault(&stream, &heard);
                // Its reply has to be processed before the end of the connection.
                while hear(&stream).is_ok() {}
                return;
            }
            if let Some(payload) = payload(&heard, &traits) {
                let _ = (&stream).write_all(&answer(heard.request, &payload));
            }
        }
    });
    let text = format!("vhost-user-blk,socket={}", place.path.display());
    let memory = rvmm_devices::virtio::vhost_user::testing::shared_memory(0x8000_0000, 1 << 20);
    let wiring = Wiring { memory: Arc::new(memory.unwrap()), ..wiring() };
    let error = rvmm_devices::testing::create(&text, wiring).err().unwrap();
    peer.join().unwrap();
    std::error::Error::source(&error).unwrap().to_string()
}

fn close(stream: &UnixStream) {
    stream.shutdown(std::net::Shutdown::Both).unwrap();
}

fn say(stream: &UnixStream, bytes: &[u8]) {
    let mut stream = stream;
    let _ = stream.write_all(bytes);
}

#[test]
fn a_peer_with_invalid_replies_is_refused() {
    let faults: &[(u32, &str, Fault)] = &[
        (GET_FEATURES, "closed", |s, _| close(s)),
        (GET_FEATURES, "closed", |s, h| {
            say(s, &answer(h.request, &[0; 8])[..5]);
            close(s);
        }),
        (GET_FEATURES, "closed", |s, h| {
            say(s, &answer(h.request, &[0; 8])[..19]);
            close(s);
        }),
        (GET_FEATURES, "virtio 1", |s, h| {
            say(s, &answer(h.request, &[0; 8]));
        }),
        (GET_FEATURES, "invalid reply header", |s, _| say(s, &[0; 12])),
        (GET_FEATURES, "invalid reply header", |s, _| say(s, &[0xff; 64])),
        (GET_FEATURES, "is invalid", |s, h| say(s, &answer(h.request, &[0; 4]))),
        (GET_FEATURES, "is invalid", |s, h| say(s, &answer(h.request, &[0; 16]))),
        (GET_FEATURES, "is invalid", |s, h| say(s, &answer(h.request, &[0; 500]))),
        (GET_FEATURES, "unexpected reply", |s, _| say(s, &answer(GET_CONFIG, &[0; 8]))),
        (GET_FEATURES, "unexpected reply", |s, _| say(s, &answer(SET_MEM_TABLE, &[0; 8]))),
        (GET_PROTOCOL_FEATURES, "provide the configuration space", |s, h| {
            say(s, &answer(h.request, &[0; 8]));
        }),
        (GET_QUEUE_NUM, "is invalid", |s, h| say(s, &answer(h.request, &[]))),
        (GET_CONFIG, "is invalid", |s, h| say(s, &answer(h.request, &[]))),
        (GET_CONFIG, "is invalid", |s, h| say(s, &answer(h.request, &[0; 72]))),
        (GET_CONFIG, "is invalid", |s, h| say(s, &answer(h.request, &h.payload[..71]))),
        (GET_CONFIG, "is invalid", |s, h| {
            say(s, &answer(h.request, &[&h.payload[..], &[0; 1]].concat()));
        }),
        (GET_CONFIG, "is invalid", |s, h| say(s, &answer(h.request, &vec![0; 1 << 20]))),
    ];
    for (index, (request, part, fault)) in faults.iter().enumerate() {
        let refused = refusal(*request, 0, *fault);
        assert!(refused.contains(part), "{index}: {refused}");
    }
}

#[test]
fn an_inflight_buffer_of_the_wrong_size_is_refused() {
    let with_file = |heard: &Heard, size: u64, offset: u64| {
        let payload = [&size.to_ne_bytes()[..], &offset.to_ne_bytes(), &[0; 8]].concat();
        answer(heard.request, &payload)
    };
    let refused = refusal(GET_INFLIGHT_FD, INFLIGHT, |s, h| say(s, &answer(h.request, &[0; 24])));
    assert!(refused.contains("no usable memory"), "{refused}");
    let refused = refusal(GET_INFLIGHT_FD, INFLIGHT, |s, h| say(s, &answer(h.request, &[0; 25])));
    assert!(refused.contains("is invalid"), "{refused}");
    let place = |size, offset, file: &dyn AsRawFd| {
        let (near, far) = UnixStream::pair().unwrap();
        let heard = Heard { request: GET_INFLIGHT_FD, flags: 0, payload: vec![], fds: vec![] };
        near.send_with_fd(&with_file(&heard, size, offset)[..], file.as_raw_fd()).unwrap();
        far
    };
    // A peer that forwards the same bytes to a device.
    for (size, offset, is_memory) in [
        (8193, 0, true),
        (1, 8192, true),
        (u64::MAX, 0, true),
        (4096, u64::MAX, true),
        (1 << 40, 0, true),
        (4096, 0, false),
    ] {
        let far = match is_memory {
            true => place(size, offset, &notes()),
            false => place(size, offset, &UnixStream::pair().unwrap().0),
        };
        *SHARED.lock().unwrap() = Some(far);
        let refused = refusal(GET_INFLIGHT_FD, INFLIGHT, |stream, _| {
            let far = SHARED.lock().unwrap().take().unwrap();
            let answer = hear(&far).unwrap();
            let bytes =
                rvmm_devices::virtio::vhost_user::testing::answer(answer.request, &answer.payload);
            stream.send_with_fd(&bytes[..], answer.fds[0].as_raw_fd()).unwrap();
        });
        assert!(refused.contains("no usable memory"), "{size} {offset}: {refused}");
    }
}

/// The socket with the bytes that the hostile peer of one test forwards.
static SHARED: Mutex<Option<UnixStream>> = Mutex::new(None);

#[test]
fn a_peer_that_turns_hostile_is_dropped_and_reconnected() {
    let turns: &[fn(&UnixStream)] = &[
        |peer| say(peer, &[0xff; 4096]),
        |peer| say(peer, &answer(GET_FEATURES, &[0; 8])),
        |peer| say(peer, &answer(GET_CONFIG, &[0; 200])),
        |peer| {
            let file = notes();
            let fds = [file.as_raw_fd(); 50];
            peer.send_with_fds(&[&answer(GET_VRING_BASE, &[0; 8])[..]], &fds).unwrap();
        },
    ];
    for hostile in turns {
        let place = place();
        let listener = UnixListener::bind(&place.path).unwrap();
        let traits = disk();
        let text = format!("vhost-user-blk,socket={}", place.path.display());
        let (mut rig, peer) = build_by_hand(&listener, &text, &traits);
        rig.start(FLUSH);
        serve_start(&mut rig, &peer, &traits);
        hostile(&peer);
        listener.set_nonblocking(true).unwrap();
        let peer = loop {
            turn(rig.device.as_mut(), 10_000).unwrap();
            if let Ok((stream, _)) = listener.accept() {
                break stream;
            }
        };
        peer.set_nonblocking(false).unwrap();
        // A peer that reconnects as another device is refused.
        let mut other = disk();
        other.features &= !FLUSH;
        let mut requests = 0;
        while let Ok(heard) = hear(&peer) {
            requests += 1;
            if let Some(payload) = payload(&heard, &other) {
                (&peer).write_all(&answer(heard.request, &payload)).unwrap();
                turn(rig.device.as_mut(), 10_000).unwrap();
            }
        }
        assert_eq!(requests, 6, "a greeting and nothing more");
        assert_eq!(rig.status(), status::RUNNING);
    }
}

#[test]
fn interrupts_of_a_stopped_device_are_dropped() {
    let place = place();
    let heard = serve_at(&place.path, disk()).unwrap();
    let mut rig = build(&format!("vhost-user-blk,socket={}", place.path.display()));
    rig.start(0);
    let (holdings, _) = holdings(&heard, 1);
    rig.write(0x70, 0);
    for _ in 0..1000 {
        holdings.call(0);
    }
    rig.run();
    assert!(!rig.irq.is_high());
    assert_eq!(rig.read(0x60), 0);
}

#[test]
fn a_paused_device_waits_until_its_peer_has_stopped_and_continues_at_the_used_index() {
    let place = place();
    let heard = serve_at(&place.path, disk()).unwrap();
    let mut rig = build(&format!("vhost-user-blk,socket={}", place.path.display()));
    rig.start(FLUSH);
    let (holdings, _) = holdings(&heard, 1);
    rig.add(0, &[Buffer::Read(b"hello"), Buffer::Write(5)]);
    shout(&holdings, 0);
    rig.device.pause().unwrap();
    let requests: Vec<u32> = heard.try_iter().map(|heard| heard.request).collect();
    assert!(requests.contains(&GET_VRING_BASE), "{requests:?}");
    rig.device.resume();
    let (holdings, _) = self::holdings(&heard, 1);
    assert_eq!(holdings.queues[0].base, 1);
    let why = rig.device.save().unwrap_err().to_string();
    assert_eq!(why, "its state is in the program that serves it");
}

#[test]
fn a_device_whose_peer_leaves_during_a_pause_is_at_rest() {
    let place = place();
    let listener = UnixListener::bind(&place.path).unwrap();
    let text = format!("vhost-user-blk,socket={}", place.path.display());
    let (mut rig, peer) = build_by_hand(&listener, &text, &disk());
    rig.start(FLUSH);
    serve_start(&mut rig, &peer, &disk());
    let leaving = thread::spawn(move || while hear(&peer).unwrap().request != GET_VRING_BASE {});
    rig.device.pause().unwrap();
    leaving.join().unwrap();
    rig.device.resume();
    assert_eq!(rig.status(), status::RUNNING, "it waits for the peer to come back");
}
