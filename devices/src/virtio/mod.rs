//! Virtio devices (virtio 1.3): what they share, and the seam between a device and its transport.
//!
//! | file | what |
//! |---|---|
//! | `life.rs`, `pass.rs` | the life of a device: status, features, queues; and its work |
//! | `mmio.rs` | the transport: registers and interrupt |
//! | `queue.rs` | a virtqueue that a driver cannot break; the only one that knows `virtio-queue` |
//! | `chain.rs` | a descriptor chain, taken apart and judged |
//! | `work.rs` | what a device works with: chains in, chains out |
//! | `remote.rs` | queues that somebody else works on |
//! | `interrupt.rs`, `hold.rs` | the interrupt, and results that wait for others |
//! | `bucket.rs` | token buckets |
//! | one file or folder per device | what only that device does |
//!
//! Everything that a device does happens on the I/O thread: kicks come as events, results go back under the device's lock.
//! A hart only reaches the transport's registers; a reset, which a hart causes, is the one thing that waits for the host, and
//! not for long: where a host's call does not end, the driver sees a reset that is not over.
//!
//! A queue may also be another program's or the host's kernel's ([`VirtioDevice::is_remote`]): then it gets the driver's set-up and
//! the kicks, and what is in the rings is between it and the driver.

use vmm_sys_util::eventfd::EventFd;

use crate::device::Source;

pub mod balloon;
pub mod blk;
pub mod bucket;
pub mod chain;
pub(crate) mod console;
mod hold;
pub(crate) mod input;
mod interrupt;
mod life;
pub mod mmio;
pub mod net;
mod pass;
pub mod queue;
mod remote;
pub(crate) mod rng;
pub mod testing;
pub mod vhost_kernel;
pub mod vhost_user;
pub(crate) mod vsock;
pub mod work;

pub use bucket::{Limit, Limiter};
pub use chain::{Chain, ChainError, Segment, pieces};
pub use mmio::VirtioMmio;
pub use queue::{MAX_QUEUE_SIZE, RingError};
pub use vm_memory::GuestMemoryMmap;
use vm_memory::{Bytes, GuestAddress};
pub use work::Work;

/// Guest RAM as devices reach it: alive as long as somebody holds this.
pub trait DmaMemory: Send + Sync {
    /// The RAM, by guest-physical address.
    fn view(&self) -> &GuestMemoryMmap;

    /// The guest needs what is in these `len` bytes from `addr` no more: whole pages of RAM inside may be given to the host.
    /// They stay RAM, and read as zero or as before. What of the range is not RAM is left alone.
    fn release(&self, addr: u64, len: u64);
}

impl DmaMemory for GuestMemoryMmap {
    fn view(&self) -> &GuestMemoryMmap {
        self
    }

    /// Only makes them read as zero: giving them back takes more than this crate may do.
    fn release(&self, addr: u64, len: u64) {
        let end = addr.saturating_add(len) / 4096 * 4096;
        let first = addr.checked_next_multiple_of(4096).unwrap_or(end);
        for page in (first..end).step_by(4096) {
            if self.write_slice(&[0; 4096], GuestAddress(page)).is_err() {
                return;
            }
        }
    }
}

/// Feature bits that the transport offers for every device (virtio 1.3, chapter 6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: chains in tables of their own.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides say when they want to hear of the other.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: not a legacy driver; without it most devices do not start.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_RING_RESET`: one queue can be reset alone.
    pub const RING_RESET: u64 = 1 << 40;
    /// All of them. ACCESS_PLATFORM is not among them: no IOMMU stands between these devices and RAM.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// The driver broke the device: it needs a reset and does nothing before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtioError {
    /// A ring cannot be read any further.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The host's end is gone for good.
    #[error("the host's end is gone")]
    Gone,
    /// The host's kernel, which works on the rings, makes no sense of them.
    #[error("the host's kernel cannot go on with its queues")]
    Stuck,
}

/// A queue as the driver has set it up: checked to be RAM, and frozen until it is reset. Addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Its number.
    pub queue: u16,
    /// Entries; a power of two.
    pub size: u16,
    /// The descriptor area.
    pub descriptors: u64,
    /// The driver area: the available ring.
    pub driver: u64,
    /// The device area: the used ring.
    pub device: u64,
}

/// What only one kind of device does. The transport owns the rest.
pub trait VirtioDevice: Send {
    /// The model's name, as in the catalog.
    fn name(&self) -> &'static str;

    /// The device type (virtio 1.3, chapter 5).
    fn id(&self) -> u32;

    /// The greatest size of each queue: powers of two up to [`MAX_QUEUE_SIZE`].
    fn queue_sizes(&self) -> &[u16];

    /// The features of this kind of device that are offered; constant.
    fn features(&self) -> u64;

    /// The configuration space, little-endian.
    fn config(&self) -> &[u8];

    /// The driver writes `data` at `offset` of the configuration space, inside it. Fields that are not the driver's stay
    /// as they are.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// Of [`feature::TRANSPORT`], what is offered: all of it, where nobody else works on the queues.
    fn transport_features(&self) -> u64 {
        feature::TRANSPORT
    }

    /// Whether somebody else works on `queue` where the driver has taken these features: nothing is taken from it here, and
    /// no kick of it counts; always the same for the same features.
    fn is_remote(&self, queue: u16, features: u64) -> bool {
        let _ = (queue, features);
        false
    }

    /// A queue that somebody else works on starts, set up like this: before the device is activated, or later where it was reset alone.
    /// Every notification of the driver is written to `kick`.
    fn start_remote(&mut self, rings: Rings, kick: &EventFd) {
        let _ = (rings, kick);
    }

    /// Whether those who work on its queues raise the interrupt line by themselves ([`crate::IrqLine::raise_by`]) while it is active, without a
    /// word to the transport; constant.
    fn raises_line(&self) -> bool {
        false
    }

    /// Whether a driver may do without [`feature::VERSION_1`] (virtio 1.3, 6.2: a device may refuse to go on then): only where nothing that
    /// passes between the two looks different without it; constant.
    fn may_lack_version_1(&self) -> bool {
        false
    }

    /// Whether results may wait for others for a moment, so that one interrupt is for several (`hold.rs`); constant.
    fn may_hold(&self) -> bool {
        false
    }

    /// The driver is ready (DRIVER_OK) and has taken `features` of those offered.
    fn activate(&mut self, features: u64);

    /// The driver has made chains of `queue` available, or may have.
    ///
    /// # Errors
    /// [`VirtioError`] where the device cannot go on without a reset.
    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError>;

    /// The driver resets `queue` alone: what was taken from it is forgotten, and no longer touches guest memory when this
    /// returns and [`is_settled`](Self::is_settled).
    fn reset_queue(&mut self, queue: u16);

    /// Back to the state after power-on. Nothing that was taken from a queue touches guest memory when this returns and
    /// [`is_settled`](Self::is_settled). Waits for a second at most.
    fn reset(&mut self);

    /// Whether nothing of before the last resets touches guest memory any more. The driver sees a reset as not over before;
    /// the device is called ([`ready`](Self::ready)) when it is.
    fn is_settled(&self) -> bool {
        true
    }

    /// What the I/O loop has to watch for this device; tokens are below [`mmio::KICK`].
    fn sources(&self) -> Vec<Source>;

    /// A source may be ready, whether the driver is or not.
    ///
    /// # Errors
    /// As for [`kicked`](Self::kicked).
    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError>;
}
