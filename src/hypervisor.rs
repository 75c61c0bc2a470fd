//! The interface between the machine and its hypervisor: KVM, or in tests a double.

mod state;

use std::io;
use std::sync::Arc;

use rvmm_devices::IoEvent;
use rvmm_devices::irq::IrqLine;

pub use self::state::{
    AplicState, HartState, ImsicState, IrqchipState, MpState, Register, RegisterValue, SourceState,
    VmState,
};
use crate::config::{CpuId, ExtensionChange, IrqchipChoice};
use crate::error::VmError;
use crate::layout::Span;
use crate::vcpu::hart::{Hart, Reg};
use crate::vcpu::record::Ticks;
use crate::vcpu::restarts::Exits;

/// The memory slot of guest RAM.
pub(crate) const RAM_SLOT: u32 = 0;
/// The memory slot of the trap shim's page.
pub(crate) const SHIM_SLOT: u32 = 1;
/// The first memory slot for memory that devices map into the guest.
pub(crate) const FIRST_WINDOW_SLOT: u32 = 2;

/// Properties of a vCPU as the kernel reports them: the input of the device tree's /cpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuFacts {
    /// Extensions of the guest by lower-case name (`i`, `m`, `zicbom`, ...), in the order of KVM's numbers.
    pub extensions: Vec<String>,
    /// `satp.MODE` of the widest translation: 0 none, 8 Sv39, 9 Sv48, 10 Sv57.
    pub satp_mode: u64,
    /// Block sizes in bytes, where the vCPU has the extension.
    pub cbom_block: Option<u32>,
    /// See `cbom_block`.
    pub cboz_block: Option<u32>,
    /// See `cbom_block`.
    pub cbop_block: Option<u32>,
    /// Ticks of `time` per second.
    pub timebase_hz: u64,
}

/// Settings of the vCPUs; the same for every hart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuSettings {
    /// Changes to the ISA, in the order given.
    pub isa: Vec<ExtensionChange>,
    /// Changes to the SBI extensions.
    pub sbi: Vec<ExtensionChange>,
    /// `mvendorid`, `marchid` and `mimpid`, where they differ from the host's.
    pub id: CpuId,
}

/// Requested addresses and size of the in-kernel AIA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AiaPlan {
    /// Harts, each of which gets an IMSIC of one page.
    pub harts: u32,
    /// Requested wired interrupt sources of the APLIC: 1 to this number.
    pub sources: u32,
    /// Interrupt identities that the guest may use of one IMSIC: 1 to this number.
    pub identities: u32,
    /// The address range of the APLIC's registers.
    pub aplic: Span,
    /// The address range of the IMSICs: hart `n` has page `n`.
    pub imsics: Span,
}

/// The interrupt controller that the kernel provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    /// In-kernel APLIC and IMSICs.
    Aia(AiaFacts),
    /// None: the machine has a PLIC of its own, which drives the harts' external interrupt lines.
    None,
}

/// Properties of the in-kernel AIA, as read back from the kernel.
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

/// A source of virtual machines: the host's KVM, or in tests a double.
pub trait Hypervisor: Send {
    /// Creates a VM without memory and harts.
    ///
    /// # Errors
    /// The host refuses: out of memory, out of file descriptors.
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError>;
}

/// Saving, restoring and resetting a VM, and the log of the pages that its guest writes.
pub trait VmLifecycle {
    /// The state of the VM but its memory: time, the registers and the run state of every hart, the in-kernel interrupt controller.
    ///
    /// All harts are out of the guest and settled, and nothing raises an interrupt meanwhile. Not saved are what the hypervisor does not
    /// show: the counters of SBI PMU, the start of a hart that it has not made yet ([`VmLifecycle::starting`]), the resumption from SBI
    /// SUSP, and the debugger's setting of `ebreak`. The guest's memory is saved afterwards: the steal time of a hart is written there
    /// when it runs.
    ///
    /// # Errors
    /// A register cannot be read.
    fn save(&self) -> io::Result<VmState>;

    /// The harts that the guest has started (SBI HSM) and that have not begun: the hypervisor does not show where they will. Each begins
    /// when it runs next. All harts are out of the guest.
    ///
    /// # Errors
    /// A register cannot be read.
    fn starting(&self) -> io::Result<Vec<u32>>;

    /// Restores a saved state into a VM with the same harts and the same irqchip, none of which has run since it was created. Returns the
    /// harts with a pending software interrupt: on KVM it does not end a `wfi`, though the guest sees it, so each is to be kicked after
    /// it has run, until the interrupt is gone.
    ///
    ///
    /// Memory is restored by the caller, who calls [`Vm::code_changed`] afterwards. Lines of the in-kernel controller get the levels
    /// that were saved.
    ///
    /// # Errors
    /// The harts or the irqchip differ from those that were saved: the message names what differs, and nothing was written. Or a
    /// register refuses its value; then the VM is of no use.
    fn restore(&self, state: &VmState) -> Result<Vec<u32>, VmError>;

