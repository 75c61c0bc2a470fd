//! Reads KVM's capabilities for `rvmm doctor`, with throwaway VMs.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_IOEVENTFD, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_NR_MEMSLOTS, KVM_CAP_NR_VCPUS,
    KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_VM_GPA_BITS,
};
use kvm_ioctls::VmFd;
use rustix::system::uname;

use super::isa::SBI_EXTENSIONS;
use super::knobs::withholds;
use super::report::{AiaSupport, HostReport, SbiState, SbiSupport};
use super::vcpu::Vcpu;
use super::vm::shown;
use super::{Kvm, aia, identities, open, regs};
use crate::error::VmError;
use crate::hypervisor::Vm;
use crate::riscv::insn::ECALL;
use crate::riscv::sbi::v01;
use crate::vcpu::exit::Exit;

/// The guest-physical address of the page of [`v01_calls_exit`].
const CODE: u64 = 0x8000_0000;

/// Reads KVM's capabilities.
///
/// # Errors
/// As [`open`]; or no VM with one hart can be created on this host.
pub fn probe() -> Result<HostReport, VmError> {
    let kvm = open()?;
    let vm = kvm.new_vm()?;
    let vcpu = vm.make_vcpu(0)?;
    let fd = vm.fd();
    let read = |what: &str, id| {
        vcpu.reg(id).map_err(|e| VmError::io(format!("Cannot read {what} from KVM"), e))
    };
    let sbi_v01 = v01_calls_exit(&kvm);
    Ok(HostReport {
        max_vcpus: vm.max_harts(),
        recommended_vcpus: cap(fd, KVM_CAP_NR_VCPUS).unwrap_or(1),
        address_bits: cap(fd, KVM_CAP_VM_GPA_BITS),
        memory_slots: cap(fd, KVM_CAP_NR_MEMSLOTS),
        isa: shown(&vcpu, None)?.into_iter().map(String::from).collect(),
        satp_mode: read("the MMU mode", regs::SATP_MODE)?,
        timebase_hz: read("the timebase", regs::TIMEBASE)?,
        sbi: sbi(&vcpu, sbi_v01),
        sbi_v01,
        guest_debug: cap(fd, KVM_CAP_SET_GUEST_DEBUG).is_some(),
        irqfd: cap(fd, KVM_CAP_IRQFD).is_some(),
        ioeventfd: cap(fd, KVM_CAP_IOEVENTFD).is_some(),
        aia: aia_offer(&kvm, fd),
    })
}

/// The value of a capability; `None` where the kernel does not have it.
fn cap(fd: &VmFd, number: u32) -> Option<u32> {
    u32::try_from(fd.check_extension_raw(number.into())).ok().filter(|value| *value > 0)
}

fn aia_offer(kvm: &Kvm, fd: &VmFd) -> Option<AiaSupport> {
    cap(fd, KVM_CAP_IRQCHIP)?;
    let device = aia::open(fd).ok()?;
    let ids = aia::offered_ids(&device).ok()?;
    let all_ids_work = identities::all_work(kvm).ok()?;
    Some(AiaSupport { guest_files: aia::guest_files(&device), ids, all_ids_work })
}

fn sbi(vcpu: &Vcpu, v01: Option<bool>) -> Vec<SbiSupport> {
    let release = uname().release().to_string_lossy().into_owned();
    let state = |number, name| match vcpu.reg(regs::sbi_extension(number)) {
        Ok(0) => SbiState::Off,
        Ok(_) if withholds(name, &release) => SbiState::Withheld,
        // Kernels without it list it nevertheless.
        Ok(_) if name == "v01" && v01 == Some(false) => SbiState::Absent,
        Ok(_) => SbiState::On,
        Err(_) => SbiState::Absent,
    };
    let numbered = (0..).zip(SBI_EXTENSIONS.iter().copied());
    numbered.map(|(number, name)| SbiSupport { name, state: state(number, name) }).collect()
}

/// A page of memory.
#[repr(C, align(4096))]
struct Page([u32; 1024]);

/// True if a call of SBI 0.1 exits to user space: a guest makes one, and then one that always does.
fn v01_calls_exit(kvm: &Kvm) -> Option<bool> {
    let mut page = Box::new(Page([0; 1024]));
    // li a7, 1; ecall; lui a7, 0x9000 (the first vendor extension); ecall
    for (word, instruction) in page.0.iter_mut().zip([0x0010_0893, ECALL, 0x0900_08b7, ECALL]) {
        *word = instruction;
    }
    // Declared after the page, so dropped before it: the kernel must not use the page any more.
    let vm = kvm.new_vm().ok()?;
    let host = std::ptr::from_ref(page.as_ref()) as u64;
    vm.map_memory(0, CODE, host, size_of::<Page>() as u64).ok()?;
    let vcpu = vm.make_vcpu(0).ok()?;
    vcpu.set_reg(regs::PC, CODE).ok()?;
    let mut hart = super::hart::KvmHart::new(0, vcpu.into(), Arc::default());
    match crate::vcpu::hart::Hart::enter(&mut hart).ok()? {
        Exit::Sbi(call) => Some(call.extension == v01::PUTCHAR),
        _ => None,
    }
}
