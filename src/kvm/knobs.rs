//! `--isa`, `--sbi` and `--cpu-id` on one vCPU: switched in KVM where KVM can, else hidden from the device tree.
//!
//! KVM can switch off few ISA extensions (those that a hardware bit turns off for a guest): the others stay executable
//! and can only be left out of the tree.

use std::io;

use rustix::system::uname;

use super::isa::{ISA_EXTENSIONS, SBI_EXTENSIONS, isa_number, near, sbi_number, with_dependents};
use super::regs;
use super::release::{Version, is_at_least};
use super::vcpu::Vcpu;
use crate::config::{CpuId, ExtensionChange};
use crate::error::VmError;
use crate::hypervisor::CpuSettings;

/// SBI extensions that are off in KVM by default and that rvmm implements: the debug console and system suspend.
const SBI_DEFAULTS: &[&str] = &["dbcn", "susp"];

/// The first kernel that is known to check the arguments of a guest's PMU calls (`arch/riscv/kvm/vcpu_pmu.c`): in older ones a call
/// with invalid numbers reaches past the guest's counters.
const CHECKS_PMU_CALLS: Version = (7, 2);

/// The result of the changes to the ISA. Every name is one of the table's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Applied {
    /// Off in KVM: their instructions are illegal for the guest.
    pub(super) disabled: Vec<&'static str>,
    /// Still executable, but left out of the device tree.
    pub(super) hidden: Vec<&'static str>,
    /// SBI extensions of this kernel that are off, since a guest could harm the host with them.
    pub(super) withheld: Vec<&'static str>,
}

/// True if an SBI extension is off by default, to protect the host.
pub(super) fn withholds(name: &str, release: &str) -> bool {
    name == "pmu" && !is_at_least(release, CHECKS_PMU_CALLS)
}

/// Applies `knobs` to `vcpu`, before it runs for the first time.
pub(super) fn apply(vcpu: &Vcpu, knobs: &CpuSettings) -> Result<Applied, VmError> {
    let mut applied = Applied::default();
    for change in &knobs.isa {
        let name = isa_name(change)?;
        if change.on {
            switch_on(vcpu, name, &mut applied)?;
        } else {
            for gone in with_dependents(name) {
                switch_off(vcpu, gone, &mut applied)?;
            }
        }
    }
    apply_sbi(vcpu, &knobs.sbi)?;
    applied.withheld = withhold(vcpu, &knobs.sbi, &uname().release().to_string_lossy())?;
    apply_id(vcpu, knobs.id)?;
    Ok(applied)
}

fn switch_off(vcpu: &Vcpu, name: &'static str, applied: &mut Applied) -> Result<(), VmError> {
    let Some(id) = isa_number(name).map(regs::isa_extension) else { return Ok(()) };
    match vcpu.reg(id) {
        Ok(0) => return Ok(()),
        Ok(_) => {}
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        Err(e) => return Err(VmError::io(format!("Cannot read ISA extension {name} from KVM"), e)),
    }
    match vcpu.set_reg(id, 0) {
        Ok(()) => applied.disabled.push(name),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            if !applied.hidden.contains(&name) {
                applied.hidden.push(name);
            }
        }
        Err(e) => return Err(VmError::io(format!("Cannot switch off ISA extension {name}"), e)),
    }
    Ok(())
}

fn switch_on(vcpu: &Vcpu, name: &'static str, applied: &mut Applied) -> Result<(), VmError> {
    let Some(id) = isa_number(name).map(regs::isa_extension) else { return Ok(()) };
    match vcpu.set_reg(id, 1) {
        Ok(()) => {
            applied.disabled.retain(|off| *off != name);
            applied.hidden.retain(|hidden| *hidden != name);
            Ok(())
        }
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::ENOENT) => {
                VmError::new(format!("--isa: this host has no ISA extension {name}"))
            }
            Some(libc::EINVAL) => VmError::new(format!(
                "--isa: KVM does not support {name} in guests on this host, though the host has it"
            )),
            _ => VmError::io(format!("Cannot switch on ISA extension {name}"), e),
        }),
    }
}

