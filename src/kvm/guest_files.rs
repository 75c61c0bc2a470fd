//! The host's IMSIC guest files (AIA 1.0, section 3.2): the hosts where a hart that waits on one is always woken.
//!
//! Two faults are known. A host with one CPU has neither, and an emulated IMSIC has neither.
//!
//! * Kernels before 6.18 check the guest file on the CPU that the hart's thread is on now, not on the one where it went to sleep.
//!   Once the thread has migrated, its hart sleeps on despite interrupts of devices and of other harts.
//! * QEMU (seen in 10.0.2, `findings/qemu-hgeie-race.sh`) computes `mip.SGEIP` from `hgeie` and `hgeip` outside of the lock that guards
//!   both. The kernel sets `hgeie` before a hart sleeps; if another CPU writes to the guest file in the same moment, SGEIP stays
//!   clear, and nothing wakes the hart. A guest of one hart that waits for a device without a timer was lost in a third of all runs.
#![expect(unsafe_code, reason = "sysconf has no safe interface")]

use std::fs;

use rustix::system::uname;

use super::release::{Version, is_at_least};
use super::report::LostWakeUps;

/// The first kernel that looks for a waiting hart's interrupts on the right CPU (commit `RISC-V: KVM: Read HGEIP CSR on the correct
/// cpu` and its prerequisites).
const WAKES_EVERY_HART: Version = (6, 18);

/// Files with the maker's name: of the machine in its device tree, and in its firmware's tables.
const MAKERS: [&str; 2] = ["/sys/firmware/devicetree/base/model", "/sys/class/dmi/id/sys_vendor"];

/// Checks that this host wakes every hart that waits on a guest file.
///
/// # Errors
/// It does not: the reason.
pub(super) fn are_safe() -> Result<(), LostWakeUps> {
    let release = uname().release().to_string_lossy().into_owned();
    keep_wake_ups(&release, configured_cpus(), MAKERS.into_iter().any(is_of_qemu))
}

/// As [`are_safe`] for a kernel of this release, on a host with this many CPUs, which QEMU emulates or not.
fn keep_wake_ups(release: &str, cpus: u64, is_qemu: bool) -> Result<(), LostWakeUps> {
    if cpus == 1 {
        Ok(())
    } else if !is_at_least(release, WAKES_EVERY_HART) {
        Err(LostWakeUps::Kernel)
    } else if is_qemu {
        Err(LostWakeUps::Qemu)
    } else {
        Ok(())
    }
}

/// True if this file names QEMU as the maker of the machine.
fn is_of_qemu(path: &str) -> bool {
    fs::read(path).is_ok_and(|name| String::from_utf8_lossy(&name).to_lowercase().contains("qemu"))
}

/// Number of the host's CPUs, offline ones included; the maximum where it is not known.
fn configured_cpus() -> u64 {
    // SAFETY: this call only reads.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    u64::try_from(cpus).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_files_are_used_where_every_hart_that_waits_on_one_is_woken() {
        use LostWakeUps::{Kernel, Qemu};
        for release in ["6.12.107+deb13-riscv64", "6.17.13", "5.19", "6", "", "next-20261122"] {
            for is_qemu in [false, true] {
                assert_eq!(keep_wake_ups(release, 2, is_qemu), Err(Kernel), "{release}");
                assert_eq!(keep_wake_ups(release, u64::MAX, is_qemu), Err(Kernel), "{release}");
                assert_eq!(keep_wake_ups(release, 1, is_qemu), Ok(()), "{release}");
            }
        }
        for release in ["6.18.0", "6.18-rc7", "6.19.2-arch1", "7.0.0+", "10.2"] {
            assert_eq!(keep_wake_ups(release, 2, false), Ok(()), "{release}");
            assert_eq!(keep_wake_ups(release, 2, true), Err(Qemu), "{release}");
            assert_eq!(keep_wake_ups(release, 1, true), Ok(()), "{release}");
        }
        assert!(configured_cpus() > 0);
    }

    #[test]
    fn a_machine_of_qemu_is_known_by_its_maker() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("maker");
        let says = |name: &str| {
            fs::write(&path, name).unwrap();
            is_of_qemu(path.to_str().unwrap())
        };
        assert!(says("riscv-virtio,qemu\0") && says("QEMU\n"));
        assert!(!says("Banana Pi BPI-F3\0") && !says("SiFive\n") && !says(""));
        assert!(!is_of_qemu("/nonexistent"));
    }
}
