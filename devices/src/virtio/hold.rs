//! Interrupt coalescing: used buffers wait for others before the driver is interrupted.
//!
//! A driver with many requests in flight makes the next one available without waiting for an interrupt; each interrupt and each kick
//! costs an exit. So the interrupt is held back until there are [`BATCH`] results, and a timer polls for new requests meanwhile.
//! A driver that waits for a result makes no new request available: then the interrupt is sent, and holding is not
//! tried again for a number of interrupts that doubles each time. The timer adapts to the rate of the requests, so that a machine
//! of any speed loses the time of a few requests in a thousand at most.
//!
//! Not implemented: limits per queue, and settings by the guest (virtio has notification coalescing for network devices only).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// Number of results after which the interrupt is sent.
const BATCH: u16 = 8;

/// Number of average intervals without a result after which none is expected.
const QUIET_INTERVALS: u32 = 4;

/// Bounds of the time without a result after which the interrupt is sent, and the longest time that a result is held. Results further
/// apart than the longest gap are never coalesced; on an emulated host they are 2.5 ms apart, due to the interrupts and kicks to be saved.
const MIN_GAP: Duration = Duration::from_micros(20);
const MAX_GAP: Duration = Duration::from_millis(8);
const MAX_HOLD: Duration = Duration::from_millis(20);

/// Number of interrupts before holding is tried: 2 to the power of this; initially, and at most.
const FIRST_PENALTY: u8 = 4;
const MAX_PENALTY: u8 = 10;

/// The decisions, without the timer.
#[derive(Debug)]
struct Policy {
    /// Number of results held, and the time of the first.
    held: Option<(u16, Instant)>,
    /// The time of the last result.
    last: Instant,
    /// The average interval between results, smoothed.
    interval: Duration,
    /// Number of interrupts before the next try.
    skip: u16,
    penalty: u8,
}

impl Policy {
    fn new(now: Instant) -> Self {
        let penalty = FIRST_PENALTY;
        Self { held: None, last: now, interval: MAX_GAP, skip: 1 << penalty, penalty }
    }

    /// Time without a result after which the interrupt is sent.
    fn gap(&self) -> Duration {
        self.interval.saturating_mul(QUIET_INTERVALS).clamp(MIN_GAP, MAX_GAP)
    }

    /// Returns true if the driver is to be interrupted, with `count` results (at least 1) since the last interrupt.
    fn interrupts(&mut self, count: u16, now: Instant) -> bool {
        let (before, since) = self.held.unwrap_or((0, now));
        let new = count.saturating_sub(before);
        if new > 0 {
            let passed = now.saturating_duration_since(self.last).min(MAX_GAP);
            self.interval = (self.interval * 3 + passed / u32::from(new)) / 4;
            self.last = now;
        }
        if self.held.is_none() && self.skip > 0 {
            self.skip -= 1;
            return true;
        }
        let is_batch = count >= BATCH;
        if is_batch {
            self.penalty = self.penalty.saturating_sub(1);
        }
        let interrupts = is_batch || now.saturating_duration_since(since) >= MAX_HOLD;
        self.held = (!interrupts).then_some((count, since));
        interrupts
    }

    /// Called after the timer has expired and new requests were processed. Returns the time to wait further; `None` if the driver is
    /// to be interrupted.
    fn expired(&mut self, now: Instant) -> Option<Duration> {
        let quiet = now.saturating_duration_since(self.last);
        let left = self.gap().checked_sub(quiet).filter(|left| !left.is_zero());
        if left.is_none() {
            self.held = None;
            self.penalty = self.penalty.saturating_add(1).min(MAX_PENALTY);
            self.skip = 1 << self.penalty;
        }
        left
    }
}

/// Holds back a device's interrupts.
#[derive(Debug)]
pub(super) struct Hold {
    policy: Policy,
    timer: TimerFd,
    /// The time of the timer's expiry, if it is set.
    due: Option<Instant>,
}

