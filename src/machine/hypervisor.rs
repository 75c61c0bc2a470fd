//! What the machine asks of the hypervisor: the seam behind which KVM stands, and in tests nothing at all.

use std::io;
use std::sync::Arc;

use rvmm_devices::Doorbell;
use rvmm_devices::irq::IrqLine;

use crate::config::{CpuId, IrqchipChoice, KnobChange};
use crate::layout::Span;
use crate::vcpu::hart::{Hart, Reg};
use crate::vcpu::record::Ticks;
use crate::vcpu::restarts::Exits;

/// The memory slot of guest RAM.
pub(crate) const RAM_SLOT: u32 = 0;
/// The memory slot of the page that stands in for a trap vector.
pub(crate) const SHIM_SLOT: u32 = 1;
/// The first memory slot of what devices show to the guest.
pub(crate) const FIRST_WINDOW_SLOT: u32 = 2;

/// What a vCPU is, as the kernel tells it: the input of the tree's /cpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuFacts {
    /// Extensions of the guest by lower-case name (`i`, `m`, `zicbom`, ...), sorted as KVM numbers them.
    pub extensions: Vec<String>,
    /// `satp.MODE` of the widest translation: 0 none, 8 Sv39, 9 Sv48, 10 Sv57.
    pub satp_mode: u64,
    /// Block sizes in bytes, where the extension is there.
    pub cbom_block: Option<u32>,
    /// See `cbom_block`.
    pub cboz_block: Option<u32>,
    /// See `cbom_block`.
    pub cbop_block: Option<u32>,
    /// Ticks of `time` per second.
    pub timebase_hz: u64,
}

/// How the vCPUs are to be made; the same for every hart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuKnobs {
    /// Changes to the ISA, in the order given.
    pub isa: Vec<KnobChange>,
    /// Changes to the SBI extensions.
    pub sbi: Vec<KnobChange>,
    /// `mvendorid`, `marchid`, `mimpid`, where not the host's.
    pub id: CpuId,
}

/// Where the in-kernel AIA is to stand, and how large it is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AiaPlan {
    /// Harts, each of which gets an IMSIC of one page.
    pub harts: u32,
    /// Wired interrupt sources wanted at the APLIC: 1 to this number.
    pub sources: u32,
    /// Interrupt identities that the guest may use of one IMSIC: 1 to this number.
    pub identities: u32,
    /// Where the APLIC's registers are.
    pub aplic: Span,
    /// Where the IMSICs are: hart `n`'s at page `n`.
    pub imsics: Span,
}

/// The interrupt controller that the kernel granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    /// In-kernel APLIC and IMSICs.
    Aia(AiaFacts),
    /// None: the machine brings a PLIC and drives the harts' external interrupt lines.
    None,
}

/// What the in-kernel AIA looks like, as read back from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AiaFacts {
    /// Wired interrupt sources of the APLIC: 1 to this number.
    pub sources: u32,
    /// Interrupt identities of each IMSIC: 1 to this number.
    pub ids: u32,
    /// Bits of the hart index in an IMSIC's address.
    pub hart_index_bits: u32,
    /// Bits of the guest index in an IMSIC's address.
    pub guest_index_bits: u32,
}

/// Who makes virtual machines: the host's KVM, or in tests a double.
pub trait Hypervisor: Send {
    /// Makes a VM without memory and harts.
    ///
    /// # Errors
    /// The host refuses: out of memory, out of file descriptors.
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError>;
}

/// A virtual machine. Calls come in boot order: memory, harts (ascending), irqchip, lines; then the harts run.
pub trait Vm: Send + Sync {
    /// How many harts a VM may have at most.
    fn max_harts(&self) -> u32;

    /// Gives the guest `size` bytes of this process's memory from `host_addr` at `guest_addr`, both multiples of 4096.
    /// The memory stays mapped as long as the VM lives: the caller keeps it.
    fn map_memory(&self, slot: u32, guest_addr: u64, host_addr: u64, size: u64) -> io::Result<()>;

