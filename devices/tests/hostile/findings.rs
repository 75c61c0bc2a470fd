//! Regression tests for findings of fuzzers and reviews: how long one pass of a device may occupy the I/O thread, and what
//! it waits for.

use std::sync::Arc;

use rvmm_devices::testing::{MemoryHost, create, dispatch_event, turn};
use rvmm_devices::virtio::blk::testing::MemoryDisk;
use rvmm_devices::virtio::mmio::KICK;
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, RAM_SIZE, Rig, WRITE};

use crate::scenario::ram::Watched;

fn rig(options: &str) -> Rig {
    let mut rig = Rig::build(|wiring| create(options, wiring).unwrap());
    rig.start(rig_features(options));
    rig
}

/// The features to negotiate: streams for a vsock device.
fn rig_features(options: &str) -> u64 {
    u64::from(options.starts_with("vsock,"))
}

/// Number of requests of `queue` that are returned by one call of the device, and in total.
fn served(rig: &mut Rig, queue: u32) -> (usize, usize) {
    dispatch_event(rig.device.as_mut(), KICK | queue);
    let first = std::iter::from_fn(|| rig.take_used(queue)).count();
    rig.run();
    (first, first + std::iter::from_fn(|| rig.take_used(queue)).count())
}

#[test]
fn one_pass_draws_a_quarter_of_a_mib_of_random_numbers_and_the_next_goes_on() {
    let mut rig = rig("rng");
    for _ in 0..16 {
        rig.add(0, &[Buffer::Write(64 << 10)]);
    }
    assert_eq!(served(&mut rig, 0), (4, 16));
}

#[test]
fn one_pass_takes_half_a_mib_of_a_guests_packets_and_the_next_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = rig(&format!("vsock,path={}", folder.path().join("s").display()));
    // For a stream that does not exist: from 3 to 2, 64 KiB, type 1, RW.
    let header = [3_u32, 0, 2, 0, 7, 8, 64 << 10, 5 << 16 | 1, 0, 0, 0];
    let mut packet: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    packet.resize(44 + (64 << 10), 1);
    for _ in 0..16 {
        rig.add(1, &[Buffer::Read(&packet)]);
    }
    assert_eq!(served(&mut rig, 1), (8, 16));
}

#[test]
fn a_report_of_more_memory_than_a_pass_may_release_takes_several_passes() {
    let mut watched = None;
    let mut rig = Rig::build(|mut wiring| {
        let memory = watched.insert(Watched::new(wiring.memory.view().clone()));
        wiring.memory = Arc::new(memory.clone());
        create("balloon,reporting=on", wiring).unwrap()
    });
    rig.start(1 << 5);
    // All of RAM, sixteen times, not page-aligned.
    let table = rig.rings(2)[0];
    for index in 0..16 {
        let flags = if index < 15 { WRITE | NEXT } else { WRITE };
        rig.set_descriptor(table, index, (RAM + 5, RAM_SIZE as u32 - 5, flags, index + 1));
    }
    rig.make_available(2, 0);
    rig.write(0x50, 2);
    let mut all = 0;
    let mut calls = 0;
    while turn(rig.device.as_mut(), 0).unwrap() > 0 {
        let now = watched.as_ref().unwrap().take_released();
        assert!(now <= 4096 * 4096 * 2, "{now} bytes at once");
        all += now;
        calls += 1;
        assert!(calls < 100, "the device never sleeps");
    }
    assert_eq!(rig.take_used(2), Some((0, 0)));
    assert_eq!(all, 16 * (RAM_SIZE - 5));
    assert!(calls >= 8, "{calls}");
}

/// A disk with two queues whose host does not complete requests, and a read of its first sector in flight.
fn stuck(features: u64) -> (Rig, MemoryDisk, u16) {
    let disk = MemoryDisk::new(8).unwrap();
    disk.change(|bytes| bytes.fill(0xd5));
    let mut rig = Rig::build(|mut wiring| {
        wiring.host = Arc::new(MemoryHost::with_disk(disk.clone()));
        create("blk,path=d,queues=2", wiring).unwrap()
    });
    rig.start(features);
    disk.get_stuck();
    let head = rig.add(0, &[Buffer::Read(&[0; 16]), Buffer::Write(512), Buffer::Write(1)]);
    rig.kick(0);
    (rig, disk, head)
}

fn reads(rig: &mut Rig) {
    let request = [Buffer::Read(&[0; 16]), Buffer::Write(512), Buffer::Write(1)];
    assert!(rig.ask(0, &request).unwrap().starts_with(&[0xd5; 512]));
}

#[test]
fn a_reset_does_not_wait_for_a_disk_that_hangs_and_is_over_when_the_disk_has_answered() {
    let (mut rig, disk, _) = stuck(0);
    for value in [0, 1, 3, 11, 15, 0] {
        rig.write(0x70, value);
        // The host may still write to memory: the driver sees a device that needs a reset.
        assert_eq!(rig.status(), 64, "after {value}");
    }
    rig.run();
    assert_eq!(rig.status(), 64);
    disk.release();
    rig.run();
    assert_eq!(rig.status(), 0);
    rig.start(0);
    assert_eq!(rig.take_used(0), None);
    reads(&mut rig);
}

#[test]
fn a_queue_that_is_reset_alone_is_not_set_up_again_before_its_disk_has_answered() {
    let (mut rig, disk, _) = stuck(1 << 40);
    rig.write(0x30, 0);
    rig.write(0xc0, 1);
    for _ in 0..2 {
        assert_eq!((rig.read(0xc0), rig.read(0x44)), (1, 0));
        assert!(!rig.write(0x80, 0) && !rig.write(0x44, 1));
        rig.run();
    }
    disk.release();
    rig.run();
    assert_eq!((rig.read(0xc0), rig.status()), (0, 15));
    rig.set_up(0);
    reads(&mut rig);
}

#[test]
fn a_ring_that_breaks_while_the_disk_hangs_breaks_only_its_device() {
    let (mut rig, disk, head) = stuck(0);
    rig.make_available(0, head);
    rig.kick(0);
    assert_eq!(rig.status() & 64, 64);
    disk.release();
    rig.run();
    assert_eq!(rig.take_used(0), None, "a broken device is silent");
    rig.start(0);
    reads(&mut rig);
}
