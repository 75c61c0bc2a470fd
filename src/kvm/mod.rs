//! KVM on RISC-V, behind the traits `Vm` and `Hart`: the only module with ioctls of KVM.
//!
//! [`open`] is the entry point. `vm` creates memory, harts, irqchip and lines; `identities` counts the interrupt identities of an
//! IMSIC; `hart` runs one vCPU, `exit` decodes its exits and `kick` gets it out of the guest; `clock` reads the time and `stats` KVM's
//! counters; `deadline` clears what a timer leaves in the host's CPUs; `knobs` applies ISA and SBI settings; `isa` and `regs` are the
//! kernel's numbers; `probe` makes a [`report`] of the host's capabilities.

mod aia;
mod aia_state;
mod clock;
mod deadline;
mod exit;
mod hart;
mod identities;
mod irq;
mod irqchip;
mod isa;
mod kick;
mod knobs;
mod lifecycle;
mod probe;
mod refusal;
mod regs;
pub(crate) mod release;
mod renew;
pub mod report;
mod slots;
mod snapshot;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_API_VERSION;

pub use probe::probe;

use crate::error::VmError;
use crate::hypervisor::{Hypervisor, Vm};

/// An open /dev/kvm.
#[derive(Debug, Clone)]
pub struct Kvm {
    fd: Arc<kvm_ioctls::Kvm>,
}

/// Opens /dev/kvm.
///
/// # Errors
/// One line with the cause and the remedy: the module, the permission or the hypervisor extension is missing, or the kernel has
/// another API version.
pub fn open() -> Result<Kvm, VmError> {
    let fd = kvm_ioctls::Kvm::new().map_err(|e| refusal::of_open(e.into()))?;
    let version = fd.get_api_version();
    match u32::try_from(version) {
        Ok(KVM_API_VERSION) => Ok(Kvm { fd: Arc::new(fd) }),
        _ => Err(refusal::of_version(version)),
    }
}

impl Kvm {
    fn new_vm(&self) -> Result<vm::KvmVm, VmError> {
        let fd = self.fd.create_vm();
        fd.map(|fd| vm::KvmVm::new(self.clone(), fd))
            .map_err(|e| VmError::io("Cannot create a virtual machine", io::Error::from(e)))
    }
}

impl Hypervisor for Kvm {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError> {
        Ok(Arc::new(self.new_vm()?))
    }
}
