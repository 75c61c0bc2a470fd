//! What stands in for firmware, with a scripted hart whose breakpoints are all there is.

use std::sync::Arc;

use crate::config::{CsrValue, Unassigned};
use crate::vcpu::dispatch::Trouble;
use crate::vcpu::firmware::{Firmware, shim, sites};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::{FakeUart, RAM, ScriptHart, world};
use crate::vcpu::trap::resolve;
use crate::vcpu::{Control, World};

const SITE: u64 = RAM.base + 0x100;
const A0: u8 = 10;
const SUPERVISOR: u64 = 1;
const SPP: u64 = 1 << 8;
const SPIE: u64 = 1 << 5;
const SIE: u64 = 1 << 1;

fn with(firmware: Firmware) -> (World, FakeUart) {
    let (mut world, uart) = world(Unassigned::Zero);
    world.firmware = Some(firmware);
    (world, uart)
}

fn planted() -> (World, FakeUart) {
    with(Firmware::new([SITE].into(), Vec::new(), None))
}

/// A hart at the breakpoint, in supervisor mode, with these registers from a0 on.
fn at(pc: u64, args: &[u64]) -> ScriptHart {
    let args = args.iter().zip(A0..).map(|(value, number)| (Reg::X(number), *value));
    ScriptHart::new(0, []).with([(Reg::Pc, pc), (Reg::Mode, SUPERVISOR)]).with(args)
}

fn step(hart: &mut ScriptHart, world: &World) -> Option<StopReason> {
    resolve(hart, world, Trouble::Breakpoint).unwrap()
}

fn reg(hart: &ScriptHart, reg: Reg) -> u64 {
    hart.get(reg).unwrap()
}

#[test]
fn a_byte_for_the_old_console_is_sent_and_the_hart_goes_on_behind_the_call() {
    let (world, uart) = planted();
    uart.line().room = 1;
    let mut hart = at(SITE, &[b'x'.into(), 7, 0, 0, 0, 0, 9, 1]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!(uart.line().sent, b"x");
    assert_eq!(
        (reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11)), reg(&hart, Reg::Pc)),
        (0, 7, SITE + 4)
    );
    // The line is full now: the same call is made again, and again.
    let mut hart = at(SITE, &[b'y'.into(), 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::X(10))), (SITE, b'y'.into()));
}

#[test]
fn the_old_console_gives_what_was_typed_or_says_that_nothing_was() {
    let (world, uart) = planted();
    uart.line().typed.push_back(b'k');
    for expected in [u64::from(b'k'), u64::MAX] {
        let mut hart = at(SITE, &[0, 0, 0, 0, 0, 0, 0, 2]);
        step(&mut hart, &world);
        assert_eq!(reg(&hart, Reg::X(10)), expected);
    }
}

#[test]
fn the_old_shutdown_powers_the_machine_off() {
    let (world, _) = planted();
    assert_eq!(step(&mut at(SITE, &[0, 0, 0, 0, 0, 0, 0, 8]), &world), Some(StopReason::PowerOff));
}

#[test]
fn a_call_that_the_kernel_answers_is_made_from_the_shim_and_leaves_no_other_trace() {
    let (world, _) = planted();
    let satp = 8 << 60 | 0x80100;
    // Without translation here, so that the site is found; satp is put back all the same.
    let mut hart = at(SITE, &[1234, 5, 6, 7, 8, 9, 3, 0]).with([(Reg::Csr(Csr::Sstatus), SIE)]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!(reg(&hart, Reg::Pc), shim::ERRAND);
    assert_eq!((reg(&hart, Reg::X(17)), reg(&hart, Reg::X(16))), (0x5449_4d45, 0));
    assert_eq!((reg(&hart, Reg::X(10)), reg(&hart, Reg::Csr(Csr::Sstatus)) & SIE), (1234, 0));
    // The kernel has answered.
    let mut hart = hart.with([
        (Reg::Pc, shim::RETURN),
        (Reg::X(10), 0),
        (Reg::X(11), 99),
        (Reg::Csr(Csr::Satp), satp),
    ]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!(
        (reg(&hart, Reg::Pc), reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11))),
        (SITE + 4, 0, 5)
    );
    assert_eq!((reg(&hart, Reg::X(16)), reg(&hart, Reg::X(17))), (3, 0));
    assert_eq!((reg(&hart, Reg::Csr(Csr::Sstatus)), reg(&hart, Reg::Csr(Csr::Satp))), (SIE, 0));
    // A second time nobody is on an errand: the breakpoint is the guest's own.
    let mut hart = hart.with([(Reg::Pc, shim::RETURN)]);
    step(&mut hart, &world);
    assert_eq!(reg(&hart, Reg::Csr(Csr::Scause)), 3);
}

