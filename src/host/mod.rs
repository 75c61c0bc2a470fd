//! The host's ends of devices, on Linux: what a virtio device reads from and writes to outside the guest.

use std::sync::Arc;

use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::blk::{DiskBackend, DiskPlan};
use rvmm_devices::{Host, HostError};

mod disk;

/// This machine's kernel.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Linux;

impl Host for Linux {
    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        Ok(Box::new(disk::open(plan, memory)?))
    }
}
