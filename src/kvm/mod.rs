//! KVM on RISC-V, behind the traits `Vm` and `Hart`: the only room with ioctls.
//!
//! [`open`] is the door. `vm` makes memory, harts, irqchip and lines; `identities` counts the interrupts that an IMSIC can tell apart; `hart` runs one vCPU and `exit` says why it came
//! back; `clock` tells the time and `stats` what KVM counts; `kick` gets it out of the guest; `deadline` takes back what its timer leaves in the host's CPUs; `knobs` shapes the ISA; `isa` and `regs` are the kernel's numbers; `probe` asks
//! for a [`report`] of what the host can do.

mod aia;
mod clock;
mod deadline;
mod exit;
mod hart;
mod identities;
mod irq;
mod isa;
mod kick;
mod knobs;
mod probe;
mod refusal;
mod regs;
pub(crate) mod release;
pub mod report;
mod stats;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_API_VERSION;

pub use probe::probe;

use crate::machine::hypervisor::{Hypervisor, Vm, VmError};

/// The kernel's virtualization, opened.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

/// Opens /dev/kvm.
///
/// # Errors
/// One line that says what is missing and what to do: the module, the permission, the hypervisor extension, or a kernel
/// that speaks another version of the interface.
pub fn open() -> Result<Kvm, VmError> {
    let fd = kvm_ioctls::Kvm::new().map_err(|e| refusal::of_open(e.into()))?;
    let version = fd.get_api_version();
    match u32::try_from(version) {
        Ok(KVM_API_VERSION) => Ok(Kvm { fd }),
        _ => Err(refusal::of_version(version)),
    }
}

impl Kvm {
    fn new_vm(&self) -> Result<vm::KvmVm, VmError> {
        let fd = self.fd.create_vm();
        fd.map(vm::KvmVm::new)
            .map_err(|e| VmError::io("Cannot make a virtual machine", io::Error::from(e)))
    }
}

impl Hypervisor for Kvm {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError> {
        Ok(Arc::new(self.new_vm()?))
    }
}
