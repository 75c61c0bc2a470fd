//! The host's ends of devices, on Linux: what a virtio device reads from and writes to outside the guest.

use rvmm_devices::Host;

/// This machine's kernel.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Linux;

impl Host for Linux {}
