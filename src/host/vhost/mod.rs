//! The kernel's vhost (Linux, include/uapi/linux/vhost.h; drivers/vhost/{vhost,net,vsock}.c): queues of a guest that a kernel thread
//! of this process handles.
//!
//! The kernel accesses guest RAM through this process's mapping, so RAM need not be shared. ioctls are synchronous; the one that
//! stops a queue waits for buffers in flight. (With the module option `experimental_zcopytx`, which should be off, also for frames
//! that the host still holds.) Left out: what `devices/src/virtio/vhost_kernel` leaves out.
#![expect(unsafe_code, reason = "the ioctls of vhost have no safe interface")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use libc::{Ioctl, c_int};
use rustix::fs::{Mode, OFlags, open};
use rvmm_devices::HostError;
use rvmm_devices::virtio::vhost_kernel::{KernelQueue, KernelQueues};
use rvmm_devices::virtio::{DmaMemory, WriteLog};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::node::{DeviceNode as Node, Place, VHOST_NET as NET, VHOST_VSOCK as VSOCK};

/// `VHOST_VIRTIO`: the type of the ioctls.
const VHOST: u32 = 0xaf;
const GET_FEATURES: Ioctl = libc::_IOR::<u64>(VHOST, 0x00);
const SET_OWNER: Ioctl = libc::_IO(VHOST, 0x01);
/// The header alone; the regions follow it.
const SET_MEM_TABLE: Ioctl = libc::_IOW::<[u32; 2]>(VHOST, 0x03);
const SET_FEATURES: WriteIoctl<u64> = WriteIoctl::new(0x00);
const SET_LOG_BASE: WriteIoctl<u64> = WriteIoctl::new(0x04);
const SET_VRING_NUM: WriteIoctl<VringState> = WriteIoctl::new(0x10);
const SET_VRING_ADDR: WriteIoctl<VringAddr> = WriteIoctl::new(0x11);
const SET_VRING_BASE: WriteIoctl<VringState> = WriteIoctl::new(0x12);
const SET_VRING_KICK: WriteIoctl<VringFile> = WriteIoctl::new(0x20);
const SET_VRING_CALL: WriteIoctl<VringFile> = WriteIoctl::new(0x21);
const SET_VRING_ERR: WriteIoctl<VringFile> = WriteIoctl::new(0x22);
const NET_SET_BACKEND: WriteIoctl<VringFile> = WriteIoctl::new(0x30);
const VSOCK_SET_GUEST_CID: WriteIoctl<u64> = WriteIoctl::new(0x60);
const VSOCK_SET_RUNNING: WriteIoctl<c_int> = WriteIoctl::new(0x61);

/// `VHOST_F_LOG_ALL`: the kernel sets bits for what it writes into buffers.
const LOG_ALL: u64 = 1 << 26;
/// `1 << VHOST_VRING_F_LOG`: and for what it writes into the used ring.
const LOG_USED: u32 = 1;
/// `VHOST_PAGE_SIZE`: the size of the pages in its log.
const LOG_PAGE: u64 = 4096;

/// Limit of RAM regions; rvmm's guests have one.
const MOST_REGIONS: usize = 8;

/// `VHOST_FILE_UNBIND`
const NO_FILE: RawFd = -1;

/// An ioctl that reads a `T`, whose size is part of the request code.
struct WriteIoctl<T>(Ioctl, PhantomData<T>);

impl<T> WriteIoctl<T> {
    const fn new(number: u32) -> Self {
        Self(libc::_IOW::<T>(VHOST, number), PhantomData)
    }
}

/// `struct vhost_vring_state`
#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

/// `struct vhost_vring_file`
#[repr(C)]
struct VringFile {
    index: u32,
    fd: c_int,
}

/// `struct vhost_vring_addr`: addresses in this process.
#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest: u64,
    size: u64,
    here: u64,
    flags: u64,
}

/// `struct vhost_memory`
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    regions: [Region; MOST_REGIONS],
}

/// One vhost device, with its memory table set. Closing it stops its queues.
struct Vhost {
    fd: OwnedFd,
    /// Keeps RAM mapped as long as the kernel may access it.
    memory: Arc<dyn DmaMemory>,
    /// Keeps the record of written pages as long as the kernel may set bits in it: while a queue runs.
    log: Option<WriteLog>,
}

