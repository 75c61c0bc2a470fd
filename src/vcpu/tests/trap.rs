//! The traps that a guest takes, and the faults that stop the machine.

use proptest::prelude::*;

use super::super::exit::Fault;
use super::super::hart::{Csr, Hart, Reg};
use super::super::stop::StopReason;
use super::super::testing::{Event, NOWHERE, RAM, ScriptHart, context};
use super::super::trap::resolve;
use super::super::{MachineContext, UnresolvedExit};
use crate::config::Unassigned;
use crate::riscv::trap::sstatus::{SIE, SPIE, SPP};

const CODE: u64 = RAM.base + 0x1000;
const VECTOR: u64 = RAM.base + 0x2000;

const LW: u32 = 0x0045_a503; // lw a0,4(a1)
const SW: u32 = 0x00a5_a223; // sw a0,4(a1)
const AMOADD: u32 = 0x00c5_a52f; // amoadd.w a0,a2,(a1)
const LR: u32 = 0x1005_a52f; // lr.w a0,(a1)
const FLD: u32 = 0x0085_b507; // fld fa0,8(a1)
const FSD: u32 = 0x00a5_b427; // fsd fa0,8(a1)
const C_FLD: u32 = 0x2588; // c.fld fa0,8(a1)
const ECALL: u32 = 0x73;

/// A hart in supervisor mode at `pc`, with `a1` (x11) pointing to [`NOWHERE`].
fn hart(pc: u64) -> ScriptHart {
    ScriptHart::new(3, []).with([
        (Reg::Pc, pc),
        (Reg::Mode, 1),
        (Reg::X(11), NOWHERE),
        (Reg::Csr(Csr::Stvec), VECTOR | 1),
    ])
}

fn world_with(code: u32) -> MachineContext {
    let (context, _) = context(Unassigned::Zero);
    context.ram.write(CODE, &code.to_le_bytes()).unwrap();
    context
}

fn csr(hart: &ScriptHart, csr: Csr) -> u64 {
    hart.get(Reg::Csr(csr)).unwrap()
}

fn settle(hart: &mut ScriptHart, context: &MachineContext, fault: Fault) -> Option<StopReason> {
    resolve(hart, context, UnresolvedExit::Fault(fault)).unwrap()
}

#[track_caller]
fn check_trap(hart: &ScriptHart, cause: u64, tval: u64, epc: u64) {
    let seen = [Csr::Scause, Csr::Stval, Csr::Sepc].map(|name| csr(hart, name));
    assert_eq!(seen, [cause, tval, epc], "scause, stval, sepc");
    assert_eq!(hart.get(Reg::Pc).unwrap(), VECTOR, "exceptions use the base of stvec");
    assert_eq!(hart.get(Reg::Mode).unwrap(), 1);
}