fn apply_sbi(vcpu: &Vcpu, changes: &[ExtensionChange]) -> Result<(), VmError> {
    for name in SBI_DEFAULTS {
        let absent = |e: &io::Error| e.raw_os_error() == Some(libc::ENOENT);
        match set_sbi(vcpu, name, true) {
            // Older kernels do not have it: they answer the guest's call with NOT_SUPPORTED.
            Err(e) if !absent(&e) => return Err(sbi_error(name, true, e)),
            _ => {}
        }
    }
    for change in changes {
        let name = sbi_name(change)?;
        set_sbi(vcpu, name, change.on).or_else(|e| match e.raw_os_error() {
            Some(libc::ENOENT) if !change.on => Ok(()),
            _ => Err(sbi_error(name, change.on, e)),
        })?;
    }
    Ok(())
}

/// Switches off the extensions that may do harm, unless the user has set them.
fn withhold(
    vcpu: &Vcpu,
    changes: &[ExtensionChange],
    release: &str,
) -> Result<Vec<&'static str>, VmError> {
    let mut withheld = Vec::new();
    for name in SBI_EXTENSIONS.iter().copied().filter(|name| withholds(name, release)) {
        let is_there = sbi_number(name).is_some_and(|number| {
            vcpu.reg(regs::sbi_extension(number)).is_ok_and(|state| state != 0)
        });
        if is_there && changes.iter().all(|change| change.name != name) {
            set_sbi(vcpu, name, false).map_err(|e| sbi_error(name, false, e))?;
            withheld.push(name);
        }
    }
    Ok(withheld)
}

/// Switches system suspend off again, where it is on.
pub(super) fn without_suspend(vcpu: &Vcpu) -> Result<(), VmError> {
    set_sbi(vcpu, "susp", false).or_else(|e| match e.raw_os_error() {
        Some(libc::ENOENT) => Ok(()),
        _ => Err(sbi_error("susp", false, e)),
    })
}

fn set_sbi(vcpu: &Vcpu, name: &str, on: bool) -> io::Result<()> {
    match sbi_number(name) {
        Some(number) => vcpu.set_reg(regs::sbi_extension(number), u64::from(on)),
        None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    }
}

fn sbi_error(name: &str, on: bool, error: io::Error) -> VmError {
    if error.raw_os_error() == Some(libc::ENOENT) {
        return VmError::new(format!("--sbi: this host's kernel has no SBI extension {name}"));
    }
    let verb = if on { "on" } else { "off" };
    VmError::io(format!("Cannot switch {verb} SBI extension {name}"), error)
}

fn apply_id(vcpu: &Vcpu, id: CpuId) -> Result<(), VmError> {
    let registers = [
        ("vendor", regs::MVENDORID, id.vendor),
        ("arch", regs::MARCHID, id.arch),
        ("impl", regs::MIMPID, id.imp),
    ];
    for (name, register, value) in registers {
        if let Some(value) = value {
            vcpu.set_reg(register, value)
                .map_err(|e| VmError::io(format!("Cannot set --cpu-id {name}={value:#x}"), e))?;
        }
    }
    Ok(())
}

fn isa_name(change: &ExtensionChange) -> Result<&'static str, VmError> {
    let name = known("--isa", "ISA", ISA_EXTENSIONS, &change.name)?;
    match name {
        "h" if change.on => Err(VmError::invalid_request(
            "--isa: h is not available: KVM on RISC-V does not run hypervisors inside guests",
        )),
        "i" if !change.on => {
            Err(VmError::invalid_request("--isa: i cannot be switched off: every hart has it"))
        }
        _ => Ok(name),
    }
}

fn sbi_name(change: &ExtensionChange) -> Result<&'static str, VmError> {
    if change.name == "base" {
        return Err(VmError::invalid_request("--sbi: base is always on"));
    }
    known("--sbi", "SBI", SBI_EXTENSIONS, &change.name)
}

/// Returns the table's entry for `name`.
fn known(
    flag: &str,
    kind: &str,
    table: &'static [&'static str],
    name: &str,
) -> Result<&'static str, VmError> {
    if let Some(found) = table.iter().find(|entry| **entry == name) {
        return Ok(found);
    }
    let near = near(table, name);
    let shown: String = name.chars().take(32).collect();
    let hint = if near.is_empty() {
        String::new()
    } else {
        format!(" (did you mean {}?)", near.join(", "))
    };
    Err(VmError::invalid_request(format!("{flag}: KVM has no {kind} extension {shown:?}{hint}")))
}
