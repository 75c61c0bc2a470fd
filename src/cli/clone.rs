//! The verb `clone`: starts machines from one snapshot, each a process `rvmm restore` with ends of its own on the host.
//!
//! The memory of all is the snapshot's file, mapped copy on write: its pages are in the host's memory once.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::{inspect, output};
use crate::config::{DeviceConfig, VmConfig};
use crate::error::{EXIT_HOST, EXIT_OK, EXIT_USAGE, Error};
use crate::host::read_small;
use crate::inspect::{Connection, Order, Query, Reply, runtime_folder, socket_name};
use crate::snapshot::{Snapshot, SnapshotRequest};

/// This program's file, even if it was renamed or deleted after the start (proc(5)).
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Time-out for a clone to start. It takes some milliseconds.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Bytes of a clone's messages that are shown if it does not start.
const MOST_MESSAGES: u64 = 64 << 10;

/// The flags of `rvmm clone`.
#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// The folder of a snapshot, or the name or process ID of a running machine, which is saved for that and goes on
    #[arg(value_name = "DIR|MACHINE")]
    source: PathBuf,
    /// Number of machines
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, hide_default_value = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// Their names are NAME-1, NAME-2, ... [default: the saved machine's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Folder for what the clones write to disks: a qcow2 image for each writable disk of each clone [default: the working directory]
    #[arg(long, value_name = "DIR")]
    disks: Option<PathBuf>,
    /// Tap interfaces of the clones' network devices: TAP with the clone's number in the place of {}; may be given several times
    #[arg(long, value_name = "ethN=TAP{}")]
    tap: Vec<String>,
    /// Print JSON, a line for each clone, instead of text
    #[arg(long)]
    json: bool,
}

/// A clone that runs.
#[derive(Debug, Serialize)]
struct Started {
    name: String,
    pid: u32,
    /// The Unix socket of its console.
    console: PathBuf,
}

impl CloneArgs {
    /// Starts the clones, prints a line for each, and returns the exit code. If one does not start, those before it run on.
    pub(super) fn perform(&self) -> u8 {
        match self.start_all() {
            Ok(()) => EXIT_OK,
            Err((message, code)) => {
                output::print_message(&message);
                code
            }
        }
    }

    fn start_all(&self) -> Result<(), (String, u8)> {
        let source = self.snapshot()?;
        let failed = |error: Error| (output::chain(&error), error.exit_code());
        // Checked once for all: afterwards its stamp shows that nothing has changed.
        let snapshot = Snapshot::open(source.folder()).map_err(failed)?;
        let config = &snapshot.machine().config;
        let name = self.name.as_ref().unwrap_or(&config.name);
        let runtime = runtime_folder().ok_or((
            "Cannot clone: there is no runtime folder for the clones' consoles (set XDG_RUNTIME_DIR)"
                .to_owned(),
            EXIT_HOST,
        ))?;
        for number in 1..=self.count {
            let clone = Clone { args: self, config, runtime: &runtime, number, name };
            let started = clone.start(source.folder())?;
            let line = if self.json {
                serde_json::to_string(&started).unwrap_or_default() + "\n"
            } else {
                let Started { name, pid, console } = &started;
                format!("{name} {pid} {}\n", console.display())
            };
            output::show(&line);
        }
        Ok(())
    }

    /// The snapshot in the folder, or a new one of the running machine.
    fn snapshot(&self) -> Result<Source, (String, u8)> {
        if self.source.join("state.json").exists() {
            return Ok(Source::Folder(self.source.clone()));
        }
        let failed = |what: String| (what, EXIT_USAGE);
        let Some(machine) = self.source.to_str().filter(|name| !name.contains('/')) else {
            let folder = self.source.display();
            return Err(failed(format!("Cannot clone {folder}: there is no snapshot")));
        };
        let own = format!("rvmm-clone-{}", std::process::id());
        let folder = std::env::temp_dir().join(own);
        let request = SnapshotRequest {
            folder: folder.as_path().into(),
            live: true,
            ..SnapshotRequest::default()
        };
        match inspect::give(Some(machine), &Order::Snapshot(request)) {
            Ok(_) => {}
            Err(what) => return Err((what, EXIT_HOST)),
        }
        let source = Source::Temporary(folder);
        let snapshot = Snapshot::open(source.folder())
            .map_err(|error| (output::chain(&error), error.exit_code()))?;
        if let Some(path) = writable_disks(&snapshot.machine().config).next() {
            return Err(failed(format!(
                "Cannot clone the running machine {machine}: it goes on writing its disk {path} (save it with rvmm snapshot --stop, and clone the folder)"
            )));
        }
        Ok(source)
    }
}

