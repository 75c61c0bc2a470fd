//! The engine on io_uring(7): a batch of calls costs one system call, and what the page cache has is there when it returns.
//!
//! The ring's own descriptor is what epoll watches, so outcomes that are reaped at once wake nobody. Calls are made by
//! whichever thread holds the device's lock: the I/O thread, and a hart that resets the device.
#![expect(unsafe_code, reason = "the kernel works on guest RAM by address")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use log::warn;

use super::engine::{Call, Engine, Outcome, What};

/// Calls that are submitted at once, at most.
const BATCH: u32 = 256;

/// Outcomes that have room: of all that the device has on the way, and as many cancellations.
const OUTCOMES: u32 = 1024;

/// What cancellations are called; their outcomes are of no interest.
const CANCEL: u64 = u64::MAX;

/// Bytes between two submits that may be copied from and to the page cache by the thread that submits; what is beyond that
/// is done by the kernel's workers, however large the guest makes its requests.
const INLINE: u64 = 4 << 20;

/// An instance of io_uring.
pub(super) struct Uring {
    ring: IoUring,
    /// Bytes of the calls since the last submit.
    inline: u64,
    /// Calls that the kernel did not take.
    refused: Vec<u32>,
    has_warned: bool,
}

impl Uring {
    /// A ring, where the kernel has one and allows it.
    ///
    /// # Errors
    /// What the kernel says; `Unsupported` where one of the calls is missing.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_cqsize(OUTCOMES).build(BATCH)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, inline: 0, refused: Vec::new(), has_warned: false })
    }

    fn entry(&mut self, id: u32, call: Call) -> squeue::Entry {
        let fd = Fd(call.fd);
        let entry = match call.what {
            What::Read(to) => {
                opcode::Readv::new(fd, to.first, to.count).offset(call.offset).build()
            }
            What::Write { from, is_durable } => opcode::Writev::new(fd, from.first, from.count)
                .offset(call.offset)
                .rw_flags(if is_durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            What::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            What::Allocate { mode } => {
                opcode::Fallocate::new(fd, call.len).offset(call.offset).mode(mode).build()
            }
        };
        self.inline = self.inline.saturating_add(call.len);
        let is_large = self.inline > INLINE;
        let flags = if is_large { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        entry.user_data(id.into()).flags(flags)
    }

    /// Enters the kernel until it has taken everything and, where `wanted`, an outcome is there. Short of memory, it may
    /// refuse for a while.
    fn enter(&mut self, wanted: usize) {
        for _ in 0..100 {
            match self.ring.submit_and_wait(wanted) {
                Ok(_) if self.ring.submission().is_empty() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if !std::mem::replace(&mut self.has_warned, true) {
                        warn!("The kernel does not take requests to disks for now: {error}");
                    }
                    if !self.ring.completion().is_empty() {
                        return;
                    }
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    unsafe fn push(&mut self, id: u32, call: Call) {
        let entry = self.entry(id, call);
        for _ in 0..2 {
            // SAFETY: the caller answers for the file, the buffers and their list until the outcome was reaped.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            self.enter(0);
        }
        self.refused.push(id);
    }

    fn submit(&mut self) {
        self.inline = 0;
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn withdraw(&mut self, id: u32) -> bool {
        // What waits for one of the kernel's workers ends at once; for the rest there is no harm in asking.
        let cancel = opcode::AsyncCancel::new(id.into()).build().user_data(CANCEL);
        // SAFETY: it has no buffers.
        let _ = unsafe { self.ring.submission().push(&cancel) };
        false
    }

    fn reap(&mut self, outcomes: &mut Vec<Outcome>) {
        let refused = |id| (id, Err(io::ErrorKind::OutOfMemory.into()));
        outcomes.extend(self.refused.drain(..).map(refused));
        let calls = self.ring.completion().filter(|entry| entry.user_data() != CANCEL);
        outcomes.extend(calls.map(|entry| {
            let result = entry.result();
            let moved = u32::try_from(result);
            let id = u32::try_from(entry.user_data()).unwrap_or(u32::MAX);
            (id, moved.map_err(|_| io::Error::from_raw_os_error(result.saturating_neg())))
        }));
    }

    fn wait(&mut self, most: Option<Duration>) {
        self.inline = 0;
        let Some(most) = most else { return self.enter(usize::from(self.refused.is_empty())) };
        self.enter(0);
        if self.refused.is_empty() {
            let most = Timespec::from(most);
            // In time, too late, or interrupted: who waits looks, and waits again.
            let _ = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&most));
        }
    }

    fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
