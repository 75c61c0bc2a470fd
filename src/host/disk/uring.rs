//! The engine on io_uring(7): a batch of calls costs one system call, and reads from the page cache are done when it returns.
//!
//! epoll watches the ring's own descriptor, so outcomes that are reaped at once cause no wake-up. Calls are submitted by the
//! thread that holds the device's lock: the I/O thread, or a hart that resets the device.
#![expect(unsafe_code, reason = "the kernel works on guest RAM by address")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use log::warn;

use super::engine::{Call, CallKind, Engine, Outcome};

/// Entries of the submission queue.
const BATCH: u32 = 256;

/// Entries of the completion queue: for all requests that the device has in flight, and as many cancellations.
const OUTCOMES: u32 = 1024;

/// User data of cancellations, whose outcomes are ignored.
const CANCEL: u64 = u64::MAX;

/// Limit of the bytes between two submits that the submitting thread may copy from and to the page cache; the rest is done by
/// the kernel's workers, however large the guest's requests are.
const INLINE: u64 = 4 << 20;

/// Limit of calls of io_uring_enter(2) that take a part of the queue, or fail with EINTR.
const MOST_TRIES: u32 = 100;

/// Pause of a thread that waits for outcomes while the kernel takes no calls.
const PAUSE: Duration = Duration::from_micros(100);

/// An instance of io_uring.
pub(super) struct Uring {
    ring: IoUring,
    /// Submits the entries of the ring, and waits for a number of outcomes: io_uring_enter(2).
    enter: Enter,
    /// Calls for which the ring has no room, the oldest first; no more than are in flight.
    backlog: VecDeque<squeue::Entry>,
    /// The last io_uring_enter(2) did not take all entries.
    is_behind: bool,
    /// Bytes of the calls since the last submit.
    inline: u64,
    has_warned: bool,
}

type Enter = Box<dyn FnMut(&IoUring, usize) -> io::Result<usize> + Send>;

