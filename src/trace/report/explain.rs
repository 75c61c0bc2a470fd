//! Explanations of exits: for each kind the part of the hardware, of KVM and of rvmm, and references; for known causes, their
//! purpose.
//!
//! Sections are named by their titles, since their numbers change with the editions of the specifications.

use crate::trace::record::ExitKind;

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
    kvm: "There is no memory slot at the address, so no page can be mapped. KVM decodes the instruction (from htinst, or read \
        out of the guest with HLVX) for its width and register, and KVM_RUN returns with KVM_EXIT_MMIO.",
    rvmm: "The bus finds the device by its address, the device's lock is taken, and the device answers. The next KVM_RUN writes the value \
        into the register, moves the program counter past the load and enters the guest again.",
    read: "Privileged specification, Hypervisor extension: Two-Stage Address Translation, and Trap Cause Codes. KVM API: KVM_EXIT_MMIO.",
};

const MMIO_WRITE: Explanation = Explanation {
    title: "Store to a device register",
    hardware: "The guest stores to a guest-physical address that the second stage of translation does not map: a store guest-page fault \
        (cause 23), from VS-mode into the host's kernel.",
    kvm: "First KVM checks its own devices and the ioeventfds that rvmm registered (ioeventfd): a virtio driver's notification ends there, \
        without an exit of this kind. Any other store becomes KVM_EXIT_MMIO with the stored value.",
    rvmm: "The bus finds the device, and the device takes the value. The guest waits for that, since only the next KVM_RUN advances its \
        program counter.",
    read: "Privileged specification, Hypervisor extension: Two-Stage Address Translation, and Trap Cause Codes. KVM API: KVM_EXIT_MMIO, \
        KVM_IOEVENTFD.",
};

const SBI: Explanation = Explanation {
    title: "SBI call that the kernel passes to rvmm",
    hardware: "The guest's kernel runs ecall: an environment call from VS-mode (cause 10), which is never delegated to the guest, enters the \
        host's kernel.",
    kvm: "KVM is the guest's firmware: it handles timers, interrupts between harts, remote fences and the start of harts itself. It passes \
        on calls of the console, of vendors and of experimental extensions: KVM_RUN returns with KVM_EXIT_RISCV_SBI.",
    rvmm: "The call is answered by its extension and function; a0 and a1 go back with the next KVM_RUN, which also steps over the ecall. Where \
        the console has no room, the same call is made again.",
    read: "SBI specification: Binary Encoding, and the chapter of the extension. KVM API: KVM_EXIT_RISCV_SBI.",
};

const CSR: Explanation = Explanation {
    title: "CSR access that the kernel passes to rvmm",
    hardware: "The guest reads or writes a CSR that it may not access directly: a virtual-instruction exception (cause 22) enters the \
        host's kernel.",
    kvm: "KVM decodes the instruction, finds that the CSR is one for user space, and KVM_RUN returns with KVM_EXIT_RISCV_CSR.",
    rvmm: "seed returns 16 random bits of the host; any other CSR reads as zero and ignores writes.",
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
    rvmm: "An ebreak that is not a breakpoint of the debugger raises the exception in the guest, as on hardware.",
    read: "Privileged specification: Machine Trap Delegation, and Hypervisor extension: hedeleg. KVM API: KVM_SET_GUEST_DEBUG.",
};

const INTERRUPTED: Explanation = Explanation {
    title: "Kick",
    hardware: "Not caused by the guest. An interrupt of the host (often the one by which another CPU sends a signal) ended guest mode.",
    kvm: "KVM saw a signal for the hart's thread, or immediate_exit set in the shared page: KVM_RUN returns with EINTR.",
    rvmm: "Another thread kicked the hart, for a pause, an inspection or a stop. The hart checks for the request and continues when it may, \
        so the time of this exit includes the whole pause.",
    read: "KVM API: KVM_RUN, immediate_exit.",
};

const FAULT: Explanation = Explanation {
    title: "Access that KVM cannot emulate",
    hardware: "A guest-page fault as for a load or store of a device register, but of an instruction of another kind, or of a fetch.",
    kvm: "KVM decodes plain loads and stores only. For atomics, vectors, floating point, misaligned accesses, and before Linux 7 fetches, \
        KVM_RUN fails with an errno and does not report the address.",
    rvmm: "rvmm reads the registers, walks the guest's page tables, decodes the instruction, and raises the access fault in the guest that \
        hardware would have raised. Where none fits, the machine stops and its registers are reported.",
    read: "Privileged specification: Supervisor Cause Register, Physical Memory Attributes. KVM API: KVM_RUN.",
};

const UNKNOWN: Explanation = Explanation {
    title: "An exit that rvmm does not know",
    hardware: "Not known: the kernel is newer than this rvmm, or its answer is invalid.",
    kvm: "KVM_RUN returned with an unknown exit reason.",
    rvmm: "The machine stops and its registers are reported.",
    read: "KVM API: The kvm_run structure.",
};

