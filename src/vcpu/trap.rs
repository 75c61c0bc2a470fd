//! Traps that hardware would raise and KVM does not: determines the cause after the exit, and enters the guest's own trap vector
//! (Privileged specification, 12.1 and 3.1.15).
//!
//! KVM fails on three things that a guest can do in one instruction: a memory access that it does not emulate (atomics, floating
//! point, vectors, cache blocks) or a misaligned one, to an address without memory; and, before Linux 7, an instruction fetch from
//! there. On hardware all of them are access faults, so they are here, whatever the policy for unassigned addresses is. KVM does
//! not report the address, so it is derived from the program counter, the guest's page tables and the instruction. If the
//! instruction cannot cause such a fault, the machine stops.
//!
//! Limitations: `stval` is the base of a vector access, not the faulting element, and is not masked under pointer masking.

use std::io;

use log::warn;

use super::context::{MachineContext, Notice};
use super::dispatch::UnresolvedExit;
use super::dump::dump;
use super::exit::Fault;
use super::firmware::BreakpointOutcome;
use super::hart::{Csr, Hart, Reg};
use super::stop::StopReason;
use super::walk::{WalkError, translate};
use crate::config::Unassigned;
use crate::memory::{GuestRam, PAGE, RamError};
use crate::riscv::access::{self, AccessKind, Operand};
use crate::riscv::insn;
use crate::riscv::trap::{SUPERVISOR, USER, cause, sstatus};

/// An exception: `scause` and `stval`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trap {
    cause: u64,
    tval: u64,
}

/// The instruction at the program counter, or the reason for which it cannot be fetched.
pub(super) enum Fetched {
    Word(u32),
    Trap(Trap),
    Lost,
}

/// Resolves an exit that needs the hart's registers: raises a trap in the guest (`None`), or stops the machine.
///
/// # Errors
/// A register cannot be read or written, which no guest causes.
#[cold]
pub(super) fn resolve(
    hart: &mut dyn Hart,
    context: &MachineContext,
    trouble: UnresolvedExit,
) -> io::Result<Option<StopReason>> {
    hart.abandon();
    let pc = hart.get(Reg::Pc)?;
    match trouble {
        UnresolvedExit::Breakpoint => return breakpoint(hart, context, pc),
        UnresolvedExit::Unassigned { addr, write } if context.unassigned == Unassigned::Stop => {
            let dump = dump(hart);
            return Ok(Some(StopReason::UnassignedAccess { hart: hart.id(), addr, write, dump }));
        }
        UnresolvedExit::Unassigned { addr, write } => unassigned(hart, context, pc, addr, write)?,
        UnresolvedExit::Fault(fault) => return resolve_fault(hart, context, pc, fault),
        UnresolvedExit::UnknownEvent(number) => {
            let what =
                format!("it asked for system event {number}, which this version does not know");
            return Ok(Some(hart_fault(hart, what)));
        }
        UnresolvedExit::UnknownExit(number) => {
            let what =
                format!("it left the guest for reason {number}, which this version does not know");
            return Ok(Some(hart_fault(hart, what)));
        }
    }
    Ok(None)
}

/// Handles an `ebreak`: the firmware's first, then a debugger's; all others are the guest's own.
fn breakpoint(
    hart: &mut dyn Hart,
    context: &MachineContext,
    pc: u64,
) -> io::Result<Option<StopReason>> {
    let outcome = match &context.firmware {
        Some(firmware) => firmware.breakpoint(hart, context, pc)?,
        None => BreakpointOutcome::NotFirmware,
    };
    match outcome {
        BreakpointOutcome::Done => {}
        BreakpointOutcome::Stop(reason) => return Ok(Some(reason)),
        BreakpointOutcome::NotFirmware if is_debuggers(hart, context, pc)? => {}
        BreakpointOutcome::NotFirmware => raise(hart, Trap { cause: cause::BREAKPOINT, tval: pc })?,
    }
    Ok(None)
}

/// True if the `ebreak` at `pc` is a breakpoint of a debugger.
fn is_debuggers(hart: &dyn Hart, context: &MachineContext, pc: u64) -> io::Result<bool> {
    context.debugger.as_ref().map_or(Ok(false), |debugger| debugger.claims(hart, pc))
}

