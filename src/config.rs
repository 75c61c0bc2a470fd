//! What a user asks for: plain data, validated once, the same for the command line, a file and the API.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::layout::RAM_BASE;

mod csr;
mod gdb;
pub(crate) mod slots;
mod trace;
mod valid;

pub use csr::CsrValue;
pub use gdb::{GdbAddress, GdbConfig};
pub use trace::{TraceConfig, TraceFormat};
pub use valid::ValidConfig;
pub(crate) use valid::quoted;

/// A whole machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// The machine's name: 1 to 64 letters, digits, `_` and `-`.
    pub name: String,
    /// Guest RAM in bytes: a multiple of 4 KiB, with huge pages of 2 MiB; at least 16 MiB.
    pub mem: u64,
    /// Back guest RAM with huge pages of 2 MiB from the host's pool.
    pub hugepages: bool,
    /// The harts.
    pub cpus: CpuConfig,
    /// What is loaded and where it starts.
    pub boot: BootConfig,
    /// The interrupt controller.
    pub irqchip: IrqchipChoice,
    /// Where the first UART's other end is.
    pub serial: SerialConfig,
    /// Further devices and options of the board's own, as `NAME,key=value,...`.
    pub devices: Vec<String>,
    /// What a guest's reset request does.
    pub on_reset: OnReset,
    /// What an access to an address without memory and device does.
    pub unassigned: Unassigned,
    /// How the guest's calls of SBI 0.1 are answered.
    pub sbi_v01: SbiV01,
    /// Who keeps the guest's timer.
    pub timer: TimerChoice,
    /// Seconds that a guest with a power button (the device `input`) has to power off after SIGTERM; 0 is none: it is
    /// stopped at once.
    pub grace_s: u32,
    /// Where every exit is recorded, if anywhere.
    pub trace: Option<TraceConfig>,
    /// Where a debugger may connect; none where nothing is said.
    pub gdb: Option<GdbConfig>,
}

/// The harts of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuConfig {
    /// How many harts, 1 to what KVM allows. 0 is taken as 1.
    pub count: u32,
    /// Extensions to switch off or on, in order.
    pub isa: Vec<KnobChange>,
    /// SBI extensions to switch off or on, in order.
    pub sbi: Vec<KnobChange>,
    /// Machine identification CSRs that differ from the host's.
    pub id: CpuId,
    /// Host CPUs that harts are pinned to: (hart, host CPU).
    pub affinity: Vec<(u32, u32)>,
    /// The privilege mode in which the boot hart starts.
    pub mode: StartMode,
    /// CSRs of machine mode that a guest without a trap vector finds.
    pub csrs: Vec<CsrValue>,
}

/// One `-name` or `+name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnobChange {
    /// Lower-case name, as in `riscv,isa-extensions` or as KVM calls the SBI extension (`pmu`, `sta`, `dbcn`, ...).
    pub name: String,
    /// True to switch on.
    pub on: bool,
}

/// `mvendorid`, `marchid`, `mimpid` (Privileged specification 3.1.2 to 3.1.4); `None` keeps the host's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuId {
    /// `mvendorid`
    pub vendor: Option<u64>,
    /// `marchid`
    pub arch: Option<u64>,
    /// `mimpid`
    pub imp: Option<u64>,
}

/// What is loaded and where the boot hart starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootConfig {
    /// A kernel: RISC-V Image (plain, gzip, zstd) or ELF.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: InitrdConfig,
    /// The kernel's command line, taken as given.
    pub cmdline: String,
    /// A device tree to use instead of the generated one; where the initrd lies is written into it.
    pub dtb: Option<PathBuf>,
    /// Where to write the device tree that the guest gets.
    pub dump_dtb: Option<PathBuf>,
    /// Where the device tree is put, a multiple of 8, instead of high in RAM.
    pub dtb_addr: Option<u64>,
    /// Flat binaries at fixed guest-physical addresses.
    pub load: Vec<LoadConfig>,
    /// Where the boot hart starts, if not at the start of an `Image` or the lowest address of an ELF file.
    pub entry: Option<u64>,
}

/// The initial RAM disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum InitrdConfig {
    /// None.
    #[default]
    None,
    /// A file, passed on unread.
    File(PathBuf),
    /// The built-in prompt: an initramfs made on the fly around this static executable of rvmm.
    Builtin(PathBuf),
}

/// A flat binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadConfig {
    /// The file.
    pub file: PathBuf,
    /// Its guest-physical address.
    pub addr: u64,
}

/// Which interrupt controller the guest gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IrqchipChoice {
    /// The in-kernel AIA where the host has it, else the PLIC.
    #[default]
    Auto,
    /// In-kernel AIA (APLIC and IMSICs), or an error.
    Aia,
    /// PLIC in user space.
    Plic,
}

/// The privilege mode in which the boot hart starts (Privileged specification, chapter "Hypervisor extension": both are virtual).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StartMode {
    /// VS: a kernel's.
    #[default]
    Supervisor,
    /// VU: every privileged instruction of the guest is a trap that rvmm sees.
    User,
}

/// How the calls of SBI 0.1 (legacy console, timer, shutdown; numbers 0 to 8) are answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SbiV01 {
    /// By the host's kernel where it can; else by breakpoints in the guest's code, unless that is a Linux kernel.
    #[default]
    Auto,
    /// By the host's kernel, or an error.
    Kernel,
    /// By breakpoints in the guest's code.
    Patch,
    /// The guest's code stays as it is.
    Off,
}

