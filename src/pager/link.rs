//! The machine's side of a pager: the connection, and the thread that ends the machine if it is closed.
//!
//! The thread `io`, which has the process's signals, may wait for a page itself, as may the one that restores the machine. So a signal that
//! ends the machine and that nobody takes is followed here.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::handshake::{self, Region};
use crate::error::Error;
use crate::memory::GuestRam;
use crate::signals;
use crate::sockets::connect_to;
use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

/// Time for the thread `io` to take a signal.
const SIGNAL_PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// The signals that end a machine.
const ENDING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Stack of the thread; its deepest call is a log line.
const STACK: usize = 128 << 10;

/// A pager that serves the machine's memory. Once the machine has a reason to stop, or the pager is gone, the absent pages are lost:
/// who waits for one, such as a hart within KVM_RUN, does not wait any more.
pub(crate) struct PagerLink {
    wake: Arc<OwnedFd>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Has the thread look around. A failure means that it is about to do so anyway.
fn wake_up(wake: &OwnedFd) {
    let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
}

/// What the thread has.
struct Watch {
    pager: UnixStream,
    path: PathBuf,
    wake: Arc<OwnedFd>,
    is_over: Arc<AtomicBool>,
    ram: Arc<GuestRam>,
    control: Arc<Control>,
}

impl PagerLink {
    /// Leaves RAM to the pager that listens at `path`. Nothing has accessed RAM before.
    ///
    /// # Errors
    /// [`Error::Config`] for RAM of a kind that cannot be left to a pager; [`Error::Host`] if nobody listens, or the host does not allow
    /// it.
    pub(crate) fn connect(
        path: &Path,
        ram: &Arc<GuestRam>,
        control: &Arc<Control>,
    ) -> Result<Self, Error> {
        let failed = |what: &str, source: io::Error| Error::Host {
            what: format!("Cannot {what} the pager at {}", path.display()),
            source,
        };
        let faults = ram.leave_to_pager()?;
        let pager = connect_to(path).map_err(|source| Error::Host {
            what: format!(
                "Cannot connect to the pager at {} (start it first, and once for each machine)",
                path.display()
            ),
            source,
        })?;
        let sent = handshake::send(&pager, &[Region::of(ram)], &faults);
        sent.map_err(|error| failed("hand the memory to", error))?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let wake = Arc::new(wake.map_err(|error| failed("watch", error.into()))?);
        let is_over = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&wake);
        control.on_stop(Box::new(move || wake_up(&stopped)));
        let watch = Watch {
            pager,
            path: path.into(),
            wake: Arc::clone(&wake),
            is_over: Arc::clone(&is_over),
            ram: Arc::clone(ram),
            control: Arc::clone(control),
        };
        let thread = thread::Builder::new().name("pager".into()).stack_size(STACK);
        let thread = thread.spawn(move || watch.run()).map_err(|error| failed("watch", error))?;
        Ok(Self { wake, is_over, thread: Some(thread) })
    }
}

impl Drop for PagerLink {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        wake_up(&self.wake);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Watch {
    fn run(self) {
        while self.control.reason().is_none() {
            if self.is_over.load(Ordering::SeqCst) {
                return;
            }
            if let Some(why) = self.wait() {
                let path = self.path.display();
                // First, so that nobody takes lost pages for the reason.
                self.control.stop(StopReason::HostFailure(format!(
                    "the pager at {path}, which has the guest's memory, {why} (see its messages; start it again, and restore the machine again)"
                )));
            }
        }
        self.ram.lose_absent();
    }

    /// Waits for a reason to look around; the result is what is wrong with the pager.
    fn wait(&self) -> Option<String> {
        let watched = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut descriptors = vec![watched(self.pager.as_fd()), watched(self.wake.as_fd())];
        let own = descriptors.len();
        descriptors.extend(signals::descriptor().map(watched));
        let is_ready = |descriptor: &PollFd<'_>| !descriptor.revents().is_empty();
        match poll(&mut descriptors, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return None,
            Err(error) => return Some(format!("cannot be watched: {error}")),
        }
        if !descriptors.iter().take(own).any(is_ready) {
            descriptors.truncate(own);
            let _ = poll(&mut descriptors, Some(&SIGNAL_PATIENCE));
            if signals::is_waiting(&ENDING) {
                self.control.stop(StopReason::Requested);
            }
        }
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        match recv(&self.pager, &mut [0; 64], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Some("has ended".into()),
            // Not a word of the protocol; it does no harm.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => None,
            Err(error) => Some(format!("has ended: {error}")),
        }
    }
}
