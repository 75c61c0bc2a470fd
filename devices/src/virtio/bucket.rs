//! Rate limits by token buckets (with Firecracker's parameters: size, burst, refill time).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use crate::lifecycle::RestoreError;

/// A limit: `size` tokens, refilled evenly over `refill`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Capacity of the bucket in tokens: bytes or operations.
    pub size: u64,
    /// Additional tokens at the start, not refilled.
    pub burst: u64,
    /// Time to refill an empty bucket; at least a millisecond.
    pub refill: Duration,
}

impl Limit {
    /// This number of tokens a second, without a burst.
    #[must_use]
    pub fn per_second(size: u64) -> Self {
        Self { size, burst: 0, refill: Duration::from_secs(1) }
    }
}

/// A bucket and its tokens.
#[derive(Debug)]
struct Bucket {
    limit: Limit,
    tokens: u64,
    burst: u64,
    /// The time up to which the refill has been added.
    counted: Instant,
}

impl Bucket {
    fn new(limit: Limit, now: Instant) -> Self {
        Self { limit, tokens: limit.size, burst: limit.burst, counted: now }
    }

    fn save(&self) -> Tokens {
        let Self { limit: _, tokens, burst, counted: _ } = self;
        Tokens { tokens: *tokens, burst: *burst }
    }

    /// Takes over the tokens, as far as the limit allows.
    fn restore(&mut self, saved: Tokens) {
        let Tokens { tokens, burst } = saved;
        self.tokens = tokens.min(self.limit.size);
        self.burst = burst.min(self.limit.burst);
        self.counted = Instant::now();
    }

    fn refill(&mut self, now: Instant) {
        let refill_ns = self.limit.refill.as_nanos().max(1_000_000);
        let passed_ns = now.saturating_duration_since(self.counted).as_nanos().min(refill_ns);
        let gained = passed_ns * u128::from(self.limit.size) / refill_ns;
        if gained > 0 {
            let gained = u64::try_from(gained).unwrap_or(u64::MAX);
            self.tokens = self.tokens.saturating_add(gained).min(self.limit.size);
            self.counted = now;
        }
    }

    /// True if there are `wanted` tokens. A request larger than the bucket passes when the bucket is full.
    fn has(&self, wanted: u64) -> bool {
        self.burst.saturating_add(self.tokens) >= wanted || self.tokens == self.limit.size
    }

    fn take(&mut self, wanted: u64) {
        let from_burst = wanted.min(self.burst);
        self.burst -= from_burst;
        self.tokens = self.tokens.saturating_sub(wanted - from_burst);
    }

    /// Time until there are `wanted` tokens, if no others are taken.
    fn wait(&self, wanted: u64) -> Duration {
        let missing =
            wanted.min(self.limit.size).saturating_sub(self.tokens.saturating_add(self.burst));
        let refill_ns = self.limit.refill.as_nanos().max(1_000_000);
        let wait_ns =
            (u128::from(missing) * refill_ns).div_ceil(u128::from(self.limit.size.max(1)));
        Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX))
            .max(Duration::from_millis(1))
    }
}

/// The tokens of a limiter; `None` without a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimiterState {
    bytes: Option<Tokens>,
    operations: Option<Tokens>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    tokens: u64,
    burst: u64,
}

/// A device's limits on bytes and operations; each may be absent.
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: TimerFd,
    /// The time of the next try, if an operation was not allowed.
    waits_until: Option<Instant>,
}

impl Limiter {
    /// A limiter whose buckets are full.
    ///
    /// # Errors
    /// The host has no timers left.
    pub fn new(bytes: Option<Limit>, operations: Option<Limit>) -> io::Result<Self> {
        let now = Instant::now();
        let bucket = |limit: Limit| Bucket::new(limit, now);
        Ok(Self {
            bytes: bytes.filter(|limit| limit.size > 0).map(bucket),
            operations: operations.filter(|limit| limit.size > 0).map(bucket),
            timer: TimerFd::new()?,
            waits_until: None,
        })
    }

    /// The tokens that are left.
    #[must_use]
    pub fn save(&self) -> LimiterState {
        // An operation that waits is tried again when the device is resumed.
        let Self { bytes, operations, timer: _, waits_until: _ } = self;
        let tokens = |bucket: &Option<Bucket>| bucket.as_ref().map(Bucket::save);
        LimiterState { bytes: tokens(bytes), operations: tokens(operations) }
    }

