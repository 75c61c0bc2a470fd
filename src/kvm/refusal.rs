//! Errors of opening /dev/kvm, with cause and remedy in one line each.

use std::fs;
use std::io;

use crate::error::VmError;
use crate::host::node::{KVM, Place};

/// The error of a failed open of /dev/kvm.
pub(super) fn of_open(error: io::Error) -> VmError {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok();
    let what = open_message(error.kind(), cpuinfo.as_deref(), Place::here());
    match error.kind() {
        // The message says it already.
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => VmError::new(what),
        _ => VmError::io(what, error),
    }
}

/// The error for a kernel whose KVM_GET_API_VERSION is not 12.
pub(super) fn of_version(version: i32) -> VmError {
    VmError::new(format!(
        "/dev/kvm has API version {version}, and rvmm needs 12: is it the kernel's own device?"
    ))
}

fn open_message(kind: io::ErrorKind, cpuinfo: Option<&str>, place: Place) -> String {
    let why = match (kind, place) {
        (io::ErrorKind::NotFound, _)
            if cpuinfo.and_then(has_hypervisor_extension) == Some(false) =>
        {
            "this CPU has no hypervisor extension (H): rvmm needs a host that has it".into()
        }
        (io::ErrorKind::NotFound, Place::Machine) => {
            format!("the kernel module is not loaded ({})", KVM.remedy_for_absence(place))
        }
        (io::ErrorKind::NotFound, Place::Container) => {
            format!("it does not exist here ({})", KVM.remedy_for_absence(place))
        }
        (io::ErrorKind::PermissionDenied, _) => {
            format!("permission denied ({})", KVM.remedy_for_denial(place))
        }
        _ => "the kernel refused (sudo dmesg | grep kvm may say why)".into(),
    };
    format!("Cannot open /dev/kvm: {why}")
}

/// True if the first `isa` line of /proc/cpuinfo has `h`; `None` where there is no such line.
pub(super) fn has_hypervisor_extension(cpuinfo: &str) -> Option<bool> {
    let isa = cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "isa").then(|| value.trim())
    })?;
    let letters = isa.strip_prefix("rv64").or_else(|| isa.strip_prefix("rv32")).unwrap_or(isa);
    Some(letters.split('_').next().unwrap_or("").contains('h'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH_H: &str =
        "processor\t: 0\nhart\t\t: 0\nisa\t\t: rv64imafdch_zicbom_zihpm\nmmu\t\t: sv57\n";

    #[test]
    fn the_letter_h_is_looked_for_among_the_letters_only() {
        assert_eq!(has_hypervisor_extension(WITH_H), Some(true));
        assert_eq!(has_hypervisor_extension("isa\t: rv64imafdc_zihpm_sha\n"), Some(false));
        assert_eq!(has_hypervisor_extension("processor : 0\n"), None);
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        let missing = io::ErrorKind::NotFound;
        let here = |kind, cpuinfo| open_message(kind, cpuinfo, Place::Machine);
        assert!(here(missing, Some(WITH_H)).contains("modprobe kvm"));
        assert!(here(missing, None).contains("modprobe kvm"));
        assert!(here(missing, Some("isa : rv64imac\n")).contains("(H)"));
        assert!(here(io::ErrorKind::PermissionDenied, None).contains("usermod -aG kvm"));
        assert!(here(io::ErrorKind::Other, None).contains("dmesg"));
        assert!(of_version(11).to_string().contains("12"));
    }

    #[test]
    fn in_a_container_the_device_has_to_be_given_to_it() {
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied] {
            let said = open_message(kind, Some(WITH_H), Place::Container);
            assert!(said.contains("start it with --device /dev/kvm"), "{said}");
            assert!(!said.contains("modprobe") && !said.contains("usermod"), "{said}");
        }
        let said =
            open_message(io::ErrorKind::NotFound, Some("isa : rv64imac\n"), Place::Container);
        assert!(said.contains("(H)"), "{said}");
    }
}
