//! Parsers for the kernel's tables: /proc, /sys, /dev/kmsg and the device tree. Pure; they leave out what does not parse.

/// Number of CPUs in a list like `0-3,6`; `None` if it is not such a list.
pub(super) fn cpu_count(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0u32, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// Size of all ranges of a memory node's `reg`, in bytes: pairs of two cells each for address and size (Devicetree
/// Specification 0.4, section 3.4).
pub(super) fn device_tree_bytes(reg: &[u8]) -> Option<u64> {
    let (ranges, rest) = reg.as_chunks::<16>();
    if ranges.is_empty() || !rest.is_empty() {
        return None;
    }
    ranges.iter().try_fold(0u64, |sum, range| {
        let size = range.last_chunk::<8>().map(|size| u64::from_be_bytes(*size))?;
        sum.checked_add(size)
    })
}

/// A value of /proc/meminfo in KiB, by its name without the colon.
pub(super) fn meminfo_kib(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix(':')?;
        value.trim().strip_suffix("kB")?.trim().parse().ok()
    })
}

/// A line of /proc/mounts (fstab(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) source: String,
    pub(super) place: String,
    pub(super) kind: String,
    pub(super) options: String,
}

/// The lines of /proc/mounts.
pub(super) fn mounts(text: &str) -> impl Iterator<Item = Mount> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(' ').map(unescape);
        Some(Mount {
            source: fields.next()?,
            place: fields.next()?,
            kind: fields.next()?,
            options: fields.next()?,
        })
    })
}

/// Decodes the three octal digits that encode blanks and backslashes in /proc/mounts.
fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// File systems in /proc/filesystems that need a disk.
pub(super) fn disk_file_systems(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix('\t'))
}

/// The fields of a process that `ps` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) parent: u32,
    pub(super) state: char,
    /// Resident memory in pages.
    pub(super) pages: u64,
    pub(super) name: String,
}

/// Parses /proc/PID/stat (proc_pid_stat(5)). The name is in parentheses, and may contain parentheses and blanks.
pub(super) fn process(stat: &str) -> Option<Process> {
    let (start, rest) = stat.rsplit_once(')')?;
    let (_, name) = start.split_once('(')?;
    let mut fields = rest.split_ascii_whitespace();
    Some(Process {
        name: name.to_owned(),
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
        // Field 24; the two above are 3 and 4.
        pages: fields.nth(19)?.parse().ok()?,
    })
}

/// A record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg) as `dmesg` shows it.
pub(super) fn kernel_message(record: &str) -> Option<String> {
    let (header, message) = record.split_once(';')?;
    let microseconds: u64 = header.split(',').nth(2)?.parse().ok()?;
    // Lines that begin with a blank are a dictionary for programs.
    let message = message.lines().next().unwrap_or_default();
    let (seconds, fraction) = (microseconds / 1_000_000, microseconds % 1_000_000);
    Some(format!("[{seconds:5}.{fraction:06}] {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(cpu_count("0\n"), Some(1));
        assert_eq!(cpu_count("0-3\n"), Some(4));
        assert_eq!(cpu_count("0-1,3,5-7"), Some(6));
        for wrong in ["", "a", "3-1", "0-4294967295", "1-"] {
            assert_eq!(cpu_count(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_memory_node_is_summed_up() {
        let range = |base: u64, size: u64| [base.to_be_bytes(), size.to_be_bytes()].concat();
        assert_eq!(device_tree_bytes(&range(0x8000_0000, 512 << 20)), Some(512 << 20));
        let two = [range(0x8000_0000, 1 << 30), range(0x1_0000_0000, 1 << 30)].concat();
        assert_eq!(device_tree_bytes(&two), Some(2 << 30));
        assert_eq!(device_tree_bytes(&[]), None);
        assert_eq!(device_tree_bytes(&two[..24]), None);
        let huge = [range(0, u64::MAX), range(0, 1)].concat();
        assert_eq!(device_tree_bytes(&huge), None);
    }

    #[test]
    fn meminfo_is_read_by_whole_names() {
        let text =
            "MemTotal:         497408 kB\nMemFree:          430100 kB\nHugePages_Total:       0\n";
        assert_eq!(meminfo_kib(text, "MemTotal"), Some(497_408));
        assert_eq!(meminfo_kib(text, "MemFree"), Some(430_100));
        assert_eq!(meminfo_kib(text, "Mem"), None);
        assert_eq!(meminfo_kib(text, "HugePages_Total"), None);
    }

    #[test]
    fn mounts_may_have_blanks_in_their_names() {
        let text =
            "devtmpfs /dev devtmpfs rw,nosuid 0 0\n/dev/vda /a\\040b\\134c ext4 ro 0 0\nbroken\n";
        let mounts: Vec<_> = mounts(text).collect();
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[1].place, "/a b\\c");
        assert_eq!((mounts[1].source.as_str(), mounts[1].kind.as_str()), ("/dev/vda", "ext4"));
        assert_eq!(mounts[1].options, "ro");
    }

    #[test]
    fn only_file_systems_of_disks_are_tried() {
        let text = "nodev\tsysfs\nnodev\tproc\n\text4\n\tsquashfs\n";
        assert_eq!(disk_file_systems(text).collect::<Vec<_>>(), ["ext4", "squashfs"]);
    }

    #[test]
    fn a_process_may_have_parentheses_in_its_name() {
        let stat =
            "42 (a) (b c) S 1 42 42 1024 42 4194560 100 0 0 0 1 2 0 0 20 0 1 0 123 2093056 77 1844";
        let expected = Process { parent: 1, state: 'S', pages: 77, name: "a) (b c".into() };
        assert_eq!(process(stat), Some(expected));
        assert_eq!(process("42 (sh) S 1"), None);
        assert_eq!(process(""), None);
    }

    #[test]
    fn kernel_messages_get_their_time() {
        let record = "6,1,2000345,-;Linux version 6.12\n SUBSYSTEM=none\n";
        assert_eq!(kernel_message(record).unwrap(), "[    2.000345] Linux version 6.12");
        assert_eq!(kernel_message("6,1;x"), None);
        assert_eq!(kernel_message("no header"), None);
    }
}
