//! The engine on a thread of its own: calls are made one after the other. For files where there is no io_uring, and for what
//! is more than a file.
#![expect(unsafe_code, reason = "preadv and pwritev2 go to guest RAM by address")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::engine::{Call, Engine, Maker, Outcome, What};

/// A thread that makes calls.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// Pushed and not submitted.
    pushed: Vec<(u32, Call)>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    calls: Mutex<Calls>,
    /// There are calls, or the end.
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
    /// Starts the thread, named `disk`, for calls of the system.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        Self::with(System)
    }

    /// Starts the thread for calls that `maker` makes; it is dropped there after the last one.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub(super) fn with(maker: impl Maker + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            begun: Condvar::new(),
            ended: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new().name("disk".into()).spawn(move || its.work(maker))?;
        Ok(Self { shared, pushed: Vec::new(), thread: Some(thread) })
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, mut maker: impl Maker) {
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
            // SAFETY: who pushed the call answers for file and buffers until the outcome is reaped.
            let result = unsafe { maker.make(call) };
            calls = self.calls();
            calls.outcomes.push((id, result));
            self.ended.notify_all();
            // Refused means that it is readable anyway.
            let _ = self.event.write(1);
        }
    }
}

/// Calls of the system, on the file that each names.
struct System;

impl Maker for System {
    unsafe fn make(&mut self, call: Call) -> io::Result<u32> {
        // SAFETY: the caller's promise.
        unsafe { make(call) }
    }
}

/// Makes a call, in this thread.
///
/// # Safety
/// As for [`Engine::push`], until this returns.
pub(super) unsafe fn make(call: Call) -> io::Result<u32> {
    let refuse = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = libc::off_t::try_from(call.offset).map_err(refuse)?;
    // SAFETY: the caller answers for the file being open.
    let file = unsafe { BorrowedFd::borrow_raw(call.fd) };
    let moved = match call.what {
        What::Read(to) => {
            let count = i32::try_from(to.count).map_err(refuse)?;
            // SAFETY: the caller answers for the buffers and their list.
            unsafe { libc::preadv(call.fd, to.first, count, offset) }
        }
        What::Write { from, is_durable } => {
            let count = i32::try_from(from.count).map_err(refuse)?;
            let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { libc::pwritev2(call.fd, from.first, count, offset, flags) }
        }
        What::Sync => return Ok(rustix::fs::fdatasync(file).map(|()| 0)?),
        What::Allocate { mode } => {
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
        // Empty where nothing has ended.
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
        // A thread that panicked is gone too.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
