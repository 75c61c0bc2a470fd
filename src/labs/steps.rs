//! Each lab step by step: the actions of each mode, and the transitions between them. `--explain` prints the steps of a lab,
//! `--picture` draws them. Numbers of causes are those of the RISC-V Privileged specification (12.1.8, 15.6.1).
//!
//! Left out: repetitions (each printed byte), and the host's kernel between two steps where it only passes on.

use super::catalog::{Lab, Variant};

/// A privilege mode, in order from the guest's user mode to the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Virtual user mode: a program in the guest.
    Vu,
    /// Virtual supervisor mode: the guest's kernel.
    Vs,
    /// Hypervisor-extended supervisor mode: the host's Linux with KVM.
    Hs,
    /// User mode of the host: rvmm.
    U,
}

/// One step: an action where `from` is `to`, else a transition.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// The mode that acts.
    pub from: Mode,
    /// The mode that continues.
    pub to: Mode,
    /// A short description.
    pub text: &'static str,
}

impl Mode {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vu => "VU",
            Self::Vs => "VS",
            Self::Hs => "HS",
            Self::U => "U",
        }
    }
}

/// The steps of a variant of a lab; none if they are not described.
#[must_use]
pub fn steps(lab: &Lab, variant: &Variant) -> &'static [Step] {
    let found = SCRIPTS.iter().find(|(name, of, _)| (*name, *of) == (lab.name, variant.name));
    found.map_or(&[], |(_, _, steps)| steps)
}

const fn at(mode: Mode, text: &'static str) -> Step {
    Step { from: mode, to: mode, text }
}

const fn go(from: Mode, to: Mode, text: &'static str) -> Step {
    Step { from, to, text }
}

use Mode::{Hs, U, Vs, Vu};

const RUN: Step = go(U, Hs, "KVM_RUN: run this hart");
const TO_VS: Step = go(Hs, Vs, "sret with hstatus.SPV = 1 and sstatus.SPP = 1");
const TO_VU: Step = go(Hs, Vu, "sret with hstatus.SPV = 1 and sstatus.SPP = 0");
const SHIM: Step = go(Vs, Hs, "trap shim's ebreak: cause 3, not delegated: VM exit");
const SATP: Step = at(Vs, "satp = its own table (Sv39)");
const RESET_CALL: Step = go(Vs, Hs, "ecall, cause 10: SBI System Reset");
const RESET_EVENT: Step = go(Hs, U, "KVM_EXIT_SYSTEM_EVENT: the machine ends");

