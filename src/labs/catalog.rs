//! The list of labs, and the expected lines of each, which are those of the courses' own graders.

/// An exercise.
#[derive(Debug)]
pub struct Lab {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its question, in one line.
    pub question: &'static str,
    /// An explanation.
    pub story: &'static str,
    /// The ways to run it; the first is the usual one.
    pub variants: &'static [Variant],
    /// Its guest.
    pub(super) guest: Guest,
}

/// A way to run a lab.
#[derive(Debug)]
pub struct Variant {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its difference from the others.
    pub summary: &'static str,
    /// The expected lines, whole and in this order, among others; of two machines in any order.
    pub expects: &'static [&'static str],
}

/// The guest of a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guest {
    /// A flat file of this project's at an address.
    Bare { payload: &'static [u8], addr: u64 },
    /// The same file in two machines, with these configurations.
    Pair { payload: &'static [u8], configs: [&'static str; 2] },
    /// A Linux kernel of the user's, or the host's own.
    Linux,
}

macro_rules! payload {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".bin"))
    };
}

/// The load address of the course's guests: after the room for firmware.
pub(super) const LOAD_ADDRESS: u64 = 0x8020_0000;
/// The load address of the RVM tutorial's guests.
const RVM: u64 = 0x9000_0000;

/// The user program that h_4_0 loads from the flash.
pub(super) const ORIGIN: &[u8] = payload!("origin");

const fn bare(payload: &'static [u8], addr: u64) -> Guest {
    Guest::Bare { payload, addr }
}

const ENDS: [&str; 2] = ["Shutdown vm normally!", "Hypervisor ok!"];
const FLASH: [&str; 2] =
    ["Try to access dev region [0xFFFFFFC022000000], got 0x646C6670", "Got pflash magic: pfld"];
const TASKS: &str = "Multi-task(Preemptible) ok!";

