//! The report for `doctor`, compared with a machine.

use super::super::probe;
use super::super::report::SbiState;
use super::asm::*;
use super::*;
use crate::config::IrqchipChoice;
use crate::hypervisor::{AiaPlan, Irqchip};
use crate::layout::Span;

#[test]
fn a_report_agrees_with_the_machine_that_is_made() {
    let report = probe().unwrap();
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    let plan = AiaPlan {
        harts: 1,
        sources: 95,
        identities: 31,
        aplic: Span { base: 0x0d00_0000, size: 0x4000 },
        imsics: Span { base: 0x2800_0000, size: 0x1000 },
    };
    let irqchip = guest.vm.create_irqchip(IrqchipChoice::Auto, &plan).unwrap();
    assert_eq!(report.aia.is_some(), irqchip != Irqchip::None);
    let facts = guest.vm.cpu_facts().unwrap();
    assert!(facts.extensions.iter().all(|name| report.has_isa(name)));
    assert_eq!((report.satp_mode, report.timebase_hz), (facts.satp_mode, facts.timebase_hz));
    assert_eq!(report.max_vcpus, guest.vm.max_harts());
    assert!((1..=report.max_vcpus).contains(&report.recommended_vcpus));
}

#[test]
fn a_report_knows_what_every_kernel_since_6_12_has() {
    let report = probe().unwrap();
    assert!(report.irqfd && report.ioeventfd && report.guest_debug);
    assert!(report.address_bits.is_some_and(|bits| [41, 50, 59].contains(&bits)));
    assert!(report.memory_slots.is_some_and(|slots| slots >= 32));
    let state = |name| report.sbi.iter().find(|offer| offer.name == name).unwrap().state;
    for name in ["time", "ipi", "rfence", "srst", "hsm"] {
        assert_eq!(state(name), SbiState::On, "{name}");
    }
    assert_eq!(state("dbcn"), SbiState::Off);
    assert!(report.has_sbi("dbcn") && !report.has_sbi("nonsense"));
}

#[test]
fn calls_of_sbi_0_1_are_reported_by_a_trial_and_not_by_the_kernels_list() {
    let report = probe().unwrap();
    let v01 = report.sbi_v01.expect("the throwaway guest runs");
    assert_eq!(report.has_sbi("v01"), v01);
    let guest = Guest::new(&[&li(A7, 1)[..], &[ECALL], &li(A7, 0x0900_0000), &[ECALL]].concat());
    let mut hart = guest.hart(0);
    assert_eq!(called(hart.as_mut(), [0; 2]).0 == 1, v01);
}
