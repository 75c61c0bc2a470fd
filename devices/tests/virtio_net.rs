//! The network device with a correct and a hostile driver, and a network in memory.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::collections::HashSet;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use proptest::prelude::*;
use rvmm_devices::config::{ByteRate, FrameRate, MacAddress, Mtu};
use rvmm_devices::testing::{MemoryHost, captured_log, create, turn};
use rvmm_devices::virtio::net::testing::MemoryNet;
use rvmm_devices::virtio::net::{
    Counters, HEADER, MAX_FRAME, Net, NetBackend, NetConfig, NetworkSource, Offloads, bit,
};
use rvmm_devices::virtio::testing::{Buffer, NEXT, Rig};
use rvmm_devices::virtio::{VirtioDevice, feature};
use rvmm_devices::{Interest, Wiring};
use vm_memory::{Bytes, GuestAddress};

const RX: u32 = 0;
const TX: u32 = 1;
const CTRL: u32 = 2;

/// No offloads, one buffer per frame.
const PLAIN: u64 = bit::MAC | bit::STATUS;
/// The features that Linux negotiates.
const LINUX: u64 = PLAIN
    | bit::CSUM
    | bit::GUEST_CSUM
    | bit::HOST_TSO4
    | bit::HOST_TSO6
    | bit::GUEST_TSO4
    | bit::GUEST_TSO6
    | bit::MRG_RXBUF
    | bit::CTRL_VQ
    | bit::CTRL_RX
    | bit::CTRL_GUEST_OFFLOADS
    | feature::EVENT_IDX;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

struct Test {
    rig: Rig,
    net: MemoryNet,
    counters: Arc<Counters>,
}

fn test_with(settings: &NetConfig, features: u64) -> Test {
    let net = MemoryNet::new().unwrap();
    let settings = NetConfig { mac: settings.mac.or(MacAddress::new(MAC)), ..settings.clone() };
    let device = Net::new(Box::new(net.clone()), &settings).unwrap();
    let counters = device.counters();
    let mut rig = Rig::new(Box::new(device));
    rig.start(features);
    Test { rig, net, counters }
}

fn test(features: u64) -> Test {
    test_with(&NetConfig::default(), features)
}

#[test]
fn a_card_has_the_mac_address_that_its_backend_needs() {
    let needed = [2, 1, 2, 3, 4, 5];
    let address = |mac: Option<[u8; 6]>, end: Option<[u8; 6]>| {
        let net = MemoryNet::new().unwrap();
        if let Some(end) = end {
            net.set_address(end);
        }
        let mac = mac.and_then(MacAddress::new);
        let settings = NetConfig { mac, ..NetConfig::default() };
        let mut address = [0; 6];
        let lines = captured_log(|| {
            let device = Net::new(Box::new(net), &settings).unwrap();
            Rig::new(Box::new(device)).device.read(0x100, &mut address).unwrap();
        });
        (address, lines)
    };
    assert_eq!(address(None, Some(needed)), (needed, vec![]));
    assert_eq!(address(Some(needed), Some(needed)), (needed, vec![]));
    assert_eq!(address(Some(MAC), None), (MAC, vec![]));
    let (made, lines) = address(None, None);
    assert!(made != needed && made != [0; 6] && lines.is_empty());
    let (address, lines) = address(Some(MAC), Some(needed));
    assert_eq!((address, lines.len()), (MAC, 1));
    assert!(
        lines[0].contains("02:01:02:03:04:05") && lines[0].contains("leave out mac="),
        "{lines:?}"
    );
}

#[test]
fn a_restored_card_has_the_address_that_the_driver_has_read_unless_another_one_is_chosen() {
    let card = |end: [u8; 6], chosen: Option<[u8; 6]>| {
        let net = MemoryNet::new().unwrap();
        net.set_address(end);
        let mac = chosen.and_then(MacAddress::new);
        let settings = NetConfig { mac, pin: true, ..NetConfig::default() };
        let mut rig = None;
        captured_log(|| {
            rig = Some(Rig::new(Box::new(Net::new(Box::new(net.clone()), &settings).unwrap())))
        });
        (rig.unwrap(), net)
    };
    let address = |rig: &mut Rig| {
        let mut address = [0; 6];
        rig.device.read(0x100, &mut address).unwrap();
        address
    };
    let (mut saved, _) = card(MAC, None);
    saved.device.pause().unwrap();
    let state = saved.device.save().unwrap();
    // Another network, whose end would give the card another address.
    let other = [2, 9, 9, 9, 9, 9];
    let (mut moved, net) = card(other, None);
    moved.device.restore(state.clone()).unwrap();
    moved.device.resume();
    assert_eq!(address(&mut moved), MAC);
    // Frames are checked against the same address.
    moved.start(PLAIN);
    let mut test = Test { rig: moved, net, counters: Arc::default() };
    test.send(&NO_HEADER, &frame(64));
    assert_eq!(test.net.sent().len(), 1);
    let chosen = [2, 7, 7, 7, 7, 7];
    let (mut cloned, _) = card(other, Some(chosen));
    cloned.device.restore(state).unwrap();
    assert_eq!(address(&mut cloned), chosen);
}

/// A frame of `len` bytes from `MAC`, filled with a pattern.
fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let end = len.min(12);
    frame[end.min(6)..end].copy_from_slice(&MAC[..end.saturating_sub(6)]);
    frame
}

fn header(flags: u8, gso_type: u8, words: [u16; 4]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = flags;
    header[1] = gso_type;
    for (at, word) in words.iter().enumerate() {
        header[2 + 2 * at..4 + 2 * at].copy_from_slice(&word.to_le_bytes());
    }
    header
}

