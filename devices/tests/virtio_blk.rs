//! The block device with correct and incorrect drivers (virtio 1.3, 5.2).
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::sync::Arc;

use proptest::prelude::*;
use rvmm_devices::Wiring;
use rvmm_devices::testing::{MemoryHost, create, turn, wiring};
use rvmm_devices::virtio::blk::testing::MemoryDisk;
use rvmm_devices::virtio::blk::{DiskCache, DiskFormat, DiskPlan};
use rvmm_devices::virtio::feature::RING_RESET;
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, Rig, WRITE, status};
use vm_memory::{Bytes, GuestAddress};

use Buffer::{Read, Write};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;

const SECTORS: usize = 64;
const BLK: u64 = 0x100;

/// A disk of [`SECTORS`] sectors, each filled with its number, and a driver with the flush feature.
fn rig(options: &str) -> (Rig, MemoryDisk) {
    let (mut rig, disk) = stopped(options);
    rig.start(F_FLUSH);
    (rig, disk)
}

fn stopped(options: &str) -> (Rig, MemoryDisk) {
    let disk = MemoryDisk::new(SECTORS).unwrap();
    disk.change(|bytes| {
        bytes.chunks_mut(512).enumerate().for_each(|(index, sector)| sector.fill(index as u8));
    });
    let text = format!("blk,path=disk{options}");
    let host = Arc::new(MemoryHost::with_disk(disk.clone()));
    let rig = Rig::build(|wiring| create(&text, Wiring { host, ..wiring }).unwrap());
    (rig, disk)
}

