//! Saving and restoring, with machines that go on elsewhere.

use std::thread;

use rvmm_devices::testing::skip;

use super::aia::{LEVEL_HIGH, host_has_aia, plan, trap_to, wired};
use super::asm::*;
use super::*;
use crate::config::{ExtensionChange, IrqchipChoice};
use crate::hypervisor::{MpState, RegisterValue, SourceState, VmState};
use crate::kvm::regs;
use crate::riscv::sbi::eid;
use crate::vcpu::hart::Csr;

const TIME: u16 = 0xc01;
const STIMECMP: u16 = 0x14d;

/// Iterations of the loop of [`counting`].
const ROUNDS: u32 = 12;

/// A guest that makes its software interrupt pending, sets its timer to a second later, and adds 3.0 to a floating-point sum in each
/// iteration of a loop, which calls with the sum and `sip`. Then it waits for the timer and calls with `scause`.
///
/// With Sstc it sets the timer without KVM, which forgets a deadline that SBI TIME has set if the thread of the hart is preempted before
/// the hart runs on (up to Linux 7.3).
fn counting() -> Vec<u32> {
    let set_timer = if host_has_sstc() {
        vec![csrw(STIMECMP, A0)]
    } else {
        let time = u32::try_from(eid::TIME).unwrap();
        [&li(A7, time)[..], &[addi(A6, ZERO, 0), ECALL]].concat()
    };
    let (fadd, to_float, to_integer, zero) = (0x02b5_7553, 0xd223_75d3, 0xc225_1553, 0xf200_0553);
    let add_a0_t0 = 0x0055_0533;
    let prologue = [
        &li(T0, 0x2000)[..],
        &[csrs(SSTATUS, T0), addi(T1, ZERO, 3), to_float, zero],
        &[addi(T0, ZERO, 2), csrs(SIP, T0)],
        &li(T0, 10_000_000),
        &[csrr(A0, TIME), add_a0_t0],
        &set_timer,
        &li(T0, 0x20),
        &[csrs(SIE, T0), addi(T0, ZERO, ROUNDS)],
    ];
    let call = [&li(A7, 0x0900_0000)[..], &[ECALL]].concat();
    let body = [&[fadd, to_integer, csrr(A1, SIP)][..], &call, &[addi(T0, T0, 0xfff)]].concat();
    let body = [&body[..], &[branch_back(T0, u32::try_from(body.len()).unwrap())]].concat();
    let wait =
        [&trap_to(7)[..], &[addi(T1, ZERO, 2), csrs(SSTATUS, T1), WFI, jump_back(1)]].concat();
    [&prologue.concat()[..], &body, &wait, &[csrr(A0, SCAUSE)], &call, &[SPIN]].concat()
}

fn host_has_sstc() -> bool {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    guest.vm.cpu_facts().unwrap().extensions.contains(&"sstc".into())
}

/// The sum, and the software interrupt in `sip`, of this many calls.
fn calls(hart: &mut dyn Hart, count: u32) -> Vec<[u64; 2]> {
    (0..count).map(|_| called(hart, [0; 2]).1).map(|args| [args[0], args[1] & 2]).collect()
}

/// A machine of one hart, with the interrupt controller that this host has.
fn machine(code: &[u32]) -> (Guest, Box<dyn Hart>) {
    let guest = Guest::new(code);
    let hart = guest.hart(0);
    guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
    (guest, hart)
}

/// The state as it arrives in another process.
fn sent(state: &VmState) -> VmState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// A second machine with the memory and the state of the first one.
fn moved(guest: &Guest, state: &VmState) -> (Guest, Box<dyn Hart>) {
    let (second, hart) = machine(&[]);
    let mut bytes = vec![0; 0x1_0000];
    guest.memory.read_slice(&mut bytes, GuestAddress(BASE)).unwrap();
    second.memory.write_slice(&bytes, GuestAddress(BASE)).unwrap();
    second.vm.restore(&sent(state)).unwrap();
    second.vm.code_changed().unwrap();
    (second, hart)
}