    /// Returns the VM to its state after creation: no harts, no irqchip, time 0.
    ///
    /// Memory, ioevents, the width of addresses and the levels of lines stay. Every line that was given out works on as soon as the
    /// irqchip, or the hart that it leads to, exists again: it then has the level that its device drove last, and the eventfds
    /// that were attached to it. Pages written before are reported by the next [`VmLifecycle::dirty_pages`].
    ///
    /// All harts were dropped; so should be what [`Vm::counters`] returned, which belongs to them.
    ///
    /// # Errors
    /// A hart still exists, or the host refuses a new VM. The VM is then of no use.
    fn reset(&self) -> Result<(), VmError>;

    /// Switches the log of written pages of a memory slot on or off. All harts are out of the guest. The log has the writes of the
    /// guest and of the hypervisor, not those of this process (`GuestRam::take_written` has them) or of the kernel's vhost.
    ///
    /// # Errors
    /// There is no such slot, or the host refuses.
    fn log_dirty(&self, slot: u32, on: bool) -> Result<(), VmError>;

    /// The pages of a slot that were written since the last call, or since the log was switched on: a bit for each 4096 bytes, 64 in
    /// a word, from the lowest address on. Harts may run.
    ///
    /// # Errors
    /// There is no such slot, or its log is off.
    fn dirty_pages(&self, slot: u32) -> io::Result<Vec<u64>>;
}

/// A virtual machine. Calls are made in boot order: memory, harts (ascending), irqchip, lines; then the harts run.
pub trait Vm: VmLifecycle + Send + Sync {
    /// Maximum number of harts of a VM.
    fn max_harts(&self) -> u32;

    /// Maps `size` bytes of this process's memory from `host_addr` into the guest at `guest_addr`, both multiples of 4096.
    /// The caller keeps the memory mapped as long as the VM exists.
    fn map_memory(&self, slot: u32, guest_addr: u64, host_addr: u64, size: u64) -> io::Result<()>;

    /// As [`Vm::map_memory`], for memory that the guest may read and execute; its stores there exit as accesses to devices do.
    fn map_rom(&self, slot: u32, guest_addr: u64, host_addr: u64, size: u64) -> io::Result<()>;

    /// Makes code that this process has changed in guest memory visible to harts that run from now on.
    ///
    /// # Errors
    /// The kernel cannot make all CPUs discard fetched instructions.
    fn code_changed(&self) -> io::Result<()>;

    /// Creates the next hart; the first one created is the boot hart.
    fn create_hart(&self, id: u32, knobs: &CpuSettings) -> Result<Box<dyn Hart>, VmError>;

    /// Properties of the harts, once one exists, with the knobs applied. After [`Vm::create_irqchip`], since `ssaia` is
    /// hidden from a guest without AIA.
    fn cpu_facts(&self) -> Result<CpuFacts, VmError>;

    /// The clock of the harts, once one exists.
    fn ticks(&self) -> Result<Ticks, VmError> {
        Ok(Ticks::monotonic())
    }

    /// The hypervisor's own counters of each hart; opened before the first hart runs.
    fn counters(&self) -> Vec<Box<dyn Counters>> {
        Vec::new()
    }

    /// Reads a register of a hart that is out of the guest and settled; from any thread.
    fn reg(&self, _hart: u32, _reg: Reg) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Bits of a guest-physical address: 41, 50 or 59 where the second stage of translation has 3, 4 or 5 levels.
    fn address_bits(&self) -> Option<u32> {
        None
    }

    /// Narrows guest-physical addresses as far as possible: neither memory nor a device is at `end` or above. Before memory and harts.
    fn limit_addresses(&self, _end: u64) {}

    /// Creates the in-kernel interrupt controller that `choice` allows, according to `plan`, after the harts and before the
    /// first of them runs.
    ///
    /// # Errors
    /// [`IrqchipChoice::Aia`] on a host without it; the message says what to do.
    fn create_irqchip(&self, choice: IrqchipChoice, plan: &AiaPlan) -> Result<Irqchip, VmError>;

    /// True if the guest has set up any interrupt source of the in-kernel controller; `None` without such a controller.
    fn has_set_up_irqchip(&self) -> Option<bool> {
        None
    }

    /// Registers `ioevent` of the device at `base`: the kernel then handles the write without an exit. A hypervisor may
    /// also do nothing: then the write exits as any other.
    fn register_ioeventfd(&self, base: u64, ioevent: IoEvent<'_>) -> Result<(), VmError>;

    /// The line into the in-kernel APLIC's source `source` (1-based).
    fn irq_line(&self, source: u32) -> Result<Arc<dyn IrqLine>, VmError>;

    /// The external interrupt line of hart `hart` (VSEIP), for a PLIC in user space.
    fn external_line(&self, hart: u32) -> Result<Arc<dyn IrqLine>, VmError>;
}

/// The hypervisor's counters of one hart. Reading them does not disturb the hart.
pub trait Counters: Send + Sync {
    /// The hart's id.
    fn hart(&self) -> u32;

    /// The counters by the hypervisor's names.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&self) -> io::Result<Vec<(String, u64)>>;

    /// The counter of exits alone, for frequent reads.
    ///
    /// # Errors
    /// Exits are not counted.
    fn exits(&self) -> io::Result<Box<dyn Exits>>;
}
