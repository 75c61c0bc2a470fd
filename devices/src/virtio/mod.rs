//! Virtio devices (virtio 1.3): common parts, and the interface between a device and its transport.
//!
//! | file | contents |
//! |---|---|
//! | `state.rs`, `pass.rs` | the state of a device: status, features, queues; and the processing of its queues |
//! | `mmio.rs` | the transport: registers and interrupt |
//! | `lifecycle.rs` | pause, save and restore of all that |
//! | `queue.rs` | a virtqueue that validates the driver's rings; the only file that uses `virtio-queue` |
//! | `chain.rs` | parsing and validation of descriptor chains |
//! | `work.rs` | a device's access to its queues |
//! | `remote.rs` | queues processed by another program or the kernel (vhost) |
//! | `interrupt.rs`, `hold.rs` | the interrupt, and its coalescing |
//! | `bucket.rs` | token buckets |
//! | one file or folder per device | the device type |
//!
//! A device does all its work on the I/O thread: kicks arrive as events, results are returned under the device's lock.
//! A hart only accesses the transport's registers. Only a device reset, on a hart, waits for the host, for a bounded
//! time: if a call of the host does not return, the driver reads that the reset is not complete.
//!
//! A queue may also be processed by another program or the host's kernel ([`DeviceType::remote`]): the device then passes on
//! the driver's set-up and the kicks, and does not access the rings.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vmm_sys_util::eventfd::EventFd;

use crate::device::Source;
use crate::irq::Interrupt;
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};

pub mod balloon;
pub mod blk;
pub mod bucket;
pub mod chain;
pub(crate) mod console;
mod hold;
pub(crate) mod input;
mod interrupt;
mod lifecycle;
pub mod mmio;
pub mod net;
mod pass;
pub mod queue;
mod remote;
pub(crate) mod rng;
mod state;
pub mod testing;
pub mod vhost_kernel;
pub mod vhost_user;
pub(crate) mod vsock;
pub mod work;

pub use bucket::{Limit, Limiter};
pub use chain::{Chain, ChainError, SavedChain, Segment, pieces};
pub use mmio::VirtioMmio;
pub use queue::{MAX_QUEUE_SIZE, RingError};
pub use vm_memory::GuestMemoryMmap;
use vm_memory::{Bytes, GuestAddress};
pub use work::Work;

/// Guest RAM for DMA: stays mapped until the last reference is dropped.
///
/// While a machine is saved or moved, the written pages are recorded. Whoever writes to RAM notes it: a device that processes its
/// queues itself does, and the kernel's vhost does ([`write_log`](Self::write_log)). Queues of another program
/// ([`RemoteQueues`]) are not recorded.
pub trait DmaMemory: Send + Sync {
    /// The RAM, by guest-physical address.
    fn view(&self) -> &GuestMemoryMmap;

    /// True while writes are recorded; at other times there is no need to note them.
    fn records_writes(&self) -> bool;

    /// Notes that `len` bytes from `addr` on were written, or may have been. Called after the last of them is written, so that
    /// whoever takes the note and then reads them gets the new ones. Addresses in the range that are not RAM are ignored.
    fn note_written(&self, addr: u64, len: u64);

    /// The record itself, for the host's kernel; `None` while nothing is recorded. Recording begins and ends while all queues are
    /// paused.
    fn write_log(&self) -> Option<WriteLog>;

    /// Releases whole pages of RAM within these `len` bytes from `addr` to the host: the guest no longer needs their contents.
    /// They stay RAM, and read as zero or as before; what changes is noted as written. Addresses in the range that are not RAM are
    /// ignored.
    fn release(&self, addr: u64, len: u64);
}

/// A record of written pages: a bit for each 4096 bytes, 64 in a word, the lowest one first.
#[derive(Debug, Clone)]
pub struct WriteLog {
    /// Guest-physical address of the first page.
    pub start: u64,
    /// The bits. Others set and clear them at any time.
    pub words: Arc<[AtomicU64]>,
}