impl Hold {
    /// Holds nothing until after the first interrupts.
    ///
    /// # Errors
    /// The host has no timers left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { policy: Policy::new(Instant::now()), timer: TimerFd::new()?, due: None })
    }

    /// The timer's descriptor, readable when [`is_time`](Self::is_time) returns true.
    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// True if results are held.
    pub(super) fn is_holding(&self) -> bool {
        self.policy.held.is_some()
    }

    /// Returns true if the driver is to be interrupted, with `count` results (at least 1) since the last interrupt.
    pub(super) fn interrupts(&mut self, count: u16) -> bool {
        let interrupts = self.policy.interrupts(count, Instant::now());
        if !interrupts && self.due.is_none() {
            return !self.arm(self.policy.gap());
        }
        interrupts
    }

    /// Processes an event of the timer, which may be stale. Returns true if results are held and it is time to poll for new requests.
    pub(super) fn is_time(&mut self) -> bool {
        // Reading the counter makes the descriptor unreadable again; before the expiry it would block.
        if self.due.is_none_or(|due| due > Instant::now()) {
            return false;
        }
        let _ = self.timer.wait();
        self.due = None;
        self.is_holding()
    }

    /// Returns true if the driver is to be interrupted now, after the timer has expired and new requests were processed.
    pub(super) fn is_over(&mut self) -> bool {
        if !self.is_holding() {
            return false;
        }
        match self.policy.expired(Instant::now()) {
            Some(left) => !self.arm(left),
            None => true,
        }
    }

    /// Drops the held results: the driver was reset.
    pub(super) fn forget(&mut self) {
        self.policy.held = None;
    }

    /// Sets the timer. If that fails, returns false and holds nothing, as nothing would end the hold.
    fn arm(&mut self, after: Duration) -> bool {
        let due = Instant::now().checked_add(after);
        self.due = self.timer.reset(after, None).ok().and(due);
        if self.due.is_none() {
            self.forget();
        }
        self.due.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that makes a request available every `pace` without waiting for results; returns the number of interrupts.
    fn run(policy: &mut Policy, now: &mut Instant, pace: Duration, requests: u32) -> u32 {
        let (mut pending, mut count) = (0, 0);
        for _ in 0..requests {
            *now += pace;
            pending += 1;
            if policy.interrupts(pending, *now) {
                (pending, count) = (0, count + 1);
            }
        }
        count
    }

    /// A driver that waits for each result; returns the time lost.
    fn wait_for_each(
        policy: &mut Policy,
        now: &mut Instant,
        pace: Duration,
        requests: u32,
    ) -> Duration {
        let mut lost = Duration::ZERO;
        for _ in 0..requests {
            *now += pace;
            if policy.interrupts(1, *now) {
                continue;
            }
            while let Some(left) = policy.expired(*now) {
                (*now, lost) = (*now + left, lost + left);
            }
        }
        lost
    }

    #[test]
    fn a_driver_that_does_not_wait_gets_one_interrupt_for_eight_results() {
        for pace in [5, 60, 400, 2_400] {
            let (mut now, pace) = (Instant::now(), Duration::from_micros(pace));
            let mut policy = Policy::new(now);
            assert_eq!(run(&mut policy, &mut now, pace, 16), 16, "holding is not tried at once");
            assert_eq!(run(&mut policy, &mut now, pace, 800), 100);
        }
    }

    #[test]
    fn a_driver_that_waits_for_each_result_loses_less_than_a_hundredth() {
        let (mut now, pace) = (Instant::now(), Duration::from_micros(60));
        let mut policy = Policy::new(now);
        let lost = wait_for_each(&mut policy, &mut now, pace, 20_000);
        assert!(lost > Duration::ZERO && lost < 20_000 * pace / 100, "{lost:?}");
    }

    #[test]
    fn a_driver_that_stops_waiting_gets_fewer_interrupts_again() {
        let (mut now, pace) = (Instant::now(), Duration::from_micros(60));
        let mut policy = Policy::new(now);
        wait_for_each(&mut policy, &mut now, pace, 5_000);
        run(&mut policy, &mut now, pace, 1_024);
        assert_eq!(run(&mut policy, &mut now, pace, 800), 100);
    }

    #[test]
    fn no_result_is_held_for_longer_than_the_bound() {
        let (mut now, pace) = (Instant::now(), Duration::from_millis(7));
        let mut policy = Policy::new(now);
        run(&mut policy, &mut now, pace, 16);
        for _ in 0..100 {
            let first = now + pace;
            let mut count = 0;
            loop {
                now += pace;
                count += 1;
                if policy.interrupts(count, now) {
                    break;
                }
            }
            assert!(now - first < MAX_HOLD + pace);
        }
    }

    #[test]
    fn results_of_a_slow_disk_are_hardly_ever_held() {
        let (mut now, pace) = (Instant::now(), Duration::from_millis(10));
        let mut policy = Policy::new(now);
        let mut lost = Duration::ZERO;
        for _ in 0..10_000 {
            now += pace;
            if !policy.interrupts(1, now) {
                // The next result follows after the timer.
                lost += policy.gap();
                assert_eq!(policy.expired(now + policy.gap()), None);
            }
        }
        assert!(lost > Duration::ZERO && lost < 10_000 * pace / 100, "{lost:?}");
    }

    #[test]
    fn the_timer_ends_a_hold_without_further_results() {
        let mut hold = Hold::new().unwrap();
        (0..1 << FIRST_PENALTY).for_each(|_| assert!(hold.interrupts(1)));
        assert!(!hold.interrupts(1) && hold.is_holding());
        while !(hold.is_time() && hold.is_over()) {}
        assert!(!hold.is_holding() && hold.interrupts(1));
    }

    #[test]
    fn after_a_reset_nothing_is_held() {
        let mut hold = Hold::new().unwrap();
        (0..1 << FIRST_PENALTY).for_each(|_| assert!(hold.interrupts(1)));
        assert!(!hold.interrupts(1));
        hold.forget();
        assert!(!hold.is_time() && !hold.is_over());
    }
}
