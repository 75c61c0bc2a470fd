//! The list of driver errors in rings (docs/hostile-guests.md, group B), against every queue of every device: the request is
//! returned or the device needs a reset, and after a reset it works.

use crate::scenario::RING_RESET;
use crate::scenario::kind::Kind;
use crate::scenario::ram::{HIGH, LOW};
use crate::scenario::script::Script;
use crate::scenario::stage::{BUFFERS, Stage};
use crate::scenario::works;

const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const NEEDS_RESET: u32 = 64;

/// Applies `wrong` to each queue of each device, kicks, and checks the device.
fn each(features: u64, wrong: impl Fn(&mut Stage, usize)) {
    for kind in Kind::ALL {
        let mut stage = Stage::new(kind, kind.options()[0]);
        for queue in 0..stage.queues.len() {
            stage.start(features, SIZE.into());
            // Backends complete requests at once.
            wrong(&mut stage, queue);
            stage.kick(queue as u32);
            stage.run();
            let status = stage.status();
            assert_eq!(status & !NEEDS_RESET, 15, "{kind:?}, queue {queue}");
        }
        works(&mut stage);
    }
}

fn descriptor(stage: &mut Stage, queue: usize, index: u16, fields: (u64, u32, u16, u16)) {
    let table = stage.rings(queue)[0];
    stage.descriptor(table, index, fields);
}

#[test]
fn chains_that_are_loops_come_back() {
    for length in [1, 2, SIZE] {
        for flags in [NEXT, NEXT | WRITE] {
            each(0, |stage, queue| {
                for index in 0..length {
                    let next = (index + 1) % length;
                    descriptor(stage, queue, index, (BUFFERS, 64, flags, next));
                }
                stage.offer(queue, 0);
            });
        }
    }
}

#[test]
fn indices_outside_of_the_table_are_no_descriptors() {
    for next in [SIZE, SIZE + 1, 0x8000, u16::MAX] {
        each(0, |stage, queue| {
            descriptor(stage, queue, 0, (BUFFERS, 64, NEXT, next));
            stage.offer(queue, 0);
        });
        each(0, |stage, queue| stage.offer(queue, next));
    }
    each(0, |stage, queue| {
        let available = stage.rings(queue)[1];
        stage.poke(available + 4, &[0xff; 2 * SIZE as usize]);
        stage.poke(available + 2, &SIZE.to_le_bytes());
    });
}

#[test]
fn invalid_indirect_tables_come_back() {
    let table = HIGH.start;
    let fields = [
        (table, 0, INDIRECT, 0),
        (table, 8, INDIRECT, 0),
        (table, 17, INDIRECT, 0),
        (table, 16, INDIRECT | NEXT, 1),
        (table, 16, INDIRECT | WRITE, 0),
        (table, 16 * 65_535, INDIRECT, 0),
        (table, u32::MAX, INDIRECT, 0),
        (HIGH.end - 8, 16, INDIRECT, 0),
        (HIGH.end, 16, INDIRECT, 0),
        (u64::MAX - 7, 16, INDIRECT, 0),
        (0x1000_0000, 16, INDIRECT, 0),
        (LOW.start + 0x1000, 16, INDIRECT, 0),
    ];
    for features in [0, INDIRECT_DESC] {
        for fields in fields {
            each(features, |stage, queue| {
                // A table inside a table.
                stage.descriptor(table, 0, (table, 16, INDIRECT, 0));
                descriptor(stage, queue, 0, fields);
                descriptor(stage, queue, 1, (BUFFERS, 8, 0, 0));
                stage.offer(queue, 0);
            });
        }
    }
}

#[test]
fn buffers_outside_of_ram_come_back_and_odd_ones_harm_only_the_guest() {
    let buffers = [
        (0, 64),
        (LOW.end, 64),
        (LOW.end - 8, 64),
        (HIGH.end - 1, 2),
        (LOW.end - 8, (HIGH.start - LOW.end) as u32 + 16),
        (u64::MAX - 7, 64),
        (u64::MAX, u32::MAX),
        (BUFFERS, u32::MAX),
        (BUFFERS, 0),
        (0x1000_0000, 8),
        (0x0c00_0000, 8),
        (LOW.start, 64),
    ];
    for (addr, len) in buffers {
        for flags in [0, WRITE, NEXT, NEXT | WRITE] {
            each(INDIRECT_DESC, |stage, queue| {
                descriptor(stage, queue, 0, (addr, len, flags, 1));
                descriptor(stage, queue, 1, (BUFFERS, 1, WRITE, 0));
                stage.offer(queue, 0);
            });
        }
    }
}

#[test]
fn buffers_of_the_wrong_direction_stay_as_they_are() {
    for order in [[WRITE, 0, 0], [0, 0, 0], [WRITE, WRITE, WRITE], [WRITE, 0, WRITE]] {
        for len in [0, 1, 11, 12, 15, 16, 17, 43, 44, 512] {
            each(0, |stage, queue| {
                for (index, flags) in (0..).zip(order) {
                    let next = if index < 2 { NEXT } else { 0 };
                    let addr = BUFFERS + 1024 * u64::from(index);
                    descriptor(stage, queue, index, (addr, len, flags | next, index + 1));
                }
                stage.offer(queue, 0);
            });
        }
    }
}

