//! The command line as clap structs: every verb, every flag, its help text. Only `cli` uses these types.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use log::LevelFilter;
use rvmm_devices::number;

use super::choice;
use super::clone::CloneArgs;
use super::device::{self, ConsoleEnd, DeviceFlag};
#[cfg(feature = "labs")]
use super::lab::LabVerb;
use super::machines::{BalloonArgs, KillArgs, ListArgs, StopArgs, WaitArgs};
use super::migrate::MigrateArgs;
use super::pager::PagerArgs;
use super::snapshot::{RestoreArgs, SnapshotArgs};
use super::texts::{ABOUT, EXAMPLES, LONG_ABOUT, PAGER_EXAMPLES, SHORT_END};
use super::value::{self, List};
use super::verb::{MachineArgs, TraceVerb};
use crate::config::{
    CpuId, CsrValue, DeviceConfig, Endpoint, ExtensionChange, GdbConfig, IrqchipChoice, LoadConfig,
    SbiV01, StartMode, TimerChoice, TraceConfig, Unassigned,
};

/// The whole command: `rvmm FLAGS` is `rvmm run FLAGS`.
#[derive(Debug, Parser)]
#[command(
    name = "rvmm",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = SHORT_END,
    after_long_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_help_heading = "Verbs",
    subcommand_value_name = "VERB",
    override_usage = "rvmm [run] --kernel FILE [--mem SIZE] [FLAGS]\n       rvmm VERB",
    max_term_width = 110
)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) verb: Option<Verb>,
    #[command(flatten)]
    pub(super) run: RunArgs,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Run a machine; the same as rvmm without a verb
    #[command(after_help = SHORT_END, after_long_help = EXAMPLES, override_usage = "rvmm run --kernel FILE [--mem SIZE] [FLAGS]")]
    Run(Box<RunArgs>),
    /// Report what this host supports, with advice for what is missing
    Doctor {
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    #[cfg(feature = "labs")]
    #[command(flatten)]
    Labs(LabVerb),
    /// Process traces of exits, which rvmm --trace FILE writes
    Trace {
        #[command(subcommand)]
        verb: TraceVerb,
    },
    /// List your running machines
    #[command(after_help = "Example: rvmm list")]
    List(ListArgs),
    /// Print a running machine's properties and state
    #[command(after_help = "Example: rvmm info web")]
    Info {
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Stop a machine: press its power button, and end it if the guest does not power off in time
    #[command(after_help = "Example: rvmm stop web --timeout 60")]
    Stop(StopArgs),
    /// End a machine's process at once
    #[command(after_help = "Example: rvmm kill web")]
    Kill(KillArgs),
    /// Restart a machine's guest at once, as after a reset
    #[command(after_help = "Example: rvmm reboot web")]
    Reboot {
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Have a machine's guest give memory to the host (--device balloon)
    #[command(after_help = "Example: rvmm balloon web 256M")]
    Balloon(BalloonArgs),
    /// Wait until a machine has ended
    #[command(after_help = "Example: rvmm wait web")]
    Wait(WaitArgs),
    /// Show a running machine's activity, each second: exits by kind, harts and devices
    #[command(after_help = "Example: rvmm stat web")]
    Stat {
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Print the registers of all harts of a running machine, which is paused for a moment
    #[command(after_help = "Example: rvmm regs web")]
    Regs {
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Translate a virtual address of a running machine, and print both stages of the walk
    #[command(after_help = "Example: rvmm walk 0xffff_ffff_8000_0000 web --hart 1")]
    Walk {
        /// The virtual address
        #[arg(value_name = "ADDRESS", value_parser = number::address)]
        address: u64,
        /// The hart whose page tables are used
        #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
        hart: u32,
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Pause a running machine until rvmm resume
    #[command(after_help = "Example: rvmm pause web")]
    Pause {
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Let a paused machine run again
    #[command(after_help = "Example: rvmm resume web")]
    Resume {
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Save a running machine in a folder, from which rvmm restore continues it
    #[command(after_help = "Example: rvmm snapshot web web.snapshot")]
    Snapshot(SnapshotArgs),
    /// Continue a machine that was saved, or take over one that comes from rvmm migrate
    #[command(
        after_help = "Examples: rvmm restore web.snapshot --name again\n          rvmm restore --listen unix:/tmp/web.move"
    )]
    Restore(Box<RestoreArgs>),
    /// Start several machines from one snapshot; they share its memory
    #[command(after_help = "Example: rvmm clone web.snapshot -n 10")]
    Clone(CloneArgs),
    /// Move a running machine to a process that waits for it with rvmm restore --listen
    #[command(after_help = "Example: rvmm migrate web unix:/tmp/web.move")]
    Migrate(MigrateArgs),
    /// Serve the memory of a machine that is restored with --pager
    ///
    /// With --socket it serves one machine, from a snapshot's files or, with --from, from a rvmm pager --serve on another host, and ends with
    /// the machine. With --serve it serves the pages of a snapshot to pagers on other hosts until it is ended.
    #[command(after_help = PAGER_EXAMPLES)]
    Pager(PagerArgs),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example: rvmm completions bash > ~/.local/share/bash-completion/completions/rvmm"
    )]
    Completions {
        /// The shell
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
    /// Print the manual page
    #[command(after_help = "Example: rvmm man | man -l -")]
    Man,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The kernel: a RISC-V Image (plain, gzip or zstd) or an ELF file
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub(super) kernel: Option<PathBuf>,

    /// Read the whole configuration from a JSON file, or with - from standard input; no other flag may be given
    ///
    /// --dump-config writes such a file; docs/config.schema.json describes it. RVMM_LOG sets the log level.
    #[arg(long, value_name = "FILE", help_heading = "Boot", exclusive = true)]
    pub(super) config: Option<PathBuf>,

    /// Print the configuration that the other flags describe as JSON for --config, and exit
    #[arg(long, help_heading = "Boot")]
    pub(super) dump_config: bool,

    /// Initial RAM disk, passed to the kernel as it is
    #[arg(long, value_name = "FILE", help_heading = "Boot", conflicts_with = "no_initrd")]
    pub(super) initrd: Option<PathBuf>,

    /// No initial RAM disk, not even the built-in prompt
    ///
    /// The built-in prompt is used if neither --initrd nor a disk is given, and the kernel's command line has neither root=,
    /// rdinit= nor noinitrd.
    #[arg(long, help_heading = "Boot")]
    pub(super) no_initrd: bool,

    /// The kernel's command line [default: earlycon=sbi console=ttyS0]
    ///
    /// It replaces the whole default. earlycon=sbi shows the messages of a kernel before its console is up.
    #[arg(long, value_name = "STR", help_heading = "Boot", allow_hyphen_values = true)]
    pub(super) cmdline: Option<String>,

    /// Use this device tree instead of the generated one
    ///
    /// Its command line is used: --cmdline cannot be given with it. rvmm writes the initrd's address into it, and reports where
    /// it does not match the machine.
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub(super) dtb: Option<PathBuf>,

    /// Address of the device tree [default: high in RAM]
    #[arg(long, value_name = "ADDR", help_heading = "Boot", allow_negative_numbers = true, value_parser = number::address)]
    pub(super) dtb_addr: Option<u64>,

    /// Write the guest's device tree to a file, and continue
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub(super) dump_dtb: Option<PathBuf>,

    /// Load a flat binary at a guest-physical address; may be given several times
    #[arg(long, value_name = "FILE@ADDR", help_heading = "Boot", value_parser = OsStringValueParser::new().try_map(value::load))]
    pub(super) load: Vec<LoadConfig>,

    /// Entry point of hart 0 [default: an Image's first byte, an ELF file's lowest address]
    ///
    /// An address inside a loaded file, or inside a flash (mode=map).
    #[arg(long, value_name = "ADDR", help_heading = "Boot", allow_negative_numbers = true, value_parser = number::address)]
    pub(super) entry: Option<u64>,

    /// Memory of the guest [default: 512M]
    ///
    /// Bytes, or a number with K, M, G or T (powers of 1024): 512M, 2G, 0x2000_0000. A multiple of 4K (with --hugepages of 2M), at least 16M.
    #[arg(long, value_name = "SIZE", help_heading = "Machine", allow_negative_numbers = true, value_parser = number::size)]
    pub(super) mem: Option<u64>,

    /// Take the memory from the host's pool of huge pages of 2 MiB
    #[arg(long, help_heading = "Machine")]
    pub(super) hugepages: bool,

    /// Number of harts [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine", allow_negative_numbers = true, value_parser = value::cpus)]
    pub(super) cpus: Option<u32>,

    /// The interrupt controller [default: auto]
    #[arg(long, value_name = "CONTROLLER", help_heading = "Machine", value_parser = choice::irqchip())]
    pub(super) irqchip: Option<IrqchipChoice>,

    /// Name of the machine, for people and logs: letters, digits, '_' and '-' [default: rvmm]
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    pub(super) name: Option<String>,

    /// Extensions that differ from the host's: host,-v,-zicbom
    ///
    /// -NAME switches one off: in KVM if KVM allows it, else it is hidden in the device tree, and the log says which.
    /// +NAME requires one. The host's extensions are the default.
    #[arg(long, value_name = "LIST", help_heading = "Harts", allow_hyphen_values = true, value_parser = value::isa)]
    pub(super) isa: Option<List<ExtensionChange>>,

    /// SBI extensions to switch off (-NAME) or on (+NAME): -pmu,-sta
    #[arg(long, value_name = "LIST", help_heading = "Harts", allow_hyphen_values = true, value_parser = value::sbi)]
    pub(super) sbi: Option<List<ExtensionChange>>,

    /// Identification registers that differ from the host's: vendor=N,arch=N,impl=N
    ///
    /// The guest reads them through SBI BASE: mvendorid, marchid and mimpid.
    #[arg(long, value_name = "LIST", help_heading = "Harts", value_parser = value::cpu_id)]
    pub(super) cpu_id: Option<CpuId>,

    /// Pin harts to CPUs of the host: 0=2,1=3 puts hart 0 on CPU 2 and hart 1 on CPU 3
    #[arg(long, value_name = "LIST", help_heading = "Harts", value_parser = value::affinity)]
    pub(super) affinity: Option<List<(u32, u32)>>,

    /// Backend of the serial line ttyS0: stdio, null, pty, file:PATH, unix:PATH or connect:PATH [default: stdio]
    ///
    /// pty creates a pseudo terminal and prints its path; unix listens on a socket for one client at a time, connect connects to one.
    #[arg(long, value_name = "WHERE", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(value::serial))]
    pub(super) serial: Option<Endpoint>,

    /// A disk: a file or block device; may be given several times
    ///
    /// The first one is the guest's vda. KEY=VALUE are the options of --device blk: ro=on, cache=none, serial=TEXT, ... Short
    /// for --device blk,path=PATH,KEY=VALUE; vhost-user=SOCKET is a disk that another program serves. With a disk there is no
    /// built-in prompt: name the root file system with --cmdline 'console=ttyS0 root=/dev/vda'.
    #[arg(long, value_name = "PATH,KEY=VALUE", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(device::disk))]
    pub(super) disk: Vec<DeviceConfig>,

    /// Connect the guest to a network: user, tap=NAME or vhost-user=SOCKET, with options; may be given several times
    ///
    /// user needs Debian's passt and no privileges: user,forward=2222:22 forwards port 2222 of the host to port 22 of the guest.
    /// For tap interfaces see docs/networks.md. Short for --device net-user, net or vhost-user-net.
    #[arg(long, value_name = "user|tap=NAME", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(device::net))]
    pub(super) net: Vec<DeviceConfig>,

    /// A virtio console, hvc0: to=WHERE; with port=NAME,path=PATH a named port of it; may be given several times
    ///
    /// WHERE is as for --serial. A port is /dev/virtio-ports/NAME in the guest, and the Unix socket PATH on the host (or
    /// port=NAME,to=WHERE). All --console together are one --device console,to=WHERE,port1=NAME=unix:PATH,...
    #[arg(long, value_name = "to=WHERE|port=NAME,path=PATH", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(device::console))]
    pub(super) console: Vec<ConsoleEnd>,

    /// Share a folder of the host, through virtiofsd: mount -t virtiofs TAG /mnt in the guest; may be given several times
    ///
    /// With :ro it is read-only. Short for --device fs,tag=TAG,path=PATH.
    #[arg(long, value_name = "TAG=PATH[:ro]", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(device::share))]
    pub(super) share: Vec<DeviceConfig>,

    /// Add a device, or set options of a built-in one; may be given several times
    ///
    /// --device help lists all devices with their options. A comma in a value is written twice.
    #[arg(long, value_name = "NAME,KEY=VALUE", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(device::device))]
    pub(super) device: Vec<DeviceFlag>,

    /// Connect programs in the guest and on the host by sockets: the guest's port N, and the host's port N at PATH_N
    ///
    /// rvmm listens on the Unix socket PATH: a client that writes CONNECT N is connected to the guest's port N. With backend=kernel both
    /// sides use AF_VSOCK, the guest as CID N. Short for --device vsock,path=PATH and --device vsock,backend=kernel.
    #[arg(long, value_name = "PATH[,cid=N][,timeout=S]|backend=kernel[,cid=N]", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(device::vsock))]
    pub(super) vsock: Option<DeviceConfig>,

    /// Give the guest a power button, which SIGTERM presses; short for --device input
    #[arg(long, help_heading = "Devices")]
    pub(super) power_button: bool,

    /// List the devices and their options
    #[arg(long, help_heading = "Devices")]
    pub(super) list_devices: bool,

    /// Exit when the guest requests a reboot, instead of restarting it
    #[arg(long, help_heading = "Behaviour")]
    pub(super) no_reboot: bool,

    /// Effect of an access to an address without memory or device [default: zero]
    #[arg(long, value_name = "EFFECT", help_heading = "Behaviour", value_parser = choice::unassigned())]
    pub(super) unassigned: Option<Unassigned>,

    /// The mode in which hart 0 starts: vs (a kernel's) or vu (every privileged instruction traps to rvmm) [default: vs]
    #[arg(long, alias = "mode", value_name = "MODE", help_heading = "Study", value_parser = choice::start_mode())]
    pub(super) start_mode: Option<StartMode>,

    /// Emulate a machine-mode CSR for a guest without a trap vector; may be given several times
    ///
    /// NAME is mhartid, mvendorid and so on, or a number such as 0xf14. Accesses are emulated until the guest sets stvec itself;
    /// any other trap stops the machine with a register dump.
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Study", value_parser = value::csr)]
    pub(super) csr: Vec<CsrValue>,

    /// Implementation of the guest's SBI 0.1 calls: console, timer, shutdown [default: auto]
    #[arg(long, value_name = "IMPLEMENTATION", help_heading = "Study", value_parser = choice::sbi_v01())]
    pub(super) sbi_v01: Option<SbiV01>,

    /// Implementation of the guest's timer [default: kernel]
    #[arg(long, value_name = "IMPLEMENTATION", help_heading = "Study", value_parser = choice::timer())]
    pub(super) timer: Option<TimerChoice>,

    /// Seconds that a guest with a power button has to power off after SIGTERM [default: 10]
    ///
    /// A second SIGTERM stops it at once, and so does the first one if SECONDS is 0.
    #[arg(long, alias = "grace", value_name = "SECONDS", help_heading = "Behaviour")]
    pub(super) shutdown_timeout: Option<u32>,

    /// Record every exit of every hart in a file; options: format=chrome, format=lines, pc=on, ring=N
    ///
    /// Chrome's trace events, which Perfetto opens, or JSON lines if FILE ends in .jsonl; rvmm trace report FILE makes a page of
    /// either. pc=on adds the program counter of every exit, which costs a system call each; ring=N is the number of exits in
    /// the ring between a hart and the writer. See docs/tracing.md.
    #[arg(long, value_name = "FILE,KEY=VALUE", help_heading = "Behaviour", value_parser = OsStringValueParser::new().try_map(value::trace))]
    pub(super) trace: Option<TraceConfig>,

    /// Accept a debugger at tcp:PORT, tcp:HOST:PORT or unix:PATH, optionally followed by ,wait=off
    ///
    /// The guest waits for it before its first instruction, or with wait=off runs until one connects. In gdb: target remote
    /// :PORT. Anyone who can connect controls the guest; without a HOST that is every user of this machine. See docs/debugging.md.
    #[arg(long, value_name = "WHERE[,wait=off]", help_heading = "Behaviour", value_parser = OsStringValueParser::new().try_map(value::gdb))]
    pub(super) gdb: Option<GdbConfig>,

    /// Level of the log on standard error: off, error, warn, info, debug or trace [default: warn]
    ///
    /// The environment variable RVMM_LOG sets it, too; this flag takes precedence.
    #[arg(long, value_name = "LEVEL", help_heading = "Behaviour", value_parser = value::level)]
    pub(super) log: Option<LevelFilter>,
}
