//! The verbs `pause`, `resume`, `snapshot` and `restore`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use log::LevelFilter;
use rvmm_devices::config::{Cid, MacAddress};
use rvmm_devices::{FilePath, number};

use super::verb::MachineArgs;
use super::{exit_code, inspect, migrate, output, run, value};
use crate::config::{Endpoint, GdbConfig, TraceConfig, quoted};
use crate::error::EXIT_OK;
use crate::inspect::{Order, Reply};
use crate::migration::{Address, Incoming};
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
    /// Save only what has changed since the last snapshot with --diff; the first one is whole
    ///
    /// From the first one on the machine keeps track of what it writes, which costs it some time; a snapshot without --diff ends that.
    #[arg(long)]
    diff: bool,
    /// Save most of the memory while the guest runs, and stop it for the rest only
    #[arg(long)]
    live: bool,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// The flags of `rvmm restore`.
#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The folder of the snapshot
    #[arg(value_name = "DIR", required_unless_present = "listen")]
    folder: Option<PathBuf>,
    /// Wait for a machine that rvmm migrate sends: unix:PATH, tcp:HOST:PORT on this host, or fd:N, a connected socket
    #[arg(long, value_name = "WHERE", conflicts_with_all = ["folder", "pager", "prefetch"], value_parser = OsStringValueParser::new().try_map(migrate::address))]
    listen: Option<Address>,
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
    /// Get the guest's memory from another program, as Firecracker does with UFFD: unix:PATH
    ///
    /// The program serves the guest's page faults (userfaultfd): rvmm pager, or a handler that was written for Firecracker. Of the folder only
    /// the state is read. If the program ends, the machine ends with an error.
    #[arg(long, value_name = "unix:PATH", conflicts_with = "prefetch", value_parser = OsStringValueParser::new().try_map(value::unix_socket))]
    pager: Option<PathBuf>,
    /// Read all of the memory's file while the guest runs, ahead of it
    #[arg(long)]
    prefetch: bool,
    /// Another file for a disk; may be given several times
    ///
    /// Disks are named as Linux does: the first one is vda.
    #[arg(long, value_name = "vdX=PATH", value_parser = OsStringValueParser::new().try_map(disk_path))]
    disk_path: Vec<NewEnd>,
    /// A new qcow2 image over a disk, for what the guest writes; may be given several times
    #[arg(long, value_name = "vdX=PATH", value_parser = OsStringValueParser::new().try_map(disk_overlay))]
    disk_overlay: Vec<NewEnd>,
    /// Another tap interface for a network device; may be given several times. The first device is eth0
    #[arg(long, value_name = "ethN=TAP", value_parser = OsStringValueParser::new().try_map(tap))]
    tap: Vec<NewEnd>,
    /// Another MAC address for a network device; the guest reads it when it loads its driver again
    #[arg(long, value_name = "ethN=MAC", value_parser = mac)]
    mac: Vec<NewEnd>,
    /// Another socket for the guest's vsock device
    #[arg(long, value_name = "PATH")]
    vsock_path: Option<PathBuf>,
    /// Another CID for the guest
    #[arg(long, value_name = "N", value_parser = cid)]
    vsock_cid: Option<NewEnd>,
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
    from: From,
    options: RestoreOptions,
    level: LevelFilter,
}

/// What a machine continues from.
#[derive(Debug)]
enum From {
    Folder(PathBuf),
    Migration(Address),
}

/// An order to a running machine, and the form of its reply.
#[derive(Debug)]
pub(super) struct OrderTask {
    target: Option<String>,
    order: Order,
    json: bool,
}

impl OrderTask {
    pub(super) fn new(machine: MachineArgs, order: Order) -> Self {
        Self { target: machine.machine, order, json: machine.json }
    }

    /// Gives the order, prints the reply, and returns the exit code.
    pub(super) fn perform(&self) -> u8 {
        match inspect::give(self.target.as_deref(), &self.order) {
            Ok(Reply::Snapshot(report)) if self.json => output::show(&json(&report)),
            Ok(Reply::Snapshot(report)) => output::show(&text(&report)),
            Ok(Reply::Done { took_ns }) if self.json => {
                output::show(&format!("{{\"took_ns\":{took_ns}}}\n"))
            }
            Ok(_) => EXIT_OK,
            Err(what) => inspect::refuse(&what),
        }
    }
}

impl SnapshotArgs {
    /// The order of these flags.
    pub(super) fn task(self) -> Result<OrderTask, String> {
        let Self { machine, folder, stop, diff, live, json } = self;
        let folder = std::path::absolute(&folder).map_err(|error| {
            format!("Cannot save to {}: {error}", quoted(&folder.to_string_lossy()))
        })?;
        let order = Order::Snapshot(SnapshotRequest { folder: folder.into(), stop, diff, live });
        Ok(OrderTask { target: Some(machine), order, json })
    }
}

