//! A vCPU as its own thread uses it: the interface between the run loop and KVM.

use std::io;
use std::sync::Arc;

use super::exit::Exit;
pub use crate::riscv::csr::Csr;

/// A register that the VMM reads or writes. Widths are 64 bits (rvmm runs rv64 guests only).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    /// Program counter.
    Pc,
    /// Integer register `x1` to `x31`; `X(0)` reads as zero and ignores writes.
    X(u8),
    /// Privilege mode: 1 supervisor, 0 user.
    Mode,
    /// `time` as the guest reads it, in ticks of its timebase; read-only.
    Time,
    /// The tick of `time` at which the timer interrupt becomes pending; all ones for never; read-only.
    TimeCompare,
    /// A supervisor CSR of the guest.
    Csr(Csr),
    /// Floating-point register `f0` to `f31`, its 64 bits. Refused with ENOENT where the vCPU has no D extension.
    F(u8),
    /// `fcsr`, 32 bits in the lower half. Refused as [`Reg::F`] is.
    Fcsr,
}

/// One vCPU. All methods are called on the vCPU's own thread, except before that thread starts.
pub trait Hart: Send {
    /// The hart id: vcpu id, `mhartid` as the guest knows it, and `reg` of its device tree node.
    fn id(&self) -> u32;

    /// Binds the hart to the calling thread and returns its kick. Called once, before the first [`Hart::enter`].
    fn bind(&mut self) -> io::Result<Arc<dyn Kick>>;

    /// Completes the last exit with the data written into it, runs the guest, and returns the next exit.
    ///
    /// # Errors
    /// Only failures that leave the vCPU unusable; everything that a guest can cause is an [`Exit`].
    fn enter(&mut self) -> io::Result<Exit<'_>>;

    /// Returns the exit of the last [`Hart::enter`] again; to be called before anything else is done with the hart.
    fn last_exit(&mut self) -> Exit<'_>;

    /// Completes the last exit (destination register, program counter) without running the guest, so that registers
    /// are current and may be written.
    fn settle(&mut self) -> io::Result<()>;

    /// Discards the last exit: the instruction is not completed and the program counter stays at it.
    fn abandon(&mut self);

    /// Makes every `ebreak` of the guest exit as [`Exit::Debug`], with the program counter at it, in every privilege mode;
    /// otherwise they are delivered to the guest's own trap vector.
    ///
    /// # Errors
    /// The kernel has no guest debugging.
    fn trap_ebreaks(&mut self, on: bool) -> io::Result<()>;

    /// Makes the guest's timer interrupt pending or not, until the guest sets its timer; affects no other interrupt. False if that
    /// is not possible from user space: then the guest itself has to set its timer (SBI TIME).
    fn set_timer_pending(&mut self, on: bool) -> io::Result<bool>;

    /// Sets the external interrupt to the level of its line: the kernel loses it when it starts a hart.
    fn sync_external_interrupt(&mut self) -> io::Result<()>;

    /// Reads a register. Until the last exit is settled or abandoned, the registers are those before its instruction completes.
    fn get(&self, reg: Reg) -> io::Result<u64>;

    /// Writes a register. The last exit must be settled or abandoned first.
    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()>;
}

/// Makes one hart leave the guest, from any thread.
///
/// The caller changes the state that the hart is to check before it kicks. A kick is never lost: the [`Hart::enter`] under way, or else
/// the next one, returns [`Exit::Interrupted`]; several kicks before that count as one. [`Hart::settle`] may
/// consume a kick, since its caller checks the state before it waits.
pub trait Kick: Send + Sync {
    /// Kicks. Neither blocks nor fails, and does nothing once the hart's thread has ended.
    fn kick(&self);
}
