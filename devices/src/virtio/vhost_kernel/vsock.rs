//! Vsock device in the host's kernel (virtio 1.3, section 5.10; Linux, drivers/vhost/vsock.c): programs of the host use AF_VSOCK,
//! as those of the guest do.
//!
//! The event queue stays here and is never used, since events report migration. A queue cannot be reset alone: the kernel starts and
//! stops both at once.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Kernel, QUEUES};
use crate::catalog::{BuildError, Built, Device, Wiring};
use crate::device::Source;
use crate::irq::Interrupt;
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::virtio::{
    DeviceType, DmaMemory, RemoteQueues, Rings, VirtioDevice, VirtioError, VirtioLifecycle, Work,
    feature,
};

/// Name in the catalog: that of the device with Unix sockets.
const MODEL: &str = "vsock";

/// `VIRTIO_VSOCK_F_STREAM`, which the kernel always supports but does not report.
const F_STREAM: u64 = 1;
/// `VIRTIO_VSOCK_F_SEQPACKET`, if the kernel supports it.
const F_SEQPACKET: u64 = 1 << 1;

struct KernelVsock {
    kernel: Kernel,
    memory: Arc<dyn DmaMemory>,
    config: [u8; 8],
}

/// Builds the device for the guest with this CID.
pub(in crate::virtio) fn build(guest_cid: u32, wiring: Wiring) -> Built {
    let end = wiring
        .host
        .kernel_sockets(guest_cid, wiring.memory.clone())
        .map_err(|source| BuildError::Backend { model: MODEL, source })?;
    let kernel = Kernel::new(MODEL, vec![end], F_SEQPACKET).map_err(|source| BuildError::Host {
        model: MODEL,
        what: "queues",
        source,
    })?;
    let config = u64::from(guest_cid).to_le_bytes();
    Ok(Device::Virtio(Box::new(KernelVsock { kernel, memory: wiring.memory, config })))
}

impl VirtioDevice for KernelVsock {
    fn device_type(&self) -> DeviceType {
        let features = F_STREAM | self.kernel.features() & F_SEQPACKET;
        DeviceType {
            transport_features: self.kernel.features() & !feature::RING_RESET,
            remote: RemoteQueues::First(QUEUES),
            ..DeviceType::new(MODEL, 19, &[256, 256, 64], features)
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn attach_interrupt(&mut self, interrupt: &Interrupt) -> bool {
        self.kernel.attach(interrupt)
    }

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

    fn list_sources(&self, list: &mut Vec<Source>) {
        list.extend(self.kernel.sources());
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.kernel.ready(token, work)
    }
}

/// The reason why it cannot be saved or restored.
const UNSAVABLE: &str = "its connections are in the host's kernel (use backend=unix)";

impl VirtioLifecycle for KernelVsock {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        self.kernel.pause(self.memory.as_ref());
        Ok(())
    }

    fn resume(&mut self) {
        self.kernel.resume();
    }

    fn reset(&mut self) {
        self.kernel.reset();
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, _queue: u16) {}

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        Err(SaveError(UNSAVABLE.into()))
    }

    fn restore(
        &mut self,
        _state: SavedState,
        _features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        Err(RestoreError(UNSAVABLE.into()))
    }
}