const NO_HEADER: [u8; HEADER] = [0; HEADER];

/// A virtio-net header of TCP over IPv4 with segmentation offload.
fn segment() -> [u8; HEADER] {
    header(1, 1, [54, 1448, 34, 16])
}

impl Test {
    /// Sends a frame as one buffer, which is returned in any case.
    fn send(&mut self, header: &[u8], frame: &[u8]) {
        let bytes: Vec<u8> = [header, frame].concat();
        assert_eq!(self.rig.ask(TX, &[Buffer::Read(&bytes)]), Some(Vec::new()));
    }

    /// The next received frame: its header with the number of buffers, and its bytes. Skips buffers that were returned unused.
    fn received(&mut self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut parts = std::iter::from_fn(|| self.part()).filter(|part| !part.is_empty());
        let mut bytes = parts.next()?;
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            bytes.extend(parts.next().unwrap());
        }
        drop(parts);
        let frame = bytes.split_off(HEADER);
        Some((bytes, frame))
    }

    fn part(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.rig.take_used(RX)?;
        let mut bytes = self.rig.written(RX, head);
        bytes.truncate(len as usize);
        Some(bytes)
    }

    fn command(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.rig.ask(CTRL, &[Buffer::Read(bytes), Buffer::Write(1)]).unwrap()
    }

    /// The events of the network that the device waits for.
    fn interest(&self) -> Option<Interest> {
        let sources = self.rig.device.sources();
        sources.iter().find(|source| source.token == 0).map(|source| source.interest)
    }

    /// Checks that frames pass in both directions after a new start.
    fn works_after_a_reset(&mut self) {
        self.net.fail(None);
        self.rig.start(LINUX);
        let _ = self.net.sent();
        self.send(&NO_HEADER, &frame(60));
        assert_eq!(self.net.sent(), [(NO_HEADER, frame(60))]);
        while self.net.waiting() > 0 {
            self.rig.add(RX, &[Buffer::Write(70_000)]);
            self.rig.kick(RX);
            let _ = self.rig.take_used(RX);
        }
        self.rig.add(RX, &[Buffer::Write(2000)]);
        self.rig.kick(RX);
        self.net.arrive(NO_HEADER, &frame(99));
        self.rig.run();
        assert_eq!(self.received().map(|(_, frame)| frame), Some(frame(99)));
    }
}

#[test]
fn frames_of_the_guest_reach_the_network_as_they_are() {
    let mut test = test(LINUX);
    test.send(&NO_HEADER, &frame(60));
    test.send(&segment(), &frame(9000));
    assert_eq!(test.net.sent(), [(NO_HEADER, frame(60)), (segment(), frame(9000))]);
    assert_eq!(test.counters.tx_frames.get(), 2);
}

#[test]
fn header_and_frame_may_be_split_anywhere() {
    let mut test = test(LINUX);
    let bytes = [&segment()[..], &frame(100)].concat();
    for cut in [1, 11, 12, 13, 20, 25, 26, 27, 111] {
        let (first, second) = bytes.split_at(cut);
        let parts = [Buffer::Read(first), Buffer::Read(&[]), Buffer::Read(second)];
        assert_eq!(test.rig.ask(TX, &parts), Some(Vec::new()));
        assert_eq!(test.net.sent(), [(segment(), frame(100))], "{cut}");
    }
    let bytes: Vec<Buffer<'_>> = bytes[..26].chunks(2).map(Buffer::Read).collect();
    test.rig.ask(TX, &bytes).unwrap();
    assert_eq!(test.net.sent().len(), 0, "its checksum would be behind its end");
    assert_eq!(test.counters.tx_malformed.get(), 1);
}

#[test]
fn an_invalid_frame_is_dropped_and_counted() {
    let mut test = test(LINUX);
    let large = frame(MAX_FRAME as usize + 1);
    let bad: [(&[u8], &[u8]); 12] = [
        (&[], &[]),
        (&[0; 11], &[]),
        (&NO_HEADER, &[]),
        (&NO_HEADER, &[1]),
        (&NO_HEADER, &frame(13)),
        (&NO_HEADER, &large),
        (&header(1, 1, [54, 0, 34, 16]), &frame(9000)),
        (&header(0, 1, [54, 1448, 34, 16]), &frame(9000)),
        (&header(1, 3, [54, 1448, 34, 16]), &frame(9000)),
        (&header(1, 0x81, [54, 1448, 34, 16]), &frame(9000)),
        (&header(1, 0, [61, 0, 34, 16]), &frame(60)),
        (&header(1, 0, [0, 0, 43, 16]), &frame(60)),
    ];
    for (header, frame) in bad {
        test.send(header, frame);
    }
    assert_eq!(test.net.sent(), []);
    assert_eq!(test.counters.tx_malformed.get(), 12);
    test.works_after_a_reset();
}

#[test]
fn offloads_that_were_not_negotiated_are_not_passed_on() {
    let mut test = test(PLAIN);
    test.send(&segment(), &frame(9000));
    test.send(&header(1, 0, [0, 0, 34, 16]), &frame(60));
    assert_eq!((test.net.sent().len(), test.counters.tx_malformed.get()), (0, 2));
    // Undefined flags are ignored.
    test.send(&header(0xfe, 0, [0, 0, 0, 0]), &frame(60));
    assert_eq!(test.net.sent(), [(NO_HEADER, frame(60))]);
}

