//! Devices whose queues the host's kernel serves (Linux, include/uapi/linux/vhost.h; drivers/vhost/net.c and vsock.c).
//!
//! | file | contents |
//! |---|---|
//! | `vsock.rs` | sockets: `--device vsock,backend=kernel` |
//! | `testing.rs` | a kernel for tests |
//!
//! The network device is `net` itself: only its data queues are served by the kernel. The kernel receives the driver's kicks and
//! works on the rings in guest RAM as mapped in this process. Its interrupts are eventfds as with vhost-user (`remote.rs`), so this
//! works with an AIA and with a PLIC; with an AIA they stay in the kernel. The kernel validates the rings; on an error it signals
//! that, and the device needs a reset. Unlike another program it stops at once on request, and cannot die.
//!
//! Left out: logging (migration), the IOTLB (no IOMMU), busy polling, and reading the index where the kernel stopped
//! (`VHOST_GET_VRING_BASE`): a queue that was set up anew starts at 0, and one that was paused at the index of its used ring.

use std::io;
use std::os::fd::AsRawFd;

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::remote::{Calls, Remote};
use super::{DmaMemory, Rings, VirtioError, Work, feature};
use crate::device::{Interest, Source};
use crate::irq::Interrupt;

pub mod testing;
pub(crate) mod vsock;

/// Queues of each end.
const QUEUES: u16 = 2;

/// The first token of [`Kernel`]'s sources; those of the device are below.
pub(super) const FIRST_TOKEN: u32 = 0x1_0000;
const TOKEN_ERROR: u32 = FIRST_TOKEN;
const TOKEN_WAKEUP: u32 = FIRST_TOKEN + 1;
const TOKEN_CALL: u32 = FIRST_TOKEN + 2;

/// A queue for the kernel to serve, from the entry [`Rings::next`] on.
#[derive(Debug, Clone, Copy)]
pub struct KernelQueue<'a> {
    /// Its rings; the queue number is that of the end: 0 or 1.
    pub rings: Rings,
    /// Written to when the driver has made chains available.
    pub kick: &'a EventFd,
    /// Written to by the kernel to interrupt the driver.
    pub call: &'a EventFd,
    /// Written to by the kernel on an error in the ring.
    pub error: &'a EventFd,
}

/// Two queues that the host's kernel serves: receive, 0, and transmit, 1. Dropping it stops them.
pub trait KernelQueues: Send {
    /// Features of the device and of the transport that the kernel supports.
    fn features(&self) -> u64;

