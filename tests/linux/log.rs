//! Messages in a kernel's log that indicate a fault of the machine or its device tree.

/// Lines that Debian's kernel logs as a warning or worse on a machine without faults, with the reasons.
const ALLOWED: &[(&str, &str)] =
    &[("hrtimer: interrupt took ", "the host had no time for the guest")];

/// The lines of `dmesg -r` of level warning or worse (4 or less) that are not allowed.
pub(crate) fn complaints(log: &str) -> Vec<String> {
    assert!(log.contains("Linux version"), "this is no kernel log: {log:.300}");
    let worse = |line: &&str| {
        let level = line.strip_prefix('<').and_then(|rest| rest.split('>').next());
        level.and_then(|level| level.parse::<u32>().ok()).is_some_and(|level| level % 8 <= 4)
    };
    let allowed = |line: &&str| ALLOWED.iter().any(|(text, _)| line.contains(text));
    log.lines().filter(worse).filter(|line| !allowed(line)).map(str::to_owned).collect()
}