#[test]
fn a_frame_of_four_gibibytes_or_outside_of_ram_is_returned() {
    let mut test = test(LINUX);
    let [table, ..] = test.rig.rings(TX);
    let addr = test.rig.allocate(4096);
    for index in 0..15 {
        test.rig.set_descriptor(table, index, (addr, 4 << 20, NEXT, index + 1));
    }
    test.rig.set_descriptor(table, 15, (addr, 100, 0, 0));
    test.rig.make_available(TX, 0);
    test.rig.kick(TX);
    assert_eq!(test.rig.take_used(TX), Some((0, 0)));
    test.rig.set_descriptor(table, 3, (0x1000, 100, 0, 0));
    test.rig.make_available(TX, 3);
    test.rig.kick(TX);
    assert_eq!(test.rig.take_used(TX), Some((3, 0)));
    assert_eq!(test.net.sent(), []);
    test.works_after_a_reset();
}

#[test]
fn a_pinned_device_sends_under_its_own_address_only() {
    let settings = NetConfig { pin: true, ..NetConfig::default() };
    let mut test = test_with(&settings, PLAIN);
    test.send(&NO_HEADER, &frame(60));
    let mut other = frame(60);
    other[11] = 99;
    test.send(&NO_HEADER, &other);
    assert_eq!(test.net.sent(), [(NO_HEADER, frame(60))]);
    assert_eq!(test.counters.tx_spoofed.get(), 1);
}

#[test]
fn frames_wait_while_the_network_is_full_and_none_is_lost() {
    let mut test = test(LINUX);
    test.net.set_full(true);
    for len in [60, 61, 62] {
        test.rig.add(TX, &[Buffer::Read(&[&NO_HEADER[..], &frame(len)].concat())]);
    }
    test.rig.kick(TX);
    assert_eq!(test.rig.take_used(TX), None);
    assert_eq!(test.interest(), Some(Interest::Write));
    test.rig.kick(TX);
    test.net.set_full(false);
    test.rig.run();
    let lens: Vec<usize> = test.net.sent().iter().map(|(_, frame)| frame.len()).collect();
    assert_eq!(lens, [60, 61, 62]);
    assert_eq!((0..3).filter_map(|_| test.rig.take_used(TX)).count(), 3);
    assert_eq!(test.interest(), None);
}

#[test]
fn a_backlog_larger_than_one_pass_goes_out_without_another_kick() {
    let mut test = test(LINUX);
    test.net.set_full(true);
    let bytes = [&segment()[..], &frame(MAX_FRAME as usize)].concat();
    for _ in 0..16 {
        test.rig.add(TX, &[Buffer::Read(&bytes)]);
    }
    test.rig.kick(TX);
    test.net.set_full(false);
    turn(test.rig.device.as_mut(), 0).unwrap();
    let first = test.net.sent().len();
    assert!((1..16).contains(&first), "{first} frames in one pass");
    test.rig.run();
    assert_eq!(first + test.net.sent().len(), 16);
}

#[test]
fn frames_of_the_network_reach_the_guest_with_one_buffer_each() {
    let mut test = test(PLAIN);
    for _ in 0..3 {
        test.rig.add(RX, &[Buffer::Write(5), Buffer::Write(1), Buffer::Write(2000)]);
    }
    test.rig.kick(RX);
    assert_eq!(test.interest(), Some(Interest::Read));
    test.net.arrive(NO_HEADER, &frame(60));
    test.net.arrive(NO_HEADER, &frame(1514));
    test.rig.run();
    for len in [60, 1514] {
        assert_eq!(
            test.received(),
            Some((header(0, 0, [0; 4])[..10].iter().copied().chain([1, 0]).collect(), frame(len)))
        );
    }
    assert!(test.rig.irq.is_high());
    assert_eq!((test.received(), test.counters.rx_frames.get()), (None, 2));
}

#[test]
fn a_large_frame_fills_several_buffers_which_the_driver_sees_at_once() {
    let mut test = test(LINUX);
    for _ in 0..16 {
        test.rig.add(RX, &[Buffer::Write(4500)]);
    }
    test.rig.kick(RX);
    test.net.arrive(segment(), &frame(60_000));
    test.net.arrive(NO_HEADER, &frame(4488));
    test.net.arrive(NO_HEADER, &frame(4489));
    test.rig.run();
    let (got, bytes) = test.received().unwrap();
    assert_eq!((&got[..10], got[10], bytes == frame(60_000)), (&segment()[..10], 14, true));
    assert_eq!(test.received().map(|(header, frame)| (header[10], frame)), Some((1, frame(4488))));
    // One buffer is left, and the last frame needs two.
    assert_eq!((test.received(), test.counters.rx_too_large.get()), (None, 1));
    test.net.arrive(NO_HEADER, &frame(70));
    test.rig.run();
    assert_eq!(
        test.received().map(|(_, bytes)| bytes),
        Some(frame(70)),
        "the buffer is still there"
    );
}

#[test]
fn buffers_left_over_by_a_frame_are_used_for_the_next_one() {
    let mut test = test(LINUX);
    let add = |test: &mut Test, count: usize| {
        for _ in 0..count {
            test.rig.add(RX, &[Buffer::Write(4500)]);
        }
        test.rig.kick(RX);
    };
    add(&mut test, 16);
    for size in [60_000, 70, 60_000, 4488, 4489, 30_000, 60_000, 1500] {
        test.net.arrive(segment(), &frame(size));
        test.rig.run();
        let (got, bytes) = test.received().unwrap();
        let buffers = (size + HEADER).div_ceil(4500);
        assert_eq!((usize::from(got[10]), bytes == frame(size)), (buffers, true), "{size}");
        add(&mut test, buffers);
    }
    assert_eq!(test.counters.rx_too_large.get(), 0);
}

