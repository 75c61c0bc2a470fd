//! Number of interrupt identities that work in an emulated IMSIC.
//!
//! Up to Linux 7.2 KVM changes the pending and enable bits of an emulated interrupt file 32 at a time (`imsic_mrif_atomic_rmw` in
//! `arch/riscv/kvm/aia_imsic.c`), though words have 64: identities 32 to 63, 96 to 127 and so on can never be enabled, and their
//! interrupts are lost. Linux allocates in each hart's file an identity per source and one for inter-processor interrupts, in ascending
//! order, so a machine with few devices is not affected, and one with many hangs.

use kvm_bindings::{KVM_DEV_RISCV_AIA_GRP_IMSIC, KVM_DEV_RISCV_AIA_IMSIC_ISEL_BITS};

use super::Kvm;
use super::aia;
use crate::error::VmError;
use crate::hypervisor::AiaPlan;
use crate::layout::Span;

/// Identities that work in every emulated IMSIC: 1 to this number.
pub(super) const ALWAYS: u32 = 31;

/// `eip0`, the pending bits of identities 0 to 63 (AIA 1.0, section 3.8).
const EIP0: u64 = 0x80;

/// An identity outside the first 32-bit word.
const PROBE: u64 = 40;

/// The AIA of the throwaway VM.
const PLAN: AiaPlan = AiaPlan {
    harts: 1,
    sources: 1,
    identities: 1,
    aplic: Span { base: 0x0d00_0000, size: 0x4000 },
    imsics: Span { base: 0x2800_0000, size: 0x1000 },
};

/// True if identities above [`ALWAYS`] work in an emulated IMSIC of this kernel, found out by setting one pending and reading it back.
/// Before a hart runs for the first time its interrupt file is an emulated one, whatever it is later.
pub(super) fn all_work(kvm: &Kvm) -> Result<bool, VmError> {
    let vm = kvm.new_vm()?;
    let _hart = vm.make_vcpu(0)?;
    let device = aia::make(vm.fd(), &PLAN)?;
    let pending = 1 << PROBE;
    // The file of hart 0; the hart index is in the bits above the register number.
    let attr = EIP0 & ((1 << KVM_DEV_RISCV_AIA_IMSIC_ISEL_BITS) - 1);
    let group = KVM_DEV_RISCV_AIA_GRP_IMSIC;
    aia::set(&device, "the pending bits", group, attr, &pending)?;
    let found: u64 = aia::get(&device, "pending bits", group, attr)?;
    Ok(found == pending)
}