/// Every lab, in teaching order.
pub const LABS: &[Lab] = &[
    Lab {
        name: "h_1_0",
        question: "How does a hypervisor enter a guest, and how does it come back?",
        story: "The guest is two instructions: it asks to be shut down. It runs in VU mode, where its ecall is a trap to VS mode; \
                there the trap shim, a page of rvmm's, turns the trap into a VM exit. rvmm reads the cause and a7 from the hart, \
                as the course's hypervisor reads them from its saved registers.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &[
                "VmExit Reason: VSuperEcall: Some(Reset(Reset { reset_type: Shutdown, reason: NoReason }))",
                ENDS[0],
                ENDS[1],
            ],
        }],
        guest: bare(payload!("h_1_0"), LOAD_ADDRESS),
    },
    Lab {
        name: "simple_hv",
        question: "What does a hypervisor do about an instruction that its guest may not execute, and about memory that is not there?",
        story: "The guest reads a CSR of machine mode, then memory at 0x40, then asks for shutdown. The first is an illegal \
                instruction: rvmm decodes it, writes 0x1234 into its destination register and goes on behind it. The second is a guest \
                page fault: KVM decodes the load, a device at 0x40 answers 0x6688, KVM writes the register. When the guest asks \
                for shutdown, both values are in its registers.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &[
                "Bad instruction: 0xf14025f3 sepc: 0x80200000",
                "LoadGuestPageFault: stval0x40 sepc: 0x80200004",
                "VmxExit Reason: VSuperEcall: Some(Reset(Reset { reset_type: Shutdown, reason: NoReason }))",
                "a0 = 0x6688, a1 = 0x1234",
                ENDS[0],
                ENDS[1],
            ],
        }],
        guest: bare(payload!("simple_hv"), LOAD_ADDRESS),
    },
    Lab {
        name: "h_2_0",
        question: "How does a guest come to a device, through two page tables?",
        story: "The guest has its own page table (Sv39) and reads the flash at a virtual address. Its table leads to \
                guest-physical 0x22000000; what is there is the hypervisor's choice: memory of a file, memory that is mapped at the \
                first load, or the host's own flash.",
        variants: &[
            Variant {
                name: "map",
                summary: "the file is guest memory from the start: no exit",
                expects: &FLASH,
            },
            Variant {
                name: "lazy",
                summary: "the first load exits and is answered; then the page is guest memory",
                expects: &["NestedPageFault addr 0x22000000", FLASH[0], FLASH[1]],
            },
            Variant {
                name: "passthrough",
                summary: "the host's own flash at the same address (root; a host whose flash holds an image of mkpflash)",
                expects: &FLASH,
            },
        ],
        guest: bare(payload!("h_2_0"), LOAD_ADDRESS),
    },
    Lab {
        name: "h_3_0",
        question: "Who interrupts a guest that never gives up the CPU?",
        story: "Two tasks of the guest share a hart and only spin. The guest sets its timer by an SBI call, and the timer's \
                interrupt lets it switch between them. In the variant kernel KVM does all of it without exits to rvmm; in the variant user rvmm \
                handles each call and raises each interrupt itself, as the course's hypervisor does.",
        variants: &[
            Variant { name: "kernel", summary: "KVM implements the timer", expects: &[TASKS] },
            Variant {
                name: "user",
                summary: "rvmm implements the timer, and prints its events",
                expects: &[
                    "Set timer...",
                    "timer irq emulation",
                    "Set timer...",
                    "timer irq emulation",
                    TASKS,
                ],
            },
        ],
        guest: bare(payload!("h_3_0"), LOAD_ADDRESS),
    },
    Lab {
        name: "h_4_0",
        question: "Who answers the system call of a program in a guest?",
        story: "A small monolithic kernel loads a program from the flash and starts it in user mode. Its ecall is delegated to the \
                guest's kernel by hardware (hedeleg): rvmm sees only the end.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &["handle_syscall ...", "monolithic kernel exit [Some(0)] normally!"],
        }],
        guest: bare(payload!("h_4_0"), LOAD_ADDRESS),
    },
    Lab {
        name: "rvm-1",
        question: "What becomes of a guest's call to what it takes for firmware?",
        story: "Each byte of the guest's line is an ecall of SBI 0.1. A host's kernel built with it passes the call to rvmm; on others, \
                Debian's among them, rvmm has replaced the ecall with a breakpoint, and handles the call there.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &["[INFO][GUEST] Hello, world!", "hello world in kernel"],
        }],
        guest: bare(payload!("rvm_1"), RVM),
    },
    Lab {
        name: "rvm-2",
        question: "Which traps of a guest are the guest's own, and who gives it those that the hardware does not?",
        story: "A batch kernel runs eight user programs. An illegal instruction traps to the guest's kernel by itself. The store to \
                address 0 does not: KVM makes an exit of it, since nothing is there, and rvmm injects the access fault into \
                the guest (--unassigned fault) by its vscause, vstval, vsepc and vsstatus.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &[
                "[kernel] IllegalInstruction in application, core dumped.",
                "[kernel] PageFault in application, core dumped.",
                "3^10000=5079(MOD 10007)",
                "Test power OK!",
                "[kernel] Application exited with code 1234",
                "Test write1 OK!",
                "Test write0 OK!",
                "hello world in kernel",
            ],
        }],
        guest: bare(payload!("rvm_2"), RVM),
    },
    Lab {
        name: "smp",
        question: "How do the harts of a machine start, how do they call each other, and whose timer is it?",
        story: "Four harts, three of which wait inside KVM until hart 0 starts them by SBI HSM. Each has a thread of its own on \
                the host, its own timer, and takes an interrupt from its neighbour; all of that KVM does in the kernel.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &[
                "smp: harts: 4, timers: 4, interrupts between them: 4",
                "smp: all harts are up",
            ],
        }],
        guest: bare(payload!("smp"), LOAD_ADDRESS),
    },
    Lab {
        name: "two-vms",
        question: "How do two virtual machines talk, when neither knows of the other?",
        story: "Two machines in one process, each from a configuration file of its own (guests/labs/two_vms). Each has a second serial \
                port; the host connects the two by a Unix socket. A byte that one guest stores to its port is an exit, passes through the \
                socket, and is read when the other one loads from its port: another exit.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &[
                "[left] got over the line: hello from right",
                "[right] got over the line: hello from left",
            ],
        }],
        guest: Guest::Pair {
            payload: payload!("two_vms"),
            configs: [
                include_str!("../../guests/labs/two_vms/left.json"),
                include_str!("../../guests/labs/two_vms/right.json"),
            ],
        },
    },
    Lab {
        name: "dtb",
        question: "What does a kernel know when it starts, and who told it?",
        story: "A guest gets its hart's id in a0 and the address of a device tree in a1, and nothing else. rvmm generates the tree from \
                what it has built; kernel and tree may lie anywhere in RAM, and a tree of the user's own is taken as it is.",
        variants: &[
            Variant {
                name: "generated",
                summary: "kernel and tree where rvmm puts them",
                expects: &["dtb: boots"],
            },
            Variant {
                name: "moved",
                summary: "the kernel at 0x90000000, the tree at 0x98000000",
                expects: &["dtb: boots"],
            },
            Variant {
                name: "own",
                summary: "the generated tree, dumped to a file and given back as the user's own",
                expects: &["dtb: boots"],
            },
        ],
        guest: bare(payload!("dtb"), LOAD_ADDRESS),
    },
    Lab {
        name: "linux-smp",
        question: "Does a Linux that nobody has changed come up on four harts?",
        story: "The host's own kernel, or the one given, with rvmm's device tree, interrupt controller and init: no patch, no \
                special configuration.",
        variants: &[Variant {
            name: "usual",
            summary: "",
            expects: &["user space reached on 4 harts"],
        }],
        guest: Guest::Linux,
    },
];