impl RestoreArgs {
    /// The machine of these flags.
    pub(super) fn task(self, env_level: Option<OsString>) -> Result<RestoreTask, String> {
        let level = run::level(self.log, env_level)?;
        let vsock = self.vsock_path.map(|path| NewEnd::Vsock(path.into()));
        let ends = [self.disk_path, self.disk_overlay, self.tap, self.mac];
        let ends = ends.into_iter().flatten().chain(vsock).chain(self.vsock_cid).collect();
        let options = RestoreOptions {
            name: self.name,
            paused: self.paused,
            follows_wall_clock: self.wall_clock,
            force: self.force,
            serial: self.serial,
            ends,
            trace: self.trace,
            gdb: self.gdb,
            pager: self.pager,
            prefetches: self.prefetch,
        };
        let folder = From::Folder(self.folder.unwrap_or_default());
        let from = self.listen.map_or(folder, From::Migration);
        Ok(RestoreTask { from, options, level })
    }
}

impl RestoreTask {
    /// Runs the machine until it stops, and returns the exit code.
    pub(super) fn perform(self) -> u8 {
        let Self { from, options, level } = self;
        let named = |saved: &str| options.name.clone().unwrap_or_else(|| saved.to_owned());
        match from {
            From::Folder(folder) => {
                let open =
                    if options.pager.is_some() { Snapshot::open_state } else { Snapshot::open };
                match open(&folder) {
                    Ok(snapshot) => {
                        let name = named(&snapshot.machine().config.name);
                        let restore = |parts| Vmm::restore(snapshot, options, parts);
                        run::run_machine(&name, level, restore)
                    }
                    Err(error) => exit_code(Err(error)),
                }
            }
            From::Migration(address) => match Incoming::accept(&address, say_where) {
                Ok(incoming) => {
                    let name = named(incoming.name());
                    run::run_machine(&name, level, |parts| Vmm::receive(incoming, options, parts))
                }
                Err(error) => exit_code(Err(error)),
            },
        }
    }
}

/// Tells where a machine is waited for.
fn say_where(address: &str) {
    output::print_message(&format!("Waiting for a machine at {address}"));
}

fn json(report: &SnapshotReport) -> String {
    serde_json::to_string(report).unwrap_or_default() + "\n"
}

fn text(report: &SnapshotReport) -> String {
    let mut folder = String::new();
    output::push_escaped(&mut folder, &report.folder.to_string());
    let paused_ms = report.paused_ns as f64 / 1e6;
    let mib = report.memory as f64 / f64::from(1 << 20);
    let what = match &report.parent {
        None => String::new(),
        Some(parent) => {
            let mut text = String::from(", the difference to ");
            output::push_escaped(&mut text, &parent.to_string());
            text
        }
    };
    format!(
        "Saved {mib:.1} MiB of memory in {folder}{what}; the guest stood still for {paused_ms:.1} ms\n"
    )
}

/// `vdX=PATH`: a disk's file.
fn disk_path(text: OsString) -> Result<NewEnd, String> {
    disk(&text).map(|(number, path)| NewEnd::Disk(number, path))
}

/// `vdX=PATH`: an image over a disk.
fn disk_overlay(text: OsString) -> Result<NewEnd, String> {
    let (number, path) = disk(&text)?;
    let path = std::path::absolute(&path).map_err(|error| error.to_string())?;
    Ok(NewEnd::Overlay(number, path.into()))
}

fn disk(text: &OsStr) -> Result<(usize, FilePath), String> {
    let form = "it is not of the form vdX=PATH (write vda=copy.img)";
    let (name, path) = pair(text).ok_or(form)?;
    let number = match name {
        [b'v', b'd', letter] if letter.is_ascii_lowercase() => letter - b'a',
        _ => return Err(form.into()),
    };
    Ok((number.into(), path.into()))
}

/// `ethN=TAP`.
fn tap(text: OsString) -> Result<NewEnd, String> {
    let (number, tap) = card(&text).ok_or("it is not of the form ethN=TAP (write eth0=tap1)")?;
    Ok(NewEnd::Tap(number, tap.to_str().ok_or("the tap's name is not UTF-8")?.to_owned()))
}

/// `ethN=MAC`.
fn mac(text: &str) -> Result<NewEnd, String> {
    let form = "it is not of the form ethN=MAC (write eth0=52:54:00:12:34:56)";
    let (number, mac) = card(text.as_ref()).ok_or(form)?;
    let byte = |pair: &str| u8::from_str_radix(pair, 16).ok().filter(|_| pair.len() == 2);
    let bytes: Option<Vec<u8>> = mac.to_str().and_then(|mac| mac.split(':').map(byte).collect());
    let mac = bytes.and_then(|bytes| MacAddress::new(bytes.try_into().ok()?));
    Ok(NewEnd::Mac(number, mac.ok_or(form)?))
}