/// For tests: nothing is recorded.
impl DmaMemory for GuestMemoryMmap {
    fn view(&self) -> &GuestMemoryMmap {
        self
    }

    fn records_writes(&self) -> bool {
        false
    }

    fn note_written(&self, _addr: u64, _len: u64) {}

    fn write_log(&self) -> Option<WriteLog> {
        None
    }

    /// Only zeroes the pages: releasing them needs unsafe code.
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
    /// `VIRTIO_F_INDIRECT_DESC`: indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides give the index at which they want to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: not a legacy driver; most devices require it.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_RING_RESET`: one queue can be reset alone.
    pub const RING_RESET: u64 = 1 << 40;
    /// All of them. ACCESS_PLATFORM is not offered: there is no IOMMU between these devices and RAM.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// An error after which the device does nothing until it is reset (DEVICE_NEEDS_RESET).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtioError {
    /// A ring is invalid.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The backend is gone for good.
    #[error("the backend is gone")]
    BackendGone,
    /// The host's kernel (vhost), which processes the queues, found them invalid.
    #[error("the host's kernel stopped processing the queues")]
    Stuck,
}

/// A queue as set up by the driver: its rings are in RAM, and fixed until it is reset. Addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// The queue's number.
    pub queue: u16,
    /// Entries; a power of two.
    pub size: u16,
    /// The descriptor area.
    pub descriptors: u64,
    /// The driver area: the available ring.
    pub driver: u64,
    /// The device area: the used ring.
    pub device: u64,
    /// The index in the available ring to begin with: 0, unless the queue was stopped and continues.
    pub next: u16,
}

/// The constant properties of a device.
#[derive(Debug, Clone)]
pub struct DeviceType {
    /// The model's name, as in the catalog.
    pub name: &'static str,
    /// The device type (virtio 1.3, chapter 5).
    pub id: u32,
    /// The maximum size of each queue: powers of two up to [`MAX_QUEUE_SIZE`].
    pub queue_sizes: Box<[u16]>,
    /// The offered features of this device type.
    pub features: u64,
    /// The offered features of [`feature::TRANSPORT`]: all of them, unless a remote queue's backend lacks some.
    pub transport_features: u64,
    /// The queues that another program or the kernel processes.
    pub remote: RemoteQueues,
    /// True if a driver may leave out [`feature::VERSION_1`] (virtio 1.3, 6.2: a device may fail to operate then): only if the
    /// device's data formats are the same without it.
    pub version_1_is_optional: bool,
    /// True if results may be held back for a short time, so that several share one interrupt (`hold.rs`).
    pub coalesces_interrupts: bool,
}

impl DeviceType {
    /// A device that processes all its queues itself, for drivers of virtio 1.
    #[must_use]
    pub fn new(name: &'static str, id: u32, queue_sizes: &[u16], features: u64) -> Self {
        Self {
            name,
            id,
            queue_sizes: queue_sizes.into(),
            features,
            transport_features: feature::TRANSPORT,
            remote: RemoteQueues::None,
            version_1_is_optional: false,
            coalesces_interrupts: false,
        }
    }
}

/// The queues of a device that another program or the kernel processes: the device takes no chains from them, and ignores their kicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteQueues {
    /// None.
    None,
    /// This number of queues, the first ones.
    First(u16),
    /// Those of this number of pairs of a network device, or of one pair without `VIRTIO_NET_F_MQ`.
    Pairs(u16),
}

impl RemoteQueues {
    /// True if `queue` is one of them with these negotiated features.
    #[must_use]
    pub fn include(self, queue: u16, features: u64) -> bool {
        match self {
            Self::None => false,
            Self::First(count) => queue < count,
            Self::Pairs(_) if features & net::bit::MQ == 0 => queue < 2,
            Self::Pairs(count) => queue / 2 < count,
        }
    }
}

