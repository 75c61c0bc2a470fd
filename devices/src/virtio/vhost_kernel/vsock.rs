//! Vsock device in the host's kernel (virtio 1.3, section 5.10; Linux, drivers/vhost/vsock.c): programs of the host use AF_VSOCK,
//! as those of the guest do.
//!
//! The event queue stays here and is never used, since events report migration. A queue cannot be reset alone: the kernel starts and
//! stops both at once.

use vmm_sys_util::eventfd::EventFd;

use super::{Kernel, QUEUES};
use crate::catalog::{BuildError, Built, Wiring};
use crate::device::Source;
use crate::virtio::{Rings, VirtioDevice, VirtioError, VirtioMmio, Work, feature};

/// Name in the catalog: that of the device with Unix sockets.
const MODEL: &str = "vsock";

/// `VIRTIO_VSOCK_F_STREAM`, which the kernel always supports but does not report.
const F_STREAM: u64 = 1;
/// `VIRTIO_VSOCK_F_SEQPACKET`, if the kernel supports it.
const F_SEQPACKET: u64 = 1 << 1;

struct KernelVsock {
    kernel: Kernel,
    config: [u8; 8],
}

/// Builds the device for the guest with this CID.
pub(in crate::virtio) fn build(guest_cid: u32, wiring: Wiring) -> Built {
    let end = wiring
        .host
        .kernel_sockets(guest_cid, wiring.memory.clone())
        .map_err(|source| BuildError::Backend { model: MODEL, source })?;
    let mut kernel = Kernel::new(MODEL, vec![end], F_SEQPACKET)
        .map_err(|source| BuildError::Host { model: MODEL, what: "queues", source })?;
    kernel.raise(&*wiring.irq);
    let config = u64::from(guest_cid).to_le_bytes();
    VirtioMmio::create(Box::new(KernelVsock { kernel, config }), wiring)
}

impl VirtioDevice for KernelVsock {
    fn name(&self) -> &'static str {
        MODEL
    }

    fn id(&self) -> u32 {
        19
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn features(&self) -> u64 {
        F_STREAM | self.kernel.features() & F_SEQPACKET
    }

    fn transport_features(&self) -> u64 {
        self.kernel.features() & !feature::RING_RESET
    }

    fn is_remote(&self, queue: u16, _features: u64) -> bool {
        queue < QUEUES
    }

    fn uses_irqfd(&self) -> bool {
        self.kernel.uses_irqfd()
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn start_remote(&mut self, rings: Rings, kick: &EventFd) {
        self.kernel.add(rings, kick);
    }

    fn activate(&mut self, features: u64) {
        self.kernel.activate(features);
    }

    fn kicked(&mut self, _queue: u16, _work: &mut Work<'_>) -> Result<(), VirtioError> {
        // Buffers for events, which are never used.
        Ok(())
    }

    fn reset_queue(&mut self, _queue: u16) {}

    fn reset(&mut self) {
        self.kernel.reset();
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        list.extend(self.kernel.sources());
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.kernel.ready(token, work)
    }
}
