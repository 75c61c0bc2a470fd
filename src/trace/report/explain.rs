//! What an exit is: for each kind what the hardware did, what KVM did, what rvmm did and where to read on; for the causes that
//! occur, what they are there for.
//!
//! Sections are named by their titles, since their numbers change with the editions of the specifications.

use crate::trace::record::Kind;

/// The explanation of a kind.
pub(super) struct Explanation {
    pub(super) title: &'static str,
    pub(super) hardware: &'static str,
    pub(super) kvm: &'static str,
    pub(super) rvmm: &'static str,
    pub(super) read: &'static str,
}

const MMIO_READ: Explanation = Explanation {
    title: "Load from a device register",
    hardware: "The guest loads from a guest-physical address that the second stage of translation (hgatp) does not map. The hart raises a \
        load guest-page fault (cause 21), leaves VS-mode and enters the host's kernel in HS-mode; htval holds the address and htinst, where \
        the hart fills it, the instruction.",
    kvm: "There is no memory slot at the address, so it is no page that could be mapped. KVM decodes the instruction (from htinst, or read \
        out of the guest with HLVX) for its width and register, and KVM_RUN returns with KVM_EXIT_MMIO.",
    rvmm: "The bus finds the device by its address, the device's lock is taken, and the device answers. The next KVM_RUN writes the value \
        into the register, moves the program counter behind the load and enters the guest again.",
    read: "Privileged specification, Hypervisor extension: Two-Stage Address Translation, and Trap Cause Codes. KVM API: KVM_EXIT_MMIO.",
};

const MMIO_WRITE: Explanation = Explanation {
    title: "Store to a device register",
    hardware: "The guest stores to a guest-physical address that the second stage of translation does not map: a store guest-page fault \
        (cause 23), from VS-mode into the host's kernel.",
    kvm: "First KVM asks its own devices and the doorbells that rvmm gave it (ioeventfd): a virtio driver's kick ends there, without an exit \
        of this kind. What is left becomes KVM_EXIT_MMIO with the value that was stored.",
    rvmm: "The bus finds the device, and the device takes the value. The guest waits for that, since the next KVM_RUN is what moves its \
        program counter on.",
    read: "Privileged specification, Hypervisor extension: Two-Stage Address Translation, and Trap Cause Codes. KVM API: KVM_EXIT_MMIO, \
        KVM_IOEVENTFD.",
};

const SBI: Explanation = Explanation {
    title: "SBI call that the kernel leaves to rvmm",
    hardware: "The guest's kernel runs ecall: an environment call from VS-mode (cause 10), which is never delegated to the guest, enters the \
        host's kernel.",
    kvm: "KVM is the guest's firmware: it answers timers, interrupts between harts, remote fences and the starting of harts itself. Calls \
        of the console, of vendors and of experiments it hands on: KVM_RUN returns with KVM_EXIT_RISCV_SBI.",
    rvmm: "The call is answered by its extension and function; a0 and a1 go back with the next KVM_RUN, which also steps over the ecall. Where \
        the console has no room, the same call is made again.",
    read: "SBI specification: Binary Encoding, and the chapter of the extension. KVM API: KVM_EXIT_RISCV_SBI.",
};

const CSR: Explanation = Explanation {
    title: "CSR access that the kernel leaves to rvmm",
    hardware: "The guest reads or writes a CSR that it may not touch by itself: a virtual-instruction exception (cause 22) enters the \
        host's kernel.",
    kvm: "KVM decodes the instruction, finds that the CSR is one for user space, and KVM_RUN returns with KVM_EXIT_RISCV_CSR.",
    rvmm: "seed gives 16 bits of the host's randomness; any other reads as zero and takes no write.",
    read: "Privileged specification, Hypervisor extension: Virtual-instruction exceptions. KVM API: KVM_EXIT_RISCV_CSR.",
};

const SYSTEM: Explanation = Explanation {
    title: "Power off or reset",
    hardware: "The guest's kernel runs ecall for the SBI extension SRST: an environment call from VS-mode (cause 10).",
    kvm: "KVM stops all harts of the machine and KVM_RUN returns with KVM_EXIT_SYSTEM_EVENT.",
    rvmm: "A shutdown ends the machine; after a reset rvmm builds it again from its files.",
    read: "SBI specification: System Reset Extension. KVM API: KVM_EXIT_SYSTEM_EVENT.",
};

const DEBUG: Explanation = Explanation {
    title: "Breakpoint",
    hardware: "The guest ran ebreak while breakpoints are not delegated to it: a breakpoint exception (cause 3) enters the host's kernel.",
    kvm: "KVM_RUN returns with KVM_EXIT_DEBUG; the program counter stays at the ebreak.",
    rvmm: "An ebreak that no debugger has asked for is raised in the guest, as hardware would have done.",
    read: "Privileged specification: Machine Trap Delegation, and Hypervisor extension: hedeleg. KVM API: KVM_SET_GUEST_DEBUG.",
};

const INTERRUPTED: Explanation = Explanation {
    title: "Kick",
    hardware: "Nothing that the guest did. An interrupt of the host (often the one by which another CPU sends a signal) ended guest mode.",
    kvm: "KVM saw a signal for the hart's thread, or immediate_exit set in the shared page: KVM_RUN returns with EINTR.",
    rvmm: "Somebody wanted the hart: to pause, to be looked at, to stop. It looks what for, and goes on when it may, so that the time of \
        this exit has all of the pause in it.",
    read: "KVM API: KVM_RUN, immediate_exit.",
};

