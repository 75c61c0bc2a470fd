//! Queues that somebody else works on, another program or the kernel: what is the same for both (QEMU's documentation,
//! "Vhost-user Protocol", and include/uapi/linux/vhost.h, from which that comes).
//!
//! Whoever works on a queue writes to an eventfd for an interrupt. The I/O loop reads it and raises the line, which is a level; an
//! irqfd would be a pulse, and without an AIA the kernel swallows it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DmaMemory, Rings, Work};
use crate::device::{Interest, Source};

/// A queue as it was handed over.
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
    /// The first queue's token; the others follow.
    first: u32,
}

impl Calls {
    /// Of `count` queues, whose tokens begin with `first`.
    pub(super) fn new(count: u16, first: u32) -> io::Result<Self> {
        let call = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        Ok(Self { all: (0..count).map(call).collect::<Result<_, _>>()?, first })
    }

    /// The queue that is handed over with these rings and this kick; none where there are no descriptors left: then it stands
    /// still, and the machine is about to end of that anyway.
    pub(super) fn queue(&self, rings: Rings, kick: &EventFd) -> Option<Remote> {
        let call = self.all.get(usize::from(rings.queue)).cloned()?;
        Some(Remote { rings, kick: Arc::new(kick.try_clone().ok()?), call })
    }

    /// What the I/O loop has to watch.
    pub(super) fn sources(&self) -> impl Iterator<Item = Source> {
        let source = |(token, call): (u32, &Arc<EventFd>)| Source {
            fd: call.as_raw_fd(),
            token,
            interest: Interest::Read,
        };
        (self.first..).zip(&self.all).map(source)
    }

    /// A source of these may be ready.
    pub(super) fn ready(&self, token: u32, work: &mut Work<'_>) {
        let queue = token.checked_sub(self.first).and_then(|queue| usize::try_from(queue).ok());
        let call = queue.and_then(|queue| self.all.get(queue));
        // Empty if the event was stale.
        if call.is_some_and(|call| call.read().is_ok()) {
            work.notify_driver();
        }
    }
}
