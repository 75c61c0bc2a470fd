//! Every reason for which KVM_RUN returns, as one enum without KVM constants.

/// The reason for which a hart left the guest. The borrows point into the hart's shared `kvm_run` page: data written there is
/// passed to the guest when the hart is entered again.
#[derive(Debug)]
pub enum Exit<'a> {
    /// A load from an address without memory. `data` is as wide as the access (1, 2, 4 or 8 bytes).
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// Little-endian result, to be filled.
        data: &'a mut [u8],
    },
    /// A store to an address without memory.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// Little-endian value, as wide as the access.
        data: &'a [u8],
    },
    /// An SBI call that the kernel leaves to user space.
    Sbi(SbiCall<'a>),
    /// A CSR access that the kernel leaves to user space.
    Csr(CsrAccess<'a>),
    /// The guest requested a shutdown or reset of the machine (SBI SRST, SBI chapter 10).
    System(SystemEvent),
    /// An `ebreak` while guest debugging is on.
    Debug,
    /// A signal or an `immediate_exit` ended KVM_RUN; the guest requested nothing.
    Interrupted,
    /// The kernel could not carry out an instruction.
    Fault(Fault),
    /// An exit reason that this version does not know, by KVM's number.
    Unknown(u32),
}

/// An SBI call (SBI specification, chapter 3: a7, a6, a0..a5 in; a0, a1 out).
#[derive(Debug)]
pub struct SbiCall<'a> {
    /// Extension id (a7).
    pub extension: u64,
    /// Function id (a6).
    pub function: u64,
    /// Arguments a0 to a5.
    pub args: &'a [u64; 6],
    /// Result, to be filled: error (a0) and value (a1).
    pub ret: &'a mut [u64; 2],
}

/// A CSR read-modify-write.
#[derive(Debug)]
pub struct CsrAccess<'a> {
    /// CSR number.
    pub csr: u64,
    /// The bits to be written, where `write_mask` is one.
    pub new_value: u64,
    /// Mask of the written bits.
    pub write_mask: u64,
    /// Old value, to be filled.
    pub ret: &'a mut u64,
}

/// A system event (`KVM_EXIT_SYSTEM_EVENT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// SRST shutdown; the guest's reason (0 none, 1 failure, others as in SBI 10.1).
    Shutdown(u64),
    /// SRST cold or warm reboot, with the guest's reason.
    Reset(u64),
    /// An event type that this version does not know.
    Other(u32),
}

/// The error of a KVM_RUN that could not continue. The program counter still points at the instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// EOPNOTSUPP: an instruction that KVM cannot emulate on an address without memory, or (before Linux 7)
    /// an instruction fetch from there.
    Unemulated,
    /// EIO: a misaligned access to an address without memory.
    Misaligned,
    /// EFAULT: guest memory that the host cannot provide, or a trap that KVM does not expect.
    Memory,
    /// KVM_EXIT_FAIL_ENTRY: the hardware refused the entry.
    Entry {
        /// The kernel's reason word.
        reason: u64,
        /// The host CPU.
        cpu: u32,
    },
    /// Any other errno of KVM_RUN.
    Host(i32),
}
