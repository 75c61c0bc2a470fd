//! Effects of the knobs, and the facts that KVM reports of a hart.

use rvmm_devices::testing::skip;

use super::asm::*;
use super::*;
use crate::config::{CpuId, ExtensionChange};
use crate::error::VmError;
use crate::hypervisor::CpuFacts;
use crate::riscv::sbi::eid;

fn knobs(isa: &str, sbi: &str) -> CpuSettings {
    let parse = |list: &str| {
        let changes = list
            .split_whitespace()
            .map(|word| ExtensionChange { name: word[1..].into(), on: word.starts_with('+') });
        changes.collect()
    };
    CpuSettings { isa: parse(isa), sbi: parse(sbi), id: CpuId::default() }
}

fn facts(isa: &str) -> CpuFacts {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart_with(0, &knobs(isa, ""));
    guest.vm.cpu_facts().unwrap()
}

fn refusal(knobs: &CpuSettings) -> VmError {
    match Guest::new(&[SPIN]).vm.create_hart(0, knobs) {
        Err(error) => error,
        Ok(_) => panic!("{knobs:?} was taken"),
    }
}

fn has(facts: &CpuFacts, name: &str) -> bool {
    facts.extensions.iter().any(|extension| extension == name)
}

#[test]
fn a_hart_is_what_every_kernel_can_boot_on() {
    let facts = facts("");
    for name in ["i", "m", "a", "c", "f", "d", "zicsr", "zifencei"] {
        assert!(has(&facts, name), "{name} is missing in {:?}", facts.extensions);
    }
    assert!(!has(&facts, "h"));
    assert!([8, 9, 10].contains(&facts.satp_mode), "{}", facts.satp_mode);
    assert!(facts.timebase_hz >= 10_000);
}

#[test]
fn block_sizes_come_with_their_extensions() {
    let facts = facts("");
    for (name, block) in [("zicbom", facts.cbom_block), ("zicboz", facts.cboz_block)] {
        assert_eq!(has(&facts, name), block.is_some(), "{name}");
        assert!(block.is_none_or(|size| size.is_power_of_two() && size >= 8), "{name} {block:?}");
    }
}

#[test]
fn an_extension_that_kvm_can_switch_off_is_illegal_afterwards() {
    let before = facts("");
    assert!(has(&before, "zicboz"), "the host of the tests has zicboz");
    let after = facts("-zicboz");
    assert!(!has(&after, "zicboz"));
    assert_eq!(after.cboz_block, None);
    // `cbo.zero (t0)` on the page behind the code; the trap's target calls with scause.
    let cbo_zero = 0x0042_a00f;
    let tail = [&li(A7, 0x0900_0000)[..], &[csrr(A0, 0x142), ECALL]].concat();
    let head = [here(T0), addi(T1, T0, 20), csrw(STVEC, T1), addi(T0, T0, 0x400), cbo_zero];
    let guest = Guest::new(&[&head[..], &tail].concat());
    let mut hart = guest.hart_with(0, &knobs("-zicboz", ""));
    assert_eq!(called(hart.as_mut(), [0; 2]).1[0], 2, "illegal instruction");
    let guest = Guest::new(&[&head[..], &tail].concat());
    let mut hart = guest.hart(0);
    assert_eq!(called(hart.as_mut(), [0; 2]).1[0], 0, "no trap");
}

#[test]
fn an_extension_that_kvm_cannot_switch_off_is_hidden() {
    assert!(has(&facts(""), "zba"), "the host of the tests has zba");
    assert!(!has(&facts("-zba"), "zba"));
    assert!(has(&facts("-zba +zba"), "zba"));
}

#[test]
fn switching_off_an_extension_switches_off_its_dependents() {
    let facts = facts("-f");
    for name in ["f", "d", "v", "zfa", "zfhmin", "zcd"] {
        assert!(!has(&facts, name), "{name}");
    }
}

#[test]
fn switching_off_an_extension_that_the_host_lacks_is_no_error() {
    assert!(!has(&facts("-v -zvbb -h"), "v"));
}

#[test]
fn switching_on_an_extension_that_the_host_lacks_is_an_error() {
    let missing = ["zvkned", "zacas", "zicfiss"].into_iter().find(|name| !has(&facts(""), name));
    let missing = missing.expect("the host of the tests lacks one of them");
    let error = refusal(&knobs(&format!("+{missing}"), ""));
    assert_eq!(error.to_string(), format!("--isa: this host has no ISA extension {missing}"));
}

#[test]
fn a_misspelt_name_is_refused_with_a_suggestion() {
    let error = refusal(&knobs("-zicbon", "")).to_string();
    assert!(error.contains("\"zicbon\"") && error.contains("zicbom"), "{error}");
    let error = refusal(&knobs("", "-dbnc")).to_string();
    assert!(error.contains("did you mean dbcn"), "{error}");
}