#[test]
fn a_polling_driver_never_sees_a_part_of_a_frame() {
    let mut test = test(LINUX);
    let [.., used] = test.rig.rings(RX);
    let memory = test.rig.memory.clone();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut seen = HashSet::new();
            while !is_over.load(SeqCst) {
                let index: u16 = memory.load(GuestAddress(used + 2), SeqCst).unwrap();
                seen.insert(index % 4);
            }
            seen
        });
        for _ in 0..500 {
            for _ in 0..4 {
                test.rig.add(RX, &[Buffer::Write(500)]);
            }
            test.rig.kick(RX);
            test.net.arrive(NO_HEADER, &frame(1900));
            test.rig.run();
            assert_eq!(test.received().map(|(header, _)| header[10]), Some(4));
        }
        is_over.store(true, SeqCst);
        assert_eq!(looks.join().unwrap(), HashSet::from([0]));
    });
}

#[test]
fn an_event_index_inside_a_frame_of_several_buffers_interrupts() {
    let mut test = test(LINUX);
    let [_, available, _] = test.rig.rings(RX);
    for _ in 0..8 {
        test.rig.add(RX, &[Buffer::Write(100)]);
    }
    test.rig.kick(RX);
    // used_event: the third buffer, which is in the middle of the frame.
    test.rig.memory.write_obj(2_u16, GuestAddress(available + 4 + 2 * 16)).unwrap();
    test.net.arrive(NO_HEADER, &frame(400));
    test.rig.run();
    assert_eq!(test.rig.acknowledge(), 1);
    assert_eq!(test.received().map(|(header, _)| header[10]), Some(5));
    // And not again before that index is reached.
    test.net.arrive(NO_HEADER, &frame(60));
    test.rig.run();
    assert_eq!(test.rig.acknowledge(), 0);
    assert!(test.received().is_some());
}

#[test]
fn a_frame_larger_than_its_only_buffer_is_dropped() {
    let mut test = test(PLAIN);
    test.rig.add(RX, &[Buffer::Write(100)]);
    test.rig.kick(RX);
    test.net.arrive(NO_HEADER, &frame(89));
    test.net.arrive(NO_HEADER, &frame(88));
    test.rig.run();
    assert_eq!(test.received().map(|(_, bytes)| bytes), Some(frame(88)));
    assert_eq!(test.counters.rx_too_large.get(), 1);
}

#[test]
fn without_buffers_the_network_is_not_watched_and_nothing_is_read() {
    let mut test = test(LINUX);
    for _ in 0..1000 {
        test.net.arrive(NO_HEADER, &frame(60));
    }
    test.rig.run();
    assert_eq!((test.interest(), test.net.reads()), (None, 0));
    for _ in 0..4 {
        test.rig.add(RX, &[Buffer::Write(2000)]);
    }
    test.rig.kick(RX);
    assert_eq!((test.net.waiting(), test.net.reads(), test.interest()), (996, 4, None));
    assert_eq!((0..5).filter_map(|_| test.received()).count(), 4);
}

#[test]
fn invalid_buffers_are_returned_empty_and_lose_no_frame() {
    let mut test = test(LINUX);
    let bad = [
        test.rig.add(RX, &[Buffer::Read(b"for reading")]),
        test.rig.add(RX, &[Buffer::Write(1)]),
        test.rig.add(RX, &[Buffer::Write(0)]),
        test.rig.add(RX, &[Buffer::Write(11)]),
    ];
    let good = test.rig.add(RX, &[Buffer::Write(2000)]);
    test.rig.kick(RX);
    test.net.arrive(NO_HEADER, &frame(60));
    test.rig.run();
    let used: Vec<_> = (0..9).map_while(|_| test.rig.take_used(RX)).collect();
    assert_eq!(used, [(bad[0], 0), (bad[1], 0), (bad[2], 0), (bad[3], 0), (good, 72)]);
}

#[test]
fn the_number_of_buffers_in_a_header_is_exact_for_buffers_of_one_byte() {
    let mut test = test(LINUX);
    test.rig.add(RX, &[Buffer::Write(12)]);
    for _ in 0..15 {
        test.rig.add(RX, &[Buffer::Write(1)]);
    }
    test.rig.kick(RX);
    test.net.arrive(NO_HEADER, &frame(60));
    test.rig.run();
    assert_eq!((test.received(), test.counters.rx_too_large.get()), (None, 1));
    test.net.arrive(NO_HEADER, &frame(15));
    test.rig.run();
    let (header, bytes) = test.received().unwrap();
    assert_eq!((header[10], bytes), (16, frame(15)));
    test.works_after_a_reset();
}

#[test]
fn empty_buffers_between_others_are_returned_and_the_frame_is_complete() {
    let mut test = test(LINUX);
    for buffer in [Buffer::Write(32), Buffer::Read(b"x"), Buffer::Write(40)] {
        test.rig.add(RX, &[buffer]);
    }
    test.rig.kick(RX);
    // The first attempt fails for lack of buffers, after one of them has been returned.
    test.net.arrive(NO_HEADER, &frame(90));
    test.rig.run();
    let first: Vec<_> = (0..3).map_while(|_| test.rig.take_used(RX)).collect();
    assert_eq!(first.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0, 0]);
    test.net.arrive(NO_HEADER, &frame(28));
    test.rig.run();
    assert_eq!(test.received().map(|(_, bytes)| bytes), Some(frame(28)));
    test.works_after_a_reset();
}