#[test]
fn the_harts_of_an_old_call_are_read_where_its_pointer_leads() {
    let (world, _) = planted();
    world.ram.write(RAM.base + 0x800, &6_u64.to_le_bytes()).unwrap();
    for (pointer, expected) in [(0, (0, u64::MAX)), (RAM.base + 0x800, (6, 0))] {
        let mut hart = at(SITE, &[pointer, 0, 0, 0, 0, 0, 0, 4]);
        step(&mut hart, &world);
        assert_eq!((reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11))), expected);
        assert_eq!((reg(&hart, Reg::X(17)), reg(&hart, Reg::Pc)), (0x73_5049, shim::ERRAND));
    }
    // One that leads nowhere is an invalid address, and the guest goes on.
    let mut hart = at(SITE, &[8, 0, 0, 0, 0, 0, 0, 4]);
    step(&mut hart, &world);
    assert_eq!((reg(&hart, Reg::X(10)).cast_signed(), reg(&hart, Reg::Pc)), (-5, SITE + 4));
}

#[test]
fn a_system_call_at_a_planted_place_goes_to_the_guests_kernel() {
    let (world, _) = planted();
    let mut hart = at(SITE, &[0, 0, 0, 0, 0, 0, 0, 8])
        .with([(Reg::Mode, 0), (Reg::Csr(Csr::Stvec), RAM.base + 0x400)]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!((reg(&hart, Reg::Csr(Csr::Scause)), reg(&hart, Reg::Csr(Csr::Sepc))), (8, SITE));
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::Mode)), (RAM.base + 0x400, SUPERVISOR));
}

#[test]
fn a_breakpoint_that_nobody_planted_is_the_guests_own() {
    let (world, _) = planted();
    let mut hart =
        at(SITE + 4, &[0, 0, 0, 0, 0, 0, 0, 8]).with([(Reg::Csr(Csr::Stvec), RAM.base + 0x400)]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!((reg(&hart, Reg::Csr(Csr::Scause)), reg(&hart, Reg::Csr(Csr::Sepc))), (3, SITE + 4));
}

/// A guest without a vector that has trapped from user mode.
fn trapped(cause: u64, tval: u64, args: &[u64]) -> ScriptHart {
    at(shim::VECTOR, args).with([
        (Reg::Csr(Csr::Stvec), shim::VECTOR),
        (Reg::Csr(Csr::Scause), cause),
        (Reg::Csr(Csr::Sepc), RAM.base),
        (Reg::Csr(Csr::Stval), tval),
        (Reg::Csr(Csr::Sstatus), SPIE),
    ])
}

fn bare() -> (World, FakeUart) {
    with(Firmware::new([].into(), vec![CsrValue { number: 0xf14, value: 0x1234 }], None))
}

#[test]
fn a_csr_of_machine_mode_is_read_and_the_guest_goes_on_in_its_own_mode() {
    let (world, _) = bare();
    let word: u32 = 0xf140_25f3; // csrr a1,mhartid
    world.ram.write(RAM.base, &word.to_le_bytes()).unwrap();
    // Hardware may say which instruction it was, or 0.
    for tval in [word.into(), 0] {
        let mut hart = trapped(2, tval, &[]);
        assert_eq!(step(&mut hart, &world), None);
        assert_eq!((reg(&hart, Reg::X(11)), reg(&hart, Reg::Pc)), (0x1234, RAM.base + 4));
        assert_eq!(
            (reg(&hart, Reg::Mode), reg(&hart, Reg::Csr(Csr::Sstatus)) & (SIE | SPIE | SPP)),
            (0, SIE | SPIE)
        );
    }
}

#[test]
fn what_a_guest_without_a_vector_cannot_be_given_stops_it_and_says_what_to_do() {
    let (world, _) = bare();
    for (cause, tval, word) in
        [(2, 0x1002_6073, "--mode vs"), (13, 0x40, "trap 13"), (2, 0, "illegal")]
    {
        let Some(StopReason::HartFault { what, .. }) = step(&mut trapped(cause, tval, &[]), &world)
        else {
            panic!("trap {cause} does not stop")
        };
        assert!(what.contains(word), "{what}");
    }
}

#[test]
fn a_call_from_user_mode_is_answered_or_made_in_the_guests_name() {
    let (world, _) = bare();
    assert_eq!(
        step(&mut trapped(8, 0, &[0, 0, 0, 0, 0, 0, 0, 8]), &world),
        Some(StopReason::PowerOff)
    );
    let mut hart = trapped(8, 0, &[1, 2, 3, 4, 5, 6, 3, 0x10]);
    assert_eq!(step(&mut hart, &world), None);
    assert_eq!(reg(&hart, Reg::Pc), shim::ERRAND);
    let mut hart = hart.with([(Reg::Pc, shim::RETURN), (Reg::X(10), 0), (Reg::X(11), 77)]);
    step(&mut hart, &world);
    assert_eq!(
        (reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11)), reg(&hart, Reg::X(12))),
        (0, 77, 3)
    );
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::Mode)), (RAM.base + 4, 0));
}

