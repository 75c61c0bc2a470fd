//! Results that wait for others before the driver is interrupted and asked for more.
//!
//! A driver with many requests on the way makes the next one available whether it was interrupted or not; each interrupt and each kick
//! costs it a way out of the guest. So results are held back until there are [`MOST`] of them, and new requests are fetched by a timer meanwhile.
//! A driver that waits for the result shows itself by making nothing available: then everything goes out, and holding is not
//! tried again for a number of interrupts that doubles each time. The timer follows the pace of the requests themselves, so that a machine
//! of any speed loses a few requests' time in a thousand requests at most.
//!
//! Left out: limits per queue, and a guest's own wishes (virtio has notification coalescing for network devices only).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// Results that are worth an interrupt.
const MOST: u16 = 8;

/// Intervals between results after which nothing more is expected.
const PATIENCE: u32 = 4;

/// Bounds of the time in which nothing comes, and the longest that a result is held. Results that come further apart than the longest
/// gap are never gathered; on an emulated host they come 2.5 ms apart, because of the interrupts and kicks that this is to save.
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(8);
const LONGEST_IN_ALL: Duration = Duration::from_millis(20);

/// Interrupts that pass before holding is tried: 2 to the power of this; at first, and at most.
const FIRST_PENALTY: u8 = 4;
const MOST_PENALTY: u8 = 10;

/// The decision, without the timer.
#[derive(Debug)]
struct Policy {
    /// Results held, and since when.
    held: Option<(u16, Instant)>,
    /// When the last result came.
    last: Instant,
    /// How far apart results come, smoothed.
    interval: Duration,
    /// Interrupts that pass before the next try.
    pass: u16,
    penalty: u8,
}

impl Policy {
    fn new(now: Instant) -> Self {
        let penalty = FIRST_PENALTY;
        Self { held: None, last: now, interval: LONGEST, pass: 1 << penalty, penalty }
    }

    /// How long nothing may come before everything goes out.
    fn gap(&self) -> Duration {
        self.interval.saturating_mul(PATIENCE).clamp(SHORTEST, LONGEST)
    }

    /// Whether the driver is to be told of `count` results, at least 1, of which it does not know.
    fn tells(&mut self, count: u16, now: Instant) -> bool {
        let (before, since) = self.held.unwrap_or((0, now));
        let new = count.saturating_sub(before);
        if new > 0 {
            let passed = now.saturating_duration_since(self.last).min(LONGEST);
            self.interval = (self.interval * 3 + passed / u32::from(new)) / 4;
            self.last = now;
        }
        if self.held.is_none() && self.pass > 0 {
            self.pass -= 1;
            return true;
        }
        let is_worth_it = count >= MOST;
        if is_worth_it {
            self.penalty = self.penalty.saturating_sub(1);
        }
        let tells = is_worth_it || now.saturating_duration_since(since) >= LONGEST_IN_ALL;
        self.held = (!tells).then_some((count, since));
        tells
    }

    /// The time is up, and what is there was fetched. None where the driver is to be told of everything, else how long to wait.
    fn expired(&mut self, now: Instant) -> Option<Duration> {
        let quiet = now.saturating_duration_since(self.last);
        let left = self.gap().checked_sub(quiet).filter(|left| !left.is_zero());
        if left.is_none() {
            self.held = None;
            self.penalty = self.penalty.saturating_add(1).min(MOST_PENALTY);
            self.pass = 1 << self.penalty;
        }
        left
    }
}

/// Holds results of a device back.
#[derive(Debug)]
pub(super) struct Hold {
    policy: Policy,
    timer: TimerFd,
    /// When the timer expires, where it is set.
    due: Option<Instant>,
}