#[track_caller]
fn check_fault(stop: Option<StopReason>, part: &str) {
    match stop {
        Some(StopReason::HartFault { hart: 3, what, dump }) => {
            assert!(what.contains(part), "{what}");
            assert!(dump.contains("satp"), "{dump}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_access_that_kvm_does_not_emulate_is_the_access_fault_of_its_instruction() {
    let table = [
        (LR, 5, 0),
        (AMOADD, 7, 0),
        (FLD, 5, 8),
        (FSD, 7, 8),
        (C_FLD, 5, 8),
        (0x0205_8087, 5, 0), // vle8.v v1,(a1)
        (0x0205_80a7, 7, 0), // vse8.v v1,(a1)
        (0x0045_a00f, 7, 0), // cbo.zero (a1)
        (0x81e8, 5, 3),      // c.lbu a0,3(a1)
        (0x89c8, 7, 1),      // c.sb a0,1(a1)
    ];
    for (code, cause, offset) in table {
        let mut hart = hart(CODE);
        assert_eq!(settle(&mut hart, &world_with(code), Fault::Unemulated), None);
        check_trap(&hart, cause, NOWHERE + offset, CODE);
    }
}

#[test]
fn a_misaligned_access_is_an_access_fault_at_its_address() {
    for (code, cause) in [(LW, 5), (SW, 7)] {
        let mut hart = hart(CODE).with([(Reg::X(11), NOWHERE + 1)]);
        assert_eq!(settle(&mut hart, &world_with(code), Fault::Misaligned), None);
        check_trap(&hart, cause, NOWHERE + 5, CODE);
    }
}

#[test]
fn an_access_that_runs_out_of_ram_faults_where_ram_ends() {
    let end = RAM.base + RAM.size;
    let mut hart = hart(CODE).with([(Reg::X(11), end - 6)]);
    assert_eq!(settle(&mut hart, &world_with(LW), Fault::Misaligned), None);
    check_trap(&hart, 5, end, CODE);
}

#[test]
fn the_address_wraps_around() {
    let mut hart = hart(CODE).with([(Reg::X(11), u64::MAX)]);
    assert_eq!(settle(&mut hart, &world_with(FLD), Fault::Unemulated), None);
    check_trap(&hart, 5, 7, CODE);
}

#[test]
fn the_previous_mode_and_interrupt_enable_are_kept_as_hardware_keeps_them() {
    for (mode, before, after) in [
        (1, SIE, SPP | SPIE),
        (1, 0, SPP),
        (1, SPIE, SPP),
        (0, SIE | SPP, SPIE),
        (0, SPP | SPIE, 0),
        (0, 1 << 18 | SIE | 3 << 13, 1 << 18 | SPIE | 3 << 13),
    ] {
        let mut hart = hart(CODE).with([(Reg::Mode, mode), (Reg::Csr(Csr::Sstatus), before)]);
        assert_eq!(settle(&mut hart, &world_with(AMOADD), Fault::Unemulated), None);
        assert_eq!(csr(&hart, Csr::Sstatus), after, "mode {mode}, before {before:#x}");
        check_trap(&hart, 7, NOWHERE, CODE);
    }
}

#[test]
fn a_fetch_from_an_unassigned_address_is_a_fetch_access_fault() {
    for fault in [Fault::Unemulated, Fault::Memory] {
        for pc in [NOWHERE, 0, RAM.base + RAM.size, u64::MAX - 1] {
            let mut hart = hart(pc);
            assert_eq!(settle(&mut hart, &world_with(ECALL), fault), None);
            check_trap(&hart, 1, pc, pc);
        }
    }
}

#[test]
fn an_instruction_that_runs_out_of_ram_faults_at_its_second_half() {
    let pc = RAM.base + RAM.size - 2;
    let context = world_with(ECALL);
    context.ram.write(pc, &[0x03, 0]).unwrap();
    let mut hart = hart(pc);
    assert_eq!(settle(&mut hart, &context, Fault::Unemulated), None);
    check_trap(&hart, 1, pc + 2, pc);
}

#[test]
fn a_fetch_through_a_page_table_outside_ram_is_a_fetch_access_fault() {
    let mut hart = hart(0x4000).with([(Reg::Csr(Csr::Satp), 8 << 60 | NOWHERE >> 12)]);
    assert_eq!(settle(&mut hart, &world_with(ECALL), Fault::Unemulated), None);
    check_trap(&hart, 1, 0x4000, 0x4000);
}

#[test]
fn a_fetch_that_is_not_mapped_any_more_is_a_fetch_page_fault() {
    let mut hart = hart(0x4000).with([(Reg::Csr(Csr::Satp), 8 << 60 | RAM.base >> 12)]);
    assert_eq!(settle(&mut hart, &world_with(ECALL), Fault::Unemulated), None);
    check_trap(&hart, 12, 0x4000, 0x4000);
}

#[test]
fn instructions_are_found_through_page_tables() {
    let context = world_with(ECALL);
    // Root at RAM.base: a gigapage maps virtual 0 to 1 GiB onto 0x8000_0000.
    let gigapage: u64 = RAM.base >> 12 << 10 | 0xcf;
    context.ram.write(RAM.base, &gigapage.to_le_bytes()).unwrap();
    context.ram.write(RAM.base + 0x5000, &FSD.to_le_bytes()).unwrap();
    let mut hart = hart(0x5000).with([(Reg::Csr(Csr::Satp), 8 << 60 | RAM.base >> 12)]);
    assert_eq!(settle(&mut hart, &context, Fault::Unemulated), None);
    check_trap(&hart, 7, NOWHERE + 8, 0x5000);
}

#[test]
fn a_vector_that_cannot_be_fetched_stops_the_machine_instead_of_spinning() {
    let context = world_with(AMOADD);
    let mut hart = hart(CODE).with([(Reg::Csr(Csr::Stvec), NOWHERE)]);
    assert_eq!(settle(&mut hart, &context, Fault::Unemulated), None);
    assert_eq!(hart.get(Reg::Pc).unwrap(), NOWHERE);
    check_fault(settle(&mut hart, &context, Fault::Unemulated), "trap vector 0x20000000");
}

#[test]
fn user_code_at_the_vectors_address_still_traps_once() {
    let mut hart = hart(NOWHERE).with([(Reg::Csr(Csr::Stvec), NOWHERE), (Reg::Mode, 0)]);
    let context = world_with(ECALL);
    assert_eq!(settle(&mut hart, &context, Fault::Unemulated), None);
    check_fault(settle(&mut hart, &context, Fault::Unemulated), "cannot be fetched");
}

#[test]
fn a_fault_that_is_no_trap_stops_the_machine() {
    let context = world_with(ECALL);
    let stop = settle(&mut hart(CODE), &context, Fault::Unemulated);
    check_fault(stop, "instruction 0x00000073 at 0x80001000");
    check_fault(settle(&mut hart(CODE), &context, Fault::Misaligned), "misaligned");
    check_fault(settle(&mut hart(CODE), &world_with(LW), Fault::Memory), "EFAULT");
    let stop = |trouble| resolve(&mut hart(CODE), &context, trouble).unwrap();
    check_fault(stop(UnresolvedExit::UnknownEvent(9)), "system event 9");
    check_fault(stop(UnresolvedExit::UnknownExit(77)), "reason 77");
}

#[test]
fn an_error_of_the_host_is_the_hosts_failure() {
    for fault in [Fault::Entry { reason: 0x600, cpu: 2 }, Fault::Host(12)] {
        let stop = settle(&mut hart(CODE), &world_with(ECALL), fault);
        assert!(matches!(stop, Some(StopReason::HostFailure(_))), "{stop:?}");
    }
}

#[test]
fn a_huge_page_that_the_host_does_not_have_is_the_hosts_failure() {
    let Some(ram) = crate::memory::without_huge_pages(RAM, false) else {
        return rvmm_devices::testing::skip("this host has huge pages of 2 MiB");
    };
    let (mut context, _) = context(Unassigned::Zero);
    context.ram = ram.into();
    let stop = settle(&mut hart(CODE), &context, Fault::Memory).unwrap();
    assert_eq!(stop.exit_code(), crate::error::EXIT_HOST);
    let what = stop.to_string();
    assert!(what.starts_with("The host failed: no huge page is left for guest RAM"), "{what}");
    assert!(what.contains("hugetlb.2MB.max") && !what.contains("shrank"), "{what}");
}

#[test]
fn memory_that_a_shrunken_file_backed_is_lost() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x10_0000).unwrap();
    let ram = crate::memory::GuestRam::new(RAM, false).unwrap();
    let file = std::sync::Arc::new(file);
    ram.place_file(RAM.base, &file, 0, 0x10_0000).unwrap();
    let (mut context, _) = context(Unassigned::Zero);
    context.ram = ram.into();
    file.set_len(0).unwrap();
    let stop = settle(&mut hart(CODE), &context, Fault::Memory);
    assert_eq!(stop, Some(StopReason::MemoryLost { addr: None }));
}

#[test]
fn a_breakpoint_is_delivered_to_the_guest() {
    let mut hart = hart(CODE);
    assert_eq!(resolve(&mut hart, &world_with(ECALL), UnresolvedExit::Breakpoint).unwrap(), None);
    check_trap(&hart, 3, CODE, CODE);
}

#[test]
fn under_the_policy_fault_an_unassigned_access_faults_at_its_virtual_address() {
    let (context, _) = context(Unassigned::Fault);
    for (code, write, cause) in [(LW, false, 5), (SW, true, 7)] {
        context.ram.write(CODE, &code.to_le_bytes()).unwrap();
        let mut hart = hart(CODE);
        let trouble = UnresolvedExit::Unassigned { addr: 0xdead_0000, write };
        assert_eq!(resolve(&mut hart, &context, trouble).unwrap(), None);
        check_trap(&hart, cause, NOWHERE + 4, CODE);
        assert_eq!(hart.log().events(), [Event::Abandoned], "the access is not completed");
    }
}

#[test]
fn under_the_policy_fault_code_that_has_vanished_faults_without_an_address() {
    let (context, _) = context(Unassigned::Fault);
    for pc in [CODE, NOWHERE] {
        let mut hart = hart(pc);
        let trouble = UnresolvedExit::Unassigned { addr: NOWHERE, write: true };
        assert_eq!(resolve(&mut hart, &context, trouble).unwrap(), None);
        check_trap(&hart, 7, 0, pc);
    }
}

#[test]
fn under_the_policy_stop_an_unassigned_access_stops_with_the_registers() {
    let (context, _) = context(Unassigned::Stop);
    let trouble = UnresolvedExit::Unassigned { addr: NOWHERE, write: true };
    match resolve(&mut hart(CODE), &context, trouble).unwrap() {
        Some(StopReason::UnassignedAccess { hart: 3, addr: NOWHERE, write: true, dump }) => {
            assert!(dump.contains("pc 0000000080001000"), "{dump}");
            assert!(dump.contains("a1 0000000020000000"), "{dump}");
            assert!(dump.lines().count() <= 11 && dump.lines().all(|line| line.len() <= 100));
        }
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_guest_runs_is_a_trap_or_a_documented_stop(
        words in proptest::collection::vec(any::<u32>(), 64),
        satp: u64,
        a1: u64,
        misaligned: bool,
    ) {
        let (context, _) = context(Unassigned::Zero);
        for word in words {
            context.ram.write(CODE, &word.to_le_bytes()).unwrap();
            for satp in [0, satp] {
                let mut hart = hart(CODE).with([(Reg::X(11), a1), (Reg::Csr(Csr::Satp), satp)]);
                let fault = if misaligned { Fault::Misaligned } else { Fault::Unemulated };
                match settle(&mut hart, &context, fault) {
                    None => prop_assert!([1, 5, 7, 12].contains(&csr(&hart, Csr::Scause))),
                    Some(StopReason::HartFault { .. }) => {}
                    other => prop_assert!(false, "{other:?}"),
                }
            }
        }
    }
}
