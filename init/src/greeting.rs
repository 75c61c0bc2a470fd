//! The line about the guest, printed as soon as user space runs.

use std::time::Duration;

use rustix::system::{sysinfo, uname};
use rustix::time::{ClockId, clock_gettime};

use super::tables;

const MIB: u64 = 1 << 20;

/// The facts in the line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    /// The kernel's release, as `uname -r` has it.
    release: String,
    harts: u32,
    /// Unused bytes of RAM.
    free: u64,
    /// Bytes of RAM that the machine has.
    total: u64,
    /// Time since the kernel started its clock.
    uptime: Duration,
}

/// The line, without a line feed.
pub(super) fn line() -> String {
    describe(&facts())
}

fn describe(facts: &Facts) -> String {
    let Facts { release, harts, free, total, uptime } = facts;
    let plural = if *harts == 1 { "" } else { "s" };
    // Rounded down, so that it never shows more than there is.
    let (free, total) = (free / MIB, total / MIB);
    let (seconds, hundredths) = (uptime.as_secs(), uptime.subsec_millis() / 10);
    format!(
        "rvmm: Linux {release} on {harts} hart{plural}, {free} MiB free of {total} MiB, \
         user space after {seconds}.{hundredths:02} s"
    )
}

/// Collects the facts, with a system call or a small file each: this is part of every boot.
fn facts() -> Facts {
    let memory = sysinfo();
    let unit = u64::from(memory.mem_unit);
    let now = clock_gettime(ClockId::Boottime);
    Facts {
        release: uname().release().to_string_lossy().into_owned(),
        harts: std::fs::read_to_string("/sys/devices/system/cpu/online")
            .ok()
            .and_then(|list| tables::cpu_count(&list))
            .unwrap_or(1),
        free: memory.freeram.saturating_mul(unit),
        total: machine_memory().unwrap_or(memory.totalram.saturating_mul(unit)),
        uptime: Duration::try_from(now).unwrap_or_default(),
    }
}

/// RAM according to the device tree; the kernel's own total excludes the memory that it has reserved for itself.
fn machine_memory() -> Option<u64> {
    let cells = std::fs::read("/sys/firmware/devicetree/base/memory@80000000/reg").ok()?;
    tables::device_tree_bytes(&cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_kernel_harts_memory_and_time() {
        let facts = Facts {
            release: "6.12.107+deb13-riscv64".into(),
            harts: 4,
            free: 498 * MIB + 1000,
            total: 512 * MIB,
            uptime: Duration::from_millis(938),
        };
        assert_eq!(
            describe(&facts),
            "rvmm: Linux 6.12.107+deb13-riscv64 on 4 harts, 498 MiB free of 512 MiB, user space after 0.93 s"
        );
        let one = Facts { harts: 1, uptime: Duration::from_millis(12_005), ..facts };
        assert!(describe(&one).contains("on 1 hart, "));
        assert!(describe(&one).ends_with("after 12.00 s"));
    }

    #[test]
    fn this_machine_can_be_described() {
        let facts = facts();
        assert!(
            facts.harts > 0 && facts.free <= facts.total && !facts.uptime.is_zero(),
            "{facts:?}"
        );
    }
}