impl Hold {
    /// Nothing is held, and nothing will be before a few interrupts have passed.
    ///
    /// # Errors
    /// The host has no timers left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { policy: Policy::new(Instant::now()), timer: TimerFd::new()?, due: None })
    }

    /// Readable when it [`is_time`](Self::is_time).
    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether results wait.
    pub(super) fn is_holding(&self) -> bool {
        self.policy.held.is_some()
    }

    /// Whether the driver is to be told of `count` results, at least 1, of which it does not know.
    pub(super) fn tells(&mut self, count: u16) -> bool {
        let tells = self.policy.tells(count, Instant::now());
        if !tells && self.due.is_none() {
            return !self.arm(self.policy.gap());
        }
        tells
    }

    /// The timer has expired, or may have. Whether something waits and it is time to fetch new requests.
    pub(super) fn is_time(&mut self) -> bool {
        // The counter is read so that the descriptor is quiet again; before its time that would block.
        if self.due.is_none_or(|due| due > Instant::now()) {
            return false;
        }
        let _ = self.timer.wait();
        self.due = None;
        self.is_holding()
    }

    /// Whether the driver is to be told now, after new requests were fetched because the timer has expired.
    pub(super) fn is_over(&mut self) -> bool {
        if !self.is_holding() {
            return false;
        }
        match self.policy.expired(Instant::now()) {
            Some(left) => !self.arm(left),
            None => true,
        }
    }

    /// Nothing waits any more: the driver is gone.
    pub(super) fn forget(&mut self) {
        self.policy.held = None;
    }

    /// False, and nothing is held, where the host refuses: nobody would ever look again.
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

    /// A driver that makes a request available every `pace`, whatever happens, and counts what it is told.
    fn run(policy: &mut Policy, now: &mut Instant, pace: Duration, requests: u32) -> u32 {
        let (mut untold, mut told) = (0, 0);
        for _ in 0..requests {
            *now += pace;
            untold += 1;
            if policy.tells(untold, *now) {
                (untold, told) = (0, told + 1);
            }
        }
        told
    }

    /// A driver that waits for each result.
    fn wait_for_each(
        policy: &mut Policy,
        now: &mut Instant,
        pace: Duration,
        requests: u32,
    ) -> Duration {
        let mut lost = Duration::ZERO;
        for _ in 0..requests {
            *now += pace;
            if policy.tells(1, *now) {
                continue;
            }
            while let Some(left) = policy.expired(*now) {
                (*now, lost) = (*now + left, lost + left);
            }
        }
        lost
    }

    #[test]
    fn a_driver_that_goes_on_by_itself_is_told_of_eight_results_at_once() {
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
    fn a_driver_that_begins_to_go_on_by_itself_is_noticed() {
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
                if policy.tells(count, now) {
                    break;
                }
            }
            assert!(now - first < LONGEST_IN_ALL + pace);
        }
    }

    #[test]
    fn results_of_a_slow_disk_are_hardly_ever_held() {
        let (mut now, pace) = (Instant::now(), Duration::from_millis(10));
        let mut policy = Policy::new(now);
        let mut lost = Duration::ZERO;
        for _ in 0..10_000 {
            now += pace;
            if !policy.tells(1, now) {
                // The next one comes after the timer.
                lost += policy.gap();
                assert_eq!(policy.expired(now + policy.gap()), None);
            }
        }
        assert!(lost > Duration::ZERO && lost < 10_000 * pace / 100, "{lost:?}");
    }

    #[test]
    fn the_timer_ends_a_hold_in_which_nothing_comes() {
        let mut hold = Hold::new().unwrap();
        (0..1 << FIRST_PENALTY).for_each(|_| assert!(hold.tells(1)));
        assert!(!hold.tells(1) && hold.is_holding());
        while !(hold.is_time() && hold.is_over()) {}
        assert!(!hold.is_holding() && hold.tells(1));
    }

    #[test]
    fn a_driver_that_is_gone_is_told_nothing() {
        let mut hold = Hold::new().unwrap();
        (0..1 << FIRST_PENALTY).for_each(|_| assert!(hold.tells(1)));
        assert!(!hold.tells(1));
        hold.forget();
        assert!(!hold.is_time() && !hold.is_over());
    }
}