impl Vhost {
    fn open(node: &Node, memory: Arc<dyn DmaMemory>) -> Result<Self, HostError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = open(node.path, flags, Mode::empty())
            .map_err(|error| not_opened(node, Place::here(), error.into()))?;
        let new = Self { fd, memory, log: None };
        new.initialize()
            .map_err(|error| HostError::os(format!("Cannot set up {}", node.path), error))?;
        Ok(new)
    }

    /// Makes this process the owner, and sets the memory table.
    fn initialize(&self) -> io::Result<()> {
        let mut table = Table { count: 0, padding: 0, regions: [Region::default(); MOST_REGIONS] };
        let view = self.memory.view();
        let mut places = table.regions.iter_mut();
        for region in view.iter() {
            let guest = region.start_addr();
            let here = view.get_host_address(guest).map_err(io::Error::other)?;
            let place = places.next().ok_or(io::ErrorKind::InvalidInput)?;
            *place = Region { guest: guest.0, size: region.len(), here: here as u64, flags: 0 };
            table.count += 1;
        }
        // SAFETY: SET_OWNER takes no argument.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_OWNER) })?;
        // SAFETY: SET_MEM_TABLE reads the header and the number of regions in it, which are all in `table`. The kernel writes to
        // that memory when a queue runs: it is guest RAM, into which rvmm has no reference and which `memory` keeps mapped.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_MEM_TABLE, &raw const table) })
    }

    fn features(&self) -> io::Result<u64> {
        let mut features = 0_u64;
        // SAFETY: GET_FEATURES writes one u64, which outlives the call.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), GET_FEATURES, &raw mut features) })?;
        Ok(features)
    }

    fn send<T>(&self, request: &WriteIoctl<T>, value: &T) -> io::Result<()> {
        // SAFETY: the request reads one `T`, which outlives the call. Addresses of rings in it are results of `address`; the kernel
        // sets bits of the log with atomic accesses, in words that `log` keeps as long as a queue with this log runs.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), request.0, std::ptr::from_ref(value)) })
    }

    /// Host virtual address of `len` contiguous bytes of RAM.
    fn address(&self, guest: u64, len: usize) -> io::Result<u64> {
        let slice = self.memory.view().get_slice(GuestAddress(guest), len);
        Ok(slice.map_err(io::Error::other)?.ptr_guard_mut().as_ptr() as u64)
    }

    /// Sets the features. While written pages are recorded, the kernel records its own writes, too, from here on.
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        let log = self.memory.write_log();
        if let Some(log) = &log {
            self.send(&SET_LOG_BASE, &log_base(log)?)?;
        }
        let logging = if log.is_some() { LOG_ALL } else { 0 };
        self.send(&SET_FEATURES, &(features | logging))?;
        // No queue runs with the one before: recording begins and ends while all are stopped.
        self.log = log;
        Ok(())
    }

    /// Sets the addresses of a queue's rings, its first index, and its eventfds.
    fn set_up(&self, queue: &KernelQueue<'_>) -> io::Result<()> {
        let rings = &queue.rings;
        let (index, entries) = (u32::from(rings.queue), usize::from(rings.size));
        let addr = VringAddr {
            index,
            flags: if self.log.is_some() { LOG_USED } else { 0 },
            descriptors: self.address(rings.descriptors, 16 * entries)?,
            used: self.address(rings.device, 6 + 8 * entries)?,
            available: self.address(rings.driver, 6 + 2 * entries)?,
            log: rings.device,
        };
        self.send(&SET_VRING_NUM, &VringState { index, num: rings.size.into() })?;
        self.send(&SET_VRING_BASE, &VringState { index, num: rings.next.into() })?;
        self.send(&SET_VRING_ADDR, &addr)?;
        let file = |fd: &dyn AsRawFd| VringFile { index, fd: fd.as_raw_fd() };
        self.send(&SET_VRING_ERR, &file(queue.error))?;
        self.send(&SET_VRING_CALL, &file(queue.call))?;
        self.send(&SET_VRING_KICK, &file(queue.kick))
    }
}

