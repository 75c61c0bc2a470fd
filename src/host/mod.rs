//! The host's ends of devices, on Linux: what a virtio device reads from and writes to outside the guest.
//!
//! | file | what |
//! |---|---|
//! | `disk/` | disks: files and block devices |
//! | `tap.rs` | networks: tap interfaces |

use std::sync::Arc;

use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::blk::{DiskBackend, DiskPlan};
use rvmm_devices::virtio::net::{NetBackend, NetworkEnd};
use rvmm_devices::{Host, HostError};

mod disk;
mod tap;

#[cfg(test)]
pub(crate) use tap::tests::in_a_namespace;

/// This machine's kernel.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Linux;

impl Host for Linux {
    fn network(&self, end: &NetworkEnd) -> Result<Box<dyn NetBackend>, HostError> {
        let tap = match end {
            NetworkEnd::Tap(name) => tap::Tap::open(name),
            NetworkEnd::Descriptor(fd) => tap::Tap::inherit(*fd),
        }?;
        Ok(Box::new(tap))
    }

    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        Ok(Box::new(disk::open(plan, memory)?))
    }
}