/// A device type. The transport implements the rest; the device does not know which one it is.
pub trait VirtioDevice: VirtioLifecycle + Send {
    /// The constant properties. Called once.
    fn device_type(&self) -> DeviceType;

    /// The configuration space, little-endian.
    fn config(&self) -> &[u8];

    /// Writes `data` at `offset` of the configuration space, inside it, for the driver. Read-only fields do not
    /// change.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// Lets the backends of remote queues interrupt the driver directly while the device is active, bypassing the transport
    /// ([`Interrupt::attach_irqfd`]). True if they do. Called once, first.
    fn attach_interrupt(&mut self, interrupt: &Interrupt) -> bool {
        let _ = interrupt;
        false
    }

    /// Starts a remote queue ([`DeviceType::remote`]) with this set-up: before the device is activated, or later after a reset of the
    /// queue alone. Every notification of the driver is written to `kick`.
    fn start_remote(&mut self, rings: Rings, kick: &EventFd) {
        let _ = (rings, kick);
    }

    /// Starts the device: the driver has set DRIVER_OK and accepted these `features`.
    fn activate(&mut self, features: u64);

    /// Processes `queue`, in which the driver may have made chains available.
    ///
    /// # Errors
    /// [`VirtioError`] if the device needs a reset.
    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError>;

    /// The descriptors for the I/O loop to watch for this device; tokens are below [`mmio::KICK`].
    fn list_sources(&self, list: &mut Vec<Source>);

    /// Processes a source that may be ready; the device may be inactive.
    ///
    /// # Errors
    /// As for [`kicked`](Self::kicked).
    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError>;
}

/// The life cycle of a device type: [`Lifecycle`](crate::Lifecycle) of the part that the transport does not have. Without default bodies.
pub trait VirtioLifecycle {
    /// Brings the device to rest: completes what its backend has begun, and begins nothing more. Afterwards
    /// [`is_quiescent`](Self::is_quiescent) is true.
    ///
    /// # Errors
    /// [`PauseError`] if the backend does not complete a request in time; the device is not paused then.
    fn pause(&mut self, work: &mut Work<'_>) -> Result<(), PauseError>;

    /// Continues after a pause or a restore. The transport kicks each active queue afterwards.
    fn resume(&mut self);

    /// Resets the device to its state after power-on. Chains taken from its queues are no longer accessed in guest memory when this
    /// has returned and [`is_quiescent`](Self::is_quiescent) is true. Waits for a second at most.
    fn reset(&mut self);

    /// Opens again the end of the host that the device has lost for good: called after [`reset`](Self::reset) where the whole machine is
    /// reset, as when it was built. The device is paused or has not run. Without success it stays as it is, and logs the reason.
    fn reopen(&mut self);

    /// Resets `queue` alone: drops the chains taken from it, which are no longer accessed in guest memory when this has
    /// returned and [`is_quiescent`](Self::is_quiescent) is true.
    fn reset_queue(&mut self, queue: u16);

    /// True if no request from before the last resets accesses guest memory any more. Until then the driver reads that the reset is not
    /// complete; the device gets an event ([`VirtioDevice::ready`]) when it is.
    fn is_quiescent(&self) -> bool;

    /// Returns the state of the paused device, without that of the transport and of the queues. Chains that the device has taken and
    /// not returned are saved as [`SavedChain`].
    ///
    /// # Errors
    /// [`SaveError`] with the reason, if a part of the state is out of reach.
    fn save(&self) -> Result<SavedState, SaveError>;

    /// Takes over the state of a device of the same configuration. The queues are restored already, and `features` were negotiated if
    /// the device is active. Neither [`VirtioDevice::activate`] nor [`VirtioDevice::start_remote`] was called.
    ///
    /// # Errors
    /// [`RestoreError`] if the state is none of such a device.
    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        work: &mut Work<'_>,
    ) -> Result<(), RestoreError>;
}