/// `ethN=`, and what follows.
fn card(text: &OsStr) -> Option<(usize, &OsStr)> {
    let (name, value) = pair(text)?;
    let number = std::str::from_utf8(name.strip_prefix(b"eth")?).ok()?;
    Some((number.parse().ok()?, value))
}

/// A CID.
fn cid(text: &str) -> Result<NewEnd, String> {
    let number = number::number(text).ok().and_then(|number| u32::try_from(number).ok());
    let cid = number.and_then(Cid::new).ok_or("it is not a number from 3 to 4294967294")?;
    Ok(NewEnd::Cid(cid))
}

/// Both sides of the first `=`, the second of which is not empty.
fn pair(text: &OsStr) -> Option<(&[u8], &OsStr)> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (bytes.get(..at)?, bytes.get(at + 1..)?);
    (!value.is_empty()).then(|| (name, OsStr::from_bytes(value)))
}

#[cfg(test)]
mod tests {
    use super::super::{Task, task};
    use super::*;

    fn parse(args: &[&str]) -> Result<Task, String> {
        task(std::iter::once("rvmm").chain(args.iter().copied()).map(OsString::from), None)
    }

    fn restored(args: &[&str]) -> RestoreOptions {
        match parse(&[&["restore", "dir"], args].concat()) {
            Ok(Task::Restore(task)) => {
                assert!(
                    matches!(task.from, From::Folder(folder) if folder.to_str() == Some("dir"))
                );
                task.options
            }
            other => panic!("{args:?}: {other:?}"),
        }
    }

    #[test]
    fn a_snapshot_goes_to_the_folder_of_this_command_not_of_the_machines() {
        let Ok(Task::Give(task)) = parse(&["snapshot", "web", "a", "--diff", "--live"]) else {
            panic!("no order")
        };
        let folder = std::env::current_dir().unwrap().join("a");
        let request =
            SnapshotRequest { folder: folder.into(), stop: false, diff: true, live: true };
        assert_eq!((task.target.as_deref(), task.order), (Some("web"), Order::Snapshot(request)));
    }

    #[test]
    fn every_flag_of_a_restore_reaches_its_options() {
        assert_eq!(restored(&[]), RestoreOptions::default());
        let args = "--prefetch --name b --paused --wall-clock --force --serial null --disk-path vdb=x \
                    --disk-overlay vda=/y --tap eth1=t --mac eth0=02:00:00:00:00:0a --vsock-path z --vsock-cid 9";
        let args: Vec<&str> = args.split_whitespace().collect();
        let mac = MacAddress::new([2, 0, 0, 0, 0, 10]).unwrap();
        let expected = RestoreOptions {
            name: Some("b".into()),
            paused: true,
            follows_wall_clock: true,
            force: true,
            serial: Some(Endpoint::Null),
            ends: vec![
                NewEnd::Disk(1, "x".into()),
                NewEnd::Overlay(0, "/y".into()),
                NewEnd::Tap(1, "t".into()),
                NewEnd::Mac(0, mac),
                NewEnd::Vsock("z".into()),
                NewEnd::Cid(Cid::new(9).unwrap()),
            ],
            trace: None,
            gdb: None,
            pager: None,
            prefetches: true,
        };
        assert_eq!(restored(&args), expected);
        assert_eq!(restored(&["--pager", "unix:/p"]).pager, Some("/p".into()));
        assert!(parse(&["restore", "dir", "--pager", "unix:/p", "--prefetch"]).is_err());
    }

    #[test]
    fn an_end_of_another_form_is_a_mistake_in_one_line() {
        for (flag, value) in [
            ("--disk-path", "vda"),
            ("--disk-path", "sda=x"),
            ("--disk-path", "vdA=x"),
            ("--disk-path", "vda="),
            ("--disk-overlay", "=x"),
            ("--tap", "eth=t"),
            ("--tap", "ethx=t"),
            ("--mac", "eth0=1:2:3:4:5:6"),
            ("--mac", "eth0=01:00:00:00:00:00"),
            ("--mac", "eth0=02:00:00:00:00"),
            ("--vsock-cid", "2"),
            ("--pager", "/p"),
            ("--pager", "unix:"),
            ("--vsock-cid", "4294967296"),
        ] {
            let line = parse(&["restore", "dir", flag, value]).unwrap_err();
            assert!(line.contains(flag) && !line.contains('\n'), "{line}");
        }
        assert!(parse(&["snapshot", "web"]).unwrap_err().contains("DIR"));
        assert!(parse(&["clone", "dir", "-n", "0"]).unwrap_err().contains("--count"));
    }
}