#[test]
fn a_timer_of_user_space_raises_its_interrupt_once_its_time_has_come() {
    use crate::vcpu::firmware::timer::UserTimer;
    const STIP: u64 = 1 << 5;
    let control = Arc::new(Control::new());
    let timer = Arc::new(UserTimer::start(1, 10_000_000, &control, None).unwrap());
    let (world, _) = with(Firmware::new([SITE].into(), Vec::new(), Some(timer)));
    let mut hart =
        at(SITE, &[0, 0, 0, 0, 0, 0, 0, 0x5449_4d45]).with([(Reg::Csr(Csr::Sip), STIP | 2)]);
    assert_eq!(step(&mut hart, &world), None);
    // Set: the old interrupt is gone, the others are not.
    assert_eq!((reg(&hart, Reg::Csr(Csr::Sip)), reg(&hart, Reg::Pc)), (2, SITE + 4));
    let firmware = world.firmware.as_ref().unwrap();
    while reg(&hart, Reg::Csr(Csr::Sip)) & STIP == 0 {
        firmware.attend(&mut hart).unwrap();
        std::thread::yield_now();
    }
    // The hart is woken again and again, in case it waits with its interrupts off; the guest sees one interrupt.
    let mut hart = hart.with([(Reg::Csr(Csr::Sip), 2)]);
    for _ in 0..5 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        firmware.attend(&mut hart).unwrap();
    }
    assert_eq!(reg(&hart, Reg::Csr(Csr::Sip)), 2);
    // A time that never comes takes it back.
    let mut hart = hart.with([(Reg::Pc, SITE), (Reg::X(10), u64::MAX), (Reg::X(17), 0)]);
    step(&mut hart, &world);
    firmware.attend(&mut hart).unwrap();
    assert_eq!(reg(&hart, Reg::Csr(Csr::Sip)), 2);
}

#[test]
fn the_shims_page_is_breakpoints_around_one_call() {
    let code = shim::code();
    let word = |addr: u64| {
        let at = usize::try_from(addr - shim::PAGE).unwrap();
        u32::from_le_bytes(code[at..at + 4].try_into().unwrap())
    };
    let ebreak = u32::from_le_bytes(sites::EBREAK);
    assert_eq!(
        (word(shim::VECTOR), word(shim::ERRAND), word(shim::RETURN)),
        (ebreak, 0x73, ebreak)
    );
}
