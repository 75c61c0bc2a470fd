//! The memory balloon with its driver: valid pages, pages outside of RAM, and too many of them.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use proptest::prelude::*;
use rvmm_devices::testing::{create, turn, wiring};
use rvmm_devices::virtio::balloon::BalloonControl;
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, RAM_SIZE, Rig, WRITE};
use vm_memory::{Bytes, GuestAddress};

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

/// A page in the middle of RAM without rings or buffers of a test.
const FREE: u64 = RAM + (6 << 20);

fn rig(options: &str) -> Rig {
    Rig::build(|wiring| create(options, wiring).unwrap())
}

fn started(options: &str) -> Rig {
    let mut rig = rig(options);
    let features = rig.offered() & 0xff_ffff;
    rig.start(features);
    rig
}

fn list(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
    pages.into_iter().flat_map(|page| ((page / 4096) as u32).to_le_bytes()).collect()
}

fn mark(rig: &Rig, page: u64) {
    rig.memory.write_slice(&[0xee; 4096], GuestAddress(page)).unwrap();
}

fn is_gone(rig: &Rig, page: u64) -> bool {
    let mut bytes = [1; 4096];
    rig.memory.read_slice(&mut bytes, GuestAddress(page)).unwrap();
    bytes == [0; 4096]
}

