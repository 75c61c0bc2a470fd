//! The verbs `list`, `stop`, `kill`, `balloon` and `wait` for running machines by name.

use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rvmm_devices::number;
use serde::Serialize;

use super::inspect::{escaped, give, refuse};
use super::output;
use crate::error::EXIT_OK;
use crate::inspect::{Connection, Description, Found, GuestState, Order, Query, Reply};

/// Time-out of a machine in a list: one that does not answer is listed as such.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for the process to end when the machine was stopped.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// The flags of `rvmm list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// The flags of `rvmm stop`.
#[derive(Debug, Args)]
pub(super) struct StopArgs {
    /// Its name (--name) or process ID; optional if only one is running
    #[arg(value_name = "MACHINE")]
    machine: Option<String>,
    /// Seconds that a guest with a power button has to power off; with 0 it is stopped at once
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u32,
}

/// The flags of `rvmm kill`.
#[derive(Debug, Args)]
pub(super) struct KillArgs {
    /// Its name (--name) or process ID; optional if only one is running
    #[arg(value_name = "MACHINE")]
    machine: Option<String>,
}

/// The flags of `rvmm wait`.
#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// Its name (--name) or process ID; optional if only one is running
    #[arg(value_name = "MACHINE")]
    machine: Option<String>,
    /// Give up after this number of seconds [default: none]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
}

/// The flags of `rvmm balloon`.
#[derive(Debug, Args)]
pub(super) struct BalloonArgs {
    /// Its name (--name) or process ID
    #[arg(value_name = "MACHINE")]
    machine: String,
    /// Memory that the guest is to give to the host: 256M; 0 returns all to the guest
    #[arg(value_name = "SIZE", allow_negative_numbers = true, value_parser = number::size)]
    size: u64,
}

/// What one of these verbs does.
#[derive(Debug)]
pub(super) enum MachinesTask {
    List(ListArgs),
    Stop(StopArgs),
    Kill(KillArgs),
    Balloon(BalloonArgs),
    Wait(WaitArgs),
}

impl MachinesTask {
    /// Does it, and returns the exit code.
    pub(super) fn perform(&self) -> u8 {
        match self {
            Self::List(args) => args.perform(),
            Self::Stop(args) => report(args.perform()),
            Self::Kill(args) => report(args.perform()),
            Self::Balloon(args) => report(args.perform()),
            Self::Wait(args) => report(args.perform()),
        }
    }
}

/// A machine in a list.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Listed {
    Answers(Description),
    Silent { name: String, pid: String, error: String },
}

impl ListArgs {
    fn perform(&self) -> u8 {
        let machines: Vec<Listed> = match Found::all() {
            Ok(found) => {
                found.into_iter().map(|(found, connection)| ask(found, connection)).collect()
            }
            Err(what) => return refuse(&what),
        };
        if self.json {
            return match serde_json::to_string_pretty(&machines) {
                Ok(text) => output::show(&(text + "\n")),
                Err(error) => refuse(&format!("Cannot print the list: {error}")),
            };
        }
        output::show(&escaped(&table(&machines)))
    }
}

fn ask(found: Found, mut connection: Connection) -> Listed {
    let reply = connection.set_timeout(LIST_TIMEOUT).and_then(|()| connection.ask(Query::Info));
    let error = match reply {
        Ok(Reply::Info(info)) => return Listed::Answers(info),
        Ok(Reply::Error(what)) => what,
        Ok(_) => "it gives another reply than asked for".into(),
        Err(error) => format!("it does not answer: {error}"),
    };
    Listed::Silent { name: found.name, pid: found.pid, error }
}

fn table(machines: &[Listed]) -> String {
    let mut text =
        format!("{:20} {:>7}  {:8} {:>5} {:>9}  UP\n", "NAME", "PID", "STATE", "HARTS", "MEMORY");
    for machine in machines {
        text += &match machine {
            Listed::Answers(info) => format!(
                "{:20} {:>7}  {:8} {:>5} {:>9}  {}\n",
                info.name,
                info.pid,
                state(info.state),
                info.harts,
                mebibytes(info.memory),
                duration(info.age_ns)
            ),
            Listed::Silent { name, pid, error } => format!("{name:20} {pid:>7}  {error}\n"),
        };
    }
    text
}

fn state(state: GuestState) -> &'static str {
    match state {
        GuestState::Running => "running",
        GuestState::Paused => "paused",
    }
}