/// The snapshot that machines are cloned from.
enum Source {
    Folder(PathBuf),
    /// Removed when all clones have mapped it.
    Temporary(PathBuf),
}

impl Source {
    fn folder(&self) -> &Path {
        match self {
            Self::Folder(folder) | Self::Temporary(folder) => folder,
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Self::Temporary(folder) = self {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// The files of the disks that the guest can write.
fn writable_disks(config: &VmConfig) -> impl Iterator<Item = &rvmm_devices::FilePath> {
    config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Blk(disk) if !disk.ro => Some(&disk.path),
        _ => None,
    })
}

/// A clone that is to be started.
struct Clone<'a> {
    args: &'a CloneArgs,
    config: &'a VmConfig,
    runtime: &'a Path,
    number: u32,
    name: &'a str,
}

impl Clone<'_> {
    fn name(&self) -> String {
        format!("{}-{}", self.name, self.number)
    }

    /// Starts the clone, and waits until its guest runs.
    fn start(&self, folder: &Path) -> Result<Started, (String, u8)> {
        let name = self.name();
        let failed =
            |error: io::Error| (format!("Cannot start the clone {name}: {error}"), EXIT_HOST);
        let console = self.runtime.join(format!("{name}.console"));
        let log = self.runtime.join(format!("{name}.log"));
        let messages = File::create(&log).map_err(failed)?;
        let mut command = Command::new(THIS_PROGRAM);
        command.arg("restore").arg(folder).arg("--name").arg(&name);
        command.arg("--serial").arg(joined("unix:", &console)).args(self.ends());
        // In a process group of its own: a Ctrl-C in this terminal is not meant for it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages).process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id();
        match await_start(&mut child, &self.runtime.join(socket_name(&name, pid))) {
            Ok(()) => Ok(Started { name, pid, console }),
            Err(code) => {
                let text = read_small(&log, MOST_MESSAGES).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let last = text.lines().last().unwrap_or("it does not start");
                let last = last.strip_prefix("rvmm: ").unwrap_or(last);
                Err((format!("Cannot start the clone {name}: {last}"), code))
            }
        }
    }

    /// The flags for what the clone must not share with the others.
    fn ends(&self) -> Vec<OsString> {
        let (name, number) = (self.name(), self.number);
        let mut flags = Vec::new();
        let mut push = |flag: &str, value: OsString| flags.extend([flag.into(), value]);
        let (mut disks, mut cards) = (b'a'.., 0..);
        for device in &self.config.devices {
            match device {
                DeviceConfig::Blk(disk) => {
                    let letter = disks.next().map_or('?', char::from);
                    if !disk.ro {
                        let folder = self.args.disks.as_deref().unwrap_or(Path::new("."));
                        let file = folder.join(format!("{name}-vd{letter}.qcow2"));
                        push("--disk-overlay", joined(&format!("vd{letter}="), &file));
                    }
                }
                DeviceConfig::Net(_) => {
                    let card: u32 = cards.next().unwrap_or_default();
                    push("--mac", format!("eth{card}={}", mac(&name, card)).into());
                }
                DeviceConfig::Vsock(sockets) => {
                    if let Some(path) = &sockets.path {
                        let mut path = path.as_os_str().to_owned();
                        path.push(format!("-{name}"));
                        push("--vsock-path", path);
                    }
                    let cid = sockets.cid.map_or(3, rvmm_devices::config::Cid::get);
                    push("--vsock-cid", cid.saturating_add(number).to_string().into());
                }
                _ => {}
            }
        }
        for tap in &self.args.tap {
            push("--tap", tap.replace("{}", &number.to_string()).into());
        }
        flags
    }
}

/// A locally administered address, which depends on the clone's name.
fn mac(name: &str, card: u32) -> String {
    let sum = crate::snapshot::checksum(format!("{name} eth{card}").as_bytes()).to_le_bytes();
    let [a, b, c, d, e, ..] = sum;
    format!("52:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
}

fn joined(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text
}

/// Waits until the machine behind a socket runs; the error is the exit code of a process that has ended.
fn await_start(child: &mut Child, socket: &Path) -> Result<(), u8> {
    let began = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(EXIT_HOST));
        }
        let reply = Connection::to(socket).and_then(|mut connection| connection.ask(Query::Stat));
        if matches!(reply, Ok(Reply::Stat(_))) {
            return Ok(());
        }
        if began.elapsed() > START_TIMEOUT {
            let _ = child.kill();
            return Err(EXIT_HOST);
        }
        thread::sleep(Duration::from_millis(5));
    }
}