#[test]
fn a_head_made_available_twice_is_served_once_at_a_time() {
    for times in [2, SIZE] {
        each(0, |stage, queue| {
            stage.ends.hold();
            descriptor(stage, queue, 0, (BUFFERS, 16, NEXT, 1));
            descriptor(stage, queue, 1, (BUFFERS + 16, 513, WRITE, 0));
            (0..times).for_each(|_| stage.offer(queue, 0));
        });
    }
}

#[test]
fn an_available_index_may_be_anything() {
    for index in [SIZE + 1, 0x7fff, 0x8000, u16::MAX, SIZE] {
        for features in [0, EVENT_IDX] {
            each(features, |stage, queue| {
                let available = stage.rings(queue)[1];
                stage.poke(available + 2, &index.to_le_bytes());
            });
        }
    }
}

#[test]
fn the_used_ring_is_the_devices_whatever_the_driver_writes_there() {
    for features in [0, EVENT_IDX] {
        each(features, |stage, queue| {
            for round in 0..20_u8 {
                let used = stage.rings(queue)[2];
                stage.poke(used, &[round.wrapping_mul(37); 6 + 8 * SIZE as usize]);
                let bytes = [round; 64];
                let request = stage.kind.request(queue, &mut Script::new(&bytes));
                stage.post(queue, &request, false);
                stage.kick(queue as u32);
                stage.run();
            }
        });
    }
}

#[test]
fn kicks_without_a_reason_cost_nothing() {
    for kind in Kind::ALL {
        let mut stage = Stage::new(kind, kind.options()[0]);
        let kicks = |stage: &mut Stage| {
            for kick in 0..3000 {
                stage.kick(kick % 12);
            }
            assert!(stage.run().iter().all(|count| *count == 0));
        };
        kicks(&mut stage);
        stage.start(EVENT_IDX, SIZE.into());
        kicks(&mut stage);
        stage.reset();
        kicks(&mut stage);
        stage.start(RING_RESET, SIZE.into());
        (0..stage.queues.len()).for_each(|queue| stage.reset_queue(queue));
        kicks(&mut stage);
        works(&mut stage);
    }
}

#[test]
fn a_driver_that_ignores_the_used_ring_fills_only_its_own_ring() {
    for kind in Kind::ALL {
        for size in [1, 2, 16] {
            let mut stage = Stage::new(kind, kind.options()[0]);
            stage.start(0, size);
            let mut back = 0;
            for round in 0..60_u32 {
                let bytes = round.to_le_bytes().repeat(20);
                for queue in 0..stage.queues.len() {
                    let request = kind.request(queue, &mut Script::new(&bytes));
                    // One buffer, which fits any queue.
                    stage.post(queue, &request[..request.len().min(1)], false);
                    stage.kick(queue as u32);
                    back += stage.run().iter().sum::<u64>();
                }
            }
            assert!(back > 0 || size == 1, "{kind:?}");
            works(&mut stage);
        }
    }
}

#[test]
fn a_driver_gets_only_its_own_features_after_one_with_more() {
    for kind in Kind::ALL {
        let mut stage = Stage::new(kind, kind.options()[0]);
        stage.start(u64::MAX, SIZE.into());
        stage.start(0, SIZE.into());
        // Indirect tables are not negotiated this time: their descriptors are not buffers.
        for index in 0..stage.queues.len() {
            let table = stage.rings(index)[0];
            stage.descriptor(HIGH.start, 0, (BUFFERS, 4096, WRITE, 0));
            stage.descriptor(table, 0, (HIGH.start, 16, INDIRECT, 0));
            stage.offer(index, 0);
            stage.kick(index as u32);
        }
        // Gives devices that send to the guest something to send.
        (0..4).for_each(|_| stage.ends.random_event(kind, &mut Script::new(&[7])));
        stage.run();
        assert_eq!(stage.ram.peek::<64>(BUFFERS).unwrap(), [0; 64], "{kind:?}");
        works(&mut stage);
    }
}

#[test]
fn an_unacknowledged_interrupt_stays_and_the_device_is_idle() {
    for kind in Kind::ALL {
        let mut stage = Stage::new(kind, kind.options()[0]);
        works(&mut stage);
        stage.start(0, SIZE.into());
        // A queue that the device processes on every kick.
        let queue = usize::from(!matches!(kind, Kind::Rng | Kind::Blk | Kind::Balloon));
        descriptor(&mut stage, queue, 0, (BUFFERS, 64, NEXT, 64));
        stage.offer(queue, 0);
        stage.kick(queue as u32);
        stage.run();
        for _ in 0..10 {
            assert_eq!(stage.read(0x60), 1, "{kind:?}");
            assert!(stage.run().iter().all(|count| *count == 0));
        }
        stage.write(0x64, 0xffff_fffe);
        assert_eq!(stage.read(0x60), 1, "{kind:?}: a cause that was not acknowledged is lost");
        stage.write(0x64, 1);
        assert_eq!(stage.read(0x60), 0);
        works(&mut stage);
    }
}

#[test]
fn a_queue_is_not_reset_alone_where_that_was_not_negotiated() {
    for kind in Kind::ALL {
        let mut stage = Stage::new(kind, kind.options()[0]);
        stage.start(0, SIZE.into());
        for value in [0, 1, 2, u32::MAX] {
            stage.write(0x30, 0);
            stage.write(0xc0, value);
            assert_eq!(stage.read(0x44), 1, "{kind:?}");
            assert_eq!(stage.status(), 15);
        }
        works(&mut stage);
    }
}
