//! KVM on RISC-V, behind the traits `Vm` and `Hart`: the only module with ioctls of KVM.
//!
//! [`open`] is the entry point. `vm` creates harts and the irqchip, `slots` memory and its dirty log, and `irq` lines; `irqchip` chooses
//! between `aia` and a PLIC, and `identities` counts the interrupt identities of an IMSIC. `lifecycle` saves, restores and resets a VM:
//! `state` its harts by the rules of `snapshot`, `aia_state` its AIA, and `renew` puts a new VM in the place of an old one. `hart` runs
//! one vCPU, `exit` decodes its exits and `kick` gets it out of the guest; `clock` reads the time and `stats` KVM's counters; `deadline`
//! clears what a timer leaves in the host's CPUs; `knobs` applies ISA and SBI settings; `isa` and `regs` are the kernel's numbers;
//! `probe` makes a [`report`] of the host's capabilities.

mod aia;
mod aia_state;
mod clock;
mod deadline;
mod exit;
mod guest_files;
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
