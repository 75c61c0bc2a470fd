//! System calls on a disk's files, made by somebody else while the I/O thread goes on: what is common to both ways.
#![expect(unsafe_code, reason = "buffers are handed over by address")]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// One system call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) what: What,
    /// Of the file that is meant.
    pub(super) fd: RawFd,
    /// Where in the file, in bytes.
    pub(super) offset: u64,
    /// Bytes that it is about.
    pub(super) len: u64,
}

/// Which system call.
#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    /// preadv(2)
    Read(Buffers),
    /// pwritev2(2), with RWF_DSYNC where it has to be durable.
    Write { from: Buffers, is_durable: bool },
    /// fdatasync(2)
    Sync,
    /// fallocate(2) in this mode.
    Allocate { mode: i32 },
}

/// A list of buffers, by address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    pub(super) first: *const libc::iovec,
    pub(super) count: u32,
}

// SAFETY: plain addresses; who hands a call to an engine answers for what is there (`Engine::push`), in every thread.
unsafe impl Send for Buffers {}

/// What came of a call: bytes moved, or the kernel's error.
pub(super) type Outcome = (u32, io::Result<u32>);

/// Makes one call, and waits for it.
pub(super) trait Maker: Send {
    /// # Safety
    /// The file is open, and the buffers and their list stay where they are, until this returns.
    unsafe fn make(&mut self, call: Call) -> io::Result<u32>;
}

/// Makes calls.
pub(super) trait Engine: Send {
    /// What it is called in the log.
    fn name(&self) -> &'static str;

    /// Takes a call in, under a number that no other call has at the time. It is made after the next `submit`, or before.
    ///
    /// # Safety
    /// The file stays open, and the buffers and their list stay where they are, until the outcome was reaped.
    unsafe fn push(&mut self, id: u32, call: Call);

    /// Sets going what was pushed.
    fn submit(&mut self);

    /// Whether calls that were submitted wait for somebody to submit again, a little later, and nothing announces when.
    fn is_behind(&self) -> bool;

    /// Takes a call back that has not begun. False where it may have: its outcome comes, as soon as that can be had.
    fn withdraw(&mut self, id: u32) -> bool;

    /// Adds the outcomes that are there.
    fn reap(&mut self, outcomes: &mut Vec<Outcome>);

    /// Submits, and waits for an outcome, where `most` is given for that long at most. Only when a call is on the way.
    fn wait(&mut self, most: Option<Duration>);

    /// Readable when there may be outcomes.
    fn fd(&self) -> RawFd;
}