/// Who keeps the guest's timer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimerChoice {
    /// KVM, or the hardware.
    #[default]
    Kernel,
    /// rvmm: every call that sets it comes out, and every interrupt is raised from here.
    User,
}

/// The other end of the first UART.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum SerialConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Nothing: output vanishes.
    Null,
    /// Output to a file, created or truncated.
    File(PathBuf),
    /// A new pseudo terminal; its path is logged and printed.
    Pty,
    /// A Unix socket that rvmm listens on, one client at a time.
    Unix(PathBuf),
    /// A Unix socket that somebody else listens on: another machine's serial line.
    Connect(PathBuf),
}

impl SerialConfig {
    /// Takes `stdio`, `null`, `pty`, `file:PATH`, `unix:PATH` or `connect:PATH`.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &OsStr) -> Result<Self, &'static str> {
        let bytes = text.as_bytes();
        let path =
            |prefix: &[u8]| bytes.strip_prefix(prefix).map(|path| OsStr::from_bytes(path).into());
        match bytes {
            b"stdio" => return Ok(Self::Stdio),
            b"null" => return Ok(Self::Null),
            b"pty" => return Ok(Self::Pty),
            b"file:" | b"unix:" | b"connect:" => return Err("the path behind the ':' is missing"),
            _ => {}
        }
        if let Some(path) = path(b"file:") {
            return Ok(Self::File(path));
        }
        path(b"unix:")
            .map(Self::Unix)
            .or_else(|| path(b"connect:").map(Self::Connect))
            .ok_or("it is none of stdio, null, pty, file:PATH, unix:PATH and connect:PATH")
    }
}

/// What a guest's reset request (SBI SRST reboot, syscon reboot) does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// The machine is rebuilt from the files and starts again.
    #[default]
    Restart,
    /// rvmm exits.
    Exit,
}

/// What an access to an address without memory and device does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unassigned {
    /// Reads give zero, writes vanish.
    #[default]
    Zero,
    /// The guest takes the access fault that hardware would raise.
    Fault,
    /// The machine stops with a register dump.
    Stop,
}

/// RAM of a machine where nothing is said: 512 MiB.
pub const DEFAULT_MEM: u64 = 512 << 20;

/// The least RAM of a machine, in bytes: 16 MiB.
pub const MIN_MEM: u64 = 16 << 20;

/// RAM comes in multiples of this many bytes: 4 KiB, a page.
pub const MEM_STEP: u64 = 4 << 10;

/// RAM in huge pages comes in multiples of this many bytes: 2 MiB, a page of the second level in every RISC-V translation mode.
pub const HUGE_MEM_STEP: u64 = 2 << 20;

/// The most RAM, in bytes: what lies between its base and the end of the 56-bit physical addresses that the page tables
/// of Sv39, Sv48 and Sv57 hold (Privileged specification, chapter 12). The host's limit is lower.
pub const MAX_MEM: u64 = (1 << 56) - RAM_BASE;

/// The most harts: what the PLIC's window has contexts for, and QEMU's `virt` too. KVM's limit may be lower.
pub const MAX_CPUS: u32 = 512;

/// The longest name of a machine, in bytes.
pub const MAX_NAME: usize = 64;

/// The longest path of a Unix socket, in bytes: `sun_path` has 108, the last is NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// Command line of a kernel where nothing is said: what Linux says before its driver of the UART is there goes out by SBI's debug console,
/// a call for each message. Without that it comes later, each character at the price of two exits, and not at all from a kernel that dies before.
pub const DEFAULT_CMDLINE: &str = "earlycon=sbi console=ttyS0";

/// Seconds that a guest has to power off where nothing is said.
pub const DEFAULT_GRACE_S: u32 = 10;

impl VmConfig {
    /// Whether the machine has a device of this model besides those that every machine has.
    #[must_use]
    pub fn has_device(&self, model: &str) -> bool {
        self.devices.iter().any(|text| text.split(',').next() == Some(model))
    }

    /// How long a guest may take to power off after SIGTERM; `None` where it has no power button, or is given no time.
    #[must_use]
    pub fn power_off_patience(&self) -> Option<Duration> {
        let is_asked = self.grace_s > 0 && self.has_device("input");
        is_asked.then(|| Duration::from_secs(self.grace_s.into()))
    }
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: "rvmm".into(),
            mem: DEFAULT_MEM,
            hugepages: false,
            cpus: CpuConfig { count: 1, ..CpuConfig::default() },
            boot: BootConfig::default(),
            irqchip: IrqchipChoice::default(),
            serial: SerialConfig::default(),
            devices: Vec::new(),
            on_reset: OnReset::default(),
            unassigned: Unassigned::default(),
            sbi_v01: SbiV01::default(),
            timer: TimerChoice::default(),
            grace_s: DEFAULT_GRACE_S,
            trace: None,
            gdb: None,
        }
    }
}

impl Default for BootConfig {
    fn default() -> Self {
        Self {
            kernel: None,
            initrd: InitrdConfig::None,
            cmdline: DEFAULT_CMDLINE.into(),
            dtb: None,
            dump_dtb: None,
            dtb_addr: None,
            load: Vec::new(),
            entry: None,
        }
    }
}