#[test]
fn a_guest_that_is_saved_in_a_loop_goes_on_elsewhere_with_the_same_results() {
    let (guest, mut hart) = machine(&counting());
    assert_eq!(calls(hart.as_mut(), 5), [[3, 2], [6, 2], [9, 2], [12, 2], [15, 2]]);
    hart.settle().unwrap();
    let state = guest.vm.save().unwrap();
    let (other, _hart) = machine(&[]);
    assert_eq!(other.vm.restore(&sent(&state)).unwrap(), [0], "it has a software interrupt");
    let (_second, mut moved) = moved(&guest, &state);
    for hart in [hart.as_mut(), moved.as_mut()] {
        let rest = calls(hart, ROUNDS - 5);
        assert_eq!(rest.first(), Some(&[18, 2]));
        assert_eq!(rest.last(), Some(&[u64::from(3 * ROUNDS), 2]));
        assert_eq!(called(hart, [0; 2]).1[0], 1 << 63 | 5, "the timer's interrupt");
    }
}

#[test]
fn a_hart_that_was_started_and_has_not_run_is_told_apart_from_all_others() {
    // The first call starts hart 1 behind it; then each makes calls that exit.
    let guest = Guest::new(&[&[ECALL][..], &li(A7, 0x0900_0000), &[ECALL, jump_back(4)]].concat());
    let mut harts = [guest.hart(0), guest.hart(1)];
    guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(2)).unwrap();
    let [boot, other] = &mut harts;
    for (number, value) in [(10, 1), (11, BASE + 4), (12, 0), (16, 0), (17, eid::HSM)] {
        boot.set(Reg::X(number), value).unwrap();
    }
    assert!(guest.vm.starting().unwrap().is_empty(), "nothing has run");
    called(boot.as_mut(), [0; 2]);
    boot.settle().unwrap();
    assert_eq!(guest.vm.starting().unwrap(), [1]);
    called(other.as_mut(), [0; 2]);
    other.settle().unwrap();
    assert!(guest.vm.starting().unwrap().is_empty(), "it has begun");
}

#[test]
fn the_time_of_a_restored_guest_goes_on_from_the_saved_one() {
    let code = [&[csrr(A0, TIME)][..], &li(A7, 0x0900_0000), &[ECALL, jump_back(4)]].concat();
    let (guest, mut hart) = machine(&code);
    hart.set(Reg::Time, 1 << 50).unwrap();
    let before = called(hart.as_mut(), [0; 2]).1[0];
    hart.settle().unwrap();
    let state = guest.vm.save().unwrap();
    assert!(state.time >= before && before >= 1 << 50, "{:#x}", state.time);
    let (_second, mut moved) = moved(&guest, &state);
    let now = called(moved.as_mut(), [0; 2]).1[0];
    assert!((state.time..state.time + (1 << 40)).contains(&now), "{now:#x}");
}

/// Two harts, all of whose registers have values of their own.
fn marked() -> (Guest, [Box<dyn Hart>; 2]) {
    let guest = Guest::new(&[SPIN]);
    let mut harts = [guest.hart(0), guest.hart(1)];
    guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(2)).unwrap();
    for (hart, base) in harts.iter_mut().zip([0x1000, 0x2000]) {
        for number in 1..32 {
            hart.set(Reg::X(number), base + u64::from(number)).unwrap();
        }
        for number in 0..32 {
            hart.set(Reg::F(number), base << 48 | u64::from(number)).unwrap();
        }
        hart.set(Reg::Fcsr, 0x61).unwrap();
        for csr in [Csr::Stvec, Csr::Sscratch, Csr::Sepc, Csr::Scause, Csr::Stval] {
            hart.set(Reg::Csr(csr), base << 4).unwrap();
        }
        hart.set(Reg::Csr(Csr::Sie), 0x222).unwrap();
        hart.set(Reg::Csr(Csr::Scounteren), 5).unwrap();
        hart.set(Reg::Mode, 0).unwrap();
        hart.set(Reg::TimeCompare, base << 8).unwrap();
    }
    (guest, harts)
}

