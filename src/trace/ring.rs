//! A lock-free ring of records between one hart and the writer: the hart is the producer, the writer the consumer, and neither
//! ever waits for the other. Records that do not fit are counted and dropped.
//!
//! The records are atomic words, so that no `unsafe` is needed; their relaxed stores are plain stores on the processor.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Words of a record.
pub(super) const WORDS: usize = 8;

/// One record.
pub(super) type Words = [u64; WORDS];

/// A counter with a cache line of its own: hart and writer write different ones.
#[derive(Debug, Default)]
#[repr(align(64))]
struct PaddedCounter(AtomicU64);

/// The ring.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Box<[[AtomicU64; WORDS]]>,
    /// Number of records that were put in; only the producer writes it.
    head: PaddedCounter,
    /// Number of records that were taken out; only the consumer writes it.
    tail: PaddedCounter,
    /// Number of records that did not fit; only the producer writes it.
    lost: PaddedCounter,
}

impl Ring {
    /// A ring for `records` records, rounded up to a power of two.
    pub(super) fn new(records: u32) -> Self {
        let count = records.max(1).checked_next_power_of_two().unwrap_or(1 << 31);
        Self {
            slots: (0..count).map(|_| Default::default()).collect(),
            head: PaddedCounter::default(),
            tail: PaddedCounter::default(),
            lost: PaddedCounter::default(),
        }
    }

    /// Number of records that did not fit so far.
    pub(super) fn lost(&self) -> u64 {
        self.lost.0.load(Relaxed)
    }

    /// Takes out all records, oldest first. Must not be called by two threads at a time.
    pub(super) fn drain(&self, mut take: impl FnMut(&Words)) -> usize {
        let head = self.head.0.load(Acquire);
        let mut tail = self.tail.0.load(Relaxed);
        let mut taken = 0;
        while tail != head {
            if let Some(slot) = self.slot(tail) {
                take(&slot.each_ref().map(|word| word.load(Relaxed)));
            }
            tail = tail.wrapping_add(1);
            // After each record: a slow writer must not keep free slots from the hart.
            self.tail.0.store(tail, Release);
            taken += 1;
        }
        taken
    }

    #[inline]
    fn slot(&self, number: u64) -> Option<&[AtomicU64; WORDS]> {
        let mask = (self.slots.len() as u64).wrapping_sub(1);
        usize::try_from(number & mask).ok().and_then(|index| self.slots.get(index))
    }
}

/// The hart's end of a ring. At most one at a time; the next one continues where the last one ended.
#[derive(Debug)]
pub(super) struct Producer {
    ring: Arc<Ring>,
    head: u64,
    /// The consumer's count when it was last read.
    tail: u64,
}

impl Producer {
    pub(super) fn new(ring: Arc<Ring>) -> Self {
        let (head, tail) = (ring.head.0.load(Relaxed), ring.tail.0.load(Acquire));
        Self { ring, head, tail }
    }

    /// Puts a record in, or counts it as lost.
    #[inline]
    pub(super) fn push(&mut self, words: &Words) {
        let room = self.ring.slots.len() as u64;
        if self.head.wrapping_sub(self.tail) >= room {
            self.tail = self.ring.tail.0.load(Acquire);
            if self.head.wrapping_sub(self.tail) >= room {
                let lost = &self.ring.lost.0;
                lost.store(lost.load(Relaxed).wrapping_add(1), Relaxed);
                return;
            }
        }
        let Some(slot) = self.ring.slot(self.head) else { return };
        for (cell, word) in slot.iter().zip(words) {
            cell.store(*word, Relaxed);
        }
        self.head = self.head.wrapping_add(1);
        self.ring.head.0.store(self.head, Release);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn words(number: u64) -> Words {
        [number, !number, number, 3, 4, 5, number, number ^ 7]
    }

    fn drained(ring: &Ring) -> Vec<u64> {
        let mut all = Vec::new();
        ring.drain(|record| {
            assert_eq!(*record, words(record[0]));
            all.push(record[0]);
        });
        all
    }

    #[test]
    fn records_that_do_not_fit_are_counted_and_the_others_are_kept() {
        let ring = Arc::new(Ring::new(3));
        let mut producer = Producer::new(Arc::clone(&ring));
        (0..6).for_each(|number| producer.push(&words(number)));
        assert_eq!((drained(&ring), ring.lost()), (vec![0, 1, 2, 3], 2));
        producer.push(&words(9));
        drop(producer);
        // The hart after a reboot.
        Producer::new(Arc::clone(&ring)).push(&words(10));
        assert_eq!((drained(&ring), ring.lost()), (vec![9, 10], 2));
    }

    proptest! {
        #[test]
        fn a_ring_is_a_bounded_queue(steps in prop::collection::vec(prop::option::of(0..9_u64), 0..200)) {
            let ring = Arc::new(Ring::new(8));
            let mut producer = Producer::new(Arc::clone(&ring));
            let (mut model, mut lost, mut next) = (VecDeque::new(), 0, 0);
            for step in steps {
                match step {
                    Some(count) => for _ in 0..count {
                        producer.push(&words(next));
                        if model.len() < 8 { model.push_back(next) } else { lost += 1 }
                        next += 1;
                    },
                    None => prop_assert_eq!(drained(&ring), model.drain(..).collect::<Vec<u64>>()),
                }
                prop_assert_eq!(ring.lost(), lost);
            }
        }
    }

    #[test]
    fn under_load_every_record_comes_whole_in_order_or_is_counted() {
        const ALL: u64 = 300_000;
        let ring = Arc::new(Ring::new(64));
        let mut producer = Producer::new(Arc::clone(&ring));
        let hart =
            thread::spawn(move || (1..=ALL).for_each(|number| producer.push(&words(number))));
        let (mut last, mut seen) = (0, 0);
        loop {
            let is_over = hart.is_finished();
            for number in drained(&ring) {
                assert!(number > last, "{number} after {last}");
                (last, seen) = (number, seen + 1);
            }
            if is_over {
                break;
            }
        }
        hart.join().unwrap();
        assert_eq!(seen + ring.lost(), ALL);
    }
}