#[test]
fn the_options_are_the_features_and_the_target() {
    let offered = |options: &str| rig(options).offered() & 0xff_ffff;
    assert_eq!(offered("balloon"), DEFLATE_ON_OOM);
    assert_eq!(offered("balloon,deflate_on_oom=off,stats=0"), 0);
    assert_eq!(offered("balloon,stats=5,reporting=on"), DEFLATE_ON_OOM | STATS_VQ | PAGE_REPORTING);
    let mut rig = rig("balloon,size=64");
    assert_eq!([8, 0x100, 0x104].map(|register| rig.read(register)), [5, 64 * 256, 0]);
    rig.device.write(0x100, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    assert_eq!([0x100, 0x104].map(|register| rig.read(register)), [64 * 256, 0x0807_0605]);
    for text in ["size=-1", "size=16777216", "stats=x", "reporting=yes", "deflate_on_oom=1"] {
        assert!(create(&format!("balloon,{text}"), wiring()).is_err(), "{text}");
    }
}

#[test]
fn pages_in_the_balloon_are_released_and_their_neighbours_are_not() {
    let mut rig = started("balloon");
    let pages = [3, 1, 7, 2, 9].map(|n| FREE + n * 4096);
    (0..12).for_each(|n| mark(&rig, FREE + n * 4096));
    let numbers = list(pages);
    let (front, back) = numbers.split_at(6);
    assert_eq!(rig.ask(INFLATE, &[Buffer::Read(front), Buffer::Read(back)]).unwrap(), b"");
    for n in 0..12 {
        let page = FREE + n * 4096;
        assert_eq!(is_gone(&rig, page), pages.contains(&page), "page {n}");
    }
    // Deflates, also pages that were never in the balloon.
    assert_eq!(rig.ask(DEFLATE, &[Buffer::Read(&list([FREE, FREE + 4096]))]).unwrap(), b"");
    mark(&rig, FREE + 4096);
    assert!(!is_gone(&rig, FREE + 4096));
}

#[test]
fn pages_outside_of_ram_are_ignored() {
    let mut rig = started("balloon");
    mark(&rig, FREE);
    mark(&rig, RAM + RAM_SIZE - 4096);
    let numbers =
        list([0, 0x1000_0000, RAM - 4096, RAM + RAM_SIZE, u64::from(u32::MAX) * 4096, FREE, FREE]);
    assert_eq!(rig.ask(INFLATE, &[Buffer::Read(&numbers)]).unwrap(), b"");
    assert!(is_gone(&rig, FREE), "the one that is");
    assert!(!is_gone(&rig, RAM + RAM_SIZE - 4096));
    rig.ask(INFLATE, &[Buffer::Read(&list([RAM + RAM_SIZE - 4096]))]).unwrap();
    assert!(is_gone(&rig, RAM + RAM_SIZE - 4096));
}

#[test]
fn lists_of_invalid_length_are_returned_unread() {
    let mut rig = started("balloon");
    mark(&rig, FREE);
    let numbers = list([FREE]);
    for bytes in [&numbers[..3], &[&numbers[..], &[0]].concat(), b""] {
        assert_eq!(rig.ask(INFLATE, &[Buffer::Read(bytes)]).unwrap(), b"");
        assert!(!is_gone(&rig, FREE), "{} bytes", bytes.len());
    }
    assert_eq!(rig.ask(INFLATE, &[Buffer::Write(64)]).unwrap(), b"");
    // A byte more than a MiB, in one buffer and in two.
    let table = rig.rings(INFLATE)[0];
    rig.memory.write_slice(&numbers, GuestAddress(RAM + (2 << 20))).unwrap();
    rig.set_descriptor(table, 0, (RAM + (2 << 20), (1 << 20) + 4, 0, 0));
    rig.make_available(INFLATE, 0);
    rig.set_descriptor(table, 1, (RAM + (2 << 20), 1 << 20, NEXT, 2));
    rig.set_descriptor(table, 2, (RAM + (2 << 20), 4, 0, 0));
    rig.make_available(INFLATE, 1);
    rig.kick(INFLATE);
    assert_eq!([rig.take_used(INFLATE), rig.take_used(INFLATE)], [Some((0, 0)), Some((1, 0))]);
    assert!(!is_gone(&rig, FREE));
}

#[test]
fn a_long_list_is_processed_in_several_passes() {
    let mut rig = started("balloon");
    mark(&rig, FREE);
    let mut numbers = list(std::iter::repeat_n(FREE + 4096, 1 << 18));
    numbers.splice((1 << 20) - 4.., list([FREE]));
    let head = rig.add(INFLATE, &[Buffer::Read(&numbers)]);
    rig.write(0x50, INFLATE);
    let mut turns = 0;
    while rig.take_used(INFLATE).map(|(used, _)| used) != Some(head) {
        assert!(!is_gone(&rig, FREE), "the last page comes last");
        assert!(turn(rig.device.as_mut(), 0).unwrap() > 0, "the rest is forgotten");
        turns += 1;
    }
    assert!((64..70).contains(&turns), "{turns} turns");
    assert!(is_gone(&rig, FREE));
    // A reset in the middle forgets the rest.
    mark(&rig, FREE);
    rig.add(INFLATE, &[Buffer::Read(&numbers)]);
    rig.write(0x50, INFLATE);
    turn(rig.device.as_mut(), 0).unwrap();
    rig.start(0);
    assert!(!is_gone(&rig, FREE));
    assert_eq!(rig.take_used(INFLATE), None);
    rig.ask(INFLATE, &[Buffer::Read(&list([FREE]))]).unwrap();
    assert!(is_gone(&rig, FREE));
}

#[test]
fn a_guest_that_gives_its_own_rings_harms_only_itself() {
    let mut rig = started("balloon");
    let rings = rig.rings(INFLATE);
    rig.add(INFLATE, &[Buffer::Read(&list(rings))]);
    rig.kick(INFLATE);
    rig.add(INFLATE, &[Buffer::Read(&list([FREE]))]);
    rig.kick(INFLATE);
    rig.start(0);
    mark(&rig, FREE);
    rig.ask(INFLATE, &[Buffer::Read(&list([FREE]))]).unwrap();
    assert!(is_gone(&rig, FREE));
}

#[test]
fn free_pages_that_are_reported_are_released_whole() {
    for (options, queue) in [("balloon,reporting=on", 2), ("balloon,stats=3600,reporting=on", 3)] {
        let mut rig = started(options);
        (0..8).for_each(|n| mark(&rig, FREE + n * 4096));
        let table = rig.rings(queue)[0];
        rig.set_descriptor(table, 0, (FREE, 4096, WRITE | NEXT, 1));
        // Only whole pages.
        rig.set_descriptor(table, 1, (FREE + 2 * 4096 + 1, 3 * 4096, WRITE, 0));
        rig.make_available(queue, 0);
        rig.kick(queue);
        assert_eq!(rig.take_used(queue), Some((0, 0)));
        let gone: Vec<u64> = (0..8).filter(|n| is_gone(&rig, FREE + n * 4096)).collect();
        assert_eq!(gone, [0, 3, 4]);
        // A range that is not completely RAM is refused as a whole.
        mark(&rig, RAM + RAM_SIZE - 4096);
        rig.set_descriptor(table, 2, (RAM + RAM_SIZE - 4096, 8192, WRITE, 0));
        rig.make_available(queue, 2);
        rig.kick(queue);
        assert_eq!(rig.take_used(queue), Some((2, 0)));
        assert!(!is_gone(&rig, RAM + RAM_SIZE - 4096));
    }
}

#[test]
fn without_the_feature_the_queue_is_ignored() {
    let mut rig = rig("balloon,reporting=on");
    rig.start(0);
    mark(&rig, FREE);
    let table = rig.rings(2)[0];
    rig.set_descriptor(table, 0, (FREE, 4096, WRITE, 0));
    rig.make_available(2, 0);
    rig.kick(2);
    assert_eq!(rig.take_used(2), None);
    assert!(!is_gone(&rig, FREE));
}

#[test]
fn the_guest_is_asked_for_statistics_periodically() {
    let mut rig = started("balloon,stats=1");
    let stats = [4_u16.to_le_bytes().as_slice(), &7_u64.to_le_bytes(), &[1, 2, 3]].concat();
    for _ in 0..2 {
        let head = rig.add(2, &[Buffer::Read(&stats)]);
        rig.kick(2);
        assert_eq!(rig.take_used(2), None, "kept until it is wanted");
        while rig.take_used(2).map(|(used, _)| used) != Some(head) {
            assert!(turn(rig.device.as_mut(), 10_000).unwrap() > 0, "nobody asks");
        }
    }
    // A second buffer returns the first one.
    let first = rig.add(2, &[Buffer::Read(b"")]);
    let second = rig.add(2, &[Buffer::Read(&[0; 5000])]);
    rig.kick(2);
    assert_eq!(rig.take_used(2), Some((first, 0)));
    rig.start(rig_features());
    assert_eq!(rig.take_used(2), None, "{second} is forgotten");
}

fn rig_features() -> u64 {
    STATS_VQ
}

proptest! {
    #[test]
    fn no_list_makes_the_device_panic_or_spin(
        lists in prop::collection::vec((0_u32..4, prop::collection::vec(any::<u32>(), 0..40), any::<bool>()), 1..16)
    ) {
        let mut rig = started("balloon,stats=3600,reporting=on");
        for (queue, numbers, is_near) in lists {
            let near = |n: &u32| if is_near { (RAM / 4096) as u32 + 1500 + n % 600 } else { *n };
            let bytes: Vec<u8> = numbers.iter().map(near).flat_map(u32::to_le_bytes).collect();
            rig.add(queue, &[Buffer::Read(&bytes)]);
            rig.kick(queue);
        }
        prop_assert_eq!(rig.status() & 15, 15);
    }
}

/// A balloon and the control for its target.
fn controlled(options: &str) -> (Rig, BalloonControl) {
    let control = BalloonControl::new().unwrap();
    let rig = Rig::build(|mut wiring| {
        wiring.balloon = Some(control.clone());
        create(options, wiring).unwrap()
    });
    (rig, control)
}

#[test]
fn a_target_that_is_set_while_the_guest_runs_is_announced_to_it() {
    let (mut rig, control) = controlled("balloon,size=64");
    assert_eq!(control.target(), 64 << 20);
    rig.start(DEFLATE_ON_OOM);
    let (pages, generation) = (0x100, 0xfc);
    assert_eq!(rig.read(pages), 64 * 256);
    let before = rig.read(generation);
    control.set_target((100 << 20) + 4095).unwrap();
    rig.run();
    assert_eq!(rig.read(pages), 100 * 256, "whole pages");
    assert_ne!(rig.read(generation), before);
    assert_eq!(rig.read(0x60), 2, "the interrupt says that the configuration has changed");
    rig.write(0x64, 2);
    control.set_target(100 << 20).unwrap();
    rig.run();
    assert_eq!(rig.read(0x60), 0, "nothing has changed");
}

#[test]
fn the_size_reported_by_the_guest_can_be_read() {
    let (mut rig, control) = controlled("balloon");
    rig.start(0);
    assert_eq!(control.actual(), 0);
    rig.write(0x104, 0x1234);
    assert_eq!(control.actual(), 0x1234 * 4096);
    rig.write(0x104, u32::MAX);
    assert_eq!(control.actual(), u64::from(u32::MAX) * 4096, "a guest may say anything");
    rig.write(0x70, 0);
    assert_eq!(control.actual(), 0, "a reset empties the balloon");
}

#[test]
fn the_target_survives_a_reboot_and_has_a_limit() {
    let (rig, control) = controlled("balloon,size=8");
    let refused = control.set_target(1 << 44).unwrap_err();
    assert!(refused.to_string().contains("17592186044416"), "{refused}");
    control.set_target((1 << 44) - 1).unwrap();
    control.set_target(16 << 20).unwrap();
    drop(rig);
    let options = "balloon,size=8";
    let mut next = Rig::build(|mut wiring| {
        wiring.balloon = Some(control.clone());
        create(options, wiring).unwrap()
    });
    assert_eq!(next.read(0x100), 16 * 256);
}