impl Lab {
    /// The lab called `name`.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        LABS.iter().find(|lab| lab.name == name)
    }

    /// The lab's own guest, a flat file; `None` where it is a Linux kernel.
    #[must_use]
    pub fn payload(&self) -> Option<&'static [u8]> {
        match self.guest {
            Guest::Bare { payload, .. } | Guest::Pair { payload, .. } => Some(payload),
            Guest::Linux => None,
        }
    }

    /// The variant called `name`, or the usual one.
    #[must_use]
    pub fn variant(&self, name: Option<&str>) -> Option<&'static Variant> {
        match name {
            None => self.variants.first(),
            Some(name) => self.variants.iter().find(|variant| variant.name == name),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::riscv::sbi;
    use crate::vcpu::firmware::sites;

    #[test]
    fn every_lab_has_a_name_a_question_and_expected_lines() {
        let mut names = HashSet::new();
        for lab in LABS {
            assert!(names.insert(lab.name), "{} twice", lab.name);
            assert!(lab.question.ends_with('?') && lab.story.ends_with('.'), "{}", lab.name);
            assert!(!lab.variants.is_empty());
            for variant in lab.variants {
                assert!(!variant.expects.is_empty(), "{} {}", lab.name, variant.name);
                assert_eq!(variant.summary.is_empty(), lab.variants.len() == 1, "{}", lab.name);
            }
        }
    }

    #[test]
    fn the_guest_of_simple_hv_is_the_courses_byte_for_byte() {
        let Guest::Bare { payload, addr } = Lab::find("simple_hv").unwrap().guest else {
            panic!("no payload")
        };
        let code =
            [0xf3, 0x25, 0x40, 0xf1, 0x03, 0x35, 0x00, 0x04, 0xa1, 0x48, 0x73, 0x00, 0x00, 0x00];
        assert_eq!((&payload[..14], addr), (&code[..], 0x8020_0000));
        assert!(payload[14..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_guests_are_a_few_kib_each() {
        for lab in LABS {
            if let Guest::Bare { payload, .. } = lab.guest {
                assert!((4..4096).contains(&payload.len()), "{}: {}", lab.name, payload.len());
            }
        }
    }

    /// The constant numbers of the calls in a lab's guest.
    fn numbers(name: &str) -> Vec<u64> {
        let Guest::Bare { payload, .. } = Lab::find(name).unwrap().guest else {
            panic!("no payload")
        };
        let constant = |site: sites::Site| match site.number {
            sites::Number::Constant(number) => Some(number),
            sites::Number::Moved => None,
        };
        sites::find(payload).into_iter().filter_map(constant).collect()
    }

    #[test]
    fn the_print_call_of_every_guest_that_prints_is_found() {
        for name in ["h_2_0", "h_3_0", "h_4_0", "rvm-1", "rvm-2", "smp", "dtb"] {
            let numbers = numbers(name);
            assert!(numbers.contains(&1), "{name}: {numbers:x?}");
        }
        let timers = numbers("h_3_0").into_iter().filter(|number| sbi::is_set_timer(*number));
        assert_eq!(timers.count(), 1);
    }
}