/// The backend of a device's queues.
enum Backend {
    /// A queue of a tap.
    Tap(OwnedFd),
    /// The host's sockets.
    Sockets,
}

/// A vhost device and its backend.
struct Queues {
    /// None if it could only be stopped by closing it.
    vhost: Option<Vhost>,
    backend: Backend,
    features: u64,
}

/// Creates the vhost device between a guest's network card and this queue of a tap.
pub(super) fn network(
    tap: OwnedFd,
    memory: Arc<dyn DmaMemory>,
) -> Result<Box<dyn KernelQueues>, HostError> {
    queues(&NET, Vhost::open(&NET, memory)?, Backend::Tap(tap))
}

/// Creates the vhost device for the sockets of the guest with this CID.
pub(super) fn sockets(
    guest_cid: u32,
    memory: Arc<dyn DmaMemory>,
) -> Result<Box<dyn KernelQueues>, HostError> {
    let vhost = Vhost::open(&VSOCK, memory)?;
    vhost
        .send(&VSOCK_SET_GUEST_CID, &guest_cid.into())
        .map_err(|error| no_cid(guest_cid, error))?;
    queues(&VSOCK, vhost, Backend::Sockets)
}

fn queues(node: &Node, vhost: Vhost, backend: Backend) -> Result<Box<dyn KernelQueues>, HostError> {
    let features = vhost.features().map_err(|error| {
        HostError::os(format!("Cannot read the features of {}", node.path), error)
    })?;
    Ok(Box::new(Queues { vhost: Some(vhost), backend, features }))
}

impl Queues {
    /// Connects a queue with its backend, or disconnects it. For sockets, both queues at once.
    fn connect(&self, queue: u16, is_on: bool) -> io::Result<()> {
        let vhost = self.vhost.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        match &self.backend {
            Backend::Tap(tap) => {
                let fd = if is_on { tap.as_raw_fd() } else { NO_FILE };
                vhost.send(&NET_SET_BACKEND, &VringFile { index: queue.into(), fd })
            }
            Backend::Sockets => vhost.send(&VSOCK_SET_RUNNING, &c_int::from(is_on)),
        }
    }
}

impl KernelQueues for Queues {
    fn features(&self) -> u64 {
        self.features
    }

    fn start(&mut self, features: u64, queues: &[KernelQueue<'_>]) -> io::Result<()> {
        let vhost = self.vhost.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        if matches!(self.backend, Backend::Sockets) && queues.len() != 2 {
            return Err(io::Error::other("vhost-vsock needs both queues"));
        }
        vhost.set_features(features)?;
        queues.iter().try_for_each(|queue| vhost.set_up(queue))?;
        let numbers: Vec<u16> = queues.iter().map(|queue| queue.rings.queue).collect();
        let result = numbers.iter().try_for_each(|queue| self.connect(*queue, true));
        if result.is_err() {
            self.stop(&numbers);
        }
        result
    }

    fn stop(&mut self, queues: &[u16]) {
        if queues.iter().any(|queue| self.connect(*queue, false).is_err()) {
            self.vhost = None;
        }
    }
}

/// The address where the kernel would find the bit of guest-physical address 0: it counts pages from there. The bits of a page are in
/// the same place for both, since bytes and words of RISC-V and x86-64 are little-endian.
fn log_base(log: &WriteLog) -> io::Result<u64> {
    if !log.start.is_multiple_of(LOG_PAGE * u64::from(u8::BITS)) || cfg!(target_endian = "big") {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let first = log.words.as_ptr().expose_provenance() as u64;
    Ok(first.wrapping_sub(log.start / LOG_PAGE / u64::from(u8::BITS)))
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn not_opened(node: &Node, place: Place, error: io::Error) -> HostError {
    let remedy = node.remedy(&error, place).map(|todo| format!(" ({todo})"));
    HostError::os(format!("Cannot open {}{}", node.path, remedy.unwrap_or_default()), error)
}

fn no_cid(guest_cid: u32, error: io::Error) -> HostError {
    let todo = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            " (another guest of this host has it: give this one its own, cid=N)"
        }
        _ => "",
    };
    HostError::os(format!("Cannot use CID {guest_cid}{todo}"), error)
}

#[cfg(test)]
mod tests;