/// Raises the access fault of a plain load or store that caused an MMIO exit.
fn unassigned(
    hart: &mut dyn Hart,
    context: &MachineContext,
    pc: u64,
    addr: u64,
    write: bool,
) -> io::Result<()> {
    let satp = hart.get(Reg::Csr(Csr::Satp))?;
    let tval = match fetch(&context.ram, satp, pc) {
        Fetched::Word(word) => match access::decode(word) {
            Some(operand) => faulting_address(hart, &context.ram, satp, operand)?,
            None => 0,
        },
        // Another hart has just changed the code or its page table; `stval` may be zero.
        Fetched::Trap(_) | Fetched::Lost => 0,
    };
    if context.is_first(Notice::AccessFault) {
        warn!(
            "Hart {} takes an access fault for {addr:#x}, which is neither memory nor a device",
            hart.id()
        );
    }
    raise(hart, Trap { cause: if write { cause::STORE_ACCESS } else { cause::LOAD_ACCESS }, tval })
}

/// Raises the trap that hardware would have raised where KVM_RUN failed.
fn resolve_fault(
    hart: &mut dyn Hart,
    context: &MachineContext,
    pc: u64,
    fault: Fault,
) -> io::Result<Option<StopReason>> {
    let how = match fault {
        Fault::Unemulated => "an access that the kernel cannot emulate",
        Fault::Misaligned => "a misaligned access",
        Fault::Memory if context.ram.is_lost() => {
            return Ok(Some(StopReason::lost(&context.ram, None)));
        }
        Fault::Memory => "an access that the kernel cannot resolve (EFAULT)",
        Fault::Entry { reason, cpu } => {
            let what = format!(
                "Hart {} cannot enter the guest on CPU {cpu}: reason {reason:#x}",
                hart.id()
            );
            return Ok(Some(StopReason::HostFailure(what)));
        }
        Fault::Host(errno) => {
            let error = io::Error::from_raw_os_error(errno);
            let what = format!("KVM_RUN of hart {} failed: {error}", hart.id());
            return Ok(Some(StopReason::HostFailure(what)));
        }
    };
    let satp = hart.get(Reg::Csr(Csr::Satp))?;
    let trap = match fetch(&context.ram, satp, pc) {
        Fetched::Lost => return Ok(Some(StopReason::lost(&context.ram, None))),
        Fetched::Trap(trap) if at_vector(hart, pc)? => {
            let what = format!("its trap vector {pc:#x} cannot be fetched (cause {})", trap.cause);
            return Ok(Some(hart_fault(hart, what)));
        }
        Fetched::Trap(trap) => trap,
        Fetched::Word(word) => match access::decode(word) {
            Some(operand) if fault != Fault::Memory => {
                let tval = faulting_address(hart, &context.ram, satp, operand)?;
                Trap { cause: cause_of(operand.kind), tval }
            }
            _ => {
                let what = format!("instruction {word:#010x} at {pc:#x} made {how}");
                return Ok(Some(hart_fault(hart, what)));
            }
        },
    };
    if context.is_first(Notice::AccessFault) {
        warn!("Hart {} takes trap {} at {pc:#x}: {how}", hart.id(), trap.cause);
    }
    raise(hart, trap)?;
    Ok(None)
}

fn cause_of(kind: AccessKind) -> u64 {
    match kind {
        AccessKind::Load => cause::LOAD_ACCESS,
        AccessKind::Store => cause::STORE_ACCESS,
    }
}

/// True if a trap would lead back to `pc`: the hart would take it again and again, forever.
fn at_vector(hart: &dyn Hart, pc: u64) -> io::Result<bool> {
    Ok(hart.get(Reg::Mode)? == SUPERVISOR && vector(hart)? == pc)
}

fn vector(hart: &dyn Hart) -> io::Result<u64> {
    // The low bits are the mode of interrupts; exceptions always use the base.
    Ok(hart.get(Reg::Csr(Csr::Stvec))? & !3)
}

fn hart_fault(hart: &dyn Hart, what: String) -> StopReason {
    StopReason::HartFault { hart: hart.id(), what, dump: dump(hart) }
}