    /// Takes over the tokens of a limiter with the same limits.
    ///
    /// # Errors
    /// [`RestoreError`] if it had others.
    pub fn restore(&mut self, state: LimiterState) -> Result<(), RestoreError> {
        let LimiterState { bytes, operations } = state;
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.operations, operations)] {
            match (bucket, tokens) {
                (Some(bucket), Some(tokens)) => bucket.restore(tokens),
                (None, None) => {}
                _ => return Err(RestoreError::invalid("a rate limit")),
            }
        }
        Ok(())
    }

    /// Takes the tokens of one operation of `bytes` bytes and returns true, if there are enough. Otherwise takes nothing and waits: the
    /// descriptor becomes readable when it is time to try again.
    pub fn allows(&mut self, bytes: u64) -> bool {
        if self.bytes.is_none() && self.operations.is_none() {
            return true;
        }
        self.allows_at(bytes, Instant::now())
    }

    fn allows_at(&mut self, bytes: u64, now: Instant) -> bool {
        let mut wait = Duration::ZERO;
        for (bucket, wanted) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            let Some(bucket) = bucket else { continue };
            bucket.refill(now);
            if !bucket.has(wanted) {
                wait = wait.max(bucket.wait(wanted));
            }
        }
        if wait > Duration::ZERO {
            self.waits_until =
                self.timer.reset(wait, None).ok().and_then(|()| now.checked_add(wait));
            // Without a timer there would be no further try: the operation is allowed.
            return self.waits_until.is_none();
        }
        for (bucket, wanted) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(wanted);
            }
        }
        true
    }

    /// True if an operation was not allowed, and [`expired`](Self::expired) has not yet found that it is time to try again.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waits_until.is_some()
    }

    /// The descriptor that becomes readable when it is time to try again; must always be watched.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Processes an event of the descriptor, which may be stale. Afterwards [`is_waiting`](Self::is_waiting) is false if it is time to
    /// try again.
    pub fn expired(&mut self) {
        // Reading the counter makes the descriptor unreadable again; before the expiry it would block.
        if self.waits_until.is_some_and(|until| until <= Instant::now()) {
            let _ = self.timer.wait();
            self.waits_until = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bytes: u64, operations: u64) -> Limiter {
        let limit = |size| (size > 0).then(|| Limit::per_second(size));
        Limiter::new(limit(bytes), limit(operations)).unwrap()
    }

    #[test]
    fn without_limits_every_operation_is_allowed() {
        let mut limiter = limiter(0, 0);
        assert!((0..1000).all(|_| limiter.allows(u64::MAX)));
    }

    #[test]
    fn the_bucket_is_refilled_evenly_up_to_its_size() {
        let mut limiter = limiter(1000, 0);
        let start = limiter.bytes.as_ref().unwrap().counted;
        let count =
            |limiter: &mut Limiter, now| (0..100).filter(|_| limiter.allows_at(100, now)).count();
        assert_eq!(count(&mut limiter, start), 10);
        assert_eq!(count(&mut limiter, start + Duration::from_millis(500)), 5);
        assert_eq!(count(&mut limiter, start + Duration::from_secs(60)), 10);
    }

    #[test]
    fn operations_and_bytes_both_count() {
        let mut limiter = limiter(1000, 3);
        let now = limiter.bytes.as_ref().unwrap().counted;
        assert_eq!((0..100).filter(|_| limiter.allows_at(100, now)).count(), 3);
        // Three operations have taken 300 bytes, the refused ones none.
        assert_eq!(limiter.bytes.as_ref().unwrap().tokens, 700);
    }

    #[test]
    fn an_operation_larger_than_the_bucket_is_allowed_when_it_is_full() {
        let mut limiter = limiter(1000, 0);
        let now = limiter.bytes.as_ref().unwrap().counted;
        assert!(limiter.allows_at(5000, now));
        assert!(!limiter.allows_at(1, now));
        assert!(limiter.allows_at(5000, now + Duration::from_secs(1)));
    }

    #[test]
    fn a_burst_is_not_refilled() {
        let limit = Limit { size: 10, burst: 90, refill: Duration::from_secs(1) };
        let mut limiter = Limiter::new(None, Some(limit)).unwrap();
        let now = limiter.operations.as_ref().unwrap().counted;
        assert_eq!((0..1000).filter(|_| limiter.allows_at(0, now)).count(), 100);
        let later = now + Duration::from_secs(9);
        assert_eq!((0..1000).filter(|_| limiter.allows_at(0, later)).count(), 10);
    }

    #[test]
    fn operations_are_allowed_again_after_the_wait() {
        let mut limiter = limiter(0, 1000);
        while limiter.allows(0) {}
        assert!(limiter.is_waiting());
        while limiter.is_waiting() {
            limiter.expired();
        }
        assert!(limiter.allows(0));
    }

    #[test]
    fn a_stale_event_neither_blocks_nor_ends_the_wait() {
        let hour = Limit { size: 1, burst: 0, refill: Duration::from_secs(3600) };
        let mut limiter = Limiter::new(None, Some(hour)).unwrap();
        assert!(limiter.allows(0) && !limiter.allows(0));
        limiter.expired();
        assert!(limiter.is_waiting());
    }
}
