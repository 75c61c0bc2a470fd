//! The command line as clap knows it: every verb, every flag, its help text. Nothing else in rvmm sees these types.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use log::LevelFilter;

use super::choice;
use super::size;
use super::texts::{ABOUT, EXAMPLES, LONG_ABOUT, SHORT_END};
use super::value::{self, List};
use super::verb::{LabArgs, MachineArgs, TraceVerb};
use crate::config::{
    CpuId, CsrValue, GdbConfig, IrqchipChoice, KnobChange, LoadConfig, SbiV01, SerialConfig,
    StartMode, TimerChoice, TraceConfig, Unassigned,
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
    /// Say what this host can do, and what to do about what it cannot
    Doctor {
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Run an exercise of a course on virtualization, and see what it makes the hardware, KVM and rvmm do
    #[command(after_help = "Example: rvmm lab simple_hv --explain")]
    Lab(Box<LabArgs>),
    /// Make the image of a flash that holds one program, for the labs h_2_0 and h_4_0
    #[command(after_help = "Example: rvmm mkpflash program.bin --output pflash.img")]
    Mkpflash {
        /// The program: a flat file
        #[arg(value_name = "FILE")]
        program: PathBuf,
        /// The image, 32 MiB with holes
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
    /// Work on traces of exits, which rvmm --trace FILE writes
    Trace {
        #[command(subcommand)]
        verb: TraceVerb,
    },
    /// Show what a running machine does: exits by kind, harts and devices, each second
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
    /// Print where a virtual address of a running machine leads, through both stages of translation
    #[command(after_help = "Example: rvmm walk 0xffff_ffff_8000_0000 web --hart 1")]
    Walk {
        /// The virtual address
        #[arg(value_name = "ADDRESS", value_parser = size::address)]
        address: u64,
        /// The hart whose page tables are meant
        #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
        hart: u32,
        #[command(flatten)]
        machine: MachineArgs,
    },
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
    #[arg(long, value_name = "FILE", help_heading = "What runs")]
    pub(super) kernel: Option<PathBuf>,

    /// The whole machine from a JSON file, without any other flag
    ///
    /// Its keys are those of the library's VmConfig; rvmm logs as RVMM_LOG says.
    #[arg(long, value_name = "FILE", help_heading = "What runs", exclusive = true)]
    pub(super) config: Option<PathBuf>,

    /// Initial RAM disk, handed to the kernel as it is
    #[arg(long, value_name = "FILE", help_heading = "What runs", conflicts_with = "no_initrd")]
    pub(super) initrd: Option<PathBuf>,

    /// No initial RAM disk, not even the built-in prompt
    ///
    /// The built-in prompt comes where neither --initrd nor a disk is given, and neither root=, rdinit= nor noinitrd stands
    /// in the kernel's command line.
    #[arg(long, help_heading = "What runs")]
    pub(super) no_initrd: bool,

    /// The kernel's command line [default: earlycon=sbi console=ttyS0]
    ///
    /// What is given replaces the default as a whole. earlycon=sbi shows what a kernel says before its console is up.
    #[arg(long, value_name = "STR", help_heading = "What runs", allow_hyphen_values = true)]
    pub(super) cmdline: Option<String>,

    /// Use this device tree instead of the generated one
    ///
    /// Its command line counts: --cmdline cannot be given with it. rvmm writes into it where the initrd lies, and says where it
    /// does not fit the machine.
    #[arg(long, value_name = "FILE", help_heading = "What runs")]
    pub(super) dtb: Option<PathBuf>,

    /// Where the device tree is put [default: high in RAM]
    #[arg(long, value_name = "ADDR", help_heading = "What runs", allow_negative_numbers = true, value_parser = size::address)]
    pub(super) dtb_addr: Option<u64>,

    /// Write the device tree that the guest gets to a file, and go on
    #[arg(long, value_name = "FILE", help_heading = "What runs")]
    pub(super) dump_dtb: Option<PathBuf>,

    /// Put a flat binary at a guest-physical address; may be given several times
    #[arg(long, value_name = "FILE@ADDR", help_heading = "What runs", value_parser = OsStringValueParser::new().try_map(value::load))]
    pub(super) load: Vec<LoadConfig>,

    /// Where hart 0 starts [default: an Image's first byte, an ELF file's lowest address]
    ///
    /// An address inside something that is loaded, or inside a flash (mode=map).
    #[arg(long, value_name = "ADDR", help_heading = "What runs", allow_negative_numbers = true, value_parser = size::address)]
    pub(super) entry: Option<u64>,

    /// Memory of the guest [default: 512M]
    ///
    /// Bytes, or a number with K, M, G or T (powers of 1024): 512M, 2G, 0x2000_0000. A multiple of 4K (with --hugepages of 2M), at least 16M.
    #[arg(long, value_name = "SIZE", help_heading = "Machine", allow_negative_numbers = true, value_parser = size::size)]
    pub(super) mem: Option<u64>,

    /// Take the memory from the host's pool of huge pages of 2 MiB
    #[arg(long, help_heading = "Machine")]
    pub(super) hugepages: bool,

    /// Number of harts [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine", allow_negative_numbers = true, value_parser = value::cpus)]
    pub(super) cpus: Option<u32>,

    /// The interrupt controller [default: auto]
    #[arg(long, value_name = "WHICH", help_heading = "Machine", value_parser = choice::irqchip())]
    pub(super) irqchip: Option<IrqchipChoice>,

    /// Name of the machine, for people and logs: letters, digits, '_' and '-' [default: rvmm]
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    pub(super) name: Option<String>,

    /// Extensions that differ from the host's: host,-v,-zicbom
    ///
    /// -NAME switches one off: in KVM where KVM allows it, else it is hidden in the device tree, and the log says which.
    /// +NAME insists on one. The host's own are the start.
    #[arg(long, value_name = "LIST", help_heading = "Harts", allow_hyphen_values = true, value_parser = value::isa)]
    pub(super) isa: Option<List<KnobChange>>,

    /// SBI extensions to switch off (-NAME) or on (+NAME): -pmu,-sta
    #[arg(long, value_name = "LIST", help_heading = "Harts", allow_hyphen_values = true, value_parser = value::sbi)]
    pub(super) sbi: Option<List<KnobChange>>,

    /// Identification registers that differ from the host's: vendor=N,arch=N,impl=N
    ///
    /// The guest reads them through SBI BASE: mvendorid, marchid and mimpid.
    #[arg(long, value_name = "LIST", help_heading = "Harts", value_parser = value::cpu_id)]
    pub(super) cpu_id: Option<CpuId>,

    /// Pin harts to CPUs of the host: 0=2,1=3 puts hart 0 on CPU 2 and hart 1 on CPU 3
    #[arg(long, value_name = "LIST", help_heading = "Harts", value_parser = value::affinity)]
    pub(super) affinity: Option<List<(u32, u32)>>,

    /// The other end of the serial line ttyS0: stdio, null, pty, file:PATH, unix:PATH or connect:PATH [default: stdio]
    ///
    /// pty makes a pseudo terminal and prints its path; unix listens on a socket for one client at a time, connect is the other end of one.
    #[arg(long, value_name = "WHERE", help_heading = "Devices", value_parser = OsStringValueParser::new().try_map(value::serial))]
    pub(super) serial: Option<SerialConfig>,

    /// A disk: a file or block device; may be given several times
    ///
    /// The guest calls the first one vda. KEY=VALUE are those of --device blk: ro=on, cache=none, serial=TEXT, ... The
    /// same as --device blk,path=PATH,KEY=VALUE; vhost-user=SOCKET is a disk that another program serves. With a disk there
    /// is no built-in prompt: say what the root file system is with --cmdline 'console=ttyS0 root=/dev/vda'.
    #[arg(long, value_name = "PATH,KEY=VALUE", help_heading = "Devices", value_parser = value::disk)]
    pub(super) disk: Vec<String>,

    /// Connect the guest to a network: user, tap=NAME or vhost-user=SOCKET, with options; may be given several times
    ///
    /// user needs no privileges and Debian's passt: user,forward=2222:22 leads port 2222 of the host to port 22 of the guest.
    /// How a tap is made: docs/networks.md. A short form of --device net-user, net or vhost-user-net.
    #[arg(long, value_name = "user|tap=NAME", help_heading = "Devices", value_parser = value::net)]
    pub(super) net: Vec<String>,

    /// A virtio console, hvc0: to=WHERE; with port=NAME,path=PATH a named port beside it; may be given several times
    ///
    /// WHERE is as for --serial. A program in the guest finds a port at /dev/virtio-ports/NAME, one on the host at the Unix
    /// socket PATH (or port=NAME,to=WHERE). All of them are one --device console,to=WHERE,port1=NAME=unix:PATH,...
    #[arg(long, value_name = "to=WHERE|port=NAME,path=PATH", help_heading = "Devices", value_parser = value::console)]
    pub(super) console: Vec<value::ConsoleEnd>,

    /// Share a folder of the host, through virtiofsd: mount -t virtiofs TAG /mnt in the guest; may be given several times
    ///
    /// With :ro nothing can be changed in it. Short for --device fs,tag=TAG,path=PATH.
    #[arg(long, value_name = "TAG=PATH[:ro]", help_heading = "Devices", value_parser = value::share)]
    pub(super) share: Vec<String>,

    /// Add a device, or set options of the board's own; may be given several times
    ///
    /// --device help lists all of them with their options.
    #[arg(long, value_name = "NAME,KEY=VALUE", help_heading = "Devices")]
    pub(super) device: Vec<String>,

    /// Connect programs in the guest and on the host by sockets: the guest's port N, and N of the host at PATH_N
    ///
    /// rvmm listens on the Unix socket PATH: who connects and writes CONNECT N gets the guest's port N. With backend=kernel both
    /// sides use AF_VSOCK, the guest as CID N. Short for --device vsock,path=PATH and --device vsock,backend=kernel.
    #[arg(long, value_name = "PATH[,cid=N][,timeout=S]|backend=kernel[,cid=N]", help_heading = "Devices", value_parser = value::vsock)]
    pub(super) vsock: Option<String>,

    /// Give the guest a power button, which SIGTERM presses; short for --device input
    #[arg(long, help_heading = "Devices")]
    pub(super) power_button: bool,

    /// List the devices and their options
    #[arg(long, help_heading = "Devices")]
    pub(super) list_devices: bool,

    /// Exit when the guest asks for a reboot, instead of starting it again
    #[arg(long, help_heading = "Behaviour")]
    pub(super) no_reboot: bool,

    /// What an access to an address without memory or device does [default: zero]
    #[arg(long, value_name = "WHAT", help_heading = "Behaviour", value_parser = choice::unassigned())]
    pub(super) unassigned: Option<Unassigned>,

    /// The mode in which hart 0 starts: vs (a kernel's) or vu (every privileged instruction is a trap that rvmm sees) [default: vs]
    #[arg(long, value_name = "MODE", help_heading = "Study", value_parser = choice::mode())]
    pub(super) mode: Option<StartMode>,

    /// Give a guest without a trap vector a CSR of machine mode; may be given several times
    ///
    /// NAME is mhartid, mvendorid and so on, or a number such as 0xf14. Until the guest sets stvec itself, rvmm emulates its
    /// accesses; what it does not know stops the machine with a register dump.
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Study", value_parser = value::csr)]
    pub(super) csr: Vec<CsrValue>,

    /// Who answers the guest's calls of SBI 0.1: console, timer, shutdown [default: auto]
    #[arg(long, value_name = "WHO", help_heading = "Study", value_parser = choice::sbi_v01())]
    pub(super) sbi_v01: Option<SbiV01>,

    /// Who keeps the guest's timer [default: kernel]
    #[arg(long, value_name = "WHO", help_heading = "Study", value_parser = choice::timer())]
    pub(super) timer: Option<TimerChoice>,

    /// Seconds that a guest with a power button has to power off after SIGTERM [default: 10]
    ///
    /// A second SIGTERM stops it at once, and so does the first one where SECONDS is 0.
    #[arg(long, value_name = "SECONDS", help_heading = "Behaviour")]
    pub(super) grace: Option<u32>,

    /// Record every exit of every hart in a file; options: format=chrome, format=lines, pc=on, ring=N
    ///
    /// Chrome's trace events, which Perfetto opens, or JSON lines where FILE ends in .jsonl; rvmm trace report FILE makes a page of
    /// either. pc=on adds the program counter of every exit, for a system call each; ring=N is how many exits of a hart wait
    /// for the writer. See docs/tracing.md.
    #[arg(long, value_name = "FILE,KEY=VALUE", help_heading = "Behaviour", value_parser = value::trace)]
    pub(super) trace: Option<TraceConfig>,

    /// Let a debugger connect: tcp:PORT, tcp:HOST:PORT or unix:PATH, with ,wait=off behind it or not
    ///
    /// The guest waits for it before its first instruction, or with wait=off runs until one connects. In gdb: target remote
    /// :PORT. Whoever can connect owns the guest; without a HOST that is who has an account on this machine. See docs/debugging.md.
    #[arg(long, value_name = "WHERE[,wait=off]", help_heading = "Behaviour", value_parser = OsStringValueParser::new().try_map(value::gdb))]
    pub(super) gdb: Option<GdbConfig>,

    /// What is logged to standard error: off, error, warn, info, debug or trace [default: warn]
    ///
    /// The environment variable RVMM_LOG says the same; this flag wins.
    #[arg(long, value_name = "LEVEL", help_heading = "Behaviour", value_parser = value::level)]
    pub(super) log: Option<LevelFilter>,
}
