//! A network in memory, for tests: it records the guest's frames, and delivers those of the test to the guest.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{HEADER, NetBackend, Offloads, bit};
use crate::host::HostError;
use crate::virtio::vhost_kernel::KernelQueues;
use crate::virtio::vhost_kernel::testing::FakeKernel;
use crate::virtio::{DmaMemory, GuestMemoryMmap, Segment, feature};

/// A network in memory. A clone is a handle to the same network: a test keeps one and passes the other to the device. The
/// descriptor works with epoll.
#[derive(Debug, Clone)]
pub struct MemoryNet(Arc<Mutex<Wire>>);

#[derive(Debug)]
struct Wire {
    arriving: VecDeque<([u8; HEADER], Vec<u8>)>,
    sent: Vec<([u8; HEADER], Vec<u8>)>,
    offloads: Offloads,
    offload_changes: usize,
    is_full: bool,
    is_in_use: bool,
    is_link_up: bool,
    address: Option<[u8; 6]>,
    /// Readable when `is_link_up` has changed.
    link: EventFd,
    failure: Option<ErrorKind>,
    reads: usize,
    /// Serves the queues of a device with `vhost=on`.
    kernel: FakeKernel,
    /// The descriptor that the device watches, and its peer, which makes it readable and writable.
    near: UnixStream,
    far: UnixStream,
}

impl MemoryNet {
    /// Creates a network without frames and with room.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new() -> io::Result<Self> {
        Self::with_kernel(FakeKernel::with_features(feature::TRANSPORT | bit::MRG_RXBUF))
    }

    /// Creates a network whose vhost is this kernel.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_kernel(kernel: FakeKernel) -> io::Result<Self> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        Ok(Self(Arc::new(Mutex::new(Wire {
            arriving: VecDeque::new(),
            sent: Vec::new(),
            offloads: Offloads::default(),
            offload_changes: 0,
            is_full: false,
            is_in_use: true,
            is_link_up: true,
            address: None,
            link: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            failure: None,
            reads: 0,
            kernel,
            near,
            far,
        }))))
    }

    /// Queues a frame for the guest.
    pub fn arrive(&self, header: [u8; HEADER], frame: &[u8]) {
        self.change(|wire| wire.arriving.push_back((header, frame.to_vec())));
    }

    /// Number of frames that the device has not taken yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock().arriving.len()
    }

    /// Number of the device's attempts to take a frame.
    #[must_use]
    pub fn reads(&self) -> usize {
        self.lock().reads
    }

    /// Takes the headers and frames that the guest has sent since the last call.
    #[must_use]
    pub fn sent(&self) -> Vec<([u8; HEADER], Vec<u8>)> {
        std::mem::take(&mut self.lock().sent)
    }

    /// The offloads that frames for the guest may need.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        self.lock().offloads
    }

    /// Number of attempts to change the offloads.
    #[must_use]
    pub fn offload_changes(&self) -> usize {
        self.lock().offload_changes
    }

    /// Sets the only address for which frames arrive.
    pub fn set_address(&self, address: [u8; 6]) {
        self.lock().address = Some(address);
    }

    /// True if the device uses this queue.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.lock().is_in_use
    }

    /// Takes the link up or down.
    pub fn set_link(&self, is_up: bool) {
        self.change(|wire| {
            wire.is_link_up = is_up;
            let _ = wire.link.write(1);
        });
    }

    /// Sets if there is room for frames of the guest.
    pub fn set_full(&self, is_full: bool) {
        self.change(|wire| wire.is_full = is_full);
    }

    /// Makes every call fail with this error; `None` ends that.
    pub fn fail(&self, kind: Option<ErrorKind>) {
        self.change(|wire| wire.failure = kind);
    }

    /// The vhost kernel of this network.
    #[must_use]
    pub fn kernel(&self) -> FakeKernel {
        self.lock().kernel.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and updates the descriptor's readiness.
    fn change<R>(&self, change: impl FnOnce(&mut Wire) -> R) -> R {
        let mut wire = self.lock();
        let result = change(&mut wire);
        let is_readable = !wire.arriving.is_empty() || wire.failure.is_some();
        let is_full = wire.is_full && wire.failure.is_none();
        let mut scrap = [0; 4096];
        while matches!(wire.near.read(&mut scrap), Ok(1..)) {}
        while matches!(wire.far.read(&mut scrap), Ok(1..)) {}
        if is_readable {
            let _ = wire.far.write(&[0]);
        }
        while is_full && matches!(wire.near.write(&scrap), Ok(1..)) {}
        result
    }
}

impl NetBackend for MemoryNet {
    fn identity(&self) -> &str {
        "memory"
    }

    fn address(&self) -> Option<[u8; 6]> {
        self.lock().address
    }

    fn fd(&self) -> RawFd {
        self.lock().near.as_raw_fd()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.change(|wire| {
            wire.offload_changes += 1;
            if let Some(kind) = wire.failure {
                return Err(kind.into());
            }
            wire.offloads = offloads;
            Ok(())
        })
    }

    fn set_in_use(&mut self, is_in_use: bool) -> io::Result<()> {
        self.change(|wire| {
            if let Some(kind) = wire.failure {
                return Err(kind.into());
            }
            wire.is_in_use = is_in_use;
            Ok(())
        })
    }

    fn link_fd(&self) -> Option<RawFd> {
        Some(self.lock().link.as_raw_fd())
    }

    fn is_link_up(&mut self) -> bool {
        let wire = self.lock();
        // Fails if nothing has changed.
        let _ = wire.link.read();
        wire.is_link_up
    }

    fn kernel_queues(&self, _: Arc<dyn DmaMemory>) -> Result<Box<dyn KernelQueues>, HostError> {
        Ok(Box::new(self.kernel()))
    }

    fn send(&mut self, memory: &GuestMemoryMmap, head: &[u8], rest: &[Segment]) -> io::Result<()> {
        self.change(|wire| {
            if let Some(kind) = wire.failure {
                return Err(kind.into());
            }
            if !wire.is_in_use {
                return Err(ErrorKind::NotConnected.into());
            }
            if wire.is_full {
                return Err(ErrorKind::WouldBlock.into());
            }
            let (header, start) = head.split_first_chunk().ok_or(ErrorKind::InvalidInput)?;
            let mut frame = start.to_vec();
            for piece in rest {
                let mut bytes = vec![0; piece.len as usize];
                memory.read_slice(&mut bytes, piece.addr).map_err(io::Error::other)?;
                frame.extend(bytes);
            }
            wire.sent.push((*header, frame));
            Ok(())
        })
    }

    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &mut [u8; HEADER],
        first: &[Segment],
        rest: &mut [u8],
    ) -> io::Result<usize> {
        self.change(|wire| {
            wire.reads += 1;
            if let Some(kind) = wire.failure {
                return Err(kind.into());
            }
            if !wire.is_in_use {
                return Err(ErrorKind::NotConnected.into());
            }
            let (head, frame) = wire.arriving.pop_front().ok_or(ErrorKind::WouldBlock)?;
            *header = head;
            let mut left = frame.as_slice();
            for piece in first {
                let part;
                (part, left) = left.split_at(left.len().min(piece.len as usize));
                memory.write_slice(part, piece.addr).map_err(io::Error::other)?;
            }
            rest.iter_mut().zip(left).for_each(|(byte, value)| *byte = *value);
            Ok(frame.len())
        })
    }
}