fn refusal(options: &str) -> String {
    let error = create(options, wiring()).err().unwrap();
    std::error::Error::source(&error).unwrap().to_string()
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&count.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

/// Makes a request and returns its status; the byte holds no valid status before.
fn status_of(rig: &mut Rig, buffers: &[Buffer<'_>]) -> u8 {
    let head = rig.add(0, buffers);
    rig.kick(0);
    assert_eq!(rig.take_used(0).map(|used| used.0), Some(head), "{buffers:?}");
    *rig.written(0, head).last().unwrap()
}

fn transfer(rig: &mut Rig, kind: u32, sector: u64, bytes: usize) -> u8 {
    let header = header(kind, sector);
    match kind {
        IN => status_of(rig, &[Read(&header), Write(bytes as u32), Write(1)]),
        _ => status_of(rig, &[Read(&header), Read(&vec![0xee; bytes]), Write(1)]),
    }
}

fn config(rig: &mut Rig, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    rig.device.read(BLK + offset, &mut data[..len]).unwrap();
    u64::from_le_bytes(data)
}

#[test]
fn a_disk_describes_itself() {
    let (mut rig, disk) = stopped(",queues=4");
    assert_eq!(rig.read(8), 2);
    assert_eq!(config(&mut rig, 0, 8), SECTORS as u64, "capacity");
    assert_eq!(config(&mut rig, 12, 4), 510, "seg_max");
    assert_eq!(config(&mut rig, 20, 4), 512, "blk_size");
    assert_eq!(config(&mut rig, 32, 1), 1, "writeback");
    assert_eq!(config(&mut rig, 34, 2), 4, "num_queues");
    assert_eq!(config(&mut rig, 40, 4), 1, "max_discard_seg");
    assert_eq!(config(&mut rig, 56, 1), 1, "write_zeroes_may_unmap");
    let offered = rig.offered();
    assert_eq!(offered & 0x7fff, 0b111_1010_0100_0100);
    let plan = DiskPlan {
        path: "disk".into(),
        is_read_only: false,
        cache: DiskCache::Writeback,
        format: DiskFormat::Raw,
    };
    assert_eq!(disk.plan(), Some(plan));
}

#[test]
fn a_read_only_disk_offers_only_reads_and_refuses_the_rest() {
    let (mut rig, disk) = rig(",ro=on,cache=none,format=qcow2,backing=on");
    let offered = rig.offered();
    assert_eq!(offered & 0x7fff, 0b000_0010_0110_0100);
    assert!(offered & F_RO != 0 && offered & F_MQ == 0);
    let plan = DiskPlan {
        path: "disk".into(),
        is_read_only: true,
        cache: DiskCache::None,
        format: DiskFormat::Qcow2 { has_backing: true },
    };
    assert_eq!(disk.plan(), Some(plan));
    let before = disk.bytes();
    assert_eq!(transfer(&mut rig, OUT, 0, 512), IOERR);
    for kind in [DISCARD, WRITE_ZEROES] {
        let (header, segment) = (header(kind, 0), segment(0, 1, 0));
        assert_eq!(status_of(&mut rig, &[Read(&header), Read(&segment), Write(1)]), IOERR);
    }
    assert_eq!(transfer(&mut rig, IN, 3, 512), OK);
    assert_eq!((disk.bytes() == before, disk.journal()), (true, vec!["read 1536+512".into()]));
    rig.device.write(BLK + 32, &[0]).unwrap();
    assert_eq!(config(&mut rig, 32, 1), 1, "writeback is not the driver's without the feature");
}

#[test]
fn written_data_is_read_back_in_any_layout() {
    let (mut rig, disk) = rig("");
    let data: Vec<u8> = (0..2048_u32).map(|i| (i * 7) as u8).collect();
    let head = header(OUT, 5);
    // Buffers that contain parts of both header and data, or data and status.
    let (front, back) = data.split_at(1000);
    let first = [&head[9..], front].concat();
    assert_eq!(status_of(&mut rig, &[Read(&head[..9]), Read(&first), Read(back), Write(1)]), OK);
    assert_eq!(disk.bytes()[5 * 512..9 * 512], data);
    let head = header(IN, 5);
    let read = rig.ask(0, &[Read(&head[..1]), Read(&head[1..]), Write(3), Write(2046)]).unwrap();
    assert_eq!((&read[..2048], &read[2048..]), (&data[..], &[OK][..]));
    assert_eq!(disk.bytes().len(), SECTORS * 512);
}

#[test]
fn a_range_outside_of_the_disk_is_refused_without_the_host() {
    let (mut rig, disk) = rig("");
    let before = disk.bytes();
    let end = SECTORS as u64;
    for (sector, bytes) in [
        (end, 512),
        (end - 1, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        ((1 << 55) - 1, 1024),
        (u64::MAX / 512, 1024),
    ] {
        assert_eq!(transfer(&mut rig, IN, sector, bytes), IOERR, "{sector}");
        assert_eq!(transfer(&mut rig, OUT, sector, bytes), IOERR, "{sector}");
        for kind in [DISCARD, WRITE_ZEROES] {
            let (header, segment) = (header(kind, 0), segment(sector, bytes as u32 / 512, 0));
            assert_eq!(status_of(&mut rig, &[Read(&header), Read(&segment), Write(1)]), IOERR);
        }
    }
    assert_eq!((disk.bytes() == before, disk.journal()), (true, vec![]));
    assert_eq!(transfer(&mut rig, IN, end - 1, 512), OK);
}

#[test]
fn a_length_that_is_not_whole_sectors_is_refused() {
    let (mut rig, disk) = rig("");
    for bytes in [0, 1, 511, 513, 1023] {
        assert_eq!(transfer(&mut rig, IN, 0, bytes), IOERR, "{bytes}");
        assert_eq!(transfer(&mut rig, OUT, 0, bytes), IOERR, "{bytes}");
    }
    assert_eq!(disk.journal(), Vec::<String>::new());
}

#[test]
fn a_short_header_is_an_error_and_the_excess_of_a_long_one_is_data() {
    let (mut rig, disk) = rig("");
    assert_eq!(status_of(&mut rig, &[Write(1)]), IOERR);
    assert_eq!(status_of(&mut rig, &[Read(&[0; 15]), Write(513)]), IOERR);
    assert_eq!(status_of(&mut rig, &[Write(16), Write(512), Write(1)]), IOERR);
    // One byte of data is not a sector.
    assert_eq!(status_of(&mut rig, &[Read(&header(OUT, 0)), Read(&[1]), Write(1)]), IOERR);
    assert_eq!(disk.journal(), Vec::<String>::new());
}

#[test]
fn a_request_without_room_for_a_status_comes_back_untouched() {
    let (mut rig, disk) = rig("");
    let head = header(OUT, 0);
    assert_eq!(rig.ask(0, &[Read(&head), Read(&[0; 512])]).unwrap(), b"");
    assert_eq!(rig.ask(0, &[Read(&head), Read(&[0; 512]), Write(0)]).unwrap(), b"");
    assert_eq!(disk.journal(), Vec::<String>::new());
    // The status is the last writable byte.
    assert_eq!(status_of(&mut rig, &[Read(&head), Read(&[0; 512]), Write(7)]), OK);
    assert_eq!(status_of(&mut rig, &[Read(&header(IN, 0)), Write(513)]), OK);
    assert_eq!(disk.journal(), ["write 0+512", "read 0+512"]);
}

#[test]
fn an_unknown_request_is_not_supported() {
    let (mut rig, disk) = rig("");
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 24, 0x8000_0000, 0x8000_0001, u32::MAX] {
        assert_eq!(transfer(&mut rig, kind, 0, 512), UNSUPP, "{kind}");
    }
    assert_eq!(disk.journal(), Vec::<String>::new());
}

#[test]
fn discard_and_write_zeroes_take_one_segment_of_bounded_size() {
    let (mut rig, disk) = rig("");
    for (kind, most) in [(DISCARD, 1_u32 << 21), (WRITE_ZEROES, 1 << 15)] {
        let head = header(kind, 0);
        let good = segment(1, 2, 0);
        for (data, expected) in [
            (good.to_vec(), OK),
            (vec![], IOERR),
            (good[..15].to_vec(), IOERR),
            ([&good[..], &[0]].concat(), IOERR),
            ([good, good].concat(), IOERR),
            (segment(1, 0, 0).to_vec(), IOERR),
            (segment(0, most + 1, 0).to_vec(), IOERR),
            (segment(0, u32::MAX, 0).to_vec(), IOERR),
            (segment(1, 1, 2).to_vec(), UNSUPP),
            (segment(1, 1, u32::MAX).to_vec(), UNSUPP),
            (segment(1, 1, 1).to_vec(), if kind == DISCARD { UNSUPP } else { OK }),
        ] {
            let status = status_of(&mut rig, &[Read(&head), Read(&data), Write(1)]);
            assert_eq!(status, expected, "{kind}: {data:?}");
        }
    }
    assert_eq!(disk.journal(), ["discard 512+1024", "zero 512+1024", "unmap 512+512"]);
    assert_eq!(disk.bytes()[512..1536], [0; 1024]);
}

#[test]
fn a_range_above_the_limit_of_a_request_is_refused_inside_the_disk() {
    let (mut rig, disk) = rig("");
    disk.change(|bytes| bytes.resize(((1 << 15) + 1) * 512, 1));
    assert_eq!(transfer(&mut rig, IN, 0, 512), OK);
    let head = header(WRITE_ZEROES, 0);
    let data = segment(0, (1 << 15) + 1, 0);
    assert_eq!(status_of(&mut rig, &[Read(&head), Read(&data), Write(1)]), IOERR);
    let data = segment(0, 1 << 15, 0);
    assert_eq!(status_of(&mut rig, &[Read(&head), Read(&data), Write(1)]), OK);
}

#[test]
fn a_busy_host_is_retried_without_a_kick() {
    let (mut rig, disk) = rig("");
    disk.refuse(3);
    let head = rig.add(0, &[Read(&header(IN, 1)), Write(512), Write(1)]);
    rig.kick(0);
    let mut turns = 0;
    while rig.take_used(0) != Some((head, 513)) {
        turns += 1;
        assert_ne!(turn(rig.device.as_mut(), 60_000).unwrap(), 0, "nobody looks again");
        assert!(turns < 100, "nobody may spin");
    }
    // An idle device has nothing to do.
    assert_eq!(turn(rig.device.as_mut(), 5).unwrap(), 0);
}

#[test]
fn the_id_is_at_most_20_bytes_and_can_be_given_by_the_user() {
    let (mut one, _) = rig(",serial=twenty-bytes-exactly");
    let head = header(GET_ID, 0);
    assert_eq!(one.ask(0, &[Read(&head), Write(20), Write(1)]).unwrap(), b"twenty-bytes-exactly\0");
    assert_eq!(one.ask(0, &[Read(&head), Write(1), Write(1)]).unwrap(), b"t\0");
    assert_eq!(one.ask(0, &[Read(&head), Write(1)]).unwrap(), b"\0");
    assert_eq!(one.ask(0, &[Read(&head), Read(&[0; 20])]).unwrap(), b"");
    let head = one.add(0, &[Read(&head), Write(1 << 20), Write(1)]);
    one.kick(0);
    assert_eq!(one.take_used(0), Some((head, 20)));
    let written = one.written(0, head);
    assert!(written[..20] == *b"twenty-bytes-exactly" && written[20..].iter().all(|b| *b == 0));
    let (mut derived, _) = rig("");
    let id = derived.ask(0, &[Read(&header(GET_ID, 0)), Write(20), Write(1)]).unwrap();
    assert!(id.starts_with(b"rvmm-") && id[..20].iter().all(u8::is_ascii_graphic), "{id:?}");
}

/// Makes requests and acknowledges each interrupt, until a result is held back.
fn until_held(rig: &mut Rig) {
    let is_held = |_| {
        rig.add(0, &[Read(&header(IN, 1)), Write(512), Write(1)]);
        rig.kick(0);
        assert!(rig.take_used(0).is_some());
        rig.acknowledge() == 0
    };
    // On a slow machine the hold may end before the check; then the caller tries again.
    assert!((0..8_000).any(is_held), "nothing is ever held back");
}

#[test]
fn a_held_result_interrupts_the_driver_after_a_time_out() {
    let (mut rig, _) = rig("");
    until_held(&mut rig);
    // The driver does nothing more; the timer expires soon.
    while rig.acknowledge() == 0 {
        turn(rig.device.as_mut(), 60_000).unwrap();
    }
    assert!(!rig.irq.is_high());
}

#[test]
fn a_request_without_a_kick_is_served_while_results_are_held() {
    let (mut rig, _) = rig("");
    until_held(&mut rig);
    rig.add(0, &[Read(&header(IN, 2)), Write(512), Write(1)]);
    while rig.take_used(0).is_none() {
        assert!(turn(rig.device.as_mut(), 60_000).unwrap() > 0, "the timer looks at the queue");
    }
}

#[test]
fn a_reset_while_results_are_held_drops_their_interrupt() {
    let (mut rig, _) = rig("");
    until_held(&mut rig);
    rig.write(0x70, 0);
    rig.start(F_FLUSH);
    rig.acknowledge();
    // The timer of the hold that has ended.
    while turn(rig.device.as_mut(), 5).unwrap() > 0 {}
    assert_eq!(rig.acknowledge(), 0);
    assert_eq!(transfer(&mut rig, IN, 1, 512), OK);
}

#[test]
fn a_flush_ignores_sector_and_data_and_many_are_in_flight_at_once() {
    let (mut rig, disk) = rig("");
    assert_eq!(status_of(&mut rig, &[Read(&header(FLUSH, 0)), Write(1)]), OK);
    assert_eq!(status_of(&mut rig, &[Read(&header(FLUSH, 77)), Read(&[1; 99]), Write(1)]), OK);
    assert_eq!(disk.journal(), ["flush", "flush"]);
    disk.hold();
    let heads: Vec<u16> =
        (0..8).map(|_| rig.add(0, &[Read(&header(FLUSH, 0)), Write(1)])).collect();
    rig.kick(0);
    assert_eq!((disk.waiting(), rig.take_used(0)), (8, None));
    disk.release();
    rig.run();
    for head in heads {
        assert_eq!(rig.take_used(0), Some((head, 1)));
    }
}

#[test]
fn an_image_header_written_by_a_guest_is_only_data() {
    let (mut rig, disk) = rig("");
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.resize(512, 0);
    assert_eq!(status_of(&mut rig, &[Read(&header(OUT, 0)), Read(&qcow2), Write(1)]), OK);
    rig.start(F_FLUSH);
    let read = rig.ask(0, &[Read(&header(IN, 0)), Write(512), Write(1)]).unwrap();
    assert_eq!((&read[..512], disk.bytes().len()), (&qcow2[..], SECTORS * 512));
}

#[test]
fn requests_come_back_in_any_order_each_once() {
    let (mut rig, disk) = rig("");
    disk.hold();
    let heads: Vec<u16> =
        (0..5).map(|i| rig.add(0, &[Read(&header(IN, i)), Write(512), Write(1)])).collect();
    rig.kick(0);
    for (index, expected) in [(4, 4), (0, 0), (1, 2), (1, 3), (0, 1)] {
        assert!(disk.release_one(index));
        rig.run();
        assert_eq!(rig.take_used(0), Some((heads[expected], 513)));
        let mut sector = vec![expected as u8; 512];
        sector.push(OK);
        assert_eq!(rig.written(0, heads[expected]), sector);
    }
    assert_eq!(rig.take_used(0), None);
}

#[test]
fn a_disk_that_fails_halfway_is_an_error_and_works_again() {
    let (mut rig, disk) = rig("");
    disk.fail_after(Some(100));
    assert_eq!(transfer(&mut rig, IN, 0, 512), IOERR);
    assert_eq!(transfer(&mut rig, OUT, 0, 512), IOERR);
    assert_eq!(status_of(&mut rig, &[Read(&header(FLUSH, 0)), Write(1)]), IOERR);
    disk.fail_after(None);
    assert_eq!(transfer(&mut rig, OUT, 0, 512), OK);
    assert_eq!(rig.status(), status::RUNNING);
}

#[test]
fn after_a_reset_old_requests_touch_neither_memory_nor_the_ring() {
    let (mut rig, disk) = rig("");
    disk.hold();
    let heads: Vec<u16> =
        (1..5).map(|i| rig.add(0, &[Read(&header(IN, i)), Write(512), Write(1)])).collect();
    rig.kick(0);
    assert!(disk.release_one(1), "one has ended and was not collected");
    rig.write(0x70, 0);
    assert_eq!(disk.journal(), ["drain [0, 1, 2, 3]"]);
    let untouched = |rig: &Rig, head| rig.written(0, head).iter().all(|byte| *byte == 0);
    assert!(heads.iter().all(|head| untouched(&rig, *head)));
    rig.start(F_FLUSH);
    disk.release();
    rig.run();
    assert_eq!((rig.take_used(0), disk.journal()), (None, vec![]));
    assert_eq!(transfer(&mut rig, IN, 9, 512), OK);
}

#[test]
fn ten_thousand_resets_with_requests_in_flight_leak_nothing() {
    let (mut rig, disk) = rig("");
    for _ in 0..10_000 {
        disk.hold();
        rig.add(0, &[Read(&header(IN, 1)), Write(512), Write(1)]);
        rig.kick(0);
        rig.start(F_FLUSH);
    }
    assert_eq!(disk.waiting(), 0);
    disk.release();
    // No slots leak: the lowest one is still used first.
    disk.hold();
    drop(disk.journal());
    rig.add(0, &[Read(&header(IN, 1)), Write(512), Write(1)]);
    rig.kick(0);
    rig.write(0x70, 0);
    assert_eq!(disk.journal(), ["drain [0]"]);
}

#[test]
fn a_queue_that_is_reset_alone_loses_its_requests_and_the_others_go_on() {
    let (mut rig, disk) = stopped(",queues=2");
    rig.start(F_FLUSH | F_MQ | RING_RESET);
    disk.hold();
    rig.add(0, &[Read(&header(IN, 1)), Write(512), Write(1)]);
    let other = rig.add(1, &[Read(&header(IN, 2)), Write(512), Write(1)]);
    rig.kick(0);
    rig.kick(1);
    assert_eq!(disk.waiting(), 2);
    rig.write(0x30, 0);
    assert!(rig.write(0xc0, 1));
    assert_eq!((disk.journal(), disk.waiting()), (vec!["drain [0]".into()], 1));
    disk.release();
    rig.run();
    assert_eq!(rig.take_used(1), Some((other, 513)));
    assert!(rig.set_up(0));
    assert_eq!(transfer(&mut rig, IN, 3, 512), OK);
}

#[test]
fn overlapping_requests_of_eight_queues_each_come_back_once() {
    let (mut rig, disk) = stopped(",queues=8");
    rig.start(F_FLUSH | F_MQ);
    disk.hold();
    for round in 0..4_u32 {
        for queue in 0..8 {
            let data = vec![(round * 8 + queue) as u8; 1024];
            rig.add(queue, &[Read(&header(OUT, u64::from(round))), Read(&data), Write(1)]);
            rig.write(0x50, queue);
        }
    }
    rig.run();
    assert_eq!(disk.waiting(), 32);
    disk.release();
    rig.run();
    for queue in 0..8 {
        let used: Vec<_> = std::iter::from_fn(|| rig.take_used(queue)).collect();
        assert_eq!(used.len(), 4, "queue {queue}");
        assert!(used.iter().all(|(head, len)| *len == 1 && rig.written(queue, *head) == [OK]));
    }
}

#[test]
fn a_driver_that_does_not_flush_gets_durable_writes() {
    let (mut rig, disk) = stopped("");
    rig.start(0);
    assert_eq!(transfer(&mut rig, OUT, 0, 512), OK);
    rig.start(F_FLUSH | F_CONFIG_WCE);
    assert_eq!(transfer(&mut rig, OUT, 0, 512), OK);
    rig.device.write(BLK + 32, &[0]).unwrap();
    assert_eq!(config(&mut rig, 32, 1), 0);
    assert_eq!(transfer(&mut rig, OUT, 0, 512), OK);
    rig.device.write(BLK + 32, &[7]).unwrap();
    assert_eq!(config(&mut rig, 32, 1), 0, "7 is no cache mode");
    rig.start(F_FLUSH);
    assert_eq!(config(&mut rig, 32, 1), 1, "a reset brings the cache back");
    assert_eq!(transfer(&mut rig, OUT, 0, 512), OK);
    let (once, twice) = ("durable write 0+512", "write 0+512");
    assert_eq!(disk.journal(), [once, twice, once, twice]);
}

#[test]
fn only_the_cache_mode_in_the_configuration_is_writable() {
    let (mut rig, _) = rig("");
    for offset in 0..60 {
        rig.device.write(BLK + offset, &[0]).unwrap();
    }
    assert_eq!(config(&mut rig, 0, 8), SECTORS as u64);
    assert_eq!((config(&mut rig, 20, 4), config(&mut rig, 32, 1)), (512, 0));
    rig.device.write(BLK + 28, &[1; 8]).unwrap();
    assert_eq!((config(&mut rig, 24, 8), config(&mut rig, 32, 1)), (0, 1));
    assert!(rig.device.write(BLK + 57, &[0; 4]).is_err());
}

#[test]
fn a_disk_that_changes_its_size_tells_the_driver() {
    let (mut rig, disk) = rig("");
    let generation = rig.read(0xfc);
    disk.change(|bytes| bytes.resize(100 * 512, 9));
    assert_eq!(transfer(&mut rig, IN, 64, 512), IOERR, "not known yet");
    assert_eq!(config(&mut rig, 0, 8), 100);
    assert_ne!(rig.read(0xfc), generation);
    assert_eq!(rig.acknowledge() & 2, 2);
    assert_eq!(transfer(&mut rig, IN, 99, 512), OK);
    disk.change(|bytes| bytes.truncate(512));
    assert_eq!(transfer(&mut rig, IN, 0, 512), OK);
    assert_eq!(transfer(&mut rig, IN, 1, 512), IOERR);
}

#[test]
fn the_limit_holds_requests_back_and_loses_none() {
    let (mut rig, disk) = rig(",iops=20,bps=1000000000");
    let heads: Vec<u16> =
        (0..5).map(|_| rig.add(0, &[Read(&header(FLUSH, 0)), Write(1)])).collect();
    rig.kick(0);
    let mut used: Vec<u16> = std::iter::from_fn(|| rig.take_used(0)).map(|used| used.0).collect();
    assert_eq!(used, heads);
    for _ in 0..3 {
        let heads: Vec<u16> =
            (0..8).map(|_| rig.add(0, &[Read(&header(FLUSH, 0)), Write(1)])).collect();
        rig.kick(0);
        used.clear();
        used.extend(std::iter::from_fn(|| rig.take_used(0)).map(|used| used.0));
        while used.len() < 8 {
            turn(rig.device.as_mut(), 10_000).unwrap();
            used.extend(std::iter::from_fn(|| rig.take_used(0)).map(|used| used.0));
        }
        assert_eq!(used, heads);
    }
    assert_eq!(disk.journal().len(), 29);
}

#[test]
fn the_requests_of_eight_queues_are_in_flight_at_once() {
    let (mut rig, disk) = stopped(",queues=8");
    rig.start(F_FLUSH | F_MQ);
    disk.hold();
    // A queue of the rig has 16 entries: eight requests of two descriptors each.
    let rounds = 3;
    let mut answered = 0;
    for _ in 0..rounds {
        for queue in 0..8 {
            for _ in 0..8 {
                rig.add(queue, &[Read(&header(FLUSH, 0)), Write(1)]);
            }
            rig.write(0x50, queue);
        }
        rig.run();
        assert_eq!(disk.waiting(), 64);
        disk.release();
        rig.run();
        disk.hold();
        for queue in 0..8 {
            answered += std::iter::from_fn(|| rig.take_used(queue)).count();
        }
    }
    assert_eq!(answered, rounds * 64);
}

#[test]
fn data_inside_the_ring_harms_only_the_driver() {
    let (mut rig, disk) = rig("");
    for ring in rig.rings(0) {
        let [table, ..] = rig.rings(0);
        let (head, status) = (rig.allocate(16), rig.allocate(1));
        rig.memory.write_slice(&header(IN, 7), GuestAddress(head)).unwrap();
        rig.set_descriptor(table, 0, (head, 16, NEXT, 1));
        rig.set_descriptor(table, 1, (ring, 512, NEXT | WRITE, 2));
        rig.set_descriptor(table, 2, (status, 1, WRITE, 0));
        rig.make_available(0, 0);
        rig.kick(0);
        assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(status)).unwrap(), OK);
        rig.start(F_FLUSH);
    }
    assert_eq!(disk.journal().len(), 3);
    assert_eq!(transfer(&mut rig, OUT, 0, 512), OK);
}