#[test]
fn frames_with_offloads_that_the_driver_lacks_are_dropped() {
    let mut test = test(PLAIN);
    test.rig.add(RX, &[Buffer::Write(20_000)]);
    test.rig.kick(RX);
    test.net.arrive(segment(), &frame(9000));
    test.net.arrive(header(1, 0, [0, 0, 34, 16]), &frame(60));
    // Flags are zero without GUEST_CSUM.
    test.net.arrive(header(2, 0, [0; 4]), &frame(61));
    test.rig.run();
    let (header, bytes) = test.received().unwrap();
    assert_eq!((header[0], bytes), (0, frame(61)));
    assert_eq!(test.counters.rx_unfit.get(), 2);
}

#[test]
fn offloads_follow_the_drivers_features() {
    let mut test = test(PLAIN);
    assert_eq!(test.net.offloads(), Offloads::default());
    test.rig.start(LINUX);
    let all = Offloads { csum: true, tso4: true, tso6: true, ecn: false };
    assert_eq!(test.net.offloads(), all);
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    assert_eq!(test.command(&set(bit::GUEST_CSUM)), [0]);
    assert_eq!(test.net.offloads(), Offloads { csum: true, ..Offloads::default() });
    assert_eq!(test.command(&set(bit::GUEST_CSUM | bit::GUEST_ECN)), [1], "not negotiated");
    assert_eq!(test.command(&set(u64::MAX)), [1]);
    assert_eq!(test.net.offloads(), Offloads { csum: true, ..Offloads::default() });
    test.rig.add(RX, &[Buffer::Write(20_000)]);
    test.rig.kick(RX);
    test.net.arrive(segment(), &frame(9000));
    test.rig.run();
    assert_eq!(test.counters.rx_unfit.get(), 1);
    assert_eq!(test.command(&set(bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::GUEST_TSO6)), [0]);
    assert_eq!(test.net.offloads(), all);
    test.rig.write(0x70, 0);
    assert_eq!(test.net.offloads(), Offloads::default());
}

#[test]
fn the_host_gets_offloads_only_when_they_change() {
    let mut test = test(PLAIN);
    for _ in 0..100 {
        test.rig.start(PLAIN);
    }
    assert_eq!(test.net.offload_changes(), 0);
    test.rig.start(LINUX);
    test.rig.start(LINUX);
    assert_eq!(test.net.offload_changes(), 3, "on, off for the reset, on");
    test.net.fail(Some(ErrorKind::PermissionDenied));
    let off = [&[5, 0][..], &[0; 8]].concat();
    assert_eq!(test.command(&off), [1], "the host refuses");
    test.net.fail(None);
    test.rig.add(RX, &[Buffer::Write(20_000)]);
    test.rig.kick(RX);
    test.net.arrive(segment(), &frame(9000));
    test.rig.run();
    assert!(test.received().is_some(), "what was agreed before still holds");
    test.works_after_a_reset();
}

#[test]
fn commands_are_answered_and_invalid_ones_with_an_error() {
    let mut test = test(LINUX);
    let table = |entries: u32, macs: usize| {
        [&[1, 0][..], &entries.to_le_bytes(), &vec![2; 6 * macs], &0_u32.to_le_bytes()].concat()
    };
    for good in [&[0, 0, 1][..], &[0, 1, 0], &table(0, 0), &table(3, 3), &table(500, 500)] {
        assert_eq!(test.command(good), [0], "{good:?}");
    }
    let huge = table(u32::MAX, 1);
    for bad in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 0, 2],
        &[0, 0, 1, 1],
        &[0, 2, 1],
        &[1, 1, 2, 0, 0, 0, 0, 1],
        &table(3, 2),
        &table(0x2aaa_aaab, 1),
        &huge,
        &[1, 0, 0, 0, 0],
        &[2, 0, 1, 0],
        &[3, 0],
        &[4, 0, 0, 0],
        &[4, 0, 0xff, 0xff],
        &[5, 0, 1],
        &[5, 1],
        &[255, 255],
    ] {
        assert_eq!(test.command(bad), [1], "{bad:?}");
    }
    assert_eq!(
        test.rig.ask(CTRL, &[Buffer::Read(&[0, 0, 1])]),
        Some(Vec::new()),
        "no room to answer"
    );
    test.rig.start(PLAIN);
    assert_eq!(test.command(&[0, 0, 1]), [1], "not negotiated");
    test.works_after_a_reset();
}

#[test]
fn the_configuration_is_the_address_the_link_and_the_mtu() {
    let settings = NetConfig { mtu: Mtu::new(9000), ..NetConfig::default() };
    let mut test = test_with(&settings, PLAIN);
    assert_eq!(test.rig.offered() & bit::MTU, bit::MTU);
    let mut config = [0; 12];
    for (at, byte) in config.iter_mut().enumerate() {
        test.rig.device.read(0x100 + at as u64, std::slice::from_mut(byte)).unwrap();
    }
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x28, 0x23]);
    let _ = test.rig.device.write(0x100, &[9]);
    assert_eq!(test.rig.read(0x100) & 0xff, 2, "the address is not the driver's");
}

#[test]
fn frames_above_the_mtu_do_not_reach_the_guest_unless_segmented() {
    let settings = NetConfig { mtu: Mtu::new(1000), ..NetConfig::default() };
    let mut test = test_with(&settings, LINUX);
    for _ in 0..3 {
        test.rig.add(RX, &[Buffer::Write(20_000)]);
    }
    test.rig.kick(RX);
    for (header, len) in [(NO_HEADER, 1019), (NO_HEADER, 1018), (segment(), 9000)] {
        test.net.arrive(header, &frame(len));
    }
    test.rig.run();
    let lens: Vec<usize> = (0..3).map_while(|_| test.received()).map(|(_, f)| f.len()).collect();
    assert_eq!(lens, [1018, 9000]);
    assert_eq!(test.counters.rx_too_large.get(), 1);
}

