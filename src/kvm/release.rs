//! Linux releases: for bugs of kernels that cannot be detected in time in any other way.

/// A kernel's version: major, minor.
pub(crate) type Version = (u32, u32);

/// The version in a release such as `6.12.107+deb13-riscv64`.
pub(crate) fn version(release: &str) -> Option<Version> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// True if a release is known to be of `version` or newer.
pub(crate) fn is_at_least(release: &str, version: Version) -> bool {
    self::version(release).is_some_and(|found| found >= version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_first_two_numbers_of_a_release() {
        assert_eq!(version("6.12.107+deb13-riscv64"), Some((6, 12)));
        assert_eq!(version("7.2-rc1"), Some((7, 2)));
        assert_eq!(version("6.6"), Some((6, 6)));
        for release in ["", "linux", "6", "6.", "x.y", "99999999999.1"] {
            assert_eq!(version(release), None, "{release}");
        }
    }

    #[test]
    fn a_release_without_a_version_counts_as_the_oldest() {
        assert!(is_at_least("7.2.13+deb14-riscv64", (7, 2)) && is_at_least("10.0", (7, 2)));
        assert!(!is_at_least("7.1.9", (7, 2)) && !is_at_least("next-20261122", (0, 1)));
    }
}
