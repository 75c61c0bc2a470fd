//! The verb `stat`: a machine's counters as a table, updated each second on a terminal, printed once elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use rustix::termios::isatty;

use super::{Request, ask, connect, ended, escaped, no_reply, refuse};
use crate::cli::output;
use crate::error::EXIT_OK;
use crate::inspect::{Query, Reply, Stat};

/// The time between two queries.
const INTERVAL: Duration = Duration::from_secs(1);

/// Moves the cursor to the upper left, and clears the screen (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Columns of the table of harts: their headings, and the KVM counters that they add up.
const COLUMNS: [(&str, &[&str]); 7] = [
    ("exits", &["exits"]),
    ("MMIO rvmm", &["mmio_exit_user"]),
    ("MMIO KVM", &["mmio_exit_kernel"]),
    ("SBI", &["ecall_exit_stat"]),
    ("WFI", &["wfi_exit_stat", "wrs_exit_stat"]),
    ("CSR", &["csr_exit_user", "csr_exit_kernel"]),
    ("kicks", &["signal_exits"]),
];

/// Shows a machine until it ends or the user ends rvmm; if standard output is no terminal, shows one second of it. Returns the
/// exit code.
pub(in crate::cli) fn watch(request: &Request) -> u8 {
    if request.json {
        return ask(request);
    }
    let mut connection = match connect(request.target.as_deref()) {
        Ok(connection) => connection,
        Err(what) => return refuse(&what),
    };
    let is_terminal = isatty(io::stdout());
    let mut before: Option<Stat> = None;
    loop {
        let now = match connection.ask(Query::Stat) {
            Ok(Reply::Stat(stat)) => stat,
            // Between two runs of the guest; the counters start from zero.
            Ok(_) => {
                before = None;
                sleep(INTERVAL);
                continue;
            }
            Err(error) => {
                return match &before {
                    Some(last) => ended(&last.name),
                    None => refuse(&no_reply(&error)),
                };
            }
        };
        if before.is_some() || is_terminal {
            let text = escaped(&table(&now, before.as_ref()));
            let clear = if is_terminal { CLEAR } else { "" };
            let code = output::show(&format!("{clear}{text}"));
            if code != EXIT_OK || !is_terminal {
                return code;
            }
        }
        before = Some(now);
        sleep(INTERVAL);
    }
}

/// A table of events per second since `before`, or since the machine's start if that is `None`.
pub(super) fn table(now: &Stat, before: Option<&Stat>) -> String {
    let before = before.filter(|before| before.age_ns < now.age_ns);
    let passed_ns = now.age_ns.saturating_sub(before.map_or(0, |before| before.age_ns));
    let rate = |now: u64, before: u64| {
        let events = u128::from(now.saturating_sub(before)) * 1_000_000_000;
        events / u128::from(passed_ns.max(1))
    };
    let mut out = String::new();
    let age = now.age_ns / 1_000_000_000;
    // Writing into a String cannot fail: results are dropped.
    let _ = writeln!(
        out,
        "{}  process {}  running for {}:{:02}:{:02}  {} harts, events a second{}\n",
        now.name,
        now.pid,
        age / 3600,
        age / 60 % 60,
        age % 60,
        now.harts.len(),
        if before.is_some() { "" } else { " since its start" }
    );
    let _ = write!(out, "hart  ");
    for (head, _) in COLUMNS {
        let _ = write!(out, "{head:>11}");
    }
    let _ = writeln!(out, "{:>9}", "asleep");
    for hart in &now.harts {
        let old = before.and_then(|b| b.harts.iter().find(|old| old.hart == hart.hart));
        let value = |names: &[&str], of: &BTreeMap<String, u64>| {
            names.iter().filter_map(|name| of.get(*name)).sum::<u64>()
        };
        let then = |names: &[&str]| old.map_or(0, |old| value(names, &old.counters));
        let _ = write!(out, "{:<6}", hart.hart);
        for (_, names) in COLUMNS {
            // The kernel does not count it.
            if names.iter().all(|name| !hart.counters.contains_key(*name)) {
                let _ = write!(out, "{:>11}", "-");
                continue;
            }
            let _ = write!(out, "{:>11}", rate(value(names, &hart.counters), then(names)));
        }
        // Includes the time of polling before or instead of sleeping.
        let slept = ["halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns"];
        let asleep = value(&slept, &hart.counters).saturating_sub(then(&slept));
        let percent = u128::from(asleep) * 100 / u128::from(passed_ns.max(1));
        let _ = writeln!(out, "{:>7} %", percent.min(100));
    }
    let _ = writeln!(
        out,
        "\n{:<16}{:>14}{:>11}{:>11}{:>11}",
        "device", "address", "reads", "writes", "refused"
    );
    for device in &now.devices {
        let old = before.and_then(|b| b.devices.iter().find(|old| old.base == device.base));
        let _ = writeln!(
            out,
            "{:<16}{:>14}{:>11}{:>11}{:>11}",
            device.name,
            format!("{:#x}", device.base),
            rate(device.reads, old.map_or(0, |old| old.reads)),
            rate(device.writes, old.map_or(0, |old| old.writes)),
            rate(device.refused, old.map_or(0, |old| old.refused)),
        );
    }
    let _ = writeln!(
        out,
        "{:<16}{:>14}{:>11}{:>11}",
        "no device",
        "",
        rate(now.unassigned_reads, before.map_or(0, |b| b.unassigned_reads)),
        rate(now.unassigned_writes, before.map_or(0, |b| b.unassigned_writes)),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::{DeviceCount, HartCount};

    fn stat(age_s: u64, exits: u64, reads: u64) -> Stat {
        let counters = [("exits", exits), ("halt_wait_ns", age_s * 500_000_000)];
        let counters = counters.map(|(name, value)| (name.to_owned(), value)).into();
        let devices = vec![DeviceCount {
            name: "serial".into(),
            base: 0x1000_0000,
            reads,
            ..DeviceCount::default()
        }];
        let harts = vec![HartCount { hart: 0, counters }];
        let age_ns = age_s * 1_000_000_000;
        Stat { name: "web".into(), pid: 7, age_ns, harts, devices, ..Stat::default() }
    }

    fn line(text: &str, head: &str) -> Vec<String> {
        let line = text.lines().find(|line| line.starts_with(head)).expect("a line");
        line.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn a_table_has_the_events_of_a_second() {
        let text = table(&stat(3662, 5000, 300), Some(&stat(3660, 1000, 100)));
        assert!(text.contains("running for 1:01:02"), "{text}");
        assert_eq!(line(&text, "0 "), ["0", "2000", "-", "-", "-", "-", "-", "-", "50", "%"]);
        assert_eq!(line(&text, "serial"), ["serial", "0x10000000", "100", "0", "0"]);
    }

    #[test]
    fn without_an_earlier_reply_events_are_counted_since_the_start() {
        // After a reboot a machine counts from zero, too.
        for before in [None, Some(stat(20, 9000, 9000))] {
            let text = table(&stat(10, 5000, 300), before.as_ref());
            assert!(text.contains("since its start"), "{text}");
            assert_eq!(line(&text, "0 ")[1], "500");
        }
    }
}
