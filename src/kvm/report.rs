//! What KVM on this host can do: plain facts for `rvmm doctor`, the same type on every architecture.

/// What KVM says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostReport {
    /// Most harts of a machine.
    pub max_vcpus: u32,
    /// The number of harts up to which each has a host CPU of its own.
    pub recommended_vcpus: u32,
    /// Bits of a guest-physical address (41 Sv39x4, 50 Sv48x4, 59 Sv57x4), where KVM tells.
    pub address_bits: Option<u32>,
    /// Most pieces of memory that a machine may have, where KVM tells.
    pub memory_slots: Option<u32>,
    /// The in-kernel AIA, where the host has one.
    pub aia: Option<AiaOffer>,
    /// Extensions of a guest's hart by lower-case name, as KVM numbers them.
    pub isa: Vec<String>,
    /// `satp.MODE` of the widest translation: 8 Sv39, 9 Sv48, 10 Sv57.
    pub satp_mode: u64,
    /// Ticks of a guest's `time` per second.
    pub timebase_hz: u64,
    /// Every SBI extension that rvmm knows by KVM's name, and what this kernel makes of it.
    pub sbi: Vec<SbiOffer>,
    /// Whether the calls of SBI 0.1 (`console_putchar`, ...) leave the guest; found out by a guest that makes one, since
    /// kernels built without them still list them. `None` where that guest could not be run.
    pub sbi_v01: Option<bool>,
    /// Whether `ebreak` of a guest can be made to leave it (KVM_SET_GUEST_DEBUG).
    pub guest_debug: bool,
    /// Whether an event descriptor can raise an interrupt (KVM_IRQFD). It leads nowhere without AIA.
    pub irqfd: bool,
    /// Whether a store of a guest can signal an event descriptor (KVM_IOEVENTFD).
    pub ioeventfd: bool,
}

/// The in-kernel AIA that a machine could get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AiaOffer {
    /// What becomes of the host's IMSIC guest files.
    pub guest_files: GuestFiles,
    /// Interrupt identities of an IMSIC: 1 to this number.
    pub ids: u32,
    /// Whether all of them work where the IMSIC is emulated; else 1 to 31 do.
    pub all_ids_work: bool,
}

/// IMSIC guest files (AIA 1.0, section 3.2), by which interrupts reach a guest without an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestFiles {
    /// The host has none to give away: IMSICs are emulated.
    Absent,
    /// The host has some, and its kernel forgets to wake harts that wait on one: IMSICs are emulated.
    Unsafe,
    /// A machine gets those that are free.
    Used,
}

/// An SBI extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SbiOffer {
    /// KVM's name in lower case, as `--sbi` takes it.
    pub name: &'static str,
    /// What this kernel makes of it.
    pub state: SbiState,
}

/// What a kernel makes of an SBI extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SbiState {
    /// A guest has it unless it is switched off.
    On,
    /// A guest has it where it is switched on.
    Off,
    /// As [`SbiState::Off`], since a guest that has it could harm this kernel.
    Withheld,
    /// This kernel, or this host, has none.
    Absent,
}

impl HostReport {
    /// Whether a guest's hart has the ISA extension `name` (lower case).
    #[must_use]
    pub fn has_isa(&self, name: &str) -> bool {
        self.isa.iter().any(|extension| extension == name)
    }

    /// Whether a guest can have the SBI extension `name` (lower case), by itself or switched on.
    #[must_use]
    pub fn has_sbi(&self, name: &str) -> bool {
        self.sbi.iter().any(|offer| offer.name == name && offer.state != SbiState::Absent)
    }
}
