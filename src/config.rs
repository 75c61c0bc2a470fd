//! The configuration of a machine: plain data, validated once, the same for the command line, a file and the API.

use std::time::Duration;

pub use rvmm_devices::{DeviceConfig, Endpoint, FilePath};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::layout::RAM_BASE;

mod csr;
mod devices;
mod gdb;
mod json;
mod paths;
pub(crate) mod slots;
mod trace;
mod valid;
mod version;

pub use csr::CsrValue;
pub use gdb::{GdbAddress, GdbConfig};
pub use trace::{TraceConfig, TraceFormat};
pub use valid::ValidConfig;
pub(crate) use valid::quoted;
pub use version::ConfigVersion;

/// The configuration of a whole machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// The version of this format: 1.
    pub version: ConfigVersion,
    /// The machine's name: 1 to 64 letters, digits, `_` and `-`.
    pub name: String,
    /// Guest RAM in bytes: a multiple of 4 KiB, with huge pages of 2 MiB; at least 16 MiB.
    pub mem: u64,
    /// Back guest RAM with huge pages of 2 MiB from the host's pool.
    pub hugepages: bool,
    /// The harts.
    pub cpus: CpuConfig,
    /// The files to load and the entry point.
    pub boot: BootConfig,
    /// The interrupt controller.
    pub irqchip: IrqchipChoice,
    /// The backend of the first UART.
    pub serial: Endpoint,
    /// Further devices, and the built-in ones that differ from their defaults. In JSON each is an object, or the text of `--device`.
    #[serde(deserialize_with = "devices::read")]
    #[schemars(with = "Vec<devices::Given>")]
    pub devices: Vec<DeviceConfig>,
    /// The effect of a guest's reset request.
    pub on_reset: OnReset,
    /// The effect of an access to an address without memory and device.
    pub unassigned: Unassigned,
    /// The implementation of the guest's SBI 0.1 calls.
    pub sbi_v01: SbiV01,
    /// The implementation of the guest's timer.
    pub timer: TimerChoice,
    /// Seconds that a guest with a power button (the device `input`) has to power off after SIGTERM; with 0 it is stopped
    /// at once.
    #[serde(alias = "grace_s")]
    pub shutdown_timeout_s: u32,
    /// The trace of every exit; `None` for no trace.
    pub trace: Option<TraceConfig>,
    /// The address a debugger connects to; `None` for no debugger.
    pub gdb: Option<GdbConfig>,
}

/// The harts of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpuConfig {
    /// Number of harts, from 1 to KVM's limit. 0 is taken as 1.
    pub count: u32,
    /// Extensions to switch off or on, in order.
    pub isa: Vec<ExtensionChange>,
    /// SBI extensions to switch off or on, in order.
    pub sbi: Vec<ExtensionChange>,
    /// Machine identification CSRs that differ from the host's.
    pub id: CpuId,
    /// Host CPUs that harts are pinned to: (hart, host CPU).
    pub affinity: Vec<(u32, u32)>,
    /// The privilege mode in which the boot hart starts.
    pub mode: StartMode,
    /// Machine-mode CSRs that a guest without a trap vector can access.
    pub csrs: Vec<CsrValue>,
}

/// One `-name` or `+name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtensionChange {
    /// Lower-case name, as in `riscv,isa-extensions` or as KVM calls the SBI extension (`pmu`, `sta`, `dbcn`, ...).
    pub name: String,
    /// True to switch on.
    pub on: bool,
}

/// `mvendorid`, `marchid`, `mimpid` (Privileged specification 3.1.2 to 3.1.4); `None` keeps the host's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpuId {
    /// `mvendorid`
    pub vendor: Option<u64>,
    /// `marchid`
    pub arch: Option<u64>,
    /// `mimpid`
    pub imp: Option<u64>,
}

/// The files to load and the entry point of the boot hart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BootConfig {
    /// A kernel: RISC-V Image (plain, gzip, zstd) or ELF.
    pub kernel: Option<FilePath>,
    /// The initial RAM disk.
    pub initrd: InitrdConfig,
    /// The kernel's command line, passed on as it is.
    pub cmdline: String,
    /// Device tree to use instead of the generated one; the initrd's address is written into it.
    pub dtb: Option<FilePath>,
    /// File to write the guest's device tree to.
    pub dump_dtb: Option<FilePath>,
    /// Address of the device tree, a multiple of 8, instead of high in RAM.
    pub dtb_addr: Option<u64>,
    /// Flat binaries at fixed guest-physical addresses.
    pub load: Vec<LoadConfig>,
    /// Entry point of the boot hart, if not the start of an `Image` or the lowest address of an ELF file.
    pub entry: Option<u64>,
}

/// The initial RAM disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum InitrdConfig {
    /// None.
    #[default]
    None,
    /// A file, passed on as it is.
    File(FilePath),
    /// The built-in prompt: an initramfs generated at run time around this static executable of rvmm.
    Builtin(FilePath),
}