#[test]
fn changes_that_make_no_sense_are_refused() {
    for (isa, sbi) in [("+h", ""), ("-i", ""), ("", "-base")] {
        let error = refusal(&knobs(isa, sbi)).to_string();
        assert!(error.starts_with("--isa: ") || error.starts_with("--sbi: "), "{error}");
    }
}

/// The kernel's answer to `sbi_probe_extension` (SBI 4.4).
fn probe(extension: u64, sbi: &str) -> u64 {
    let extension = u32::try_from(extension).unwrap();
    let code = [
        &li(A7, 0x10)[..],
        &[addi(A6, ZERO, 3)],
        &li(A0, extension),
        &[ECALL],
        &li(A7, 0x0900_0000),
        &[ECALL],
    ];
    let guest = Guest::new(&code.concat());
    let mut hart = guest.hart_with(0, &knobs("", sbi));
    let (extension, args) = called(hart.as_mut(), [0; 2]);
    assert_eq!((extension, args[0]), (VENDOR, 0));
    args[1]
}

#[test]
fn the_debug_console_is_on_unless_switched_off() {
    assert_eq!(probe(eid::DBCN, ""), 1);
    assert_eq!(probe(eid::DBCN, "-dbcn"), 0);
}

#[test]
fn an_sbi_extension_switched_off_is_not_found_by_the_guest() {
    assert_eq!(probe(eid::SRST, ""), 1);
    assert_eq!(probe(eid::SRST, "-srst"), 0);
    assert_eq!(probe(eid::PMU, "-pmu -sta"), 0);
}

#[test]
fn the_pmu_is_off_where_the_kernel_does_not_check_its_calls_unless_it_is_asked_for() {
    const PMU: u64 = 9;
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let withheld = super::super::knobs::withholds("pmu", &release);
    let state = |sbi| {
        let guest = Guest::new(&[SPIN]);
        let vcpu = guest.raw_vcpu();
        let applied = super::super::knobs::apply(&vcpu, &knobs("", sbi)).ok()?;
        Some((vcpu.reg(super::super::regs::sbi_extension(PMU)).ok()?, applied.withheld))
    };
    // A kernel without a PMU for guests has no such register.
    let Some(asked) = state("+pmu") else {
        return skip("this host's kernel has no PMU for guests");
    };
    assert_eq!(asked, (1, vec![]));
    assert_eq!(state("-pmu"), Some((0, vec![])));
    let usual = if withheld { (0, vec!["pmu"]) } else { (1, vec![]) };
    assert_eq!(state(""), Some(usual));
}

#[test]
fn only_kernels_that_check_its_calls_have_the_pmu_on() {
    for release in ["6.12.117+deb13-riscv64", "7.1.3", "next"] {
        assert!(super::super::knobs::withholds("pmu", release), "{release}");
    }
    assert!(!super::super::knobs::withholds("pmu", "7.2.13+deb14-riscv64"));
    assert!(!super::super::knobs::withholds("dbcn", "6.12.117"));
}

#[test]
fn the_guest_sees_the_cpu_id_that_was_asked_for() {
    let id = CpuId { vendor: Some(0x1234), arch: Some(0x5678), imp: None };
    let ask = |fid: u32| {
        [&li(A7, 0x10)[..], &[addi(A6, ZERO, fid), ECALL], &li(A7, 0x0900_0000), &[ECALL]].concat()
    };
    for (fid, expected) in [(4, 0x1234), (5, 0x5678)] {
        let guest = Guest::new(&ask(fid));
        let mut hart = guest.hart_with(0, &CpuSettings { id, ..CpuSettings::default() });
        assert_eq!(called(hart.as_mut(), [0; 2]).1[1], expected);
    }
}

#[test]
fn knobs_are_refused_once_a_hart_has_run() {
    let guest = Guest::new(&[&li(A7, 0x0900_0000)[..], &[ECALL]].concat());
    let vcpu = guest.raw_vcpu();
    assert!(super::super::knobs::apply(&vcpu, &CpuSettings::default()).is_ok());
    vcpu.set_reg(super::super::regs::guest(Reg::Pc).unwrap(), BASE).unwrap();
    assert_eq!(vcpu.run(), Ok(()));
    let late = super::super::knobs::apply(&vcpu, &knobs("-zicboz", "")).unwrap_err();
    assert!(late.to_string().starts_with("Cannot switch off"), "{late}");
    let late = super::super::knobs::apply(&vcpu, &knobs("", "-pmu")).unwrap_err();
    assert!(late.to_string().starts_with("Cannot switch on SBI"), "{late}");
}