fn mebibytes(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes.is_multiple_of(MIB) {
        return format!("{} MiB", bytes / MIB);
    }
    let tenths = (u128::from(bytes) * 10).div_ceil(u128::from(MIB));
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

/// A time in the two largest units.
fn duration(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// The text of `rvmm info`.
pub(super) fn properties(info: &Description) -> String {
    let size = mebibytes;
    let balloon = info.balloon.map_or_else(
        || "none".into(),
        |balloon| format!("{} given of {}", size(balloon.actual), size(balloon.target)),
    );
    let rows = [
        ("name", info.name.clone()),
        ("process", info.pid.to_string()),
        ("state", state(info.state).into()),
        ("harts", info.harts.to_string()),
        ("memory", size(info.memory)),
        ("interrupt controller", info.irqchip.clone()),
        ("kernel", info.kernel.clone().unwrap_or_else(|| "none".into())),
        ("up", duration(info.age_ns)),
        ("power button", if info.power_button { "yes" } else { "no" }.into()),
        ("balloon", balloon),
    ];
    rows.iter().map(|(name, value)| format!("{name:>20}  {value}\n")).collect()
}

/// A running machine whose process is watched.
struct Running {
    connection: Connection,
    process: OwnedFd,
}

impl Running {
    fn find(target: Option<&str>) -> Result<Self, String> {
        let connection = Connection::open(target)?;
        let pid = connection.process().ok_or(
            "The machine's process is in another namespace of process IDs (run this command there)",
        )?;
        let process = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| format!("Cannot watch the machine's process: {error}"))?;
        // While it is connected, the number was not given to another process in between. It need not answer: that is when it is killed.
        if !connection.is_open() {
            return Err("The machine has just ended, or has too many clients (try again)".into());
        }
        Ok(Self { connection, process })
    }

    /// Waits for the end of the process; false if it is not there after the time-out.
    fn ends_within(&self, limit: Option<Duration>) -> Result<bool, String> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        loop {
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], limit.as_ref()) {
                Ok(count) => return Ok(count > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(format!("Cannot wait for the machine: {error}")),
            }
        }
    }

    /// `None` while it is starting or ending.
    fn describe(&mut self) -> Result<Option<Description>, String> {
        match self.connection.ask(Query::Info) {
            Ok(Reply::Info(info)) => Ok(Some(info)),
            Ok(_) => Ok(None),
            Err(error) => Err(format!("The machine does not answer: {error} (rvmm kill ends it)")),
        }
    }

    /// Gives an order; an error is its refusal. A machine that ends meanwhile need not answer.
    fn give(&mut self, order: &Order) -> Result<(), String> {
        match self.connection.give(order) {
            Ok(Reply::Error(what)) if !self.ends_within(Some(Duration::ZERO))? => Err(what),
            Ok(_) => Ok(()),
            Err(_) if self.ends_within(Some(Duration::from_secs(1)))? => Ok(()),
            Err(error) => Err(format!("The machine does not answer: {error}")),
        }
    }
}

fn report(result: Result<(), String>) -> u8 {
    match result {
        Ok(()) => EXIT_OK,
        Err(what) => refuse(&what),
    }
}

impl StopArgs {
    /// Presses the power button, and stops the machine if the guest does not power off in time.
    fn perform(&self) -> Result<(), String> {
        let mut machine = Running::find(self.machine.as_deref())?;
        let description = match machine.describe() {
            Err(_) if machine.ends_within(Some(Duration::ZERO))? => return Ok(()),
            description => description?,
        };
        let listens = |info: Description| info.power_button && info.state == GuestState::Running;
        let can_ask = self.timeout > 0 && description.is_some_and(listens);
        if can_ask {
            // Refused if it was pressed before: the guest may be on its way.
            let _ = machine.give(&Order::PowerButton);
            if machine.ends_within(Some(Duration::from_secs(self.timeout.into())))? {
                return Ok(());
            }
            output::print_message(&format!(
                "The guest has not powered off within {} s: the machine is stopped",
                self.timeout
            ));
        }
        machine.give(&Order::Stop)?;
        if machine.ends_within(Some(END_TIMEOUT))? {
            Ok(())
        } else {
            Err("The machine was told to stop, but its process goes on (rvmm kill ends it)".into())
        }
    }
}

impl KillArgs {
    /// Ends the process of a machine at once.
    fn perform(&self) -> Result<(), String> {
        let machine = Running::find(self.machine.as_deref())?;
        pidfd_send_signal(&machine.process, Signal::KILL)
            .map_err(|error| format!("Cannot kill the machine's process: {error}"))?;
        machine.ends_within(None)?;
        // What it has left is removed by the search.
        Found::all().map(|_| ())
    }
}

impl WaitArgs {
    fn perform(&self) -> Result<(), String> {
        let limit = self.timeout.map(|seconds| Duration::from_secs(seconds.into()));
        if Running::find(self.machine.as_deref())?.ends_within(limit)? {
            Ok(())
        } else {
            Err(format!("The machine still runs after {} s", self.timeout.unwrap_or_default()))
        }
    }
}

impl BalloonArgs {
    fn perform(&self) -> Result<(), String> {
        give(Some(&self.machine), &Order::Balloon(self.size)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::BalloonSizes;

    fn web() -> Description {
        Description {
            name: "web".into(),
            pid: 12,
            state: GuestState::Paused,
            harts: 4,
            memory: 512 << 20,
            irqchip: "aia".into(),
            kernel: Some("/boot/Image".into()),
            age_ns: 3_725_000_000_000,
            power_button: true,
            balloon: Some(BalloonSizes { target: 64 << 20, actual: 32 << 20 }),
        }
    }

    #[test]
    fn a_list_has_a_line_for_each_machine_also_for_one_that_does_not_answer() {
        let silent =
            Listed::Silent { name: "db".into(), pid: "7".into(), error: "it is starting".into() };
        let text = table(&[silent, Listed::Answers(web())]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("db ") && lines[1].ends_with("7  it is starting"), "{text}");
        assert!(lines[2].contains(" 12  paused       4 "), "{text}");
        assert!(lines[2].contains("512 MiB") && lines[2].ends_with("1 h 2 min"), "{text}");
    }

    #[test]
    fn the_properties_of_a_machine_are_printed_one_in_a_line() {
        let text = properties(&web());
        assert_eq!(text.lines().count(), 10);
        assert!(text.contains("balloon  32 MiB given of 64 MiB\n"), "{text}");
        let none = Description { balloon: None, kernel: None, ..web() };
        assert!(properties(&none).contains("balloon  none\n"));
    }

    #[test]
    fn a_size_is_in_mebibytes() {
        for (bytes, text) in
            [(0, "0 MiB"), (512 << 20, "512 MiB"), (4096, "0.1 MiB"), ((3 << 20) - 1, "3.0 MiB")]
        {
            assert_eq!(mebibytes(bytes), text);
        }
    }

    #[test]
    fn a_time_has_its_two_largest_units() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"), (90_000, "1 d 1 h")]
        {
            assert_eq!(duration(seconds * 1_000_000_000), text);
        }
    }
}