    /// Starts queues. `features` are those that the driver has accepted and the kernel supports; they are the same for both queues
    /// while one of them runs.
    ///
    /// # Errors
    /// The kernel refuses, or some of the rings are not in RAM: none of these queues runs then.
    fn start(&mut self, features: u64, queues: &[KernelQueue<'_>]) -> io::Result<()>;

    /// Stops these queues. Guest memory is no longer accessed for them when this returns.
    fn stop(&mut self, queues: &[u16]);
}

/// The queues of a device that the kernel serves: its first ones, two for each end.
pub(super) struct Kernel {
    model: &'static str,
    ends: Vec<Box<dyn KernelQueues>>,
    /// Features that may be set in the kernel.
    features: u64,
    calls: Calls,
    error: EventFd,
    /// Written to when the sources have changed.
    wakeup: EventFd,
    /// Negotiated features, while the device runs.
    running: Option<u64>,
    queues: Vec<Remote>,
    /// No queue runs until the device is resumed.
    is_paused: bool,
    has_warned: bool,
}

impl Kernel {
    /// Creates the queues of a device of this model, which has `features` besides the transport's.
    ///
    /// # Errors
    /// No descriptors are left, or the kernel does not support virtio 1.
    pub(super) fn new(
        model: &'static str,
        ends: Vec<Box<dyn KernelQueues>>,
        features: u64,
    ) -> io::Result<Self> {
        let known = ends.iter().fold(u64::MAX, |all, end| all & end.features());
        if known & feature::VERSION_1 == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's vhost does not support virtio 1",
            ));
        }
        let count = u16::try_from(ends.len()).unwrap_or(u16::MAX).saturating_mul(QUEUES);
        Ok(Self {
            model,
            ends,
            features: known & (features | feature::TRANSPORT),
            calls: Calls::new(count, TOKEN_CALL)?,
            error: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            wakeup: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            running: None,
            queues: Vec::new(),
            is_paused: false,
            has_warned: false,
        })
    }

    /// Has the kernel interrupt the driver itself, if possible; once, before a queue is added. True if it does.
    pub(super) fn attach(&mut self, interrupt: &Interrupt) -> bool {
        self.calls.attach(interrupt)
    }

    /// Features of the device and of the transport that the kernel supports.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Adds a queue: before [`activate`](Self::activate), or later if it was reset alone.
    pub(super) fn add(&mut self, rings: Rings, kick: &EventFd) {
        let Some(queue) = self.calls.queue(rings, kick) else { return };
        self.queues.push(queue);
        if self.running.is_some() {
            self.start(self.queues.len() - 1);
        }
    }

    /// Starts the queues of a driver that is ready, with the negotiated features.
    pub(super) fn activate(&mut self, features: u64) {
        self.running = Some(features);
        self.start(0);
    }

    /// Makes the I/O loop update its sources.
    pub(super) fn wake(&self) {
        // An error means that it is readable already.
        let _ = self.wakeup.write(1);
    }

    /// Starts the queues from this index on.
    fn start(&mut self, from: usize) {
        let features = self.running.filter(|_| !self.is_paused);
        let Some(features) = features.map(|taken| taken & self.features) else { return };
        let mut result = Ok(());
        for (number, end) in (0..).zip(&mut self.ends) {
            let own = self.queues.iter().skip(from).filter(|q| q.rings.queue / QUEUES == number);
            let own: Vec<KernelQueue<'_>> = own
                .map(|queue| KernelQueue {
                    rings: Rings { queue: queue.rings.queue % QUEUES, ..queue.rings },
                    kick: &queue.kick,
                    call: &queue.call,
                    error: &self.error,
                })
                .collect();
            if result.is_ok() && !own.is_empty() {
                result = end.start(features, &own);
            }
        }
        if let Err(error) = result {
            self.fail(&error);
        }
    }

    /// Makes the device need a reset: logs it once, and signals an error to the I/O loop as the kernel does.
    pub(super) fn fail(&mut self, why: &io::Error) {
        if !std::mem::replace(&mut self.has_warned, true) {
            warn!("{}: cannot start its queues in the kernel's vhost: {why}", self.model);
        }
        let _ = self.error.write(1);
    }

    /// Stops one queue.
    pub(super) fn reset_queue(&mut self, queue: u16) {
        if let Some(end) = self.ends.get_mut(usize::from(queue / QUEUES)) {
            end.stop(&[queue % QUEUES]);
        }
        self.queues.retain(|kept| kept.rings.queue != queue);
    }

    /// Replaces the ends, which serve no queue now.
    pub(super) fn connect(&mut self, ends: Vec<Box<dyn KernelQueues>>) {
        self.ends = ends;
        self.has_warned = false;
    }

    /// Stops all queues and drops them.
    pub(super) fn reset(&mut self) {
        if !self.is_paused {
            self.stop();
        }
        self.queues.clear();
        self.running = None;
        // An error of the stopped queues, if any.
        let _ = self.error.read();
    }

    /// Stops all queues until [`resume`](Self::resume). They continue at the index of their used ring: the kernel returns every chain
    /// that it has taken.
    pub(super) fn pause(&mut self, memory: &dyn DmaMemory) {
        if !std::mem::replace(&mut self.is_paused, true) {
            self.stop();
            for queue in &mut self.queues {
                queue.rings.next = queue.used_index(memory);
            }
        }
    }

    /// Starts the queues again.
    pub(super) fn resume(&mut self) {
        if std::mem::take(&mut self.is_paused) {
            self.start(0);
        }
    }

    /// Becomes the queues of a paused device with these negotiated features; the queues are added afterwards.
    pub(super) fn restore(&mut self, features: u64) {
        self.running = Some(features);
        self.is_paused = true;
    }

    fn stop(&mut self) {
        for (number, end) in (0..).zip(&mut self.ends) {
            let own = self.queues.iter().map(|queue| queue.rings.queue);
            let own = own.filter(|queue| queue / QUEUES == number).map(|queue| queue % QUEUES);
            let own: Vec<u16> = own.collect();
            if !own.is_empty() {
                end.stop(&own);
            }
        }
    }

    /// The descriptors to watch.
    pub(super) fn sources(&self) -> impl Iterator<Item = Source> {
        let source = |(event, token): (&EventFd, u32)| Source {
            fd: event.as_raw_fd(),
            token,
            interest: Interest::Read,
        };
        let own = [(&self.error, TOKEN_ERROR), (&self.wakeup, TOKEN_WAKEUP)];
        self.calls.sources().chain(own.map(source))
    }

    /// Takes an event: a source may be ready.
    ///
    /// # Errors
    /// [`VirtioError::Stuck`] if the kernel has signalled an error.
    pub(super) fn ready(&self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_ERROR if self.error.read().is_ok() => return Err(VirtioError::Stuck),
            TOKEN_ERROR => {}
            TOKEN_WAKEUP => drop(self.wakeup.read()),
            _ => self.calls.ready(token, work),
        }
        Ok(())
    }
}
