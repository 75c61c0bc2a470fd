//! What KVM says about itself, as lines.

use super::report::Check;

/// What KVM says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Virtualization {
    /// Most vCPUs of a machine, and the number up to which each has a host CPU of its own.
    pub(super) max_vcpus: u32,
    pub(super) recommended_vcpus: u32,
    /// Bits of a guest-physical address, where KVM tells.
    pub(super) address_bits: Option<u32>,
    /// In-kernel AIA: `None` where there is none; whether it has guest interrupt files.
    pub(super) aia: Option<bool>,
    /// Extensions of a guest's hart, by lower-case name.
    pub(super) isa: Vec<String>,
    /// SBI extensions that KVM has, switched on or not, by lower-case name.
    pub(super) sbi: Vec<String>,
}

/// SBI extensions that a guest may miss, and what brings them.
const SBI_WANTED: [(&str, &str); 6] = [
    ("dbcn", "the debug console (earlycon=sbi): Linux 6.7"),
    ("susp", "system suspend: Linux 6.14"),
    ("pmu", "performance counters: Linux 6.3"),
    ("sta", "steal time: Linux 6.8, with scheduler statistics"),
    ("fwft", "firmware features such as misaligned access delegation: Linux 6.18"),
    ("mpxy", "message proxy: Linux 6.19"),
];

/// The lines.
pub(super) fn checks(kvm: &Virtualization) -> Vec<Check> {
    let mut checks = vec![aia(kvm), Check::ok("isa", kvm.isa.join(" "))];
    checks.push(match has(&kvm.isa, "sstc") {
        true => Check::ok("sstc", "guests set their timers without leaving the guest"),
        false => Check::note(
            "sstc",
            "the CPU has no Sstc: each timer of a guest is a call to the kernel",
        ),
    });
    checks.push(match has(&kvm.isa, "smstateen") {
        true => Check::ok("smstateen", "rvmm can say which state a guest's user mode sees"),
        false => Check::note("smstateen", "the CPU has no Smstateen: nothing to switch for guests"),
    });
    checks.push(Check::ok("sbi", kvm.sbi.join(" ")));
    let lacking = SBI_WANTED.iter().filter(|(name, _)| !has(&kvm.sbi, name));
    checks.extend(lacking.map(|(name, what)| Check::note("sbi", format!("no {name}: {what}"))));
    checks.push(Check::ok(
        "vcpus",
        format!(
            "up to {} harts in a machine, {} with a host CPU each",
            kvm.max_vcpus, kvm.recommended_vcpus
        ),
    ));
    checks.extend(
        kvm.address_bits.map(|bits| {
            Check::ok("addresses", format!("guest-physical addresses have {bits} bits"))
        }),
    );
    checks
}

fn aia(kvm: &Virtualization) -> Check {
    match kvm.aia {
        Some(true) => Check::ok(
            "aia",
            "interrupt controller in the kernel (APLIC, IMSICs), with guest interrupt files",
        ),
        Some(false) => Check::ok(
            "aia",
            "interrupt controller in the kernel (APLIC, IMSICs), emulated: no guest interrupt files",
        ),
        None => Check::missing(
            "aia",
            "no interrupt controller in the kernel: guests get the PLIC of rvmm",
        )
        .advise("nothing to do: it works, with more exits for each interrupt of a device"),
    }
}

fn has(names: &[String], name: &str) -> bool {
    names.iter().any(|other| other == name)
}
