//! Resets of every device, again and again, with requests on the way: nothing that was taken from a queue touches memory
//! afterwards, and the device works. The judge of `play/` sees every byte that changes.

use crate::races::Numbers;
use crate::scenario::kind::Kind;
use crate::scenario::script::Script;
use crate::scenario::stage::Stage;
use crate::scenario::works;

const RESETS: usize = 100;

/// Requests in every queue, held up at the host's end in most of the lives.
fn load(stage: &mut Stage, numbers: &mut Numbers, life: usize) {
    if life % 4 != 3 {
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
        if round < life % 7 {
            stage.run();
        }
        if round % 2 == 0 && life % 4 == 3 {
            stage.ends.happen(stage.kind, &mut script);
        }
    }
    if !life.is_multiple_of(3) {
        stage.run();
    }
}

fn for_all(mut test: impl FnMut(&mut Stage, &mut Numbers)) {
    for kind in Kind::ALL {
        // A disk of several queues, a balloon with all of them.
        let options = kind.options();
        let mut stage = Stage::new(kind, options[1 % options.len()]);
        test(&mut stage, &mut Numbers(0x5eed));
        works(&mut stage);
    }
}

fn features(life: usize) -> u64 {
    if life.is_multiple_of(2) { u64::MAX } else { 1 << 28 | crate::scenario::RING_RESET }
}

#[test]
fn every_device_is_reset_100_times_under_load() {
    for_all(|stage, numbers| {
        for life in 0..RESETS {
            stage.start(features(life), 16);
            load(stage, numbers, life);
            stage.reset();
            // Everything that was held up may go now; there is nobody left to be given it.
            stage.ends.mend();
            stage.run();
        }
    });
}

#[test]
fn a_reset_of_the_machine_is_a_reset_of_every_device() {
    for_all(|stage, numbers| {
        for life in 0..RESETS / 4 {
            stage.start(features(life), 16);
            load(stage, numbers, life);
            stage.device.reset();
            stage.reset();
            stage.ends.mend();
            stage.run();
        }
    });
}

#[test]
fn every_queue_is_reset_100_times_alone_under_load() {
    for_all(|stage, numbers| {
        stage.start(u64::MAX, 16);
        for life in 0..RESETS {
            load(stage, numbers, life);
            let queue = life % stage.queues.len();
            stage.reset_queue(queue);
            stage.ends.mend();
            stage.run();
            stage.set_up(queue, 16);
            if stage.status() != 15 {
                stage.start(u64::MAX, 16);
            }
        }
    });
}
