//! Releases of Linux, with the limits and faults of KVM on RISC-V.

use crate::kvm::release::Version;

/// The oldest kernel that rvmm is tested with.
pub(super) const OLDEST: Version = (6, 12);

/// Limits of KVM on RISC-V: the release that lifted each, and its effect on guests, in words that follow
/// "Before Linux X.Y". From the kernel's own history of arch/riscv/kvm.
pub(super) const LIMITS: &[(Version, &str)] = &[
    ((6, 14), "a guest cannot suspend itself (SBI SUSP)"),
    ((6, 17), "illegal instructions of a guest go through the host's kernel, which is slower"),
    ((6, 18), "guests get neither SBI FWFT nor the Zicbop extension"),
    (
        (7, 0),
        "KVM maps guest memory in 4 KiB pages unless it comes from the pool of huge pages (--hugepages)",
    ),
    ((7, 2), "signed loads from device registers (lb, lh, lw) are not sign-extended"),
];

/// Faults of KVM on RISC-V that affect users: the release that introduced each, the one that fixed it, and its effect, in words that
/// follow "From Linux X.Y on and before A.B".
pub(super) const FAULTS: &[(Version, Version, &str)] = &[(
    (7, 1),
    (7, 3),
    "a host CPU that is taken offline and online again breaks the machines that have run on it: do not change the CPUs while machines run (a machine that is paused meanwhile is safe)",
)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_in_the_order_in_which_they_were_lifted() {
        assert!(LIMITS.is_sorted_by_key(|(since, _)| *since));
        assert!(FAULTS.iter().all(|(since, until, _)| since < until));
    }
}
