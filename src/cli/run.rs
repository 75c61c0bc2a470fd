//! The verb `run`: from flags to a configuration, from that to a machine, and from its stop reason to an exit code.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use log::LevelFilter;
use rvmm_boot::Cmdline;
use rvmm_devices::config::InputConfig;

use super::command::RunArgs;
use super::device::{self, DeviceFlag};
use super::value::{self, List};
use super::{logging, output};
use crate::config::{
    BootConfig, CpuConfig, DeviceConfig, InitrdConfig, OnReset, ValidConfig, VmConfig, quoted,
};
use crate::error::Error;
use crate::host::read_small;
use crate::inspect::socket_for;
use crate::vcpu::stop::StopReason;
use crate::vmm::{Parts, Vmm};

/// This program's file, even if it was renamed or deleted after the start (proc(5)).
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Kernel parameters that name a root file system or an init of the user's own: with one of them the built-in prompt is not
/// used.
const OWN_ROOT: [&str; 3] = ["root", "rdinit", "noinitrd"];

/// The level of the log without `--log` and `RVMM_LOG`.
const DEFAULT_LEVEL: LevelFilter = LevelFilter::Warn;

/// The configuration that the flags describe. Everything else has the library's default.
pub(super) fn config(args: RunArgs) -> Result<ValidConfig, Error> {
    if let Some(path) = &args.config {
        return from_file(path);
    }
    let default = VmConfig::default();
    let cpus = CpuConfig {
        count: args.cpus.unwrap_or(default.cpus.count),
        isa: list(args.isa),
        sbi: list(args.sbi),
        id: args.cpu_id.unwrap_or_default(),
        affinity: list(args.affinity),
        mode: args.start_mode.unwrap_or_default(),
        csrs: args.csr,
    };
    if args.dtb.is_some() && args.cmdline.is_some() {
        let what = "Cannot use --cmdline together with --dtb: the tree has its own command line (write it there)";
        return Err(Error::Config(what.into()));
    }
    let cmdline = args.cmdline.unwrap_or(default.boot.cmdline);
    // Disks come first, so that the first `--disk` is the guest's vda.
    let others = args.device.into_iter().filter_map(|flag| match flag {
        DeviceFlag::Device(device) => Some(*device),
        DeviceFlag::Help => None,
    });
    let mut devices: Vec<DeviceConfig> =
        args.disk.into_iter().chain(args.net).chain(args.share).chain(others).collect();
    let no_prompt = args.no_initrd || args.kernel.is_none() || devices.iter().any(is_disk);
    let boot = BootConfig {
        initrd: initrd(args.initrd, no_prompt, &cmdline)?,
        kernel: args.kernel.map(Into::into),
        cmdline,
        dtb: args.dtb.map(Into::into),
        dump_dtb: args.dump_dtb.map(Into::into),
        dtb_addr: args.dtb_addr,
        load: args.load,
        entry: args.entry,
    };
    let consoles = device::consoles(args.console)
        .map_err(|reason| Error::Config(format!("Cannot use --console: {reason}")))?;
    devices.extend(consoles);
    devices.extend(args.vsock);
    if args.power_button && !devices.iter().any(|device| matches!(device, DeviceConfig::Input(_))) {
        devices.push(InputConfig::default().into());
    }
    let config = VmConfig {
        version: default.version,
        name: args.name.unwrap_or(default.name),
        mem: args.mem.unwrap_or(default.mem),
        hugepages: args.hugepages,
        cpus,
        boot,
        irqchip: args.irqchip.unwrap_or_default(),
        serial: args.serial.unwrap_or_default(),
        devices,
        on_reset: if args.no_reboot { OnReset::Exit } else { OnReset::Restart },
        unassigned: args.unassigned.unwrap_or_default(),
        sbi_v01: args.sbi_v01.unwrap_or_default(),
        timer: args.timer.unwrap_or_default(),
        shutdown_timeout_s: args.shutdown_timeout.unwrap_or(default.shutdown_timeout_s),
        trace: args.trace,
        gdb: args.gdb,
    };
    if args.shutdown_timeout.is_some() && !config.has_device("input") {
        let what = "Cannot use --shutdown-timeout: SIGTERM stops a guest without a power button at once (add --power-button)";
        return Err(Error::Config(what.into()));
    }
    config.validate()
}

/// The machine that a JSON file describes; `-` is standard input.
fn from_file(path: &Path) -> Result<ValidConfig, Error> {
    /// No configuration needs more bytes.
    const MOST: u64 = 1 << 20;
    let refused = |reason: String| {
        Error::Config(format!("Cannot use --config {}: {reason}", quoted(&path.to_string_lossy())))
    };
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = std::io::stdin().take(MOST + 1).read_to_end(&mut bytes);
        read.map_err(|error| refused(error.to_string()))?;
        if bytes.len() as u64 > MOST {
            return Err(refused(format!("it has more than {MOST} bytes")));
        }
        bytes
    } else {
        read_small(path, MOST)?
    };
    VmConfig::from_json(&bytes).map_err(|error| refused(error.to_string()))?.validate()
}

