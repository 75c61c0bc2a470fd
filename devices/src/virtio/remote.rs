//! Remote queues, processed by another program (vhost-user) or the kernel (vhost): the common parts (QEMU's documentation,
//! "Vhost-user Protocol", and include/uapi/linux/vhost.h, on which it is based).
//!
//! The backend writes to an eventfd, the queue's call, for an interrupt. The I/O loop reads it and raises the line, which is
//! level-triggered. With an AIA, the kernel may raise the line itself (an irqfd), bypassing the I/O thread; it never lowers it, so
//! the driver's acknowledgement does ([`crate::StatusPin`]). Without an AIA the events would be lost.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DmaMemory, Rings, Work};
use crate::device::{Interest, Source};
use crate::irq::Interrupt;

/// A queue passed to its backend.
pub(super) struct Remote {
    pub(super) rings: Rings,
    pub(super) kick: Arc<EventFd>,
    pub(super) call: Arc<EventFd>,
}

impl Remote {
    /// The used ring's index, in the driver's memory.
    pub(super) fn used_index(&self, memory: &dyn DmaMemory) -> u16 {
        let addr = self.rings.device.checked_add(2).map(GuestAddress);
        let index = addr.and_then(|addr| memory.view().read_obj::<u16>(addr).ok());
        index.map_or(0, u16::from_le)
    }
}

/// The interrupts of a device's first queues, one eventfd each.
pub(super) struct Calls {
    all: Vec<Arc<EventFd>>,
    /// Number of them, the first ones, with which the kernel raises the line.
    by_kernel: usize,
    /// The token of the first queue; the others follow.
    first: u32,
}

impl Calls {
    /// Creates the eventfds of `count` queues, whose tokens begin with `first`.
    pub(super) fn new(count: u16, first: u32) -> io::Result<Self> {
        let call = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        Ok(Self { all: (0..count).map(call).collect::<Result<_, _>>()?, by_kernel: 0, first })
    }

    /// Lets the kernel interrupt the driver for them, if it can; to be called before a queue is passed on. True if it does for some.
    pub(super) fn attach(&mut self, interrupt: &Interrupt) -> bool {
        let attach = |(queue, call): &(u16, &Arc<EventFd>)| interrupt.attach_irqfd(*queue, call);
        self.by_kernel = (0..).zip(&self.all).take_while(attach).count();
        self.by_kernel > 0
    }

    /// Creates the queue with these rings and this kick; `None` if there are no descriptors left: then it is not
    /// processed, and the machine is about to fail for the same reason.
    pub(super) fn queue(&self, rings: Rings, kick: &EventFd) -> Option<Remote> {
        let call = self.all.get(usize::from(rings.queue)).cloned()?;
        Some(Remote { rings, kick: Arc::new(kick.try_clone().ok()?), call })
    }

    /// The descriptors for the I/O loop to watch.
    pub(super) fn sources(&self) -> impl Iterator<Item = Source> {
        let source = |(token, call): (u32, &Arc<EventFd>)| Source {
            fd: call.as_raw_fd(),
            token,
            interest: Interest::Read,
        };
        (self.first..).zip(&self.all).skip(self.by_kernel).map(source)
    }

    /// Processes an event of one of these sources, which may be stale.
    pub(super) fn ready(&self, token: u32, work: &mut Work<'_>) {
        let queue = token.checked_sub(self.first).and_then(|queue| u16::try_from(queue).ok());
        let Some(queue) = queue else { return };
        // Empty if the event was stale.
        if self.all.get(usize::from(queue)).is_some_and(|call| call.read().is_ok()) {
            work.notify_driver(queue);
        }
    }
}
