//! A host for tests: all backends are in memory, or sockets of this process.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::lock;
use crate::config::Endpoint;
use crate::console::{ConsoleBackend, NullConsole};
use crate::flash::{FlashMemory, FlashPlan};
use crate::host::{Host, HostError, Listener};
use crate::virtio::blk::testing::MemoryDisk;
use crate::virtio::blk::{DiskBackend, DiskPlan};
use crate::virtio::net::testing::MemoryNet;
use crate::virtio::net::{NetBackend, NetworkSource};
use crate::virtio::vhost_kernel::KernelQueues;
use crate::virtio::vhost_kernel::testing::FakeKernel;
use crate::virtio::vhost_user::testing::{Quiet, Traits, serve};
use crate::virtio::vhost_user::{Daemon, Service};
use crate::virtio::{DmaMemory, feature};

/// A host with all kinds of backends, in memory except for sockets, and only the console `null`; records opened networks and sockets.
#[derive(Debug, Clone, Default)]
pub struct MemoryHost {
    disk: Option<MemoryDisk>,
    networks: Arc<Mutex<Vec<(NetworkSource, MemoryNet)>>>,
    sockets: Arc<Mutex<Vec<(u32, FakeKernel)>>>,
    flash: Vec<u8>,
}

impl MemoryHost {
    /// A host whose disks are all this one.
    #[must_use]
    pub fn with_disk(disk: MemoryDisk) -> Self {
        Self { disk: Some(disk), ..Self::default() }
    }

    /// A host whose flash memories all contain these bytes, padded with zeroes to a whole page.
    #[must_use]
    pub fn with_flash(bytes: &[u8]) -> Self {
        Self { flash: bytes.to_vec(), ..Self::default() }
    }

    /// The networks opened so far, each with its request.
    #[must_use]
    pub fn networks(&self) -> Vec<(NetworkSource, MemoryNet)> {
        lock(&self.networks).clone()
    }

    /// The vhost-vsock backends opened so far, each with the guest's CID.
    #[must_use]
    pub fn sockets(&self) -> Vec<(u32, FakeKernel)> {
        lock(&self.sockets).clone()
    }
}

impl Host for MemoryHost {
    fn console(&self, to: &Endpoint) -> Result<Box<dyn ConsoleBackend>, HostError> {
        match to {
            Endpoint::Null => Ok(Box::new(NullConsole)),
            other => Err(HostError::invalid(format!("Cannot open {other}: not a test console"))),
        }
    }

    fn listen(&self, path: &Path) -> Result<Box<dyn Listener>, HostError> {
        let failed = |error| HostError::os(format!("Cannot listen on {}", path.display()), error);
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Box::new(TestListener(listener, path.into())))
    }

    fn flash(&self, _: &FlashPlan) -> Result<Box<dyn FlashMemory>, HostError> {
        let mut bytes = self.flash.clone();
        bytes.resize(bytes.len().max(1).next_multiple_of(4096), 0);
        Ok(Box::new(TestFlash(bytes)))
    }

    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        UnixStream::connect(path)
    }

    fn network(&self, end: &NetworkSource) -> Result<Box<dyn NetBackend>, HostError> {
        let refused = |error| HostError::os("Cannot create a network in memory", error);
        let network = MemoryNet::new().map_err(refused)?;
        lock(&self.networks).push((end.clone(), network.clone()));
        Ok(Box::new(network))
    }

    fn kernel_sockets(
        &self,
        guest_cid: u32,
        _: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        let kernel = FakeKernel::with_features(feature::TRANSPORT & !feature::RING_RESET | 2);
        lock(&self.sockets).push((guest_cid, kernel.clone()));
        Ok(Box::new(kernel))
    }

    fn serve(&self, _: &Service) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
        let refused = |error| HostError::os("Cannot create a socket pair", error);
        let (near, far) = UnixStream::pair().map_err(refused)?;
        drop(serve(far, Traits::default()));
        Ok((near, Box::new(Quiet)))
    }

    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        let refused = |error| HostError::os("Cannot create a disk in memory", error);
        let disk = match &self.disk {
            Some(disk) => disk.clone(),
            None => MemoryDisk::new(8).map_err(refused)?,
        };
        Ok(disk.open(plan, memory))
    }
}

/// Contents that cannot be mapped into a guest: they are not page-aligned.
#[derive(Debug)]
struct TestFlash(Vec<u8>);

impl FlashMemory for TestFlash {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let part = self.0.get(start..).and_then(|rest| rest.get(..data.len()));
        data.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn host_address(&self) -> u64 {
        0
    }
}

/// A socket of the standard library, and its path.
#[derive(Debug)]
struct TestListener(UnixListener, PathBuf);

impl AsRawFd for TestListener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Listener for TestListener {
    fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept().map(|(stream, _)| stream)
    }
}

impl Drop for TestListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.1);
    }
}
