//! Memory that arrives after the guest (post-copy): it runs at the target while pages are still at the source. A page that is accessed
//! before it is there is fetched first (userfaultfd(2)); the others follow in order.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::channel::Channel;
use super::message::{Kind, pages, zeroes};
use super::source::{broken, refusal};
use crate::error::{Error, chain};
use crate::memory::{GuestRam, PAGE, Placed, Userfault};
use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

/// The pages that are still at the source, and the thread that takes them in.
pub(crate) struct Arriving {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// The machine's, once it is built.
    control: OnceLock<Arc<Control>>,
    /// Makes the thread look around.
    wake: OwnedFd,
    /// For both threads that send.
    channel: Mutex<Channel>,
}

impl Shared {
    fn wake_up(&self) {
        // A failure means that it is about to look around anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn send(&self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        let mut channel = self.channel();
        channel.send(kind, bytes.len(), |payload| {
            payload.copy_from_slice(bytes);
            Ok(())
        })
    }

    fn channel(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread tells the one that builds the machine: it has got the guest, or not.
pub(super) type Verdict = Receiver<Result<(), Error>>;

impl Arriving {
    /// Lets the pages in `left` come later. From now on the thread receives all messages.
    ///
    /// # Errors
    /// RAM is in huge pages, or the host does not allow it.
    pub(super) fn start(
        ram: &Arc<GuestRam>,
        left: &[Range<u64>],
        channel: &Channel,
    ) -> Result<(Self, Verdict), Error> {
        let failed = |source: io::Error| Error::Host {
            what: "Cannot let the guest's memory arrive after it".into(),
            source,
        };
        let faults = ram.leave_ranges(left)?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let shared = Arc::new(Shared {
            control: OnceLock::new(),
            wake: wake.map_err(|error| failed(error.into()))?,
            channel: Mutex::new(channel.try_clone().map_err(failed)?),
        });
        let (sender, verdict) = mpsc::channel();
        let thread = PageThread {
            shared: Arc::clone(&shared),
            ram: Arc::clone(ram),
            faults,
            messages: channel.try_clone().map_err(failed)?,
            left: left.iter().flat_map(|range| range.clone().step_by(4096)).collect(),
            asked: BTreeSet::new(),
            verdict: Some(sender),
        };
        let started = thread::Builder::new().name("arriving".into()).spawn(move || thread.run());
        Ok((Self { shared, thread: Some(started.map_err(failed)?) }, verdict))
    }

    /// Ends the machine if memory is lost, and the wait for memory if the machine ends.
    pub(crate) fn attach(&self, control: &Arc<Control>) {
        let _ = self.shared.control.set(Arc::clone(control));
        let shared = Arc::clone(&self.shared);
        control.on_stop(Box::new(move || shared.wake_up()));
    }

    /// Sends a message in between those of the thread.
    pub(super) fn send(&self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        self.shared.send(kind, bytes)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // Without a machine nobody waits for pages any more.
        let stopped = self.shared.control.get().is_some_and(|control| control.reason().is_some());
        if !stopped {
            let _ = self.shared.channel().close();
        }
        self.shared.wake_up();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct PageThread {
    shared: Arc<Shared>,
    ram: Arc<GuestRam>,
    faults: Arc<Userfault>,
    messages: Channel,
    /// Offsets of the pages that are still at the source.
    left: BTreeSet<u64>,
    /// Those that it was asked for.
    asked: BTreeSet<u64>,
    /// Until the guest is this side's.
    verdict: Option<Sender<Result<(), Error>>>,
}

impl PageThread {
    fn run(mut self) {
        let error = match self.take_in() {
            Ok(None) => return,
            Ok(Some(error)) | Err(error) => error,
        };
        match (self.verdict.take(), self.shared.control.get()) {
            // Nobody listens if the machine could not be built.
            (Some(verdict), _) => _ = verdict.send(Err(error)),
            (None, Some(control)) => {
                let why = chain(&error);
                control.stop(StopReason::HostFailure(format!(
                    "the guest's memory has not arrived completely ({why}): the guest is lost"
                )));
            }
            (None, None) => {}
        }
        // Who waits for a page does not wait any more.
        self.ram.lose_absent();
    }

    /// Takes pages in until all are there, or the machine ends (`Ok(None)`).
    fn take_in(&mut self) -> Result<Option<Error>, Error> {
        while !self.left.is_empty() || self.verdict.is_some() {
            let watched = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let (shared, faults) = (Arc::clone(&self.shared), Arc::clone(&self.faults));
            let messages = &self.messages;
            let mut descriptors =
                [watched(faults.as_fd()), watched(messages.as_fd()), watched(shared.wake.as_fd())];
            match poll(&mut descriptors, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(broken(error.into())),
            }
            let [has_fault, has_message, _] =
                descriptors.map(|descriptor| !descriptor.revents().is_empty());
            if shared.control.get().is_some_and(|control| control.reason().is_some()) {
                self.ram.lose_absent();
                // Nothing is needed any more; an error means that the source has ended.
                let _ = shared.send(Kind::Complete, &[]);
                return Ok(None);
            }
            if has_fault {
                self.serve_faults()?;
            }
            if has_message && let Some(refusal) = self.receive()? {
                return Ok(Some(refusal));
            }
        }
        self.ram.keep_all().map_err(broken)?;
        self.shared.send(Kind::Complete, &[]).map_err(broken)?;
        Ok(None)
    }

    /// Asks for the pages that somebody waits for.
    fn serve_faults(&mut self) -> Result<(), Error> {
        let start = self.ram.host_address();
        for address in self.faults.faults().map_err(broken)? {
            let at = address.saturating_sub(start) / PAGE * PAGE;
            if !self.left.contains(&at) {
                // It is zero, or has come meanwhile.
                self.faults.zero(start.saturating_add(at)).map_err(broken)?;
            } else if self.asked.insert(at) {
                self.shared.send(Kind::Want, &at.to_le_bytes()).map_err(broken)?;
            }
        }
        Ok(())
    }

    /// Receives a message. The result is the source's refusal.
    fn receive(&mut self) -> Result<Option<Error>, Error> {
        let start = self.ram.host_address();
        let invalid = || broken(io::Error::new(io::ErrorKind::InvalidData, "it sends wrong pages"));
        match self.messages.receive().map_err(broken)? {
            (Kind::Pages, bytes) => {
                let (at, bytes) = pages(bytes).ok_or_else(invalid)?;
                for (at, page) in (at..).step_by(4096).zip(bytes.chunks(4096)) {
                    // A page that is not awaited is one that was sent twice.
                    if page.len() == 4096 && self.left.remove(&at) {
                        place(self.faults.copy(start.saturating_add(at), page))?;
                    }
                }
            }
            (Kind::Zeroes, bytes) => {
                let (at, len) = zeroes(bytes).ok_or_else(invalid)?;
                let end = at.checked_add(len).ok_or_else(invalid)?;
                let zero: Vec<u64> = self.left.range(at..end.max(at)).copied().collect();
                for at in zero {
                    self.left.remove(&at);
                    place(self.faults.zero(start.saturating_add(at)))?;
                }
            }
            (Kind::Go, _) => {
                if let Some(verdict) = self.verdict.take() {
                    let _ = verdict.send(Ok(()));
                }
            }
            (Kind::Refused, bytes) => return Ok(Some(refusal(bytes))),
            _ => return Err(invalid()),
        }
        Ok(None)
    }
}

/// A page that was filled. One that was there before, or whose memory is not the guest's any more, is fine.
fn place(placed: io::Result<Placed>) -> Result<(), Error> {
    placed.map(|_| ()).map_err(|source| Error::Host {
        what: "Cannot place a page of the guest's memory".into(),
        source,
    })
}
