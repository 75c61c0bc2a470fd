//! What fuzzers and reviews have found, each with its name: how long one pass of a device may keep the I/O thread.

use std::sync::{Arc, Mutex};

use rvmm_devices::testing::turn;
use rvmm_devices::virtio::mmio::KICK;
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, RAM_SIZE, Rig, WRITE};
use rvmm_devices::{Model, Options};

use crate::play::ram::Watched;

fn rig(options: &str) -> Rig {
    let options = Options::parse(options).unwrap();
    let mut rig =
        Rig::build(|wiring| Model::find(options.name()).unwrap().create(&options, wiring).unwrap());
    rig.start(rig_features(&options));
    rig
}

/// Streams, where there are any.
fn rig_features(options: &Options) -> u64 {
    u64::from(options.name() == "vsock")
}

/// How many requests of `queue` come back from one call of the device, and how many when it may go on.
fn served(rig: &mut Rig, queue: u32) -> (usize, usize) {
    rig.device.ready(KICK | queue);
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
    // For a stream that there is not: from 3 to 2, 64 KiB, type 1, RW.
    let header = [3_u32, 0, 2, 0, 7, 8, 64 << 10, 5 << 16 | 1, 0, 0, 0];
    let mut packet: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    packet.resize(44 + (64 << 10), 1);
    for _ in 0..16 {
        rig.add(1, &[Buffer::Read(&packet)]);
    }
    assert_eq!(served(&mut rig, 1), (8, 16));
}

#[test]
fn a_report_of_more_memory_than_a_pass_may_give_back_is_worked_off_in_turns() {
    let released = Arc::new(Mutex::new(0));
    let options = Options::parse("balloon,reporting=on").unwrap();
    let mut rig = Rig::build(|mut wiring| {
        let memory = wiring.memory.view().clone();
        wiring.memory = Arc::new(Watched { memory, released: Arc::clone(&released) });
        Model::find("balloon").unwrap().create(&options, wiring).unwrap()
    });
    rig.start(1 << 5);
    // All of RAM, sixteen times over, and not on page boundaries.
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
        let now = std::mem::take(&mut *released.lock().unwrap());
        assert!(now <= 4096 * 4096 * 2, "{now} bytes at once");
        all += now;
        calls += 1;
        assert!(calls < 100, "the device never sleeps");
    }
    assert_eq!(rig.take_used(2), Some((0, 0)));
    assert_eq!(all, 16 * (RAM_SIZE - 5));
    assert!(calls >= 8, "{calls}");
}
