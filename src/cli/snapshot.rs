//! The verbs `pause`, `resume`, `snapshot` and `restore`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use log::LevelFilter;

use super::{inspect, output, run, value};
use crate::config::{Endpoint, GdbConfig, TraceConfig, quoted};
use crate::error::{EXIT_OK, Error};
use crate::inspect::{Order, Reply};
use crate::snapshot::{Snapshot, SnapshotReport, SnapshotRequest};
use crate::vmm::{NewEnd, RestoreOptions, Vmm};

/// The flags of `rvmm snapshot`.
#[derive(Debug, Args)]
pub(super) struct SnapshotArgs {
    /// The name (--name) or process ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,
    /// The folder: a new one, or an older snapshot, which is replaced
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Stop the machine afterwards, so that its disks stay as they were saved
    #[arg(long)]
    stop: bool,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// The flags of `rvmm restore`.
#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The folder of the snapshot
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Name of the machine [default: that of the saved one]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Wait for rvmm resume before the guest continues
    #[arg(long)]
    paused: bool,
    /// Let the guest's clock run on as if the guest had run meanwhile
    ///
    /// Without it the guest's monotonic time does not notice the pause. The real-time clock shows the real time either way.
    #[arg(long)]
    wall_clock: bool,
    /// Use disks that were written since the machine was saved; the guest may damage its file systems
    #[arg(long)]
    force: bool,
    /// Backend of the first UART, instead of the saved one: stdio, null, pty, file:PATH, unix:PATH or connect:PATH
    #[arg(long, value_name = "WHERE", value_parser = OsStringValueParser::new().try_map(value::serial))]
    serial: Option<Endpoint>,
    /// Another file for a disk; may be given several times
    ///
    /// Disks are named as Linux does: the first one is vda.
    #[arg(long, value_name = "vdX=PATH", value_parser = OsStringValueParser::new().try_map(disk_path))]
    disk_path: Vec<NewEnd>,
    /// Another tap interface for a network device; may be given several times. The first device is eth0
    #[arg(long, value_name = "ethN=TAP", value_parser = OsStringValueParser::new().try_map(tap))]
    tap: Vec<NewEnd>,
    /// Another socket for the guest's vsock device
    #[arg(long, value_name = "PATH")]
    vsock_path: Option<PathBuf>,
    /// Record every exit of every hart in a file, as rvmm run --trace does
    #[arg(long, value_name = "FILE,KEY=VALUE", value_parser = OsStringValueParser::new().try_map(value::trace))]
    trace: Option<TraceConfig>,
    /// Accept a debugger, as rvmm run --gdb does
    #[arg(long, value_name = "WHERE[,wait=off]", value_parser = OsStringValueParser::new().try_map(value::gdb))]
    gdb: Option<GdbConfig>,
    /// Level of the log on standard error: off, error, warn, info, debug or trace [default: warn]
    #[arg(long, value_name = "LEVEL", value_parser = value::level)]
    log: Option<LevelFilter>,
}

/// A machine to be restored.
#[derive(Debug)]
pub(super) struct RestoreTask {
    folder: PathBuf,
    options: RestoreOptions,
    level: LevelFilter,
}

/// An order to a running machine, and the form of its reply.
#[derive(Debug)]
pub(super) struct OrderTask {
    target: Option<String>,
    order: Order,
    json: bool,
}

impl OrderTask {
    pub(super) fn new(target: Option<String>, order: Order) -> Self {
        Self { target, order, json: false }
    }

    /// Gives the order, prints the reply, and returns the exit code.
    pub(super) fn perform(&self) -> u8 {
        match inspect::give(self.target.as_deref(), &self.order) {
            Ok(Reply::Snapshot(report)) if self.json => output::show(&json(&report)),
            Ok(Reply::Snapshot(report)) => output::show(&text(&report)),
            Ok(_) => EXIT_OK,
            Err(what) => inspect::refuse(&what),
        }
    }
}

impl SnapshotArgs {
    /// The order of these flags.
    pub(super) fn task(self) -> Result<OrderTask, String> {
        let Self { machine, folder, stop, json } = self;
        let folder = std::path::absolute(&folder).map_err(|error| {
            format!("Cannot save to {}: {error}", quoted(&folder.to_string_lossy()))
        })?;
        let order = Order::Snapshot(SnapshotRequest { folder: folder.into(), stop });
        Ok(OrderTask { target: Some(machine), order, json })
    }
}

impl RestoreArgs {
    /// The machine of these flags.
    pub(super) fn task(self, env_level: Option<OsString>) -> Result<RestoreTask, String> {
        let level = run::level(self.log, env_level)?;
        let vsock = self.vsock_path.map(|path| NewEnd::Vsock(path.into()));
        let options = RestoreOptions {
            name: self.name,
            paused: self.paused,
            follows_wall_clock: self.wall_clock,
            force: self.force,
            serial: self.serial,
            ends: self.disk_path.into_iter().chain(self.tap).chain(vsock).collect(),
            trace: self.trace,
            gdb: self.gdb,
        };
        Ok(RestoreTask { folder: self.folder, options, level })
    }
}

impl RestoreTask {
    /// Runs the machine until it stops, and returns the exit code.
    pub(super) fn perform(self) -> u8 {
        let Self { folder, options, level } = self;
        let snapshot = match Snapshot::open(&folder) {
            Ok(snapshot) => snapshot,
            Err(error) => return fail(&error),
        };
        let name = options.name.clone().unwrap_or_else(|| snapshot.machine().config.name.clone());
        run::run_machine(&name, level, |parts| Vmm::restore(snapshot, options, parts))
    }
}

fn fail(error: &Error) -> u8 {
    output::print_message(&output::chain(error));
    error.exit_code()
}

fn json(report: &SnapshotReport) -> String {
    serde_json::to_string(report).unwrap_or_default() + "\n"
}

fn text(report: &SnapshotReport) -> String {
    let mut folder = String::new();
    output::push_escaped(&mut folder, &report.folder.to_string());
    let paused_ms = report.paused_ns as f64 / 1e6;
    let mib = report.memory as f64 / f64::from(1 << 20);
    format!(
        "Saved {mib:.1} MiB of memory in {folder}; the guest stood still for {paused_ms:.1} ms\n"
    )
}

/// `vdX=PATH`.
fn disk_path(text: OsString) -> Result<NewEnd, String> {
    let form = "it is not of the form vdX=PATH (write vda=copy.img)";
    let (name, path) = pair(&text).ok_or(form)?;
    let letter =
        name.strip_prefix(b"vd").filter(|rest| rest.len() == 1).and_then(|rest| rest.first());
    let number = letter.filter(|letter| letter.is_ascii_lowercase()).map(|letter| letter - b'a');
    Ok(NewEnd::Disk(number.ok_or(form)?.into(), path.into()))
}

/// `ethN=TAP`.
fn tap(text: OsString) -> Result<NewEnd, String> {
    let form = "it is not of the form ethN=TAP (write eth0=tap1)";
    let (name, tap) = pair(&text).ok_or(form)?;
    let number = name.strip_prefix(b"eth").and_then(|number| std::str::from_utf8(number).ok());
    let number = number.and_then(|number| number.parse().ok()).ok_or(form)?;
    Ok(NewEnd::Tap(number, tap.to_str().ok_or("the tap's name is not UTF-8")?.to_owned()))
}

/// Both sides of the first `=`, the second of which is not empty.
fn pair(text: &OsStr) -> Option<(&[u8], &OsStr)> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (bytes.get(..at)?, bytes.get(at + 1..)?);
    (!value.is_empty()).then(|| (name, OsStr::from_bytes(value)))
}
