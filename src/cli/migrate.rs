//! The verb `migrate`, and what `restore --listen` does on the other side.

use std::ffi::OsString;
use std::io;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use rustix::termios::isatty;

use super::{exit_code, inspect, output};
use crate::inspect::{Order, Reply};
use crate::migration::{Address, MigrationProgress, MigrationReport, MigrationRequest};

/// The flags of `rvmm migrate`.
#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// The name (--name) or process ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,
    /// Where rvmm restore --listen waits: unix:PATH, tcp:HOST:PORT on this host, or fd:N, a connected socket
    #[arg(value_name = "TARGET", value_parser = OsStringValueParser::new().try_map(address))]
    target: Address,
    /// Milliseconds for which the guest may stand still [default: 300]
    #[arg(long, value_name = "MS", default_value_t = MigrationRequest::default().downtime_ms, hide_default_value = true)]
    downtime: u32,
    /// Let the guest run there after one round, and send the rest of its memory afterwards: if the connection breaks then, the guest is lost
    #[arg(long)]
    postcopy: bool,
    /// Print JSON instead of text: a line after each round, and one at the end
    #[arg(long)]
    json: bool,
}

impl MigrateArgs {
    /// Moves the machine, prints what was done, and returns the exit code.
    pub(super) fn perform(&self) -> u8 {
        let socket = match self.target.connect() {
            Ok(socket) => socket,
            Err(error) => return exit_code(Err(error)),
        };
        let order = Order::Migrate(MigrationRequest {
            downtime_ms: self.downtime,
            postcopy: self.postcopy,
        });
        let is_shown = isatty(io::stderr()) && !self.json;
        let each = |reply: &Reply| match reply {
            Reply::Progress(_) if self.json => drop(output::show(&json(reply))),
            Reply::Progress(state) if is_shown => eprint!("\r{}\x1b[K", progress(state)),
            _ => {}
        };
        let last = inspect::give_with(Some(&self.machine), &order, socket, each);
        if is_shown {
            eprint!("\r\x1b[K");
        }
        match last {
            Ok(reply @ Reply::Migrated(_)) if self.json => output::show(&json(&reply)),
            Ok(Reply::Migrated(report)) => output::show(&text(&self.machine, &report)),
            Ok(_) => inspect::refuse("The machine gives another reply than asked for"),
            Err(what) => inspect::refuse(&what),
        }
    }
}

/// Parses an address.
pub(super) fn address(text: OsString) -> Result<Address, String> {
    Address::parse(&text)
}

fn json(reply: &Reply) -> String {
    serde_json::to_string(reply).unwrap_or_default() + "\n"
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn progress(state: &MigrationProgress) -> String {
    let MigrationProgress { round, sent, left, per_second, throttle } = state;
    let (sent, left, rate) = (mib(*sent), mib(*left), mib(*per_second));
    let slowed =
        if *throttle > 0 { format!(", the guest slowed by {throttle} %") } else { String::new() };
    format!("round {round}: {sent:.1} MiB sent, {left:.1} MiB left, {rate:.0} MiB/s{slowed}")
}

fn text(machine: &str, report: &MigrationReport) -> String {
    let mut name = String::new();
    output::push_escaped(&mut name, machine);
    let (sent, still) = (mib(report.sent), report.downtime_ns as f64 / 1e6);
    let rounds =
        if report.rounds == 1 { "1 round".into() } else { format!("{} rounds", report.rounds) };
    format!("Moved {name}: {sent:.1} MiB in {rounds}; the guest stood still for {still:.1} ms\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_and_report_are_a_line_each() {
        let state = MigrationProgress {
            round: 2,
            sent: 3 << 20,
            left: 1 << 19,
            per_second: 200 << 20,
            throttle: 0,
        };
        assert_eq!(progress(&state), "round 2: 3.0 MiB sent, 0.5 MiB left, 200 MiB/s");
        let slowed = progress(&MigrationProgress { throttle: 40, ..state });
        assert!(slowed.ends_with("200 MiB/s, the guest slowed by 40 %"), "{slowed}");
        let report = MigrationReport { rounds: 1, sent: 1 << 20, downtime_ns: 2_500_000 };
        let expected = "Moved web: 1.0 MiB in 1 round; the guest stood still for 2.5 ms\n";
        assert_eq!(text("web", &report), expected);
    }
}
