//! Repeated resets of every device with requests in flight: no request from before a reset writes to memory afterwards, and
//! the device works. The checker in `scenario/` sees every byte that changes.

use crate::races::Numbers;
use crate::scenario::kind::Kind;
use crate::scenario::script::Script;
use crate::scenario::stage::Stage;
use crate::scenario::works;

const RESETS: usize = 100;

/// Posts requests to every queue; in most cycles the host's backend is blocked.
fn load(stage: &mut Stage, numbers: &mut Numbers, cycle: usize) {
    if cycle % 4 != 3 {
        stage.ends.hold();
    }
    for round in 0..6 {
        let bytes = numbers.bytes(160);
        let mut script = Script::new(&bytes);
        for index in 0..stage.queues.len() {
            let request = stage.kind.request(index, &mut script);
            if stage.post(index, &request, round % 2 == 1) {
                stage.kick(index as u32);
            }
        }
        if round < cycle % 7 {
            stage.run();
        }
        if round % 2 == 0 && cycle % 4 == 3 {
            stage.ends.random_event(stage.kind, &mut script);
        }
    }
    if !cycle.is_multiple_of(3) {
        stage.run();
    }
}

fn for_all(mut test: impl FnMut(&mut Stage, &mut Numbers)) {
    for kind in Kind::ALL {
        // A disk with several queues, a balloon with all optional ones.
        let options = kind.options();
        let mut stage = Stage::new(kind, options[1 % options.len()]);
        test(&mut stage, &mut Numbers(0x5eed));
        works(&mut stage);
    }
}

fn features(cycle: usize) -> u64 {
    if cycle.is_multiple_of(2) { u64::MAX } else { 1 << 28 | crate::scenario::RING_RESET }
}

#[test]
fn every_device_is_reset_100_times_under_load() {
    for_all(|stage, numbers| {
        for cycle in 0..RESETS {
            stage.start(features(cycle), 16);
            load(stage, numbers, cycle);
            stage.reset();
            // Blocked requests complete now, without a driver that waits for them.
            stage.ends.restore();
            stage.run();
        }
    });
}

#[test]
fn a_reset_of_the_machine_is_a_reset_of_every_device() {
    for_all(|stage, numbers| {
        for cycle in 0..RESETS / 4 {
            stage.start(features(cycle), 16);
            load(stage, numbers, cycle);
            stage.device.reset();
            stage.reset();
            stage.ends.restore();
            stage.run();
        }
    });
}

#[test]
fn every_queue_is_reset_100_times_alone_under_load() {
    for_all(|stage, numbers| {
        stage.start(u64::MAX, 16);
        for cycle in 0..RESETS {
            load(stage, numbers, cycle);
            let queue = cycle % stage.queues.len();
            stage.reset_queue(queue);
            stage.ends.restore();
            stage.run();
            stage.set_up(queue, 16);
            if stage.status() != 15 {
                stage.start(u64::MAX, 16);
            }
        }
    });
}
