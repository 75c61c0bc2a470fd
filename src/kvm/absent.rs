//! `kvm` on hosts that are not RISC-V: every call fails. The modules that do not depend on the architecture are tested here, too.

#[cfg(test)]
#[allow(dead_code, reason = "only its tests are used here")]
mod isa;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are used here")]
mod refusal;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are used here")]
mod regs;
#[cfg_attr(not(test), expect(dead_code, reason = "only builds for RISC-V use it"))]
pub(crate) mod release;
pub mod report;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are used here")]
mod snapshot;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are used here")]
mod stats;

use std::sync::Arc;

use report::HostReport;

use crate::error::VmError;
use crate::hypervisor::{Hypervisor, Vm};

/// A handle on /dev/kvm; this build has none.
#[derive(Debug)]
pub enum Kvm {}

/// Returns an error.
///
/// # Errors
/// Always: this build of rvmm is not for a RISC-V host.
pub fn open() -> Result<Kvm, VmError> {
    Err(VmError::new(
        "rvmm runs RISC-V guests on RISC-V hosts, and this host is not RISC-V (scripts/host boots one in QEMU)",
    ))
}

/// Returns an error, as [`open`] does.
///
/// # Errors
/// Always.
pub fn probe() -> Result<HostReport, VmError> {
    match open()? {}
}

impl Hypervisor for Kvm {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_another_architecture_the_error_names_scripts_host() {
        assert!(open().unwrap_err().to_string().contains("scripts/host"));
        assert!(probe().unwrap_err().to_string().contains("scripts/host"));
    }
}