#[test]
fn invalid_options_are_refused_with_advice() {
    for (options, part) in [
        ("blk", "Option path= is missing"),
        ("blk,path=", "is not a path"),
        ("blk,path=a,ro=yes", "on or off"),
        ("blk,path=a,cache=directsync", "writeback, none or unsafe"),
        ("blk,path=a,queues=0", "1 to 8"),
        ("blk,path=a,queues=9", "1 to 8"),
        ("blk,path=a,iops=0", "requests"),
        ("blk,path=a,bps=fast", "bytes"),
        ("blk,path=a,serial=", "1 to 20"),
        ("blk,path=a,serial=twenty-one-bytes-long", "1 to 20"),
        ("blk,path=a,format=vmdk", "raw or qcow2"),
        ("blk,path=a,format=", "raw or qcow2"),
        ("blk,path=a,backing=on", "add format=qcow2"),
        ("blk,path=a,format=qcow2,backing=perhaps", "on or off"),
    ] {
        let text = refusal(options);
        assert!(text.contains(part), "{options}: {text}");
    }
}

proptest! {
    #[test]
    fn no_request_harms_the_device_or_changes_the_size_of_the_disk(
        requests in prop::collection::vec(
            (
                prop_oneof![0_u32..16, any::<u32>()],
                prop_oneof![0_u64..70, any::<u64>()],
                prop::collection::vec(any::<u8>(), 0..40),
                prop::collection::vec((any::<bool>(), prop_oneof![0_u32..3, Just(512), Just(1024), 0_u32..5000]), 0..5),
                0_usize..17,
            ),
            1..20,
        )
    ) {
        let (mut rig, disk) = rig("");
        for (kind, sector, extra, shape, cut) in &requests {
            let head = header(*kind, *sector);
            let zeroes = vec![0; 5000];
            let mut buffers = vec![Read(&head[..*cut.min(&16)]), Read(extra)];
            buffers.extend(shape.iter().map(|(write, len)| match write {
                true => Write(*len),
                false => Read(&zeroes[..*len as usize]),
            }));
            let used = rig.add(0, &buffers);
            rig.kick(0);
            prop_assert_eq!(rig.take_used(0).map(|used| used.0), Some(used));
            rig.start(F_FLUSH);
        }
        prop_assert_eq!(disk.bytes().len(), SECTORS * 512);
        prop_assert_eq!(transfer(&mut rig, IN, 0, 512), OK);
        prop_assert!(rig.memory.read_obj::<u8>(GuestAddress(RAM)).is_ok());
    }
}

#[test]
fn a_driver_without_version_1_is_accepted() {
    let (mut rig, _) = stopped("");
    assert!(rig.negotiate_only(F_FLUSH), "it is refused");
    assert!(!rig.negotiate_only(F_FLUSH | 1 << 63), "what was not offered is taken");
}
