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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_stand_in_the_order_in_which_they_were_lifted() {
        assert!(LIMITS.is_sorted_by_key(|(since, _)| *since));
    }
}