#[test]
fn a_network_that_is_gone_takes_the_link_down_and_the_guest_goes_on() {
    let mut test = test(LINUX);
    test.rig.add(RX, &[Buffer::Write(2000)]);
    test.rig.kick(RX);
    test.net.fail(Some(ErrorKind::NotConnected));
    test.rig.run();
    assert_eq!(test.rig.acknowledge() & 2, 2, "a change of the configuration");
    assert_eq!(test.rig.read(0x104) >> 16 & 1, 0, "link down");
    assert_eq!(test.interest(), None);
    test.send(&NO_HEADER, &frame(60));
    assert_eq!(test.counters.tx_failed.get(), 1);
}

#[test]
fn a_link_that_goes_down_and_up_is_reported() {
    let mut test = test(LINUX);
    let carrier = |test: &mut Test| (test.rig.acknowledge() & 2, test.rig.read(0x104) >> 16 & 1);
    for (is_up, expected) in [(false, (2, 0)), (false, (0, 0)), (true, (2, 1)), (true, (0, 1))] {
        test.net.set_link(is_up);
        test.rig.run();
        assert_eq!(carrier(&mut test), expected);
        assert_eq!(turn(test.rig.device.as_mut(), 0).unwrap(), 0, "the loop sleeps");
    }
    test.net.set_link(false);
    let device = Net::new(Box::new(test.net.clone()), &NetConfig::default()).unwrap();
    assert_eq!(device.config()[6], 0, "a new device finds it as it is");
}

#[test]
fn a_network_that_always_fails_does_not_keep_the_loop_awake() {
    let mut test = test(LINUX);
    test.rig.add(RX, &[Buffer::Write(2000)]);
    test.rig.kick(RX);
    test.net.fail(Some(ErrorKind::OutOfMemory));
    test.rig.run();
    assert_eq!(test.interest(), None);
    assert!(test.net.reads() <= 1100, "{}", test.net.reads());
}

#[test]
fn a_frame_that_the_host_refuses_is_counted_and_the_next_one_goes() {
    let mut test = test(LINUX);
    test.net.fail(Some(ErrorKind::InvalidInput));
    test.send(&NO_HEADER, &frame(60));
    test.net.fail(None);
    test.send(&NO_HEADER, &frame(61));
    assert_eq!(test.net.sent(), [(NO_HEADER, frame(61))]);
    assert_eq!(test.counters.tx_failed.get(), 1);
}

#[test]
fn a_reset_drops_waiting_frames_and_the_new_driver_starts_clean() {
    let mut test = test(LINUX);
    test.net.set_full(true);
    test.rig.add(TX, &[Buffer::Read(&[&NO_HEADER[..], &frame(60)].concat())]);
    test.rig.kick(TX);
    test.rig.add(RX, &[Buffer::Write(2000)]);
    test.rig.kick(RX);
    assert_eq!(test.interest(), Some(Interest::ReadWrite));
    test.rig.write(0x70, 0);
    assert_eq!(test.interest(), None);
    test.net.arrive(NO_HEADER, &frame(77));
    test.net.set_full(false);
    test.rig.run();
    assert_eq!((test.net.sent().len(), test.net.reads()), (0, 1));
    test.works_after_a_reset();
    for _ in 0..1000 {
        test.rig.write(0x70, 0);
        assert!(test.rig.negotiate(LINUX));
    }
    test.works_after_a_reset();
}

#[test]
fn one_queue_reset_alone_stops_its_direction() {
    let mut test = test(LINUX | feature::RING_RESET);
    test.rig.add(RX, &[Buffer::Write(2000)]);
    test.rig.kick(RX);
    test.rig.write(0x30, RX);
    test.rig.write(0xc0, 1);
    assert_eq!(test.interest(), None);
    test.net.arrive(NO_HEADER, &frame(60));
    test.rig.run();
    assert_eq!(test.net.waiting(), 1);
    test.send(&NO_HEADER, &frame(60));
    assert_eq!(test.net.sent().len(), 1);
}

fn tx(bps: u64, pps: u64) -> NetConfig {
    let (tx_bps, tx_pps) = (ByteRate::new(bps), FrameRate::new(pps));
    NetConfig { tx_bps, tx_pps, ..NetConfig::default() }
}

fn rx(bps: u64, pps: u64) -> NetConfig {
    let (rx_bps, rx_pps) = (ByteRate::new(bps), FrameRate::new(pps));
    NetConfig { rx_bps, rx_pps, ..NetConfig::default() }
}

#[test]
fn a_limit_delays_frames_of_the_guest() {
    let settings = tx(100_000, 0);
    let mut test = test_with(&settings, LINUX);
    let bytes = [&segment()[..], &frame(60_000)].concat();
    for _ in 0..3 {
        test.rig.add(TX, &[Buffer::Read(&bytes)]);
    }
    test.rig.kick(TX);
    assert_eq!(test.net.sent().len(), 1, "the second is over the limit");
    test.rig.kick(TX);
    let mut rest = 0;
    while rest < 2 {
        turn(test.rig.device.as_mut(), 10_000).unwrap();
        rest += test.net.sent().len();
    }
    assert_eq!(test.counters.tx_frames.get(), 3);
}

#[test]
fn a_limit_delays_frames_of_the_network_without_loss() {
    let settings = rx(0, 2);
    let mut test = test_with(&settings, LINUX);
    for _ in 0..8 {
        test.rig.add(RX, &[Buffer::Write(2000)]);
        test.net.arrive(NO_HEADER, &frame(60));
    }
    test.rig.kick(RX);
    // A frame is charged to the limit only before the next one is read.
    assert_eq!((test.net.waiting(), test.interest()), (5, None));
    while test.net.waiting() == 5 {
        turn(test.rig.device.as_mut(), 10_000).unwrap();
    }
    assert_eq!((0..8).map_while(|_| test.received()).count(), 8 - test.net.waiting());
}

