//! The door of `kvm` on machines that are not RISC-V: it says so. What is pure in the room is tested here too.

#[cfg(test)]
#[allow(dead_code, reason = "only its tests are wanted here")]
mod isa;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are wanted here")]
mod refusal;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are wanted here")]
mod regs;
#[cfg_attr(not(test), expect(dead_code, reason = "what asks for a release at least is elsewhere"))]
pub(crate) mod release;
pub mod report;
#[cfg(test)]
#[allow(dead_code, reason = "only its tests are wanted here")]
mod stats;

use std::sync::Arc;

use report::HostReport;

use crate::machine::hypervisor::{Hypervisor, Vm, VmError};

/// The kernel's virtualization; nobody has one here.
#[derive(Debug)]
pub enum Kvm {}

/// Refuses.
///
/// # Errors
/// Always: this build of rvmm is not one for a RISC-V host.
pub fn open() -> Result<Kvm, VmError> {
    Err(VmError::new(
        "rvmm runs RISC-V guests on RISC-V hosts, and this machine is none (scripts/host boots one in QEMU)",
    ))
}

/// Refuses, as [`open`] does.
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
    fn a_machine_of_another_kind_is_told_what_to_do() {
        assert!(open().unwrap_err().to_string().contains("scripts/host"));
        assert!(probe().unwrap_err().to_string().contains("scripts/host"));
    }
}
