//! The trap shim: a page that is read-only for the guest, to which `stvec` points until the guest sets it.
//!
//! Bare payloads have no trap vector: on KVM their first trap would lead to address 0, which is unassigned. Here it leads to a
//! breakpoint, and with the trap's CSRs rvmm does what any hypervisor does after a VM exit: emulate the instruction and return to
//! the next one, handle the SBI call, or report the trap and stop. Once the guest has set a vector, its traps are its own.
//!
//! A guest that enables its page tables without a vector of its own takes a page fault at the shim again and again, as it would
//! at address 0 on hardware.

use std::io;

use super::calls::Return;
use super::{BreakpointOutcome, Firmware};
use crate::riscv::insn::{CSRCI_SIP_SSIP, EBREAK, ECALL};
use crate::riscv::trap::cause;
use crate::vcpu::context::MachineContext;
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::stop::StopReason;
use crate::vcpu::trap::{self, Fetched};

/// Address of the page. Not page 0, so that a guest's loads from there still exit.
pub const PAGE: u64 = 0x1000;

/// Initial value of `stvec`.
pub const VECTOR: u64 = PAGE;

/// Address of the `ecall` by which calls are forwarded to the kernel.
pub const KERNEL_CALL: u64 = PAGE + 0x10;

/// The breakpoint after it.
pub const RETURN: u64 = KERNEL_CALL + ECALL_LEN;

/// Address of `csrci sip, 2`, by which a hart clears its own software interrupt. User space cannot clear it without losing one that
/// arrives meanwhile.
pub const CLEAR_IPI: u64 = RETURN + ECALL_LEN;

/// The breakpoint after it.
pub const CLEARED: u64 = CLEAR_IPI + ECALL_LEN;

/// Bytes of an `ecall`.
pub const ECALL_LEN: u64 = 4;

/// The contents of the page, from its start.
#[must_use]
pub fn code() -> Vec<u8> {
    // The first word is the vector; the next three are unused.
    [EBREAK, EBREAK, EBREAK, EBREAK, ECALL, EBREAK, CSRCI_SIP_SSIP, EBREAK]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

impl Firmware {
    /// Handles a trap of a guest without a vector of its own.
    pub(super) fn vectorless(
        &self,
        hart: &mut dyn Hart,
        context: &MachineContext,
    ) -> io::Result<BreakpointOutcome> {
        let pc = hart.get(Reg::Csr(Csr::Sepc))?;
        match hart.get(Reg::Csr(Csr::Scause))? {
            cause::ILLEGAL_INSTRUCTION => {
                let word = match hart.get(Reg::Csr(Csr::Stval))? {
                    // Hardware may write zero instead of the instruction.
                    0 => trap::fetch(&context.ram, hart.get(Reg::Csr(Csr::Satp))?, pc),
                    word => Fetched::Word((word & 0xffff_ffff) as u32),
                };
                match word {
                    Fetched::Word(word) if self.emulate(hart, word)? => {
                        leave(hart, pc.wrapping_add(4))?;
                        Ok(BreakpointOutcome::Done)
                    }
                    Fetched::Word(word) => Ok(stop(
                        hart,
                        format!(
                            "it has no trap vector, and instruction {word:#010x} at {pc:#x} is illegal in its mode (--csr NAME=VALUE gives it CSRs of machine mode, --start-mode vs those of supervisor mode)"
                        ),
                    )),
                    Fetched::Trap(_) | Fetched::Lost => Ok(stop(
                        hart,
                        format!(
                            "it has no trap vector, and the instruction at {pc:#x} is illegal and cannot be read"
                        ),
                    )),
                }
            }
            cause::CALL_FROM_USER => {
                let back = Return::from_trap(hart, pc.wrapping_add(ECALL_LEN))?;
                self.call_from(hart, context, back)
            }
            other => {
                let tval = hart.get(Reg::Csr(Csr::Stval))?;
                Ok(stop(
                    hart,
                    format!(
                        "it has no trap vector and took trap {other} at {pc:#x}, stval {tval:#x}"
                    ),
                ))
            }
        }
    }
}

/// Returns from the trap to `pc`, as `sret` does (Privileged specification, 12.1.1).
fn leave(hart: &mut dyn Hart, pc: u64) -> io::Result<()> {
    Return::from_trap(hart, pc)?.take(hart)
}

fn stop(hart: &dyn Hart, what: String) -> BreakpointOutcome {
    BreakpointOutcome::Stop(StopReason::HartFault {
        hart: hart.id(),
        what,
        dump: crate::vcpu::dump(hart),
    })
}
