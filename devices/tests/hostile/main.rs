//! Hostile guests: scripts from fuzzers and from proptest, races in guest memory, resets under load.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod findings;
mod races;
mod resets;
mod rings;
mod scenario;
mod seeds;
mod written;

use proptest::prelude::*;
use scenario::kind::{Kind, Piece};
use scenario::ram::HIGH;
use scenario::stage::{CANARY, Stage};
use vm_memory::{Bytes, GuestAddress};

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_random_script_breaks_nothing_but_its_guest(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for (_, target) in scenario::TARGETS {
            target(&bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_does_not_notice_that_its_devices_are_saved_and_restored(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        every in 1_usize..8,
    ) {
        for kind in Kind::ALL {
            scenario::restored(kind, &bytes, every);
        }
    }
}

#[test]
fn every_seed_of_the_fuzzers_passes_with_saves_and_restores_in_between() {
    for (kind, name) in Kind::ALL.into_iter().zip([
        "virtio_rng",
        "virtio_blk",
        "virtio_net",
        "virtio_vsock",
        "virtio_input",
        "virtio_balloon",
        "virtio_console",
    ]) {
        let seeds = seeds::of(name);
        assert!(!seeds.is_empty(), "no seeds of {name}");
        seeds.iter().for_each(|seed| scenario::restored(kind, seed, 3));
    }
}

#[test]
fn every_seed_of_the_fuzzers_passes() {
    for (name, target) in scenario::TARGETS {
        let seeds = seeds::of(name);
        assert!(!seeds.is_empty(), "no seeds of {name}");
        seeds.iter().for_each(|seed| target(seed));
    }
}

/// A running device with one buffer of 64 bytes that it has not processed yet.
fn stage() -> Stage {
    let mut stage = Stage::new(Kind::Rng, "rng");
    stage.start(0, 16);
    assert!(stage.post(0, &[Piece::Write(64)], false));
    stage
}

#[test]
#[should_panic(expected = "the device wrote to")]
fn the_checker_finds_a_write_outside_of_all_buffers() {
    let mut stage = stage();
    stage.forge(|stage| stage.ram.memory.write_slice(&[1], GuestAddress(CANARY.start)).unwrap());
}

#[test]
#[should_panic(expected = "the device wrote to")]
fn the_checker_finds_a_write_to_a_returned_buffer() {
    let mut stage = stage();
    stage.kick(0);
    assert_eq!(stage.run(), [1]);
    let buffer = stage.ram.peek::<8>(stage.rings(0)[0]).map(u64::from_le_bytes).unwrap();
    let byte: [u8; 1] = stage.ram.peek(buffer).unwrap();
    let change = [!byte[0]];
    stage.forge(|stage| stage.ram.memory.write_slice(&change, GuestAddress(buffer)).unwrap());
}

/// Writes an element into the used ring as a device would.
fn forge(stage: &Stage, position: u64, head: u32, len: u32) {
    let used = stage.rings(0)[2];
    let element = u64::from(head) | u64::from(len) << 32;
    stage.ram.memory.write_obj(element, GuestAddress(used + 4 + 8 * position)).unwrap();
    stage.ram.memory.write_obj(position as u16 + 1, GuestAddress(used + 2)).unwrap();
}

#[test]
#[should_panic(expected = "and only 1 were available")]
fn the_checker_finds_a_chain_that_is_returned_twice() {
    let mut stage = stage();
    stage.kick(0);
    stage.run();
    stage.forge(|stage| forge(stage, 1, 0, 64));
}

#[test]
#[should_panic(expected = "was returned and was never available")]
fn the_checker_finds_a_head_that_was_never_made_available() {
    stage().forge(|stage| forge(stage, 0, 5, 0));
}

#[test]
#[should_panic(expected = "65 bytes written to 64")]
fn the_checker_finds_a_length_beyond_the_buffers() {
    stage().forge(|stage| forge(stage, 0, 0, 65));
}

#[test]
fn the_checker_accepts_a_table_inside_its_own_buffer() {
    let mut stage = stage();
    // The table of an indirect chain is its own buffer.
    stage.descriptor(HIGH.start, 0, (HIGH.start, 64, 2, 0));
    stage.descriptor(stage.rings(0)[0], 3, (HIGH.start, 16, 4, 0));
    stage.offer(0, 3);
    stage.kick(0);
    stage.run();
    scenario::works(&mut stage);
}

#[test]
fn the_checker_accepts_a_used_ring_inside_a_buffer() {
    let mut stage = stage();
    let [table, _, used] = stage.rings(0);
    stage.descriptor(table, 3, (used, 6 + 8 * 16, 2, 0));
    stage.offer(0, 3);
    stage.kick(0);
    stage.run();
    scenario::works(&mut stage);
}
