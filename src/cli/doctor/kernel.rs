//! Releases of Linux, and what KVM on RISC-V does not do before them.

use crate::kvm::release::Version;

/// The oldest kernel that rvmm is tested with.
pub(super) const OLDEST: Version = (6, 12);

/// Limits of KVM on RISC-V: the release that lifted it, and what it means for guests, in words that follow
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

/// Faults of KVM on RISC-V that a user has to know of: the release that brought it, the one that mended it, and what it means, in words that
/// follow "From Linux X.Y on and before A.B".
pub(super) const FAULTS: &[(Version, Version, &str)] = &[(
    (7, 1),
    (7, 3),
    "a CPU of the host that is taken offline and online again spoils the machines that have run on it: leave the CPUs as they are while machines run (one that is paused meanwhile is safe)",
)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_stand_in_the_order_in_which_they_were_lifted() {
        assert!(LIMITS.is_sorted_by_key(|(since, _)| *since));
        assert!(FAULTS.iter().all(|(since, until, _)| since < until));
    }
}