/// The explanation of `kind`.
pub(super) fn of(kind: ExitKind) -> &'static Explanation {
    match kind {
        ExitKind::MmioRead => &MMIO_READ,
        ExitKind::MmioWrite => &MMIO_WRITE,
        ExitKind::Sbi => &SBI,
        ExitKind::Csr => &CSR,
        ExitKind::System => &SYSTEM,
        ExitKind::Debug => &DEBUG,
        ExitKind::Interrupted => &INTERRUPTED,
        ExitKind::Fault => &FAULT,
        ExitKind::Unknown => &UNKNOWN,
    }
}

/// The purpose of a cause, where it is known.
pub(super) fn about(kind: ExitKind, what: &str) -> Option<&'static str> {
    match kind {
        ExitKind::MmioRead | ExitKind::MmioWrite => {
            let (device, register) = what.split_once(' ').unwrap_or((what, ""));
            let device = device.split('@').next().unwrap_or(device);
            access(device, register, kind == ExitKind::MmioWrite)
        }
        ExitKind::Sbi => call(what),
        _ => None,
    }
}

fn access(device: &str, register: &str, is_write: bool) -> Option<&'static str> {
    Some(match (device, register) {
        ("no", "device") => {
            "An address without memory or a device. Reads return zero and writes are ignored, unless --unassigned says otherwise."
        }
        ("serial", "LSR") => {
            "Line status: input available, transmitter ready. A driver that polls reads it before every byte, which makes this the \
             most frequent exit of a busy console."
        }
        ("serial", "THR") => {
            "One byte of the guest's output: an exit for each byte. A virtio console sends a whole buffer with one notification."
        }
        ("serial", "RBR") => "One byte of input.",
        ("serial", "IIR") => {
            "The reason of an interrupt of the UART: read at least once for every interrupt."
        }
        ("serial", "IER") => {
            "Interrupt enable: Linux enables the transmitter's interrupt while it has something to send."
        }
        ("serial", _) => {
            "Set-up of the NS16550A: line settings, FIFOs, modem lines. They have no effect on a virtual line."
        }
        ("rtc", _) => {
            "The time of day of the goldfish clock, which a kernel reads when it starts; and its alarm."
        }
        ("power", _) => "The guest asks the test finisher to power the machine off or to reset it.",
        ("vmgenid", _) => {
            "A part of the generation ID. A kernel reads it when it starts, and after an interrupt that says that the machine was restored \
             from a snapshot."
        }
        ("plic", "CLAIM") if is_write => {
            "Completion of an interrupt: its source may interrupt again. With the kernel's AIA there is no exit for that."
        }
        ("plic", "CLAIM") => {
            "A hart claims the interrupt of the highest priority. With the kernel's AIA there is no exit for that."
        }
        ("plic", _) => {
            "Set-up of the interrupt controller: priorities, thresholds, and which source may interrupt which hart."
        }
        ("aplic", _) => {
            "A reserved register of the kernel's interrupt controller: it reads as zero."
        }
        (_, "QueueNotify") => {
            "A driver's notification. Usually the kernel handles it without an exit (ioeventfd); this one is not for a queue with a ioevent."
        }
        (_, "InterruptStatus") => {
            "A virtio driver reads the reason of an interrupt: once for every interrupt."
        }
        (_, "InterruptACK") => {
            "A virtio driver acknowledges an interrupt, which lowers the line: once for every interrupt."
        }
        (_, "Config") => {
            "The device's own configuration: the size of a disk, the address of a network card."
        }
        (_, "Status") => {
            "The device status: the driver's progress from ACKNOWLEDGE to DRIVER_OK, and device resets."
        }
        (_, register) if register.starts_with("Queue") => {
            "Set-up of a queue: its size and the addresses of its rings."
        }
        (_, register) if register.starts_with("D") => {
            "Feature negotiation, while the driver starts."
        }
        _ => return None,
    })
}

fn call(what: &str) -> Option<&'static str> {
    let extension = what.split(' ').next().unwrap_or_default();
    Some(match (extension, what) {
        (_, "DBCN console_write_byte") => {
            "One byte to the debug console: rvmm sends it through the UART, so that all output is on one console in order."
        }
        (_, "DBCN console_write") => {
            "A text in guest memory for the debug console: at most 4 KiB a call, as far as the UART has room."
        }
        (_, "DBCN console_read") => "The guest reads input from the debug console.",
        ("legacy", _) => "A call of SBI 0.1, from before extensions had numbers of their own.",
        (_, "BASE probe_extension") => {
            "Probe of an extension. rvmm answers no: the kernel itself answers for those that exist."
        }
        ("vendor" | "experimental" | "firmware", _) => {
            "A range in which this machine has no extension: the answer is SBI_ERR_NOT_SUPPORTED."
        }
        ("SUSP", _) => {
            "The system sleeps until input or an interrupt wakes it: the time of this exit is that sleep."
        }
        _ => return None,
    })
}