#[test]
fn invalid_frames_count_against_the_limit() {
    let settings = tx(1_000_000, 4);
    let mut test = test_with(&settings, LINUX);
    for _ in 0..16 {
        test.rig.add(TX, &[Buffer::Read(b"x")]);
    }
    test.rig.kick(TX);
    assert_eq!((0..16).map_while(|_| test.rig.take_used(TX)).count(), 4);
    assert_eq!(test.counters.tx_malformed.get(), 4);
}

#[test]
fn options_select_the_backend_and_the_configuration() {
    let built = |text: &str| {
        let host = MemoryHost::default();
        let mut refusal = None;
        let mut rig = None;
        let build =
            |wiring: Wiring| create(text, Wiring { host: Arc::new(host.clone()), ..wiring });
        match build(rvmm_devices::testing::wiring()) {
            Ok(_) => rig = Some(Rig::build(|wiring| build(wiring).unwrap())),
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                refusal = Some(source.unwrap_or_default());
            }
        }
        (rig, refusal.unwrap_or_default(), host)
    };
    let (rig, _, host) =
        built("net,tap=tap7,mac=52:54:00:12:34:56,mtu=1400,pin=on,rx_bps=1,tx_pps=9");
    assert_eq!(host.networks()[0].0, NetworkSource::Tap("tap7".into()));
    let mut rig = rig.unwrap();
    assert_eq!((rig.read(0x100), rig.read(0x108) >> 16), (0x1200_5452, 1400));
    let (rig, _, host) = built("net,fd=5");
    assert_eq!(host.networks()[0].0, NetworkSource::Descriptor(5));
    let mut rig = rig.unwrap();
    assert_eq!((rig.read(0x100) & 0xff, rig.offered() & bit::MTU), (2, 0));
    for (text, part) in [
        ("net", "tap=NAME or fd=N"),
        ("net,tap=a,fd=3", "possible with tap"),
        ("net,fd=x", "descriptor"),
        ("net,tap=a,mac=01:00:00:00:00:01", "unicast"),
        ("net,tap=a,mtu=67", "68 to 65535"),
        ("net,tap=a,mtu=65536", "68 to 65535"),
        ("net,tap=a,pin=yes", "on or off"),
        ("net,tap=a,rx_pps=0", "from 1"),
        ("net,tap=a,queues=2", "it has one (leave out queues=2)"),
        ("net,tap=a,queues=0", "from 1 to 8"),
        ("net,tap=a,queues=9", "from 1 to 8"),
        ("net,fd=3,queues=2", "a descriptor has one queue pair"),
    ] {
        let (rig, refusal, _) = built(text);
        assert!(rig.is_none() && refusal.contains(part), "{text}: {refusal}");
    }
}

#[test]
fn a_device_that_was_not_started_does_not_poll_the_network() {
    let net = MemoryNet::new().unwrap();
    let device = Net::new(Box::new(net.clone()), &NetConfig::default()).unwrap();
    net.arrive(NO_HEADER, &frame(60));
    let mut sources = Vec::new();
    device.list_sources(&mut sources);
    assert!(sources.iter().all(|source| source.token != 0));
}

/// A device with this number of queue pairs, and their backends.
fn several(pairs: usize, settings: &NetConfig, features: u64) -> (Rig, Vec<MemoryNet>) {
    let nets: Vec<MemoryNet> = (0..pairs).map(|_| MemoryNet::new().unwrap()).collect();
    let end = |net: &MemoryNet| Box::new(net.clone()) as Box<dyn NetBackend>;
    let device = Net::with_queues(nets.iter().map(end).collect(), settings).unwrap();
    let mut rig = Rig::new(Box::new(device));
    rig.start(features);
    (rig, nets)
}

/// The answer to `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
fn use_pairs(rig: &mut Rig, control: u32, pairs: u16) -> Vec<u8> {
    let [low, high] = pairs.to_le_bytes();
    rig.ask(control, &[Buffer::Read(&[4, 0, low, high]), Buffer::Write(1)]).unwrap()
}

fn in_use(nets: &[MemoryNet]) -> Vec<bool> {
    nets.iter().map(MemoryNet::is_in_use).collect()
}

#[test]
fn a_driver_selects_the_number_of_queue_pairs() {
    let (mut rig, nets) = several(4, &NetConfig::default(), LINUX | bit::MQ);
    assert_eq!(rig.offered() & bit::MQ, bit::MQ);
    assert_eq!(rig.read(0x108) & 0xffff, 4, "max_virtqueue_pairs");
    assert_eq!(in_use(&nets), [true, false, false, false]);
    let bytes = [&NO_HEADER[..], &frame(60)].concat();
    // A frame that arrives too early waits.
    rig.add(7, &[Buffer::Read(&bytes)]);
    rig.add(6, &[Buffer::Write(2000)]);
    (6..8).for_each(|queue| rig.kick(queue));
    nets[3].arrive(NO_HEADER, &frame(80));
    rig.run();
    assert_eq!((nets[3].sent().len(), nets[3].waiting(), rig.take_used(6)), (0, 1, None));
    assert_eq!(use_pairs(&mut rig, 8, 4), [0]);
    rig.run();
    assert_eq!(in_use(&nets), [true; 4]);
    assert_eq!(nets[3].sent(), [(NO_HEADER, frame(60))]);
    let (head, len) = rig.take_used(6).unwrap();
    assert_eq!(rig.written(6, head)[HEADER..len as usize], frame(80));
    for wrong in [0, 5, 8, 0x8000] {
        assert_eq!(use_pairs(&mut rig, 8, wrong), [1], "{wrong}");
    }
    assert_eq!(use_pairs(&mut rig, 8, 2), [0]);
    assert_eq!(in_use(&nets), [true, true, false, false]);
    rig.ask(3, &[Buffer::Read(&bytes)]).unwrap();
    assert_eq!(nets[1].sent(), [(NO_HEADER, frame(60))]);
    rig.write(0x70, 0);
    assert_eq!(in_use(&nets), [true, false, false, false]);
}