fn list<T>(given: Option<List<T>>) -> Vec<T> {
    given.map(|list| list.0).unwrap_or_default()
}

/// True if a device is a disk, from which a guest may boot.
fn is_disk(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::Blk(_) | DeviceConfig::VhostUserBlk(_))
}

/// The given file; else the built-in prompt, unless `none` or the command line excludes it.
fn initrd(file: Option<PathBuf>, none: bool, cmdline: &str) -> Result<InitrdConfig, Error> {
    if let Some(file) = file {
        return Ok(InitrdConfig::File(file.into()));
    }
    let cmdline = Cmdline::new(cmdline)?;
    if none || OWN_ROOT.iter().any(|key| cmdline.has_key(key)) {
        return Ok(InitrdConfig::None);
    }
    Ok(InitrdConfig::Builtin(THIS_PROGRAM.into()))
}

/// The level of the log: the flag's, else the environment's, else warnings.
pub(super) fn level(
    flag: Option<LevelFilter>,
    env: Option<OsString>,
) -> Result<LevelFilter, String> {
    match (flag, env) {
        (Some(level), _) => Ok(level),
        (None, None) => Ok(DEFAULT_LEVEL),
        (None, Some(text)) => {
            let text = text.to_string_lossy();
            value::level(&text)
                .map_err(|reason| format!("Cannot use RVMM_LOG={}: {reason}", quoted(&text)))
        }
    }
}

/// Runs the machine until it stops, and returns the exit code.
pub(super) fn run(config: ValidConfig, level: LevelFilter) -> u8 {
    let name = config.name.clone();
    run_machine(&name, level, |parts| Vmm::build_with(config, parts))
}

/// Runs the machine that `build` builds until it stops, and returns the exit code. The process does nothing else, so the machine takes
/// over its signals.
pub(super) fn run_machine(
    name: &str,
    level: LevelFilter,
    build: impl FnOnce(Parts) -> Result<Vmm, Error>,
) -> u8 {
    logging::start(level);
    let parts = Parts { signals: true, socket: socket_for(name), ..Parts::default() };
    match build(parts).and_then(run_built) {
        Ok(reason) => {
            if !matches!(reason, StopReason::PowerOff | StopReason::Requested) {
                output::print_message(&reason.to_string());
            }
            reason.exit_code()
        }
        Err(error) => {
            output::print_message(&output::chain(&error));
            error.exit_code()
        }
    }
}

fn run_built(machine: Vmm) -> Result<StopReason, Error> {
    if let Some(path) = machine.pty() {
        output::print_message(&format!("The console is {}", path.display()));
    }
    if let Some((address, waits)) = machine.debugger() {
        let text =
            if waits { "The guest waits for a debugger at" } else { "A debugger can connect to" };
        output::print_message(&format!("{text} {address}"));
    }
    machine.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(cmdline: &str) -> InitrdConfig {
        initrd(None, false, cmdline).expect("a good command line")
    }

    #[test]
    fn a_kernel_alone_gets_the_built_in_prompt() {
        assert_eq!(of("console=ttyS0"), InitrdConfig::Builtin("/proc/self/exe".into()));
        assert_eq!(of(""), InitrdConfig::Builtin("/proc/self/exe".into()));
    }

    #[test]
    fn a_root_of_the_users_own_leaves_no_built_in_prompt() {
        for cmdline in ["root=/dev/vda", "quiet root=LABEL=x ro", "rdinit=/init", "noinitrd"] {
            assert_eq!(of(cmdline), InitrdConfig::None, "{cmdline}");
        }
    }

    #[test]
    fn parameters_that_only_look_like_a_root_do_not_count() {
        for cmdline in ["nfsroot=1", "rootwait", "a=\"b root=c\"", "quiet -- root=x"] {
            assert!(matches!(of(cmdline), InitrdConfig::Builtin(_)), "{cmdline}");
        }
    }

    #[test]
    fn a_file_or_no_initrd_at_all_is_taken_as_given() {
        let file = initrd(Some("a.cpio".into()), false, "root=/dev/vda").expect("a file");
        assert_eq!(file, InitrdConfig::File("a.cpio".into()));
        assert_eq!(initrd(None, true, "").expect("none"), InitrdConfig::None);
    }

    #[test]
    fn the_flag_precedes_the_environment_and_the_environment_the_default() {
        let env = || Some("debug".into());
        assert_eq!(level(Some(LevelFilter::Off), env()), Ok(LevelFilter::Off));
        assert_eq!(level(None, env()), Ok(LevelFilter::Debug));
        assert_eq!(level(None, None), Ok(LevelFilter::Warn));
        assert!(
            level(None, Some("loud".into())).expect_err("no level").contains("RVMM_LOG='loud'")
        );
    }
}
