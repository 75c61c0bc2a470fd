//! Capabilities of this host's KVM, for `rvmm doctor`; the same types on every architecture.

/// The capabilities of KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostReport {
    /// Maximum number of harts of a machine.
    pub max_vcpus: u32,
    /// Number of harts up to which each has a host CPU of its own.
    pub recommended_vcpus: u32,
    /// Bits of a guest-physical address (41 Sv39x4, 50 Sv48x4, 59 Sv57x4), where KVM reports it.
    pub address_bits: Option<u32>,
    /// Maximum number of memory slots of a machine, where KVM reports it.
    pub memory_slots: Option<u32>,
    /// The in-kernel AIA, where the host has one.
    pub aia: Option<AiaSupport>,
    /// Extensions of a guest's hart by lower-case name, in the order of KVM's numbers.
    pub isa: Vec<String>,
    /// `satp.MODE` of the widest translation: 8 Sv39, 9 Sv48, 10 Sv57.
    pub satp_mode: u64,
    /// Ticks of a guest's `time` per second.
    pub timebase_hz: u64,
    /// Every SBI extension that rvmm knows by KVM's name, and its state in this kernel.
    pub sbi: Vec<SbiSupport>,
    /// True if the calls of SBI 0.1 (`console_putchar`, ...) exit to user space; found out with a guest that makes one, since
    /// kernels built without them still list them. `None` where that guest could not be run.
    pub sbi_v01: Option<bool>,
    /// True if a guest's `ebreak` can be made to exit (KVM_SET_GUEST_DEBUG).
    pub guest_debug: bool,
    /// True if an event descriptor can raise an interrupt (KVM_IRQFD). Without AIA it has no effect.
    pub irqfd: bool,
    /// True if a guest's store can signal an event descriptor (KVM_IOEVENTFD).
    pub ioeventfd: bool,
}

/// The in-kernel AIA that a machine could get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AiaSupport {
    /// The use of the host's IMSIC guest files.
    pub guest_files: GuestFiles,
    /// Interrupt identities of an IMSIC: 1 to this number.
    pub ids: u32,
    /// True if all of them work in an emulated IMSIC; else only 1 to 31 do.
    pub all_ids_work: bool,
}

/// IMSIC guest files (AIA 1.0, section 3.2), by which interrupts reach a guest without an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestFiles {
    /// The host has none for guests: IMSICs are emulated.
    Absent,
    /// The host has some, but a hart that waits on one is not always woken: IMSICs are emulated.
    Unsafe(LostWakeUps),
    /// A machine gets those that are free.
    Used,
}

/// The reason why a hart that waits on an IMSIC guest file may sleep on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LostWakeUps {
    /// The kernel is older than 6.18: it looks for the interrupt on the CPU where the hart's thread is now.
    Kernel,
    /// The host is a machine of QEMU with several CPUs, which loses interrupts of guest files.
    Qemu,
}

/// An SBI extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SbiSupport {
    /// KVM's name in lower case, as `--sbi` takes it.
    pub name: &'static str,
    /// Its state in this kernel.
    pub state: SbiState,
}

/// State of an SBI extension in a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SbiState {
    /// A guest has it unless it is switched off.
    On,
    /// A guest has it where it is switched on.
    Off,
    /// As [`SbiState::Off`], since a guest that has it could harm this kernel.
    Withheld,
    /// Not available in this kernel or on this host.
    Absent,
}

impl HostReport {
    /// True if a guest's hart has the ISA extension `name` (lower case).
    #[must_use]
    pub fn has_isa(&self, name: &str) -> bool {
        self.isa.iter().any(|extension| extension == name)
    }

    /// True if a guest can have the SBI extension `name` (lower case), by default or switched on.
    #[must_use]
    pub fn has_sbi(&self, name: &str) -> bool {
        self.sbi.iter().any(|offer| offer.name == name && offer.state != SbiState::Absent)
    }
}
