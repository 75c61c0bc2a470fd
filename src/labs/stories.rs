//! Explanations of exits: the parts of hardware, KVM and rvmm, in a few sentences each. Sections are those of the RISC-V Privileged
//! specification, version 20250508 (12 supervisor level, 15 hypervisor extension), and of the SBI specification, version 3.0.

use crate::riscv::register::A7;
use crate::riscv::trap::cause;
use crate::vcpu::exit::{Fault, SystemEvent};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::observer::ExitRecord;

/// Explains a trap that a guest without a vector of its own took to the shim.
pub(super) fn of_trap(hart: &dyn Hart) -> Option<String> {
    let csr = |csr| hart.get(Reg::Csr(csr)).unwrap_or(0);
    let (scause, pc, tval) = (csr(Csr::Scause), csr(Csr::Sepc), csr(Csr::Stval));
    let (what, then) = match scause {
        cause::ILLEGAL_INSTRUCTION => (
            "an illegal instruction. Hardware: the instruction is privileged beyond the guest's mode, so the hart trapped (cause 2) to HS \
             mode, or by hedeleg straight to VS mode",
            "decodes it; one that reads a CSR that it was given (--csr) is emulated: the destination register is written, and the \
             hart goes on behind it, as after sret",
        ),
        cause::CALL_FROM_USER => (
            "an ecall from user mode. Hardware: cause 8, delegated to VS mode (hedeleg)",
            "takes a7 for the number of an SBI call, and answers it or has the kernel answer it",
        ),
        _ => ("a trap", "cannot emulate it, and stops the machine"),
    };
    Some(format!(
        "{what}. The guest has no trap vector: stvec leads to the trap shim, whose breakpoint is the exit. scause {scause}, sepc {pc:#x}, \
         stval {tval:#x}. rvmm {then} (Privileged specification, 12.1.7 to 12.1.9, 15.2.2 and 15.6.2)."
    ))
}

/// Explains any other exit; `None` for one that the guest did not cause.
pub(super) fn of_exit(hart: &dyn Hart, seen: &ExitRecord, pc: u64) -> Option<String> {
    let a7 = hart.get(Reg::X(A7)).unwrap_or(0);
    Some(match *seen {
        ExitRecord::MmioRead { addr, len } => format!(
            "a load of {len} bytes from {addr:#x} at pc {pc:#x}. Hardware: the second stage of translation has no page there, so a \
             guest-page fault (cause 21) to HS mode, with the address in htval. KVM: no memory slot, so it decodes the load and leaves to \
             user space (KVM_EXIT_MMIO). rvmm: finds the device on its bus; the next KVM_RUN writes the answer into the register \
             and goes on behind the load (Privileged specification, 15.5)."
        ),
        ExitRecord::MmioWrite { addr, len, value } => format!(
            "a store of {value:#x} ({len} bytes) to {addr:#x} at pc {pc:#x}. Hardware: a guest-page fault (cause 23) to HS mode. KVM: \
             decodes the store (KVM_EXIT_MMIO). rvmm: gives it to the device on its bus."
        ),
        ExitRecord::Sbi { extension, function, .. } => format!(
            "an SBI call, extension {extension:#x}, function {function}, at pc {pc:#x}. Hardware: ecall from VS mode (cause 10) to HS \
             mode. KVM: not one that it answers itself (KVM_EXIT_RISCV_SBI). rvmm: answers in a0 and a1 (SBI, chapter 3)."
        ),
        ExitRecord::Csr { number } => format!(
            "an access to CSR {number:#x} at pc {pc:#x}. Hardware: a virtual-instruction exception (cause 22). KVM: leaves it to user space \
             (KVM_EXIT_RISCV_CSR)."
        ),
        ExitRecord::System(SystemEvent::Shutdown(_)) => format!(
            "the guest asks for poweroff at pc {pc:#x}. Hardware: ecall from VS mode (cause 10). KVM: SBI SRST, so it stops all harts \
             (KVM_EXIT_SYSTEM_EVENT). rvmm: ends the machine (SBI, chapter 10)."
        ),
        ExitRecord::System(_) => format!(
            "a system event at pc {pc:#x}: the guest asks for a reset, or something that this version does not know."
        ),
        ExitRecord::Breakpoint => format!(
            "a breakpoint at pc {pc:#x} in place of an ecall, a7 = {a7:#x}. Hardware: breakpoint exception (cause 3), which KVM does not \
             delegate while guest debugging is on (KVM_EXIT_DEBUG). rvmm: takes the registers for an SBI call that the host's kernel \
             does not answer, or that is to be seen, and goes on behind it."
        ),
        ExitRecord::Fault(fault) => {
            let what = match fault {
                Fault::Unemulated => "an access that KVM does not emulate",
                Fault::Misaligned => "a misaligned access to where no memory is",
                Fault::Memory => "memory that the host cannot give",
                Fault::Entry { .. } | Fault::Host(_) => "a refusal of the host",
            };
            format!(
                "{what} at pc {pc:#x}: KVM_RUN failed. rvmm: works out which trap hardware would have raised, and raises it."
            )
        }
        ExitRecord::Unknown(reason) => {
            format!("exit {reason}, which this version does not know, at pc {pc:#x}.")
        }
        ExitRecord::Interrupted => return None,
    })
}