impl Uring {
    /// Creates a ring.
    ///
    /// # Errors
    /// The kernel's; `Unsupported` if one of the operations is missing.
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
        let enter = Box::new(|ring: &IoUring, wanted| ring.submit_and_wait(wanted));
        let backlog = VecDeque::new();
        Ok(Self { ring, enter, backlog, is_behind: false, inline: 0, has_warned: false })
    }

    fn entry(&mut self, id: u32, call: Call) -> squeue::Entry {
        let fd = Fd(call.fd);
        let entry = match call.kind {
            CallKind::Read(to) => {
                opcode::Readv::new(fd, to.first, to.count).offset(call.offset).build()
            }
            CallKind::Write { from, is_durable } => opcode::Writev::new(fd, from.first, from.count)
                .offset(call.offset)
                .rw_flags(if is_durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            CallKind::WriteBack => opcode::Nop::new().build(),
            CallKind::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            CallKind::Allocate { mode } => {
                opcode::Fallocate::new(fd, call.len).offset(call.offset).mode(mode).build()
            }
        };
        self.inline = self.inline.saturating_add(call.len);
        let is_large = self.inline > INLINE;
        let flags = if is_large { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        entry.user_data(id.into()).flags(flags)
    }

    /// Moves calls from the backlog into the submission queue, as far as it has room.
    fn refill(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: the caller of `push` guarantees that file, buffers and their list are valid until the outcome is reaped.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Submits, and returns when `wanted` outcomes are available. Calls that the kernel does not take now, being short of memory
    /// or of room for outcomes, are retried when the caller sees `is_behind`: the thread also serves all other devices.
    fn enter(&mut self, wanted: usize) {
        // Each call may take a part, or be interrupted.
        for _ in 0..MOST_TRIES {
            self.refill();
            match (self.enter)(&self.ring, wanted) {
                Ok(0) if !self.ring.submission().is_empty() => break,
                Ok(_) if self.ring.submission().is_empty() && self.backlog.is_empty() => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if !std::mem::replace(&mut self.has_warned, true) {
                        warn!("The kernel takes no requests to disks for now: {error} (retrying)");
                    }
                    break;
                }
            }
        }
        self.is_behind = !self.ring.submission().is_empty() || !self.backlog.is_empty();
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    unsafe fn push(&mut self, id: u32, call: Call) {
        let entry = self.entry(id, call);
        self.backlog.push_back(entry);
        self.refill();
        if !self.backlog.is_empty() {
            self.enter(0);
        }
    }

    fn submit(&mut self) {
        self.inline = 0;
        if !self.ring.submission().is_empty() || !self.backlog.is_empty() {
            self.enter(0);
        }
    }

    fn is_behind(&self) -> bool {
        self.is_behind
    }

    fn withdraw(&mut self, id: u32) -> bool {
        let waiting = self.backlog.len();
        self.backlog.retain(|entry| entry.get_user_data() != u64::from(id));
        if self.backlog.len() < waiting {
            return true;
        }
        // Ends calls that wait for one of the kernel's workers; for the others it is harmless.
        let cancel = opcode::AsyncCancel::new(id.into()).build().user_data(CANCEL);
        // SAFETY: it has no buffers.
        let _ = unsafe { self.ring.submission().push(&cancel) };
        false
    }

    fn reap(&mut self, outcomes: &mut Vec<Outcome>) {
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
        self.enter(usize::from(most.is_none()));
        if !self.ring.completion().is_empty() {
            return;
        }
        if self.is_behind {
            // The caller checks, and waits again.
            thread::sleep(most.map_or(PAUSE, |most| most.min(PAUSE)));
        } else if let Some(most) = most {
            let most = Timespec::from(most);
            // An outcome, a time-out or EINTR: as above.
            let _ = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&most));
        }
    }

    fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use rvmm_devices::virtio::blk::{DiskBackend, DiskOp};

    use super::super::tests::{Bench, RAM, pattern, segment};
    use super::*;

    /// A disk whose kernel refuses `times` times, and the number of attempts. Reports a skip without io_uring.
    fn refusing(times: usize) -> Option<(Bench, Arc<AtomicUsize>)> {
        let mut ring = match Uring::new() {
            Ok(ring) => ring,
            Err(error) => {
                rvmm_devices::testing::skip(&format!("there is no io_uring: {error}"));
                return None;
            }
        };
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        ring.enter = Box::new(move |ring, wanted| {
            if count.fetch_add(1, SeqCst) < times {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            ring.submit_and_wait(wanted)
        });
        Some((Bench::new("", Box::new(ring)).unwrap(), asked))
    }

    /// Polls as a device does: again if the disk is behind, else when its descriptor is readable.
    fn ended(bench: &mut Bench, count: usize) -> usize {
        let (mut done, mut polls) = (Vec::new(), 0);
        loop {
            bench.disk.poll(&mut done);
            polls += 1;
            if !bench.disk.is_behind() {
                let missing = count - done.len();
                done.extend((missing > 0).then(|| bench.ended(missing)).into_iter().flatten());
                assert!(done.len() == count && done.iter().all(|done| done.is_ok), "{done:?}");
                return polls;
            }
        }
    }

    #[test]
    fn a_lone_request_that_the_kernel_refuses_for_long_is_done_when_it_no_longer_does() {
        let Some((mut bench, asked)) = refusing(250) else { return };
        bench.start(0, DiskOp::Read, 512, &[segment(RAM, 512)]);
        bench.disk.poll(&mut Vec::new());
        assert!(asked.load(SeqCst) < 5, "the thread also serves all other devices");
        assert!(ended(&mut bench, 1) > 100);
        assert_eq!(bench.ram(RAM, 512), pattern(1024, 0)[512..]);
        assert!(!bench.disk.is_behind());
    }

    #[test]
    fn more_requests_than_the_ring_has_room_for_wait_for_a_kernel_that_refuses() {
        let Some((mut bench, _)) = refusing(1000) else { return };
        let count = BATCH + 100;
        for slot in 0..count {
            bench.start(slot, DiskOp::Read, 0, &[segment(RAM + u64::from(slot) * 512, 512)]);
        }
        ended(&mut bench, count as usize);
        let last = RAM + u64::from(count - 1) * 512;
        assert_eq!(bench.ram(last, 512), pattern(512, 0));
    }

    #[test]
    fn requests_given_up_while_the_kernel_refuses_access_no_memory_later() {
        let Some((mut bench, _)) = refusing(800) else { return };
        let slots: Vec<u32> = (0..BATCH + 100).collect();
        for slot in &slots {
            bench.start(*slot, DiskOp::Read, 0, &[segment(RAM, 512)]);
        }
        bench.disk.drain(&slots);
        bench.fill(RAM, &[0xaa; 512]);
        assert!(bench.run(DiskOp::Read, 512, &[segment(RAM + 4096, 512)]));
        assert_eq!(bench.ram(RAM, 512), [0xaa; 512]);
    }
}