#[test]
fn every_register_and_run_state_is_the_same_after_a_restore() {
    let (guest, _harts) = marked();
    let mut state = guest.vm.save().unwrap();
    assert_eq!(state.harts.iter().map(|hart| hart.id).collect::<Vec<_>>(), [0, 1]);
    let states = state.harts.iter().map(|hart| hart.mp_state);
    assert_eq!(states.collect::<Vec<_>>(), [MpState::Runnable, MpState::Stopped]);
    state.harts[0].mp_state = MpState::Stopped;
    state.harts[1].mp_state = MpState::Runnable;
    let second = Guest::new(&[SPIN]);
    let _others = [second.hart(0), second.hart(1)];
    second.vm.create_irqchip(IrqchipChoice::Auto, &plan(2)).unwrap();
    second.vm.restore(&sent(&state)).unwrap();
    let found = second.vm.save().unwrap();
    assert_eq!(found.harts, state.harts);
    assert_eq!(found.irqchip, state.irqchip);
    assert!((state.time..state.time + (1 << 32)).contains(&found.time), "{:#x}", found.time);
}

#[test]
fn a_hart_has_registers_of_every_kind_and_no_register_twice() {
    let (guest, _harts) = marked();
    let state = guest.vm.save().unwrap();
    let ids: Vec<u64> = state.harts[0].registers.iter().map(|register| register.id).collect();
    assert!(ids.len() > 100, "{}", ids.len());
    let mut kinds: Vec<u64> = ids.iter().map(|id| regs::type_of(*id) >> 24).collect();
    kinds.dedup();
    for kind in [1, 2, 3, 4, 6, 7, 8] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), ids.len());
    assert!(!ids.contains(&regs::TIME), "the time is the machine's");
}

#[test]
fn a_state_of_other_harts_is_refused_by_the_name_of_what_differs() {
    let (guest, _harts) = marked();
    let state = guest.vm.save().unwrap();
    let other = Guest::new(&[SPIN]);
    let knobs = CpuSettings {
        sbi: vec![ExtensionChange { name: "dbcn".into(), on: false }],
        ..CpuSettings::default()
    };
    let _harts = [other.hart_with(0, &knobs), other.hart_with(1, &knobs)];
    other.vm.create_irqchip(IrqchipChoice::Auto, &plan(2)).unwrap();
    let before = other.vm.save().unwrap();
    let error = other.vm.restore(&state).unwrap_err().to_string();
    assert!(error.contains("SBI extension dbcn (0x1, here 0x0)"), "{error}");
    assert_eq!(other.vm.save().unwrap().harts, before.harts, "nothing was written");

    let (fewer, _hart) = machine(&[SPIN]);
    let error = fewer.vm.restore(&state).unwrap_err().to_string();
    assert!(error.contains("[0, 1]") && error.contains("[0]"), "{error}");

    let mut unknown = state.clone();
    unknown.harts[1].registers[0].id = 0x8030_0000_0200_00ff;
    unknown.harts[1].registers[0].value = RegisterValue::Word(1);
    let error = guest.vm.restore(&unknown).unwrap_err().to_string();
    assert!(error.contains("register 0x80300000020000ff"), "{error}");
}

#[test]
fn a_state_with_another_interrupt_controller_is_refused() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let (guest, _hart) = machine(&[SPIN]);
    let state = guest.vm.save().unwrap();
    let plic = Guest::new(&[SPIN]);
    let _hart = plic.hart(0);
    plic.vm.create_irqchip(IrqchipChoice::Plic, &plan(1)).unwrap();
    assert!(plic.vm.restore(&state).unwrap_err().to_string().contains("with an AIA"));
    let state = plic.vm.save().unwrap();
    assert!(guest.vm.restore(&state).unwrap_err().to_string().contains("with a PLIC"));
    let mut fewer = guest.vm.save().unwrap();
    fewer.irqchip.as_mut().unwrap().aplic.source_count = 31;
    assert!(guest.vm.restore(&fewer).unwrap_err().to_string().contains("31 interrupt sources"));
}