/// The steps by lab and variant.
const SCRIPTS: &[(&str, &str, &[Step])] = &[
    (
        "h_1_0",
        "usual",
        &[
            RUN,
            TO_VU,
            at(Vu, "li a7, 8"),
            go(Vu, Vs, "ecall: cause 8, by hedeleg to stvec"),
            SHIM,
            go(Hs, U, "KVM_RUN returns: KVM_EXIT_DEBUG"),
            at(U, "scause 8, a7 8: it asks for shutdown"),
        ],
    ),
    (
        "simple_hv",
        "usual",
        &[
            RUN,
            TO_VU,
            go(Vu, Hs, "csrr a1, mhartid: illegal, cause 2"),
            go(Hs, Vs, "KVM makes it the guest's: scause = 2, pc = stvec"),
            SHIM,
            go(Hs, U, "KVM_EXIT_DEBUG"),
            at(U, "f14025f3 decoded: a1 is 0x1234, pc is sepc + 4"),
            go(U, Vu, "KVM_RUN: on behind the csrr"),
            go(Vu, Hs, "ld a0, 64(zero): guest-page fault, cause 21"),
            go(Hs, U, "no memory there: KVM_EXIT_MMIO, 8 bytes at 0x40"),
            at(U, "the device at 0x40 says 0x6688"),
            go(U, Hs, "KVM_RUN, with the answer"),
            go(Hs, Vu, "a0 = 0x6688, sepc + 4, sret"),
            go(Vu, Vs, "ecall with a7 = 8: cause 8"),
            go(Vs, U, "shim's ebreak, as before"),
            at(U, "a0 = 0x6688, a1 = 0x1234: shutdown"),
        ],
    ),
    (
        "h_2_0",
        "map",
        &[
            at(U, "maps the file; a read-only memory slot at 0x2200_0000"),
            RUN,
            TO_VS,
            SATP,
            at(Vs, "lwu: vsatp's table says 0x2200_0000"),
            go(Vs, Hs, "hgatp's table: no page yet, cause 21"),
            at(Hs, "a slot is there: KVM maps the page"),
            go(Hs, Vs, "sret to the same lwu, which now reads pfld"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "h_2_0",
        "lazy",
        &[
            RUN,
            TO_VS,
            SATP,
            at(Vs, "lwu: vsatp's table says 0x2200_0000"),
            go(Vs, Hs, "guest-page fault, cause 21, address in htval"),
            go(Hs, U, "no slot there: KVM_EXIT_MMIO"),
            at(U, "answers from the file, makes the page a memory slot"),
            go(U, Hs, "KVM_RUN, with the answer"),
            go(Hs, Vs, "register written, sepc + 4, sret"),
            at(Vs, "further loads: no exit to rvmm"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "h_2_0",
        "passthrough",
        &[
            at(U, "maps /dev/mem at the flash; a memory slot of it"),
            RUN,
            TO_VS,
            SATP,
            at(Vs, "lwu: vsatp's table says 0x2200_0000"),
            go(Vs, Hs, "hgatp's table: no page yet, cause 21"),
            at(Hs, "KVM maps the page of the real flash"),
            go(Hs, Vs, "sret to the same lwu: the hardware answers"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "h_3_0",
        "kernel",
        &[
            RUN,
            TO_VS,
            go(Vs, Hs, "ecall, cause 10: SBI set_timer"),
            at(Hs, "vstimecmp = when (Sstc), else a timer of Linux"),
            go(Hs, Vs, "sret: on behind the ecall"),
            at(Vs, "the first task spins"),
            at(Vs, "time is up: VSTIP, interrupt 5, to stvec"),
            go(Vs, Hs, "its trap code calls set_timer again"),
            go(Hs, Vs, "sret"),
            at(Vs, "sret to the second task"),
        ],
    ),
    (
        "h_3_0",
        "user",
        &[
            RUN,
            TO_VS,
            go(Vs, Hs, "set_timer: an ebreak in the ecall's place, cause 3"),
            go(Hs, U, "KVM_EXIT_DEBUG"),
            at(U, "sip.STIP = 0; a thread sleeps until then"),
            go(U, Vs, "KVM_RUN: on behind it"),
            at(Vs, "the first task spins"),
            at(U, "the thread wakes and kicks the hart: a signal"),
            go(Vs, Hs, "the host's interrupt: VM exit"),
            go(Hs, U, "KVM_RUN returns EINTR"),
            at(U, "vstimecmp = 0: VSTIP"),
            go(U, Vs, "KVM_RUN: interrupt 5, to stvec"),
            at(Vs, "its trap code sets the timer anew, sret to the second task"),
        ],
    ),
    (
        "h_4_0",
        "usual",
        &[
            RUN,
            TO_VS,
            at(Vs, "copies the program from the flash, builds its page table"),
            go(Vs, Vu, "sret with sstatus.SPP = 0"),
            at(Vu, "li a7, 93 (exit)"),
            go(Vu, Vs, "ecall: cause 8, by hedeleg; nobody else sees it"),
            at(Vs, "scause 8: handle_syscall"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "rvm-1",
        "usual",
        &[
            at(U, "puts an ebreak where an ecall has a7 from 0 to 8"),
            RUN,
            TO_VS,
            at(Vs, "a7 = 1 (putchar), a0 = '['"),
            go(Vs, Hs, "ebreak: cause 3, not delegated: VM exit"),
            go(Hs, U, "KVM_EXIT_DEBUG at a place that it knows"),
            at(U, "prints a0; a0 = 0, pc + 4"),
            go(U, Vs, "KVM_RUN; and so on for each byte"),
            go(Vs, U, "a7 = 8 (shutdown): the same way"),
        ],
    ),
    (
        "rvm-2",
        "usual",
        &[
            RUN,
            TO_VS,
            go(Vs, Vu, "sret to program 0"),
            go(Vu, Hs, "its sret: virtual instruction, cause 22"),
            go(Hs, Vs, "KVM makes it the guest's: scause = 2, pc = stvec"),
            at(Vs, "kills it: IllegalInstruction"),
            go(Vs, Vu, "sret to program 1"),
            go(Vu, Hs, "sd zero, 0(zero): guest-page fault, cause 23"),
            go(Hs, U, "no slot there: KVM_EXIT_MMIO"),
            at(U, "nothing there: scause = 7, sepc, stval, sstatus; pc = stvec"),
            go(U, Vs, "KVM_RUN: the guest has its access fault"),
            at(Vs, "kills it: PageFault; on to program 2"),
        ],
    ),
    (
        "smp",
        "usual",
        &[
            go(U, Hs, "four threads, each in KVM_RUN for its hart"),
            go(Hs, Vs, "sret: hart 0 only; the others wait in KVM"),
            go(Vs, Hs, "ecall: SBI hart_start(1, address)"),
            go(Hs, Vs, "sret: hart 1 begins, its id in a0"),
            go(Vs, Hs, "ecall: SBI set_timer, each for itself"),
            go(Vs, Hs, "wfi: cause 22 (hstatus.VTW); the thread sleeps"),
            go(Hs, Vs, "its timer: VSTIP; wfi is over"),
            go(Vs, Hs, "ecall: SBI send_ipi to the right neighbour"),
            go(Hs, Vs, "KVM sets VSSIP there and wakes it"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "two-vms",
        "usual",
        &[
            at(U, "builds left and right; a Unix socket between them"),
            RUN,
            TO_VS,
            go(Vs, Hs, "left: sb to its port: guest-page fault, cause 23"),
            go(Hs, U, "KVM_EXIT_MMIO: a byte, written to the socket"),
            at(U, "right's end of the socket has a byte: its port too"),
            go(U, Vs, "KVM_RUN of right: on behind its last access"),
            go(Vs, Hs, "right: lbu from its port: cause 21"),
            go(Hs, U, "KVM_EXIT_MMIO: the byte is the answer"),
            go(U, Vs, "KVM_RUN: right has the byte in a register"),
            go(Vs, U, "putchar: what came, on the console"),
            at(U, "the other way round at the same time"),
        ],
    ),
    (
        "dtb",
        "generated",
        &[
            at(U, "asks KVM for ISA, MMU, timebase; builds the tree"),
            at(U, "kernel at 0x80200000, tree high in RAM"),
            at(U, "a0 = hart id, a1 = the tree, pc = the kernel"),
            RUN,
            TO_VS,
            at(Vs, "reads the tree's magic and size at a1"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "dtb",
        "moved",
        &[
            at(U, "the same tree, at 0x98000000 (--dtb-addr)"),
            at(U, "the kernel at 0x90000000 (--load, --entry)"),
            at(U, "a0 = hart id, a1 = the tree, pc = the kernel"),
            RUN,
            TO_VS,
            at(Vs, "reads the tree's magic and size at a1"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "dtb",
        "own",
        &[
            at(U, "builds a machine, writes its tree (--dump-dtb)"),
            at(U, "builds another one with that file (--dtb)"),
            at(U, "the file goes into RAM as it is"),
            RUN,
            TO_VS,
            at(Vs, "reads the tree's magic and size at a1"),
            RESET_CALL,
            RESET_EVENT,
        ],
    ),
    (
        "linux-smp",
        "usual",
        &[
            at(U, "loads kernel, init, device tree; makes four harts"),
            go(U, Vs, "KVM_RUN: hart 0, a1 = device tree"),
            go(Vs, Hs, "ecall: SBI base, timer, hart_start(1 to 3)"),
            go(Hs, Vs, "answered in KVM; four harts run"),
            go(Vs, U, "a load or store of the UART: KVM_EXIT_MMIO"),
            go(U, Vs, "KVM_RUN with the answer, or an interrupt"),
            go(Vs, Vu, "sret: init, rvmm itself, begins"),
            go(Vu, Vs, "system calls and page faults: Linux's own, by hedeleg"),
            go(Vs, U, "poweroff: a store to the power device, KVM_EXIT_MMIO"),
            at(U, "ends the machine"),
        ],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labs::LABS;

    #[test]
    fn every_script_is_that_of_a_variant_of_a_lab() {
        for (name, of, _) in SCRIPTS {
            let lab = Lab::find(name).unwrap();
            assert!(lab.variant(Some(of)).is_some(), "{name} {of}");
        }
        let all = LABS.iter().flat_map(|lab| lab.variants.iter().map(move |one| (lab, one)));
        assert_eq!(all.filter(|(lab, one)| !steps(lab, one).is_empty()).count(), SCRIPTS.len());
    }

    #[test]
    fn each_step_begins_in_the_mode_in_which_the_one_before_ended() {
        // Steps of the host's user space are excepted: its threads run beside the guest, as harts do beside each other.
        for (name, of, steps) in SCRIPTS.iter().filter(|(name, ..)| *name != "smp") {
            for pair in steps.windows(2) {
                assert!(
                    pair[0].to == pair[1].from || pair[1].from == U || pair[0].to == U,
                    "{name} {of}: {pair:?}"
                );
            }
        }
    }
}
