//! Puts a new VM of the kernel in the place of one that has run.
//!
//! KVM cannot reset a VM: before Linux 6.16 not even its harts, and up to 7.3 neither the APLIC nor the counters of SBI PMU; and second-stage
//! translations of the old guest would stay valid. So the reset creates a new VM and moves it to the old one's descriptor number: everything
//! that holds the descriptor uses the new VM from then on, without a lock in the way of interrupts.
#![expect(unsafe_code, reason = "replaces the file behind a descriptor that others hold")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{KVM_CAP_VM_GPA_BITS, kvm_enable_cap};
use kvm_ioctls::{IoEventAddress, VmFd};
use rvmm_devices::IoEvent;
use vmm_sys_util::eventfd::EventFd;

use super::Kvm;

/// Puts a new VM in the place of `old`, which ends if neither its vCPUs nor its devices are open. No other thread uses it meanwhile.
pub(super) fn replace(kvm: &Kvm, old: &VmFd) -> io::Result<()> {
    // The old VM ends first, so that there are never two: Linux names the VMs of a process after descriptor numbers, and complains about
    // a name that exists. Until there is a new one the number is an open /dev/kvm, which refuses what only a VM can do.
    put(kvm.fd.as_raw_fd(), old)?;
    let new = kvm.fd.create_vm().map_err(io::Error::from)?;
    put(new.as_raw_fd(), old)
}

/// Puts the file of `source` behind the number of `vm`.
fn put(source: RawFd, vm: &VmFd) -> io::Result<()> {
    // SAFETY: both descriptors are open. `vm` keeps owning its number, under which it has no other state than the file: the size of the
    // shared page of a vCPU, which it knows too, is the same for all VMs. The owner of `source` closes that number only.
    match unsafe { libc::dup3(source, vm.as_raw_fd(), libc::O_CLOEXEC) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The settings of a VM that a new one gets again.
#[derive(Default)]
pub(super) struct VmSettings {
    /// The width of guest-physical addresses, if it was narrowed.
    address_bits: Option<u32>,
    ioevents: Vec<Registered>,
}

/// A registered ioevent.
struct Registered {
    address: u64,
    value: u32,
    event: EventFd,
}

impl VmSettings {
    /// Narrows guest-physical addresses. Older kernels support one width only, the widest.
    pub(super) fn narrow(&mut self, vm: &VmFd, bits: u32) -> io::Result<()> {
        set_address_bits(vm, bits)?;
        self.address_bits = Some(bits);
        Ok(())
    }

    /// Registers an ioevent.
    pub(super) fn register(
        &mut self,
        vm: &VmFd,
        base: u64,
        ioevent: &IoEvent<'_>,
    ) -> io::Result<()> {
        let address = base.saturating_add(ioevent.offset);
        let registered =
            Registered { address, value: ioevent.value, event: ioevent.event.try_clone()? };
        registered.register(vm)?;
        self.ioevents.push(registered);
        Ok(())
    }

    /// Applies the settings that must precede memory.
    pub(super) fn narrow_again(&self, vm: &VmFd) -> io::Result<()> {
        self.address_bits.map_or(Ok(()), |bits| set_address_bits(vm, bits))
    }

    /// Registers all ioevents.
    pub(super) fn register_again(&self, vm: &VmFd) -> io::Result<()> {
        self.ioevents.iter().try_for_each(|ioevent| ioevent.register(vm))
    }
}

impl Registered {
    fn register(&self, vm: &VmFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(self.address);
        vm.register_ioevent(&self.event, &address, self.value).map_err(io::Error::from)
    }
}

fn set_address_bits(vm: &VmFd, bits: u32) -> io::Result<()> {
    let request = kvm_enable_cap {
        cap: KVM_CAP_VM_GPA_BITS,
        args: [bits.into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&request).map_err(io::Error::from)
}