#[test]
fn an_external_interrupt_that_was_pending_wakes_a_restored_guest_that_waits() {
    // Waits with interrupts off, and calls with sip.
    let code = [&li(T0, 0x200)[..], &[csrs(SIE, T0)], &li(A7, 0x0900_0000)].concat();
    let code = [&code[..], &[ECALL, WFI, csrr(A0, SIP), ECALL]].concat();
    let plic = |code: &[u32]| {
        let guest = Guest::new(code);
        let hart = guest.hart(0);
        guest.vm.create_irqchip(IrqchipChoice::Plic, &plan(1)).unwrap();
        (guest, hart)
    };
    let (guest, mut hart) = plic(&code);
    called(hart.as_mut(), [0; 2]);
    hart.settle().unwrap();
    guest.vm.external_line(0).unwrap().set_level(true);
    let state = guest.vm.save().unwrap();
    assert_eq!(state.irqchip, None);
    let (second, mut moved) = plic(&code);
    second.vm.restore(&sent(&state)).unwrap();
    assert_eq!(called(moved.as_mut(), [0; 2]).1[0] & 0x200, 0x200);
    // The line is high, as the device that drives it knows.
    let line = second.vm.external_line(0).unwrap();
    line.set_level(false);
    moved.settle().unwrap();
    moved.set(Reg::Pc, BASE + 4 * 7).unwrap();
    assert_eq!(called(moved.as_mut(), [0; 2]).1[0] & 0x200, 0);
}

#[test]
fn interrupts_and_levels_of_an_aia_survive() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let (guest, mut hart) = machine(&wired(LEVEL_HIGH));
    called(hart.as_mut(), [0; 2]);
    hart.settle().unwrap();
    guest.vm.irq_line(7).unwrap().set_level(true);
    // The guest has not configured this one.
    guest.vm.irq_line(8).unwrap().set_level(true);
    let state = guest.vm.save().unwrap();
    let irqchip = state.irqchip.as_ref().unwrap();
    let source = SourceState {
        number: 7,
        sourcecfg: LEVEL_HIGH,
        target: 5,
        enabled: true,
        pending: false,
        high: true,
    };
    let inactive = SourceState { number: 8, high: true, ..SourceState::default() };
    assert_eq!(irqchip.aplic.sources, [source, inactive]);
    assert_eq!((irqchip.imsics[0].pending[0], irqchip.imsics[0].enabled[0]), (1 << 5, 1 << 5));

    let (second, mut moved) = moved(&guest, &state);
    assert_eq!(second.vm.save().unwrap().irqchip, state.irqchip);
    let mut claim = || {
        let (_, args) = called(moved.as_mut(), [0; 2]);
        (args[0] >> 16, args[1] & 1 << 7 != 0)
    };
    assert_eq!(claim(), (5, true));
    assert_eq!(claim(), (0, true), "once");
    let line = second.vm.irq_line(7).unwrap();
    line.set_level(false);
    assert_eq!(claim(), (0, false), "the line knows that it was high");
    let raise = thread::spawn(move || line.set_level(true));
    raise.join().unwrap();
    assert_eq!(claim(), (5, true));
}

#[test]
fn an_interrupt_that_the_aplic_has_not_delivered_is_delivered_after_a_restore() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let (guest, mut hart) = machine(&wired(LEVEL_HIGH));
    called(hart.as_mut(), [0; 2]);
    hart.settle().unwrap();
    let mut state = guest.vm.save().unwrap();
    let source = &mut state.irqchip.as_mut().unwrap().aplic.sources[0];
    (source.pending, source.high) = (true, true);
    let (second, mut moved) = moved(&guest, &state);
    assert_eq!(called(moved.as_mut(), [0; 2]).1[0] >> 16, 5);
    drop(second);
}
