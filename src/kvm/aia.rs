//! The in-kernel AIA: an APLIC for wired interrupts and an IMSIC per hart, emulated or in hardware guest files.
//!
//! Attributes and their rules: kernel, `Documentation/virt/kvm/devices/` and `arch/riscv/kvm/aia_device.c`. The
//! kernel's defaults are kept for groups and the guest's own guest files (none) and, where [`guest_files`](super::guest_files) allows it, for the
//! mode (hardware guest files where the host has them, emulation where they run out). Smstateen needs nothing: `hstateen0` gives a
//! guest access to its AIA registers wherever the vCPU has Ssaia, and `sstateen0` has no AIA bit (Smstateen 1.0, section 2).
#![expect(unsafe_code, reason = "device attributes are passed by address")]

use kvm_bindings::{
    KVM_DEV_RISCV_AIA_ADDR_APLIC, KVM_DEV_RISCV_AIA_CONFIG_GUEST_BITS,
    KVM_DEV_RISCV_AIA_CONFIG_HART_BITS, KVM_DEV_RISCV_AIA_CONFIG_IDS,
    KVM_DEV_RISCV_AIA_CONFIG_MODE, KVM_DEV_RISCV_AIA_CONFIG_SRCS, KVM_DEV_RISCV_AIA_CTRL_INIT,
    KVM_DEV_RISCV_AIA_GRP_ADDR, KVM_DEV_RISCV_AIA_GRP_APLIC, KVM_DEV_RISCV_AIA_GRP_CONFIG,
    KVM_DEV_RISCV_AIA_GRP_CTRL, KVM_DEV_RISCV_AIA_MODE_AUTO, KVM_DEV_RISCV_AIA_MODE_EMUL,
    KVM_DEV_RISCV_AIA_MODE_HWACCEL, KVM_DEV_RISCV_APLIC_SIZE, KVM_DEV_RISCV_IMSIC_SIZE,
    kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_RISCV_AIA as KVM_DEV_TYPE_RISCV_AIA,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::guest_files;
use super::report::GuestFiles;
use crate::error::VmError;
use crate::hypervisor::{AiaFacts, AiaPlan};

/// Maximum number of interrupt identities that is requested, as in QEMU's `virt`. KVM searches an emulated IMSIC word by word
/// for the next interrupt, so identities that the machine cannot use only cost time.
const MAX_IDS: u32 = 255;

/// Registers of the APLIC (AIA 1.0, section 4.5): `domaincfg` with its enable bit, and `sourcecfg[1]`, 0 for an inactive source.
const APLIC_DOMAINCFG: u64 = 0;
const APLIC_DOMAINCFG_IE: u32 = 1 << 8;
const APLIC_SOURCECFG: u64 = 4;

/// Attribute number of the first hart's IMSIC address.
const FIRST_IMSIC: u64 = 1;

/// The AIA device, created and initialised.
pub(super) struct Aia {
    pub(super) device: DeviceFd,
    pub(super) facts: AiaFacts,
}

/// Creates the AIA of `vm`, whose harts all exist and have not run, and logs its properties.
pub(super) fn create(vm: &VmFd, plan: &AiaPlan) -> Result<Aia, VmError> {
    let device = make(vm, plan)?;
    let facts = read_back(&device)?;
    log::info!(
        "Interrupt controller: AIA in the kernel ({}), {} sources, {} identities per IMSIC",
        mode_name(mode(&device)?),
        facts.sources,
        facts.ids
    );
    Ok(Aia { device, facts })
}

/// Creates and initialises the device.
pub(super) fn make(vm: &VmFd, plan: &AiaPlan) -> Result<DeviceFd, VmError> {
    check(plan)?;
    let device = open(vm)?;
    choose_mode(&device)?;
    let hart_index_bits = index_bits(plan.harts);
    set_config(&device, "hart index bits", KVM_DEV_RISCV_AIA_CONFIG_HART_BITS, hart_index_bits)?;
    set_config(&device, "guest index bits", KVM_DEV_RISCV_AIA_CONFIG_GUEST_BITS, 0)?;
    let offered = config(&device, "interrupt identities", KVM_DEV_RISCV_AIA_CONFIG_IDS)?;
    if offered > MAX_IDS {
        set_config(&device, "interrupt identities", KVM_DEV_RISCV_AIA_CONFIG_IDS, MAX_IDS)?;
    }
    let sources = plan.sources.min(offered);
    set_config(&device, "interrupt sources", KVM_DEV_RISCV_AIA_CONFIG_SRCS, sources)?;

    let aplic = u64::from(KVM_DEV_RISCV_AIA_ADDR_APLIC);
    set(&device, "the address of the APLIC", KVM_DEV_RISCV_AIA_GRP_ADDR, aplic, &plan.aplic.base)?;
    for hart in 0..u64::from(plan.harts) {
        let addr = plan.imsics.base + hart * u64::from(KVM_DEV_RISCV_IMSIC_SIZE);
        let attr = FIRST_IMSIC + hart;
        set(&device, "the address of an IMSIC", KVM_DEV_RISCV_AIA_GRP_ADDR, attr, &addr)?;
    }
    let init = u64::from(KVM_DEV_RISCV_AIA_CTRL_INIT);
    set(&device, "the INIT control attribute", KVM_DEV_RISCV_AIA_GRP_CTRL, init, &0_u64)?;
    Ok(device)
}

impl Aia {
    /// True if no IMSIC is ever in a guest file of the host.
    pub(super) fn is_emulated(&self) -> Result<bool, VmError> {
        Ok(mode(&self.device)? == KVM_DEV_RISCV_AIA_MODE_EMUL)
    }

    /// True if the guest has enabled interrupt delivery in the APLIC or configured one of its sources.
    pub(super) fn is_set_up(&self) -> Result<bool, VmError> {
        let register = |offset| -> Result<u32, VmError> {
            get(&self.device, "the APLIC's registers", KVM_DEV_RISCV_AIA_GRP_APLIC, offset)
        };
        if register(APLIC_DOMAINCFG)? & APLIC_DOMAINCFG_IE != 0 {
            return Ok(true);
        }
        for source in 1..=u64::from(self.facts.sources) {
            if register(APLIC_SOURCECFG + 4 * (source - 1))? != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Creates the device without initialising it.
pub(super) fn open(vm: &VmFd) -> Result<DeviceFd, VmError> {
    let mut request = kvm_create_device { type_: KVM_DEV_TYPE_RISCV_AIA, fd: 0, flags: 0 };
    vm.create_device(&mut request).map_err(|e| {
        VmError::io("Cannot create the in-kernel AIA (--irqchip plic does not need it)", e.into())
    })
}

/// Keeps the kernel's default mode where that is safe, else selects emulation.
fn choose_mode(device: &DeviceFd) -> Result<(), VmError> {
    if guest_files::are_safe().is_ok() {
        return Ok(());
    }
    set_config(device, "mode", KVM_DEV_RISCV_AIA_CONFIG_MODE, KVM_DEV_RISCV_AIA_MODE_EMUL)
}

/// The mode: one of `KVM_DEV_RISCV_AIA_MODE_*`.
fn mode(device: &DeviceFd) -> Result<u32, VmError> {
    config(device, "mode", KVM_DEV_RISCV_AIA_CONFIG_MODE)
}

/// The use that machines of rvmm make of the host's IMSIC guest files.
pub(super) fn guest_files(device: &DeviceFd) -> GuestFiles {
    if !takes_hardware_mode(device) {
        return GuestFiles::Absent;
    }
    guest_files::are_safe().map_or_else(GuestFiles::Unsafe, |()| GuestFiles::Used)
}

/// True if the host has IMSIC guest files for guests: only then does the kernel accept this mode.
fn takes_hardware_mode(device: &DeviceFd) -> bool {
    let mode = KVM_DEV_RISCV_AIA_MODE_HWACCEL;
    set_config(device, "mode", KVM_DEV_RISCV_AIA_CONFIG_MODE, mode).is_ok()
}

/// Number of interrupt identities that the kernel offers.
pub(super) fn offered_ids(device: &DeviceFd) -> Result<u32, VmError> {
    config(device, "interrupt identities", KVM_DEV_RISCV_AIA_CONFIG_IDS)
}

fn check(plan: &AiaPlan) -> Result<(), VmError> {
    let pages = plan.imsics.size / u64::from(KVM_DEV_RISCV_IMSIC_SIZE);
    if plan.harts == 0 || u64::from(plan.harts) > pages {
        return Err(VmError::new(format!(
            "{} harts do not fit into the IMSIC window, which has room for {pages}",
            plan.harts
        )));
    }
    // The kernel takes the hart index from the address bits above the page, so they must be zero in the base.
    let span = u64::from(plan.harts).next_power_of_two() * u64::from(KVM_DEV_RISCV_IMSIC_SIZE);
    if !plan.imsics.base.is_multiple_of(span)
        || plan.aplic.size < u64::from(KVM_DEV_RISCV_APLIC_SIZE)
    {
        return Err(VmError::new(format!(
            "The memory map has no room for an AIA of {} harts (APLIC at {:#x}, IMSICs at {:#x})",
            plan.harts, plan.aplic.base, plan.imsics.base
        )));
    }
    Ok(())
}

/// Number of bits of a hart index for `harts` harts.
fn index_bits(harts: u32) -> u32 {
    harts.next_power_of_two().trailing_zeros()
}

fn read_back(device: &DeviceFd) -> Result<AiaFacts, VmError> {
    Ok(AiaFacts {
        sources: config(device, "interrupt sources", KVM_DEV_RISCV_AIA_CONFIG_SRCS)?,
        ids: config(device, "interrupt identities", KVM_DEV_RISCV_AIA_CONFIG_IDS)?,
        hart_index_bits: config(device, "hart index bits", KVM_DEV_RISCV_AIA_CONFIG_HART_BITS)?,
        guest_index_bits: config(device, "guest index bits", KVM_DEV_RISCV_AIA_CONFIG_GUEST_BITS)?,
    })
}

fn mode_name(mode: u32) -> &'static str {
    match mode {
        KVM_DEV_RISCV_AIA_MODE_AUTO => "guest files of the host, emulated where they run out",
        KVM_DEV_RISCV_AIA_MODE_HWACCEL => "guest files of the host",
        _ => "emulated",
    }
}

fn config(device: &DeviceFd, what: &str, attr: u32) -> Result<u32, VmError> {
    get(device, what, KVM_DEV_RISCV_AIA_GRP_CONFIG, attr.into())
}

/// The integer type of a group's attributes: 32 bits for the configuration and the APLIC's registers, 64 bits for the others.
pub(super) trait Attribute: Copy + Default {}
impl Attribute for u32 {}
impl Attribute for u64 {}

/// Reads an attribute. `T` has the width of the group's attributes.
pub(super) fn get<T: Attribute>(
    device: &DeviceFd,
    what: &str,
    group: u32,
    attr: u64,
) -> Result<T, VmError> {
    // Wide enough for every group, in case a caller's type is narrower than what the kernel writes.
    let mut value = [T::default(); 2];
    let mut request = kvm_device_attr { flags: 0, group, attr, addr: (&raw mut value) as u64 };
    // SAFETY: attributes have at most 64 bits; `value` has no fewer and outlives the call.
    unsafe { device.get_device_attr(&mut request) }
        .map_err(|e| VmError::io(format!("Cannot read {what} of the in-kernel AIA"), e.into()))?;
    let [value, _] = value;
    Ok(value)
}

fn set_config(device: &DeviceFd, what: &str, attr: u32, value: u32) -> Result<(), VmError> {
    set(device, what, KVM_DEV_RISCV_AIA_GRP_CONFIG, attr.into(), &value)
}

/// Sets an attribute. `T` has the width of the group's attributes.
pub(super) fn set<T: Attribute>(
    device: &DeviceFd,
    what: &str,
    group: u32,
    attr: u64,
    value: &T,
) -> Result<(), VmError> {
    let addr = std::ptr::from_ref(value) as u64;
    let request = kvm_device_attr { flags: 0, group, attr, addr };
    device
        .set_device_attr(&request)
        .map_err(|e| VmError::io(format!("Cannot set {what} of the in-kernel AIA"), e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Span;

    fn plan(harts: u32) -> AiaPlan {
        AiaPlan {
            harts,
            sources: 95,
            identities: 31,
            aplic: Span { base: 0xd00_0000, size: 0x4000 },
            imsics: Span { base: 0x2800_0000, size: 0x100_0000 },
        }
    }

    #[test]
    fn a_machine_gets_guest_files_only_where_they_are_safe() {
        let made = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()).ok().and_then(|vm| {
            let hart = vm.create_vcpu(0).ok()?;
            Some((create(&vm, &plan(1)).ok()?, hart, vm))
        });
        let Some((aia, _hart, _vm)) = made else {
            return rvmm_devices::testing::skip("this host has no AIA");
        };
        let mode = mode(&aia.device).unwrap();
        assert!(guest_files::are_safe().is_ok() || mode == KVM_DEV_RISCV_AIA_MODE_EMUL, "{mode}");
    }

    #[test]
    fn a_hart_index_has_as_many_bits_as_the_harts_need() {
        for (harts, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)] {
            assert_eq!(index_bits(harts), bits, "{harts} harts");
        }
    }

    #[test]
    fn a_plan_is_refused_where_an_imsic_would_be_outside_its_window() {
        assert!(check(&plan(1024)).is_ok());
        assert!(check(&plan(4097)).is_err());
        assert!(check(&plan(0)).is_err());
    }

    #[test]
    fn a_plan_is_refused_where_addresses_would_not_encode_the_hart() {
        let mut misaligned = plan(4);
        misaligned.imsics.base += 0x1000;
        assert!(check(&misaligned).is_err());
        let mut narrow = plan(4);
        narrow.aplic.size = 0x1000;
        assert!(check(&narrow).is_err());
    }
}
