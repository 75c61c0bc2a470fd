//! The interface of the engines, which make system calls on a disk's files while the I/O thread continues.
#![expect(unsafe_code, reason = "buffers are handed over by address")]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use log::info;
use rvmm_devices::HostError;
use rvmm_devices::virtio::blk::DiskPlan;

use super::uring::Uring;
use super::worker::Worker;

/// The engine of a disk in a file: io_uring, or a thread where the kernel has none.
pub(super) fn choose(plan: &DiskPlan) -> Result<Box<dyn Engine>, HostError> {
    Ok(match Uring::new() {
        Ok(ring) => Box::new(ring),
        Err(error) => {
            info!("Disk {} does not use io_uring: {error}", plan.path);
            Box::new(Worker::new().map_err(|source| no_thread(plan, source))?)
        }
    })
}

/// The error of a host without threads.
pub(super) fn no_thread(plan: &DiskPlan, source: io::Error) -> HostError {
    HostError::os(format!("Cannot start a thread for disk {}", plan.path), source)
}

/// One system call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) kind: CallKind,
    pub(super) fd: RawFd,
    /// Offset in the file, in bytes.
    pub(super) offset: u64,
    /// Length of the range, in bytes.
    pub(super) len: u64,
}

/// The kind of a system call.
#[derive(Debug, Clone, Copy)]
pub(super) enum CallKind {
    /// preadv(2)
    Read(Buffers),
    /// pwritev2(2), with RWF_DSYNC if it has to be durable.
    Write { from: Buffers, is_durable: bool },
    /// fdatasync(2)
    Sync,
    /// Writes tables of an image that are only in memory; nothing for a file.
    WriteBack,
    /// fallocate(2) in this mode.
    Allocate { mode: i32 },
}

/// A list of buffers, by address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    pub(super) first: *const libc::iovec,
    pub(super) count: u32,
}

// SAFETY: plain addresses; the caller of `Engine::push` guarantees that they are valid, in every thread.
unsafe impl Send for Buffers {}

/// The ID of a call, and the bytes moved or the kernel's error.
pub(super) type Outcome = (u32, io::Result<u32>);

/// Makes calls synchronously.
pub(super) trait Executor: Send {
    /// # Safety
    /// The file is open, and the buffers and their list stay where they are, until this returns.
    unsafe fn execute(&mut self, call: Call) -> io::Result<u32>;
}

/// Makes calls asynchronously.
pub(super) trait Engine: Send {
    /// Its name in the log.
    fn name(&self) -> &'static str;

    /// Takes a call with an ID that no other call in flight has. It is made after the next `submit`, or before.
    ///
    /// # Safety
    /// The file stays open, and the buffers and their list stay where they are, until the outcome was reaped.
    unsafe fn push(&mut self, id: u32, call: Call);

    /// Starts the calls that were pushed.
    fn submit(&mut self);

    /// True if submitted calls are waiting for another `submit` a little later, which no event announces.
    fn is_behind(&self) -> bool;

    /// Takes back a call that has not started. False if it may have: its outcome follows, as early as possible.
    fn withdraw(&mut self, id: u32) -> bool;

    /// Adds the outcomes that are available.
    fn reap(&mut self, outcomes: &mut Vec<Outcome>);

    /// Submits, and waits for an outcome, at most for `most` if it is given. Only valid with a call in flight.
    fn wait(&mut self, most: Option<Duration>);

    /// Readable when there may be outcomes.
    fn fd(&self) -> RawFd;
}