const FAULT: Explanation = Explanation {
    title: "Something that KVM cannot carry out",
    hardware: "A guest-page fault as for a load or store of a device register, but of an instruction of another kind, or of a fetch.",
    kvm: "KVM decodes plain loads and stores only. For atomics, vectors, floating point, misaligned accesses, and before Linux 7 fetches, \
        KVM_RUN fails with an errno and says nothing of the address.",
    rvmm: "rvmm reads the registers, walks the guest's page tables, decodes the instruction, and raises the access fault in the guest that \
        hardware would have raised. Where none fits, the machine stops with its registers.",
    read: "Privileged specification: Supervisor Cause Register, Physical Memory Attributes. KVM API: KVM_RUN.",
};

const UNKNOWN: Explanation = Explanation {
    title: "An exit that rvmm does not know",
    hardware: "Not known: the kernel is newer than this rvmm, or its answer makes no sense.",
    kvm: "KVM_RUN returned with the number that is given.",
    rvmm: "The machine stops with its registers.",
    read: "KVM API: The kvm_run structure.",
};

/// The explanation of `kind`.
pub(super) fn of(kind: Kind) -> &'static Explanation {
    match kind {
        Kind::MmioRead => &MMIO_READ,
        Kind::MmioWrite => &MMIO_WRITE,
        Kind::Sbi => &SBI,
        Kind::Csr => &CSR,
        Kind::System => &SYSTEM,
        Kind::Debug => &DEBUG,
        Kind::Interrupted => &INTERRUPTED,
        Kind::Fault => &FAULT,
        Kind::Unknown => &UNKNOWN,
    }
}

/// What a cause is there for, where there is more to say than its kind says.
pub(super) fn about(kind: Kind, what: &str) -> Option<&'static str> {
    match kind {
        Kind::MmioRead | Kind::MmioWrite => {
            let (device, register) = what.split_once(' ').unwrap_or((what, ""));
            let device = device.split('@').next().unwrap_or(device);
            access(device, register, kind == Kind::MmioWrite)
        }
        Kind::Sbi => call(what),
        _ => None,
    }
}

fn access(device: &str, register: &str, is_write: bool) -> Option<&'static str> {
    Some(match (device, register) {
        ("no", "device") => {
            "An address where neither memory nor a device is. Reads give zero and writes vanish, unless --unassigned says otherwise."
        }
        ("serial", "LSR") => {
            "Line status: is there input, may the next byte be sent? A driver that polls looks before every byte, which makes this the \
             most frequent exit of a busy console."
        }
        ("serial", "THR") => {
            "One byte of the guest's output: an exit a byte. A virtio console sends a whole buffer with one kick."
        }
        ("serial", "RBR") => "One byte of input.",
        ("serial", "IIR") => "Why did the UART interrupt? Read at least once for every interrupt.",
        ("serial", "IER") => {
            "Interrupts on and off: Linux switches the transmitter's on for as long as it has something to send."
        }
        ("serial", _) => {
            "Set-up of the NS16550A: line settings, FIFOs, modem lines. Their effect on a virtual line is none."
        }
        ("rtc", _) => {
            "The time of day of the goldfish clock, which a kernel reads when it starts; and its alarm."
        }
        ("power", _) => "The guest asks the test finisher to power the machine off or to reset it.",
        ("plic", "CLAIM") if is_write => {
            "The end of an interrupt: its source may interrupt again. With the AIA of the kernel there is no exit for that."
        }
        ("plic", "CLAIM") => {
            "A hart asks which source interrupted and takes it. With the AIA of the kernel there is no exit for that."
        }
        ("plic", _) => {
            "Set-up of the interrupt controller: priorities, thresholds, and which source may interrupt which hart."
        }
        ("aplic", _) => {
            "A reserved register of the kernel's interrupt controller: it reads as zero."
        }
        (_, "QueueNotify") => {
            "A driver's kick. Usually the kernel takes it without an exit (ioeventfd); this one names no queue that has a doorbell."
        }
        (_, "InterruptStatus") => {
            "A virtio driver asks why the device interrupted: once for every interrupt."
        }
        (_, "InterruptACK") => {
            "A virtio driver acknowledges an interrupt, and with it the line falls: once for every interrupt."
        }
        (_, "Config") => {
            "The device's own configuration: the size of a disk, the address of a network card."
        }
        (_, "Status") => "The driver's progress: found, features agreed, ready; and resets.",
        (_, register) if register.starts_with("Queue") => {
            "Set-up of a queue: its size and where its rings are."
        }
        (_, register) if register.starts_with("D") => {
            "What device and driver can do, agreed while the driver starts."
        }
        _ => return None,
    })
}

fn call(what: &str) -> Option<&'static str> {
    let extension = what.split(' ').next().unwrap_or_default();
    Some(match (extension, what) {
        (_, "DBCN console_write_byte") => {
            "One byte to the debug console: rvmm sends it through the UART, so that there is one console with one order."
        }
        (_, "DBCN console_write") => {
            "A text in guest memory for the debug console: at most 4 KiB a call, as far as the UART has room."
        }
        (_, "DBCN console_read") => "The guest asks the debug console for input.",
        ("legacy", _) => "A call of SBI 0.1, from before extensions had numbers of their own.",
        (_, "BASE probe_extension") => {
            "Is there such an extension? rvmm says no: what there is, the kernel has answered before."
        }
        ("vendor" | "experimental" | "firmware", _) => {
            "A range in which this machine has nothing: the answer is SBI_ERR_NOT_SUPPORTED."
        }
        ("SUSP", _) => {
            "The system sleeps until input or an interrupt wakes it: the time of this exit is that sleep."
        }
        _ => return None,
    })
}
