//! The choice between the in-kernel AIA and a PLIC in user space.

use kvm_bindings::KVM_CAP_IRQCHIP;
use kvm_ioctls::VmFd;

use super::Kvm;
use super::identities;
use super::vm::{Members, shown};
use crate::config::IrqchipChoice;
use crate::error::VmError;
use crate::hypervisor::AiaPlan;

/// True if the machine of `members` gets an AIA.
pub(super) fn is_aia(
    kvm: &Kvm,
    vm: &VmFd,
    members: &Members,
    (choice, plan): (IrqchipChoice, &AiaPlan),
) -> Result<bool, VmError> {
    if choice == IrqchipChoice::Plic {
        return Ok(false);
    }
    match (obstacle(vm, members)?, choice) {
        (Some(why), IrqchipChoice::Aia) => {
            return Err(VmError::new(format!(
                "The AIA is not available: {why} (a new machine can have --irqchip plic or auto)"
            )));
        }
        (Some(why), _) => {
            log::info!("Interrupt controller: PLIC, since {why}");
            return Ok(false);
        }
        (None, _) => {}
    }
    if members.harts.len() != plan.harts as usize {
        return Err(VmError::new("The irqchip is created before all harts are"));
    }
    if plan.identities <= identities::ALWAYS || identities::all_work(kvm)? {
        return Ok(true);
    }
    let (most, sure) = (plan.identities, identities::ALWAYS);
    if choice != IrqchipChoice::Aia {
        log::info!(
            "Interrupt controller: PLIC, since the machine may use {most} interrupts, and an emulated IMSIC of this kernel loses all but {sure}"
        );
        return Ok(false);
    }
    log::warn!(
        "With --irqchip aia the machine may use {most} interrupts, and an emulated IMSIC of this kernel loses all but {sure}: a device may hang the guest (use --irqchip auto or plic, or Linux 7.3)"
    );
    Ok(true)
}

/// The reason why the guest cannot have an AIA; `None` if it can.
fn obstacle(vm: &VmFd, members: &Members) -> Result<Option<&'static str>, VmError> {
    if vm.check_extension_raw(KVM_CAP_IRQCHIP.into()) <= 0 {
        return Ok(Some("this host has no AIA that KVM can use (Ssaia)"));
    }
    let shown = shown(members.first_vcpu()?, members.applied.as_ref())?;
    Ok((!shown.contains(&"ssaia")).then_some("ssaia is switched off (--isa)"))
}
