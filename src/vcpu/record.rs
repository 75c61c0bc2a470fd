//! The interface of the run loop to recorders of exits. With [`Unrecorded`], the compiler removes all of it from the loop.

use std::fmt;

use rustix::time::{ClockId, clock_gettime};

use super::dispatch::Flow;
use super::exit::Exit;

/// Records every exit of one hart, on the hart's thread. All methods delay the guest: none may wait, allocate or make a system
/// call.
pub trait Recorder: Send + 'static {
    /// The hart is about to enter the guest.
    fn entering(&mut self);

    /// The hart has left the guest.
    fn left(&mut self);

    /// The exit has been handled, and contains its result.
    fn answered(&mut self, exit: &Exit<'_>, flow: &Flow);

    /// True if the program counter of an exit with this result is worth a system call.
    fn wants_pc(&self, flow: &Flow) -> bool;

    /// Receives the program counter of the last exit: at the instruction that caused it.
    fn at(&mut self, pc: u64);
}

/// A recorder that does nothing.
#[derive(Debug, Clone, Copy)]
pub struct Unrecorded;

impl Recorder for Unrecorded {
    #[inline]
    fn entering(&mut self) {}

    #[inline]
    fn left(&mut self) {}

    #[inline]
    fn answered(&mut self, _: &Exit<'_>, _: &Flow) {}

    #[inline]
    fn wants_pc(&self, _: &Flow) -> bool {
        false
    }

    #[inline]
    fn at(&mut self, _: u64) {}
}

/// A counter with a constant rate that is the same for all threads and cheap to read.
#[derive(Clone, Copy)]
pub struct Ticks {
    /// Reads the counter.
    pub now: fn() -> u64,
    /// Ticks per second; not 0.
    pub hz: u64,
}

impl Ticks {
    /// CLOCK_MONOTONIC, in nanoseconds.
    #[must_use]
    pub fn monotonic() -> Self {
        Self { now: monotonic_ns, hz: 1_000_000_000 }
    }
}

impl fmt::Debug for Ticks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticks").field("hz", &self.hz).finish_non_exhaustive()
    }
}

/// CLOCK_MONOTONIC, in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}
