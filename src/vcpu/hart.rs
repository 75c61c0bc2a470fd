//! A vCPU as its own thread sees it: the seam between the run loop and KVM.

use std::io;
use std::sync::Arc;

use super::exit::Exit;

/// A register that the VMM reads or writes. Widths are 64 bits (rvmm runs rv64 guests only).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    /// Program counter.
    Pc,
    /// Integer register `x1` to `x31`; `X(0)` reads as zero and ignores writes.
    X(u8),
    /// Privilege mode: 1 supervisor, 0 user.
    Mode,
    /// `time` as the guest reads it, in ticks of its timebase; to be read only.
    Time,
    /// The tick of `time` at which the timer interrupt becomes pending; all ones for never; to be read only.
    TimeCompare,
    /// A supervisor CSR of the guest.
    Csr(Csr),
    /// Floating-point register `f0` to `f31`, its 64 bits. Refused with ENOENT where the vCPU has no D extension.
    F(u8),
    /// `fcsr`, 32 bits in the lower half. Refused as [`Reg::F`] is.
    Fcsr,
}

/// The supervisor CSRs that KVM keeps for a guest (Privileged specification, chapter 12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub enum Csr {
    Sstatus,
    Sie,
    Stvec,
    Sscratch,
    Sepc,
    Scause,
    Stval,
    Sip,
    Satp,
    Scounteren,
    Senvcfg,
    /// Needs Smstateen; refused with ENOENT where the vCPU lacks it.
    Sstateen0,
    /// Needs Ssaia, as the next two do; refused with ENOENT where the vCPU lacks it.
    Siselect,
    /// The priorities of the guest's major interrupts, one byte each, which it reaches as `iprio` registers through `sireg` (AIA
    /// specification, "Interrupts for Virtual Machines").
    Hviprio1,
    /// The rest of them.
    Hviprio2,
}

/// One vCPU. All methods are called on the vCPU's own thread, except before that thread starts.
pub trait Hart: Send {
    /// The hart id: vcpu id, `mhartid` as the guest knows it, and `reg` of its device tree node.
    fn id(&self) -> u32;

    /// Binds the hart to the calling thread and gives what gets it out of the guest. Called once, before the first
    /// [`Hart::enter`].
    fn bind(&mut self) -> io::Result<Arc<dyn Kick>>;

    /// Completes the last exit with what was written into it, runs the guest, and says why it came back.
    ///
    /// # Errors
    /// Only what leaves the vCPU unusable; all that a guest can provoke is an [`Exit`].
    fn enter(&mut self) -> io::Result<Exit<'_>>;

    /// What the last [`Hart::enter`] returned, once more; asked before anything else is done with the hart.
    fn last_exit(&mut self) -> Exit<'_>;

    /// Completes the last exit (destination register, program counter) without running the guest, so that registers
    /// are true and may be written.
    fn settle(&mut self) -> io::Result<()>;

    /// Forgets the last exit: the instruction is not completed and the program counter stays at it.
    fn abandon(&mut self);

    /// Has every `ebreak` of the guest come out as [`Exit::Debug`], with the program counter at it, whatever the privilege mode;
    /// otherwise the guest's own trap vector gets them.
    ///
    /// # Errors
    /// The kernel has no guest debugging.
    fn trap_ebreaks(&mut self, on: bool) -> io::Result<()>;

    /// Has the guest's timer interrupt pending from now on, or not pending, until the guest sets its timer; touches no other interrupt.
    /// False where it cannot be done from outside: then the guest itself has to set its timer (SBI TIME).
    fn set_timer_pending(&mut self, on: bool) -> io::Result<bool>;

    /// Drives the external interrupt to the level that its line has: the kernel forgets it when it starts a hart anew.
    fn drive_external(&mut self) -> io::Result<()>;

    /// Reads a register. While the last exit is neither settled nor abandoned, they are those of the instruction that made it.
    fn get(&self, reg: Reg) -> io::Result<u64>;

    /// Writes a register. The last exit must be settled or abandoned first.
    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()>;
}

/// Gets one hart out of the guest, from any thread.
///
/// Whoever kicks has set beforehand what the hart is to see. A kick is never lost: the [`Hart::enter`] under way, or else
/// the next one, returns [`Exit::Interrupted`]; several kicks before that count as one. [`Hart::settle`] may use a kick
/// up, since its caller looks at what was set before it waits.
pub trait Kick: Send + Sync {
    /// Kicks. Neither blocks nor fails, and does nothing once the hart's thread has ended.
    fn kick(&self);
}