#[test]
fn without_multiqueue_the_control_queue_follows_the_first_pair() {
    let (mut rig, nets) = several(3, &NetConfig::default(), LINUX);
    assert_eq!(rig.ask(CTRL, &[Buffer::Read(&[0, 0, 1]), Buffer::Write(1)]).unwrap(), [0]);
    assert_eq!(use_pairs(&mut rig, CTRL, 2), [1], "it was not negotiated");
    assert_eq!(in_use(&nets), [true, false, false]);
    assert_eq!(test(LINUX).rig.offered() & bit::MQ, 0, "one pair is no choice");
}

#[test]
fn a_host_that_refuses_the_queue_change_fails_the_command() {
    let (mut rig, nets) = several(3, &NetConfig::default(), LINUX | bit::MQ);
    nets[2].fail(Some(ErrorKind::PermissionDenied));
    assert_eq!(use_pairs(&mut rig, 6, 3), [1]);
    assert_eq!(in_use(&nets), [true, false, false]);
    nets[2].fail(None);
    assert_eq!(use_pairs(&mut rig, 6, 3), [0]);
    assert_eq!(in_use(&nets), [true; 3]);
}

#[test]
fn a_limit_applies_to_all_pairs_together() {
    let settings = tx(1_000_000, 4);
    let (mut rig, nets) = several(2, &settings, LINUX | bit::MQ);
    assert_eq!(use_pairs(&mut rig, 4, 2), [0]);
    let bytes = [&NO_HEADER[..], &frame(60)].concat();
    for queue in [1, 3] {
        for _ in 0..8 {
            rig.add(queue, &[Buffer::Read(&bytes)]);
        }
        rig.kick(queue);
    }
    let sent = || nets.iter().map(|net| net.sent().len()).sum::<usize>();
    assert_eq!(sent(), 4);
    let mut rest = 0;
    while rest < 12 {
        turn(rig.device.as_mut(), 10_000).unwrap();
        rest += sent();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_pairs_and_frames_does_harm(
        takes_mq in any::<bool>(),
        steps in prop::collection::vec((0_u8..5, 0_u32..8, 0_u16..5, 0_usize..3000), 1..24),
    ) {
        let features = if takes_mq { LINUX | bit::MQ } else { LINUX };
        let (mut rig, nets) = several(3, &NetConfig::default(), features);
        for (what, queue, pairs, len) in &steps {
            let queue = queue % 7;
            match what {
                0 => drop(rig.add(queue, &[Buffer::Read(&[&NO_HEADER[..], &frame(*len)].concat())])),
                1 => drop(rig.add(queue, &[Buffer::Write(*len as u32)])),
                2 => {
                    let order = [4, 0, *pairs as u8, 0];
                    let control = if takes_mq { 6 } else { 2 };
                    rig.add(control, &[Buffer::Read(&order), Buffer::Write(1)]);
                    rig.kick(control);
                }
                3 => nets[queue as usize % 3].arrive(NO_HEADER, &frame(*len)),
                _ => rig.kick(queue),
            }
            rig.run();
        }
        prop_assert_eq!(rig.read(0x104) >> 16 & 1, 1, "nobody was asked who is not in use");
        nets.iter().for_each(|net| drop(net.sent()));
        rig.start(LINUX);
        rig.ask(TX, &[Buffer::Read(&[&NO_HEADER[..], &frame(60)].concat())]).unwrap();
        prop_assert_eq!(nets[0].sent(), [(NO_HEADER, frame(60))]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_frame_and_no_buffers_do_harm(
        features in prop_oneof![Just(PLAIN), Just(LINUX), Just(LINUX & !bit::MRG_RXBUF)],
        steps in prop::collection::vec(
            (0_u8..6, any::<[u8; HEADER]>(), prop::collection::vec(0_u32..3000, 1..4), 0_usize..70_000), 1..14),
    ) {
        let mut test = test(features);
        for (what, header, sizes, len) in &steps {
            match what {
                0 => drop(test.rig.add(TX, &[Buffer::Read(header), Buffer::Read(&frame(*len))])),
                1 => {
                    let writes: Vec<_> = sizes.iter().map(|size| Buffer::Write(*size)).collect();
                    test.rig.add(RX, &writes);
                }
                2 => drop(test.rig.add(CTRL, &[Buffer::Read(&header[..*len % 12]), Buffer::Write(sizes[0])])),
                3 => test.net.arrive(*header, &frame(*len)),
                4 => test.net.set_full(len % 2 == 0),
                _ => (0..3).for_each(|queue| test.rig.kick(queue)),
            }
            test.rig.run();
        }
        while let Some((header, bytes)) = test.received() {
            prop_assert!(header[1] == 0 || features & bit::GUEST_TSO4 != 0);
            prop_assert!(bytes.len() < 70_000);
        }
        test.net.set_full(false);
        test.works_after_a_reset();
    }
}
