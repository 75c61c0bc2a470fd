//! The engine on a thread of its own, which makes calls one after the other. For files without io_uring, and for images.
#![expect(unsafe_code, reason = "preadv and pwritev2 go to guest RAM by address")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::engine::{Call, CallKind, Engine, Executor, Outcome};

/// A thread that makes calls.
pub(super) struct Worker {
    shared: Arc<SharedWorker>,
    /// Calls that are not submitted yet.
    pushed: Vec<(u32, Call)>,
    thread: Option<JoinHandle<()>>,
}

struct SharedWorker {
    calls: Mutex<Calls>,
    /// There are calls, or `is_over` is set.
    begun: Condvar,
    /// There are outcomes.
    ended: Condvar,
    event: EventFd,
}

#[derive(Default)]
struct Calls {
    waiting: VecDeque<(u32, Call)>,
    outcomes: Vec<Outcome>,
    is_over: bool,
}

impl Worker {
    /// Starts the thread, named `disk`, for system calls.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        Self::with(System)
    }

    /// Starts the thread for calls that `executor` makes; the thread drops it after the last one.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub(super) fn with(executor: impl Executor + 'static) -> io::Result<Self> {
        let shared = Arc::new(SharedWorker {
            calls: Mutex::default(),
            begun: Condvar::new(),
            ended: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let its = Arc::clone(&shared);
        let thread =
            thread::Builder::new().name("disk".into()).spawn(move || its.work(executor))?;
        Ok(Self { shared, pushed: Vec::new(), thread: Some(thread) })
    }
}

impl SharedWorker {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, mut executor: impl Executor) {
        let mut calls = self.calls();
        loop {
            let next = calls.waiting.pop_front();
            let Some((id, call)) = next else {
                if calls.is_over {
                    return;
                }
                calls = self.begun.wait(calls).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(calls);
            // SAFETY: the caller of `push` guarantees that file and buffers are valid until the outcome is reaped.
            let result = unsafe { executor.execute(call) };
            calls = self.calls();
            calls.outcomes.push((id, result));
            self.ended.notify_all();
            // Fails if the counter is at its limit: it is readable anyway.
            let _ = self.event.write(1);
        }
    }
}

/// Makes system calls.
struct System;

impl Executor for System {
    unsafe fn execute(&mut self, call: Call) -> io::Result<u32> {
        // SAFETY: guaranteed by the caller.
        unsafe { execute(call) }
    }
}

/// Makes a call, in this thread.
///
/// # Safety
/// As for [`Engine::push`], until this returns.
pub(super) unsafe fn execute(call: Call) -> io::Result<u32> {
    let refuse = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = libc::off_t::try_from(call.offset).map_err(refuse)?;
    // SAFETY: the caller guarantees that the file is open.
    let file = unsafe { BorrowedFd::borrow_raw(call.fd) };
    let moved = match call.kind {
        CallKind::Read(to) => {
            let count = i32::try_from(to.count).map_err(refuse)?;
            // SAFETY: the caller guarantees that the buffers and their list are valid.
            unsafe { libc::preadv(call.fd, to.first, count, offset) }
        }
        CallKind::Write { from, is_durable } => {
            let count = i32::try_from(from.count).map_err(refuse)?;
            let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { libc::pwritev2(call.fd, from.first, count, offset, flags) }
        }
        CallKind::WriteBack => return Ok(0),
        CallKind::Sync => return Ok(rustix::fs::fdatasync(file).map(|()| 0)?),
        CallKind::Allocate { mode } => {
            let mode = rustix::fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
            return Ok(rustix::fs::fallocate(file, mode, call.offset, call.len).map(|()| 0)?);
        }
    };
    u32::try_from(moved).map_err(|_| io::Error::last_os_error())
}

impl Engine for Worker {
    fn name(&self) -> &'static str {
        "a thread"
    }

    unsafe fn push(&mut self, id: u32, call: Call) {
        self.pushed.push((id, call));
    }

    fn submit(&mut self) {
        if !self.pushed.is_empty() {
            self.shared.calls().waiting.extend(self.pushed.drain(..));
            self.shared.begun.notify_one();
        }
    }

    fn is_behind(&self) -> bool {
        false
    }

    fn withdraw(&mut self, id: u32) -> bool {
        let before = self.pushed.len();
        self.pushed.retain(|(pushed, _)| *pushed != id);
        let mut calls = self.shared.calls();
        let waiting = calls.waiting.len();
        calls.waiting.retain(|(waiting, _)| *waiting != id);
        self.pushed.len() < before || calls.waiting.len() < waiting
    }

    fn reap(&mut self, outcomes: &mut Vec<Outcome>) {
        let mut calls = self.shared.calls();
        // Fails if no call has ended.
        let _ = self.shared.event.read();
        outcomes.append(&mut calls.outcomes);
    }

    fn wait(&mut self, most: Option<Duration>) {
        self.submit();
        let calls = self.shared.calls();
        let is_empty = |calls: &mut Calls| calls.outcomes.is_empty();
        match most {
            Some(most) => drop(self.shared.ended.wait_timeout_while(calls, most, is_empty)),
            None => drop(self.shared.ended.wait_while(calls, is_empty)),
        }
    }

    fn fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.calls().is_over = true;
        self.shared.begun.notify_one();
        // An error means that the thread panicked: it has ended, too.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
