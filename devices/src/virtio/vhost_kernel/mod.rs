//! Devices whose queues the host's kernel works on (Linux, include/uapi/linux/vhost.h; drivers/vhost/net.c and vsock.c).
//!
//! | file | what |
//! |---|---|
//! | `vsock.rs` | sockets: `--device vsock,backend=kernel` |
//! | `testing.rs` | a kernel for tests |
//!
//! The network card is `net` itself: only its data queues go to the kernel. The kernel reads the driver's kicks and works on the
//! rings in guest RAM as it is mapped in this process. Its interrupts come as those of another program (`remote.rs`), so this works
//! with an AIA and with a PLIC alike; with an AIA they go from the kernel to the kernel. It judges what the driver puts into the rings; where it cannot go on it says so, and the
//! device needs a reset. Unlike another program it stops at once when it is told to, and cannot die.
//!
//! Left out: logging (migration), the IOTLB (no IOMMU), busy polling, and reading back where the kernel stopped
//! (`VHOST_GET_VRING_BASE`): a queue that starts again was set up anew and starts at 0.

use std::io;
use std::os::fd::AsRawFd;

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::remote::{Calls, Remote};
use super::{Rings, VirtioError, Work, feature};
use crate::device::{Interest, Source};
use crate::irq::IrqLine;

pub mod testing;
pub(crate) mod vsock;

/// Queues of each end.
const QUEUES: u16 = 2;

/// The tokens of the device's sources from here on are those of [`Kernel`].
pub(super) const FIRST_TOKEN: u32 = 0x1_0000;
const TOKEN_ERROR: u32 = FIRST_TOKEN;
const TOKEN_LOOK: u32 = FIRST_TOKEN + 1;
const TOKEN_CALL: u32 = FIRST_TOKEN + 2;

/// A queue as the kernel is to work on it, from the first entry on.
#[derive(Debug, Clone, Copy)]
pub struct KernelQueue<'a> {
    /// Where it lies; its number is the end's: 0 or 1.
    pub rings: Rings,
    /// Written to when the driver has made chains available.
    pub kick: &'a EventFd,
    /// The kernel writes to it when the driver is to look at the queue.
    pub call: &'a EventFd,
    /// The kernel writes to it when it cannot go on.
    pub error: &'a EventFd,
}

/// Two queues that the host's kernel works on: one for the driver to receive, 0, and one to send, 1. Dropping it stops them.
pub trait KernelQueues: Send {
    /// Features that the kernel has for such a device, and for its transport.
    fn features(&self) -> u64;

    /// Starts queues. `features` are those that the driver has taken and the kernel has; they are the same for both queues while
    /// one of them runs.
    ///
    /// # Errors
    /// The kernel refuses, or some of the rings are not in RAM: none of these queues runs then.
    fn start(&mut self, features: u64, queues: &[KernelQueue<'_>]) -> io::Result<()>;

    /// Stops these queues. Nothing in guest memory is touched for them when this returns.
    fn stop(&mut self, queues: &[u16]);
}

/// The queues of a device that the kernel works on: its first ones, two for each end.
pub(super) struct Kernel {
    model: &'static str,
    ends: Vec<Box<dyn KernelQueues>>,
    /// What the kernel may be told of.
    features: u64,
    calls: Calls,
    error: EventFd,
    /// Written to where what there is to watch has changed.
    look: EventFd,
    /// Features that the driver has taken, while the device runs.
    running: Option<u64>,
    queues: Vec<Remote>,
    has_warned: bool,
}

impl Kernel {
    /// Queues of a device of this model, which knows `features` besides the transport's.
    ///
    /// # Errors
    /// No descriptors are left, or the kernel does not know virtio 1.
    pub(super) fn new(
        model: &'static str,
        ends: Vec<Box<dyn KernelQueues>>,
        features: u64,
    ) -> io::Result<Self> {
        let known = ends.iter().fold(u64::MAX, |all, end| all & end.features());
        if known & feature::VERSION_1 == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's vhost does not know virtio 1",
            ));
        }
        let count = u16::try_from(ends.len()).unwrap_or(u16::MAX).saturating_mul(QUEUES);
        Ok(Self {
            model,
            ends,
            features: known & (features | feature::TRANSPORT),
            calls: Calls::new(count, TOKEN_CALL)?,
            error: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            look: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            running: None,
            queues: Vec::new(),
            has_warned: false,
        })
    }

    /// Has the kernel raise the device's `line` itself where it can; once, before a queue is handed over.
    pub(super) fn raise(&mut self, line: &dyn IrqLine) {
        self.calls.raise(line);
    }

    /// Whether it raises the line itself.
    pub(super) fn raises_line(&self) -> bool {
        self.calls.raise_line()
    }

    /// What the kernel has of the device's features and of the transport's.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Hands a queue over: before [`activate`](Self::activate), or later where it was reset alone.
    pub(super) fn add(&mut self, rings: Rings, kick: &EventFd) {
        let Some(queue) = self.calls.queue(rings, kick) else { return };
        self.queues.push(queue);
        if self.running.is_some() {
            self.start(self.queues.len() - 1);
        }
    }

    /// The driver is ready and has taken these features.
    pub(super) fn activate(&mut self, features: u64) {
        self.running = Some(features);
        self.start(0);
    }

    /// Has the I/O loop look at what there is to watch.
    pub(super) fn wake(&self) {
        // Refused means that it is about to look.
        let _ = self.look.write(1);
    }

    /// Starts the queues from the one at this place on.
    fn start(&mut self, from: usize) {
        let Some(features) = self.running.map(|taken| taken & self.features) else { return };
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

    /// The device needs a reset; said once, and learned by the I/O loop, as from the kernel.
    pub(super) fn fail(&mut self, why: &io::Error) {
        if !std::mem::replace(&mut self.has_warned, true) {
            warn!("{}: the kernel's vhost does not take its queues: {why}", self.model);
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

    /// Stops all queues.
    pub(super) fn reset(&mut self) {
        for (number, end) in (0..).zip(&mut self.ends) {
            let own = self.queues.iter().map(|queue| queue.rings.queue);
            let own = own.filter(|queue| queue / QUEUES == number).map(|queue| queue % QUEUES);
            let own: Vec<u16> = own.collect();
            if !own.is_empty() {
                end.stop(&own);
            }
        }
        self.queues.clear();
        self.running = None;
        // Of queues that are no more; empty in most cases.
        let _ = self.error.read();
    }

    /// What the I/O loop has to watch.
    pub(super) fn sources(&self) -> impl Iterator<Item = Source> {
        let source = |(event, token): (&EventFd, u32)| Source {
            fd: event.as_raw_fd(),
            token,
            interest: Interest::Read,
        };
        let own = [(&self.error, TOKEN_ERROR), (&self.look, TOKEN_LOOK)];
        self.calls.sources().chain(own.map(source))
    }

    /// A source of these may be ready.
    ///
    /// # Errors
    /// [`VirtioError::Stuck`] where the kernel cannot go on.
    pub(super) fn ready(&self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            TOKEN_ERROR if self.error.read().is_ok() => return Err(VirtioError::Stuck),
            TOKEN_ERROR => {}
            TOKEN_LOOK => drop(self.look.read()),
            _ => self.calls.ready(token, work),
        }
        Ok(())
    }
}