    /// As [`Vm::map_memory`], for memory that the guest may read and run; its stores there come out as any other.
    fn map_rom(&self, slot: u32, guest_addr: u64, host_addr: u64, size: u64) -> io::Result<()>;

    /// Code in guest memory was changed by this process: harts that run from now on see it.
    ///
    /// # Errors
    /// The kernel cannot have all CPUs drop what they have fetched.
    fn code_changed(&self) -> io::Result<()>;

    /// Makes the next hart; the first one made is the boot hart.
    fn create_hart(&self, id: u32, knobs: &CpuKnobs) -> Result<Box<dyn Hart>, VmError>;

    /// What the harts are, once one exists, with the knobs applied. After [`Vm::create_irqchip`], since a guest without
    /// AIA is not shown `ssaia`.
    fn cpu_facts(&self) -> Result<CpuFacts, VmError>;

    /// How harts tell the time, once one exists.
    fn ticks(&self) -> Result<Ticks, VmError> {
        Ok(Ticks::monotonic())
    }

    /// What the hypervisor counts of each hart by itself; asked for before the first of them runs.
    fn counters(&self) -> Vec<Box<dyn Counters>> {
        Vec::new()
    }

    /// A register of a hart that is out of the guest and settled; from any thread.
    fn reg(&self, _hart: u32, _reg: Reg) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// How many bits a guest-physical address can have: 41, 50 or 59 where the second stage of translation has 3, 4 or 5 levels.
    fn address_bits(&self) -> Option<u32> {
        None
    }

    /// Neither memory nor a device is from address `end` on: translation may be as narrow as that allows. Before memory and harts.
    fn limit_addresses(&self, _end: u64) {}

    /// Makes the in-kernel interrupt controller that `choice` allows, as `plan` says, after the harts and before the
    /// first of them runs.
    ///
    /// # Errors
    /// [`IrqchipChoice::Aia`] on a host without it; the sentence says what to do.
    fn create_irqchip(&self, choice: IrqchipChoice, plan: &AiaPlan) -> Result<Irqchip, VmError>;

    /// Whether the guest has set up any interrupt source of the in-kernel controller; `None` where there is no controller to look at.
    fn has_set_up_irqchip(&self) -> Option<bool> {
        None
    }

    /// Has the kernel ring `doorbell` of the device at `base`, without an exit. A hypervisor that does not is right, too:
    /// then the write comes out as any other.
    fn ring_in_kernel(&self, base: u64, doorbell: Doorbell<'_>) -> Result<(), VmError>;

    /// The line into the in-kernel APLIC's source `source` (1-based).
    fn irq_line(&self, source: u32) -> Result<Arc<dyn IrqLine>, VmError>;

    /// The external interrupt line of hart `hart` (VSEIP), for a PLIC in user space.
    fn external_line(&self, hart: u32) -> Result<Arc<dyn IrqLine>, VmError>;
}

/// What the hypervisor counts of one hart. Reading it does not disturb the hart.
pub trait Counters: Send + Sync {
    /// Which hart.
    fn hart(&self) -> u32;

    /// The counters by the hypervisor's names.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&self) -> io::Result<Vec<(String, u64)>>;

    /// The number of exits alone, for who asks often.
    ///
    /// # Errors
    /// It is not counted.
    fn exits(&self) -> io::Result<Box<dyn Exits>>;
}

/// What the hypervisor refused: the whole sentence for the user, with the kernel's error as source.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct VmError {
    what: String,
    #[source]
    source: Option<io::Error>,
    mistake: bool,
}

impl VmError {
    /// A refusal with a reason of rvmm's own.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None, mistake: false }
    }

    /// A refusal of what no host could do: a mistake of whoever asked.
    pub fn mistake(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None, mistake: true }
    }

    /// A refusal by the kernel.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self { what: what.into(), source: Some(source), mistake: false }
    }

    /// Whether no host could have done what was asked.
    #[must_use]
    pub fn is_mistake(&self) -> bool {
        self.mistake
    }
}
