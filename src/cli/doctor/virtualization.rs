//! Lines about the capabilities that KVM reports.

use super::report::Check;
use crate::kvm::report::{AiaSupport, GuestFiles, HostReport, LostWakeUps, SbiState};

/// SBI extensions that a guest may need, and their requirements.
const SBI_WANTED: [(&str, &str); 6] = [
    ("dbcn", "the debug console (earlycon=sbi): Linux 6.7"),
    ("susp", "system suspend: Linux 6.14"),
    ("pmu", "performance counters: Linux 6.3, on a CPU with Sscofpmf"),
    ("sta", "steal time: Linux 6.8, with scheduler statistics"),
    ("fwft", "firmware features such as misaligned access delegation: Linux 6.18"),
    ("mpxy", "message proxy: Linux 6.19"),
];

/// The lines.
pub(super) fn checks(kvm: &HostReport) -> Vec<Check> {
    let mut checks = vec![aia(kvm)];
    checks.extend(identities(kvm));
    checks.extend([Check::ok("isa", kvm.isa.join(" ")), clock_and_mmu(kvm)]);
    checks.push(match kvm.has_isa("sstc") {
        true => Check::ok("sstc", "guests set their timers without an exit"),
        false => Check::note(
            "sstc",
            "the CPU has no Sstc: each timer of a guest is a call to the kernel",
        ),
    });
    checks.push(match kvm.has_isa("smstateen") {
        true => Check::ok(
            "smstateen",
            "KVM can disable a guest's access to the AIA's registers: --isa -ssaia",
        ),
        false => Check::note(
            "smstateen",
            "the CPU has no Smstateen: ssaia can only be hidden in the device tree",
        ),
    });
    checks.push(Check::ok("sbi", sbi(kvm)));
    let lacking = SBI_WANTED.iter().filter(|(name, _)| !kvm.has_sbi(name));
    checks.extend(lacking.map(|(name, what)| Check::note("sbi", format!("no {name}: {what}"))));
    let withheld = kvm.sbi.iter().filter(|offer| offer.state == SbiState::Withheld);
    checks.extend(withheld.map(|offer| {
        let name = offer.name;
        Check::note("sbi", format!("{name} is off: with it a guest could harm this kernel"))
            .advise(format!("use Linux 7.2 or newer, or for a trusted guest --sbi +{name}"))
    }));
    checks.push(sbi_v01(kvm));
    checks.push(match kvm.guest_debug {
        true => Check::ok("guest-debug", "a debugger can set breakpoints in guests"),
        false => Check::note("guest-debug", "no breakpoints in guests: they need Linux 6.10"),
    });
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

fn aia(kvm: &HostReport) -> Check {
    match kvm.aia {
        Some(AiaSupport { guest_files: GuestFiles::Used, .. }) => Check::ok(
            "aia",
            "interrupt controller in the kernel (APLIC, IMSICs), with guest interrupt files",
        ),
        Some(AiaSupport { guest_files: GuestFiles::Absent, .. }) => Check::ok(
            "aia",
            "interrupt controller in the kernel (APLIC, IMSICs), emulated: no guest interrupt files",
        ),
        Some(AiaSupport { guest_files: GuestFiles::Unsafe(LostWakeUps::Kernel), .. }) => Check::ok(
            "aia",
            "interrupt controller in the kernel (APLIC, IMSICs), emulated: with guest interrupt files this kernel does not always wake harts (fixed in Linux 6.18)",
        ),
        Some(AiaSupport { guest_files: GuestFiles::Unsafe(LostWakeUps::Qemu), .. }) => Check::ok(
            "aia",
            "interrupt controller in the kernel (APLIC, IMSICs), emulated: with guest interrupt files QEMU, which emulates this host, does not always wake harts",
        ),
        None => Check::missing(
            "aia",
            "no interrupt controller in the kernel: guests get the PLIC of rvmm",
        )
        .advise("nothing to do: it works, with more exits for each device interrupt"),
    }
}

/// The limit of machines with many devices.
fn identities(kvm: &HostReport) -> Option<Check> {
    let limit = kvm.aia.filter(|aia| !aia.all_ids_work)?.ids.min(31);
    Some(
        Check::note(
            "aia-identities",
            format!("an emulated interrupt controller of this kernel loses all but {limit} interrupts of a hart: machines with more than 27 devices get the PLIC of rvmm"),
        )
        .advise("nothing to do: it works; Linux 7.3 has all of them"),
    )
}

fn clock_and_mmu(kvm: &HostReport) -> Check {
    let mmu = match kvm.satp_mode {
        8 => "Sv39",
        9 => "Sv48",
        10 => "Sv57",
        _ => "an unknown paging mode",
    };
    Check::ok("mmu", format!("{mmu}; the guests' time base is {} Hz", kvm.timebase_hz))
}

/// SBI extensions that are off by default in KVM and that rvmm switches on.
const SBI_OURS: [&str; 2] = ["dbcn", "susp"];

/// The extensions that a guest can have; those that it gets only on request are marked.
fn sbi(kvm: &HostReport) -> String {
    let names = kvm.sbi.iter().filter_map(|offer| match offer.state {
        SbiState::On => Some(offer.name.to_owned()),
        SbiState::Off if SBI_OURS.contains(&offer.name) => Some(offer.name.to_owned()),
        SbiState::Off | SbiState::Withheld => {
            Some(format!("{}(by --sbi +{})", offer.name, offer.name))
        }
        SbiState::Absent => None,
    });
    names.collect::<Vec<_>>().join(" ")
}

fn sbi_v01(kvm: &HostReport) -> Check {
    match kvm.sbi_v01 {
        Some(true) => Check::ok("sbi-0.1", "calls of SBI 0.1 reach rvmm"),
        Some(false) => Check::note(
            "sbi-0.1",
            "the kernel is built without SBI 0.1: guests print through dbcn or the UART",
        ),
        None => Check::note("sbi-0.1", "SBI 0.1 is not known: no guest could be run to test it"),
    }
}