/// A flat binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadConfig {
    /// The file.
    pub file: FilePath,
    /// Its guest-physical address.
    pub addr: u64,
}

/// The guest's interrupt controller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IrqchipChoice {
    /// The in-kernel AIA if the host has it, else the PLIC.
    #[default]
    Auto,
    /// In-kernel AIA (APLIC and IMSICs), or an error.
    Aia,
    /// PLIC in user space.
    Plic,
}

/// The privilege mode in which the boot hart starts (Privileged specification, chapter "Hypervisor extension": both are virtual).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StartMode {
    /// VS, the mode of a kernel.
    #[default]
    Supervisor,
    /// VU: every privileged instruction of the guest traps to rvmm.
    User,
}

/// The implementation of the SBI 0.1 calls (legacy console, timer, shutdown; numbers 0 to 8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SbiV01 {
    /// The host's kernel if it can; else breakpoints in the guest's code, unless that is a Linux kernel.
    #[default]
    Auto,
    /// The host's kernel, or an error.
    Kernel,
    /// Breakpoints in the guest's code.
    Patch,
    /// None; the guest's code is not changed.
    Off,
}

/// The implementation of the guest's timer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TimerChoice {
    /// KVM, or the hardware.
    #[default]
    Kernel,
    /// rvmm: every call that sets it is an exit, and rvmm raises every interrupt.
    User,
}

/// The effect of a guest's reset request (SBI SRST reboot, syscon reboot).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// The machine is rebuilt from the files and restarts.
    #[default]
    Restart,
    /// rvmm exits.
    Exit,
}

/// The effect of an access to an address without memory and device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unassigned {
    /// Reads return zero, writes are ignored.
    #[default]
    Zero,
    /// The guest takes the access fault that hardware would raise.
    Fault,
    /// The machine stops with a register dump.
    Stop,
}

/// Default RAM of a machine, in bytes: 512 MiB.
pub const DEFAULT_MEM: u64 = 512 << 20;

/// Minimum RAM of a machine, in bytes: 16 MiB.
pub const MIN_MEM: u64 = 16 << 20;

/// Granularity of RAM, in bytes: 4 KiB, a page.
pub const MEM_STEP: u64 = 4 << 10;

/// Granularity of RAM in huge pages, in bytes: 2 MiB, a page of the second level in every RISC-V translation mode.
pub const HUGE_MEM_STEP: u64 = 2 << 20;

/// Maximum RAM, in bytes: from its base to the end of the 56-bit physical addresses that the page tables
/// of Sv39, Sv48 and Sv57 hold (Privileged specification, chapter 12). The host's limit is lower.
pub const MAX_MEM: u64 = (1 << 56) - RAM_BASE;

/// Maximum number of harts: the contexts in the PLIC's window, and the limit of QEMU's `virt`. KVM's limit may be lower.
pub const MAX_CPUS: u32 = 512;

/// Maximum length of a machine's name, in bytes.
pub const MAX_NAME: usize = 64;

/// Maximum length of a Unix socket's path, in bytes: `sun_path` has 108, the last is NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// Default command line of a kernel. Until its UART driver is ready, Linux prints through the SBI debug console, one call for each
/// message. Without that these messages are printed later, at two exits for each character, and a kernel that dies before prints none.
pub const DEFAULT_CMDLINE: &str = "earlycon=sbi console=ttyS0";

/// Default of the seconds that a guest has to power off.
pub const DEFAULT_SHUTDOWN_TIMEOUT_S: u32 = 10;

impl VmConfig {
    /// True if the machine has a device of this model besides the built-in ones.
    #[must_use]
    pub fn has_device(&self, model: &str) -> bool {
        self.devices.iter().any(|device| device.model().name == model)
    }

    /// Time that a guest has to power off after SIGTERM; `None` if it has no power button or no time.
    #[must_use]
    pub fn shutdown_timeout(&self) -> Option<Duration> {
        let seconds = self.shutdown_timeout_s;
        let has_time = seconds > 0 && self.has_device("input");
        has_time.then(|| Duration::from_secs(seconds.into()))
    }
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            version: ConfigVersion,
            name: "rvmm".into(),
            mem: DEFAULT_MEM,
            hugepages: false,
            cpus: CpuConfig { count: 1, ..CpuConfig::default() },
            boot: BootConfig::default(),
            irqchip: IrqchipChoice::default(),
            serial: Endpoint::default(),
            devices: Vec::new(),
            on_reset: OnReset::default(),
            unassigned: Unassigned::default(),
            sbi_v01: SbiV01::default(),
            timer: TimerChoice::default(),
            shutdown_timeout_s: DEFAULT_SHUTDOWN_TIMEOUT_S,
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