/// Enters the guest's trap vector as hardware does, with the program counter at the instruction as `sepc`.
fn raise(hart: &mut dyn Hart, trap: Trap) -> io::Result<()> {
    let pc = hart.get(Reg::Pc)?;
    let mode = hart.get(Reg::Mode)?;
    let old = hart.get(Reg::Csr(Csr::Sstatus))?;
    let mut new = old & !(sstatus::SIE | sstatus::SPIE | sstatus::SPP);
    if old & sstatus::SIE != 0 {
        new |= sstatus::SPIE;
    }
    if mode == SUPERVISOR {
        new |= sstatus::SPP;
    }
    hart.set(Reg::Csr(Csr::Sepc), pc)?;
    hart.set(Reg::Csr(Csr::Scause), trap.cause)?;
    hart.set(Reg::Csr(Csr::Stval), trap.tval)?;
    hart.set(Reg::Csr(Csr::Sstatus), new)?;
    hart.set(Reg::Mode, SUPERVISOR)?;
    let vector = vector(hart)?;
    hart.set(Reg::Pc, vector)
}

/// Raises the trap of an `ecall` in user mode.
pub(super) fn raise_call_from_user(hart: &mut dyn Hart) -> io::Result<()> {
    raise(hart, Trap { cause: cause::CALL_FROM_USER, tval: 0 })
}

/// Mode and `sstatus` of a hart after `sret` with this `sstatus`.
pub(super) fn after_return(sstatus: u64) -> (u64, u64) {
    let mode = if sstatus & sstatus::SPP == 0 { USER } else { SUPERVISOR };
    let enabled = if sstatus & sstatus::SPIE == 0 { 0 } else { sstatus::SIE };
    (mode, sstatus & !(sstatus::SIE | sstatus::SPP) | enabled | sstatus::SPIE)
}

/// `sstatus` with the interrupts of supervisor mode disabled.
pub(super) fn without_interrupts(sstatus: u64) -> u64 {
    sstatus & !sstatus::SIE
}

/// Fetches the instruction at `pc`, in halves, since it may cross a page boundary.
pub(super) fn fetch(ram: &GuestRam, satp: u64, pc: u64) -> Fetched {
    let half = |va| fetch_half(ram, satp, va);
    match half(pc) {
        Ok(low) if insn::length(low) == 2 => Fetched::Word(u32::from(low)),
        Ok(low) => match half(pc.wrapping_add(2)) {
            Ok(high) => Fetched::Word(u32::from(high) << 16 | u32::from(low)),
            Err(failed) => failed,
        },
        Err(failed) => failed,
    }
}

fn fetch_half(ram: &GuestRam, satp: u64, va: u64) -> Result<u16, Fetched> {
    let trap = |cause| Err(Fetched::Trap(Trap { cause, tval: va }));
    let addr = match translate(ram, satp, va) {
        Ok(addr) => addr,
        Err(WalkError::Page) => return trap(cause::FETCH_PAGE),
        Err(WalkError::Access) => return trap(cause::FETCH_ACCESS),
        Err(WalkError::Lost) => return Err(Fetched::Lost),
    };
    let mut bytes = [0; 2];
    match ram.read(addr, &mut bytes) {
        Ok(()) => Ok(u16::from_le_bytes(bytes)),
        Err(RamError::NotRam) => trap(cause::FETCH_ACCESS),
        Err(RamError::Lost) => Err(Fetched::Lost),
    }
}

/// The first address of the access that is not in RAM: the start of the second page for one that crosses pages and begins in RAM.
fn faulting_address(
    hart: &dyn Hart,
    ram: &GuestRam,
    satp: u64,
    operand: Operand,
) -> io::Result<u64> {
    let start = hart.get(Reg::X(operand.base))?.wrapping_add_signed(operand.offset);
    let next = (start & !(PAGE - 1)).wrapping_add(PAGE);
    let crosses = start.wrapping_add(u64::from(operand.size) - 1) & !(PAGE - 1) == next;
    let begins_in_ram = || translate(ram, satp, start).is_ok_and(|addr| ram.contains(addr, 1));
    Ok(if crosses && begins_in_ram() { next } else { start })
}
