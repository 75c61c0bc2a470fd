//! Emulated firmware, with a scripted hart that only hits breakpoints.

use std::sync::Arc;

use crate::config::{CsrValue, Unassigned};
use crate::riscv::insn::{EBREAK, ECALL};
use crate::riscv::sbi::eid;
use crate::riscv::trap::SUPERVISOR;
use crate::riscv::trap::sstatus::{SIE, SPIE, SPP};
use crate::vcpu::dispatch::UnresolvedExit;
use crate::vcpu::firmware::patches::{Patches, Wanted};
use crate::vcpu::firmware::timer::UserTimer;
use crate::vcpu::firmware::{Firmware, shim, sites};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::{Event, FakeUart, RAM, ScriptHart, context};
use crate::vcpu::trap::resolve;
use crate::vcpu::{Control, MachineContext};

const SITE: u64 = RAM.base + 0x100;
const A0: u8 = 10;

fn with(firmware: Firmware) -> (MachineContext, FakeUart) {
    let (mut context, uart) = context(Unassigned::Zero);
    context.firmware = Some(firmware);
    (context, uart)
}

/// `li a7,8` before the call at [`SITE`], and `ret` after it.
const NUMBERED: [u32; 3] = [0x0080_0893, 0x73, 0x0000_8067];
/// `mv a7,a0` in its place.
const MOVED: [u32; 3] = [0x0005_0893, 0x73, 0x0000_8067];
const V01: Wanted = Wanted { v01: true, timer: false };

fn bytes(code: &[u32]) -> Vec<u8> {
    code.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A machine with this code around [`SITE`], whose calls are patched.
fn patched(code: &[u32], wanted: Wanted, removes_unused: bool) -> (MachineContext, FakeUart) {
    let (mut context, uart) = context(Unassigned::Zero);
    let code = bytes(code);
    context.ram.write(SITE - 4, &code).unwrap();
    let mut patches = Patches::new(wanted, removes_unused, Box::new(|| Ok(())));
    let found = sites::find(&code);
    assert_eq!(found.len(), 1);
    for site in found {
        assert!(patches.insert(&context.ram, SITE - 4, &code, site).unwrap());
    }
    assert_eq!((patches.count(), word(&context, SITE)), (1, EBREAK));
    context.firmware = Some(Firmware::new(patches, Vec::new(), None));
    (context, uart)
}

fn patched_v01() -> (MachineContext, FakeUart) {
    patched(&NUMBERED, V01, true)
}

fn word(context: &MachineContext, addr: u64) -> u32 {
    let mut bytes = [0; 4];
    context.ram.read(addr, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

/// A hart at the breakpoint, in supervisor mode, with these registers from a0 on.
fn at(pc: u64, args: &[u64]) -> ScriptHart {
    let args = args.iter().zip(A0..).map(|(value, number)| (Reg::X(number), *value));
    ScriptHart::new(0, []).with([(Reg::Pc, pc), (Reg::Mode, SUPERVISOR)]).with(args)
}

fn step(hart: &mut ScriptHart, context: &MachineContext) -> Option<StopReason> {
    resolve(hart, context, UnresolvedExit::Breakpoint).unwrap()
}

fn reg(hart: &ScriptHart, reg: Reg) -> u64 {
    hart.get(reg).unwrap()
}

#[test]
fn a_byte_for_the_v01_console_is_sent_and_the_hart_continues_after_the_call() {
    let (context, uart) = patched_v01();
    uart.line().room = 1;
    let mut hart = at(SITE, &[b'x'.into(), 7, 0, 0, 0, 0, 9, 1]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!(uart.line().sent, b"x");
    assert_eq!(
        (reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11)), reg(&hart, Reg::Pc)),
        (0, 7, SITE + 4)
    );
    // The line is full now: the same call is made again, and again.
    let mut hart = at(SITE, &[b'y'.into(), 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::X(10))), (SITE, b'y'.into()));
}

#[test]
fn the_v01_console_returns_input_or_an_error() {
    let (context, uart) = patched_v01();
    uart.line().typed.push_back(b'k');
    for expected in [u64::from(b'k'), u64::MAX] {
        let mut hart = at(SITE, &[0, 0, 0, 0, 0, 0, 0, 2]);
        step(&mut hart, &context);
        assert_eq!(reg(&hart, Reg::X(10)), expected);
    }
}

#[test]
fn the_v01_shutdown_powers_the_machine_off() {
    let (context, _) = patched_v01();
    assert_eq!(
        step(&mut at(SITE, &[0, 0, 0, 0, 0, 0, 0, 8]), &context),
        Some(StopReason::PowerOff)
    );
}

#[test]
fn a_call_to_the_kernel_is_made_from_the_shim_and_changes_no_other_register() {
    let (context, _) = patched_v01();
    let satp = 8 << 60 | 0x80100;
    // Without translation here, so that the site is found; satp is restored all the same.
    let mut hart = at(SITE, &[1234, 5, 6, 7, 8, 9, 3, 0]).with([(Reg::Csr(Csr::Sstatus), SIE)]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!(reg(&hart, Reg::Pc), shim::KERNEL_CALL);
    assert_eq!((reg(&hart, Reg::X(17)), reg(&hart, Reg::X(16))), (eid::TIME, 0));
    assert_eq!((reg(&hart, Reg::X(10)), reg(&hart, Reg::Csr(Csr::Sstatus)) & SIE), (1234, 0));
    // The kernel has handled the call.
    let mut hart = hart.with([
        (Reg::Pc, shim::RETURN),
        (Reg::X(10), 0),
        (Reg::X(11), 99),
        (Reg::Csr(Csr::Satp), satp),
    ]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!(
        (reg(&hart, Reg::Pc), reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11))),
        (SITE + 4, 0, 5)
    );
    assert_eq!((reg(&hart, Reg::X(16)), reg(&hart, Reg::X(17))), (3, 0));
    assert_eq!((reg(&hart, Reg::Csr(Csr::Sstatus)), reg(&hart, Reg::Csr(Csr::Satp))), (SIE, 0));
    // A second time there is no pending call: the breakpoint is the guest's own.
    let mut hart = hart.with([(Reg::Pc, shim::RETURN)]);
    step(&mut hart, &context);
    assert_eq!(reg(&hart, Reg::Csr(Csr::Scause)), 3);
}

#[test]
fn the_harts_of_a_v01_call_are_read_through_its_pointer() {
    let (context, _) = patched_v01();
    context.ram.write(RAM.base + 0x800, &6_u64.to_le_bytes()).unwrap();
    for (pointer, expected) in [(0, (0, u64::MAX)), (RAM.base + 0x800, (6, 0))] {
        let mut hart = at(SITE, &[pointer, 0, 0, 0, 0, 0, 0, 4]);
        step(&mut hart, &context);
        assert_eq!((reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11))), expected);
        assert_eq!((reg(&hart, Reg::X(17)), reg(&hart, Reg::Pc)), (eid::IPI, shim::KERNEL_CALL));
    }
    // A pointer without memory is an invalid address, and the guest continues.
    let mut hart = at(SITE, &[8, 0, 0, 0, 0, 0, 0, 4]);
    step(&mut hart, &context);
    assert_eq!((reg(&hart, Reg::X(10)).cast_signed(), reg(&hart, Reg::Pc)), (-5, SITE + 4));
}

const VECTOR: u64 = RAM.base + 0x400;

fn user_at(pc: u64, args: &[u64]) -> ScriptHart {
    at(pc, args).with([(Reg::Mode, 0), (Reg::Csr(Csr::Stvec), VECTOR)])
}

#[test]
fn a_system_call_at_a_patch_restores_the_guests_instruction() {
    for code in [NUMBERED, MOVED] {
        let (context, _) = patched(&code, V01, true);
        let mut hart = user_at(SITE, &[0, 0, 0, 0, 0, 0, 0, 8]);
        assert_eq!(step(&mut hart, &context), None);
        // It runs its ecall now, which is no exit.
        assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::Mode)), (SITE, 0));
        assert_eq!(word(&context, SITE), ECALL);
        // Another hart that hit the breakpoint before continues the same way.
        let mut late = user_at(SITE, &[0, 0, 0, 0, 0, 0, 0, 8]);
        assert_eq!(step(&mut late, &context), None);
        assert_eq!((reg(&late, Reg::Pc), reg(&late, Reg::Csr(Csr::Scause))), (SITE, 0));
    }
}

#[test]
fn a_system_call_where_supervisors_make_calls_as_well_is_delivered_to_the_guests_kernel() {
    let (context, uart) = patched(&MOVED, V01, true);
    uart.line().room = 1;
    step(&mut at(SITE, &[b'x'.into(), 0, 0, 0, 0, 0, 0, 1]), &context);
    let mut hart = user_at(SITE, &[0, 0, 0, 0, 0, 0, 0, 8]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::Csr(Csr::Scause)), reg(&hart, Reg::Csr(Csr::Sepc))), (8, SITE));
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::Mode)), (VECTOR, SUPERVISOR));
    assert_eq!(word(&context, SITE), EBREAK);
}

/// As xv6's kernel does: it contains its first program, and copies it to a page of its own.
#[test]
fn a_program_that_the_kernel_has_copied_gets_its_system_calls_back() {
    let (context, _) = patched_v01();
    let copy = RAM.base + 0x1_0ffc;
    let mut code = vec![0; 12];
    context.ram.read(SITE - 4, &mut code).unwrap();
    context.ram.write(copy - 4, &code).unwrap();
    let mut hart = user_at(copy, &[0, 0, 0, 0, 0, 0, 0, 8]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!(
        (reg(&hart, Reg::Pc), word(&context, copy), word(&context, SITE)),
        (copy, ECALL, EBREAK)
    );
    // A breakpoint of the program's own stays.
    context.ram.write(copy, &EBREAK.to_le_bytes()).unwrap();
    context.ram.write(copy - 4, &[0x13, 0, 0, 0]).unwrap();
    let mut hart = user_at(copy, &[0, 0, 0, 0, 0, 0, 0, 8]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::Csr(Csr::Scause)), word(&context, copy)), (3, EBREAK));
}

#[test]
fn a_kernel_that_has_copied_itself_keeps_its_calls() {
    let (context, _) = patched_v01();
    let copy = RAM.base + 0x1_0000;
    let mut code = vec![0; 12];
    context.ram.read(SITE - 4, &mut code).unwrap();
    context.ram.write(copy - 4, &code).unwrap();
    let shutdown = step(&mut at(copy, &[0, 0, 0, 0, 0, 0, 0, 8]), &context);
    assert_eq!(shutdown, Some(StopReason::PowerOff));
    // Its other calls are forwarded to the host's kernel from there, too: U-Boot's first one after its relocation is to the base extension.
    let (context, _) = patched_v01();
    context.ram.write(copy - 4, &code).unwrap();
    let mut hart = at(copy, &[0, 0, 0, 0, 0, 0, 0, 0x10]).with([(Reg::Csr(Csr::Stvec), VECTOR)]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::X(17)), reg(&hart, Reg::Pc)), (0x10, shim::KERNEL_CALL));
    // With another number in a7 it is a breakpoint of its own that only looks like one.
    let (context, _) = patched_v01();
    context.ram.write(copy - 4, &code).unwrap();
    let mut hart = at(copy, &[0, 0, 0, 0, 0, 0, 0, 93]).with([(Reg::Csr(Csr::Stvec), VECTOR)]);
    step(&mut hart, &context);
    assert_eq!(reg(&hart, Reg::Csr(Csr::Scause)), 3);
}

#[test]
fn a_patch_without_v01_calls_is_removed_after_a_while() {
    let set_timer = [7, 0, 0, 0, 0, 0, 0, eid::TIME];
    let calls = |context: &MachineContext, most: usize| {
        let is_patched = |_: &usize| {
            step(&mut at(SITE, &set_timer), context);
            word(context, SITE) == EBREAK
        };
        (0..most).take_while(is_patched).count()
    };
    let (context, _) = patched(&MOVED, V01, true);
    assert!((100..1000).contains(&calls(&context, 1000)));
    // After one legacy call the patch stays; so it does if the user requested it.
    let (context, uart) = patched(&MOVED, V01, true);
    uart.line().room = 1;
    step(&mut at(SITE, &[b'x'.into(), 0, 0, 0, 0, 0, 0, 1]), &context);
    assert_eq!((uart.line().sent.clone(), calls(&context, 1000)), (b"x".to_vec(), 1000));
    let (context, _) = patched(&MOVED, V01, false);
    assert_eq!(calls(&context, 1000), 1000);
}

#[test]
fn a_breakpoint_that_is_no_patch_is_the_guests_own() {
    let (context, _) = patched_v01();
    let mut hart =
        at(SITE + 4, &[0, 0, 0, 0, 0, 0, 0, 8]).with([(Reg::Csr(Csr::Stvec), RAM.base + 0x400)]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::Csr(Csr::Scause)), reg(&hart, Reg::Csr(Csr::Sepc))), (3, SITE + 4));
}

/// A hart without a trap vector that has trapped from user mode.
fn trapped(cause: u64, tval: u64, args: &[u64]) -> ScriptHart {
    at(shim::VECTOR, args).with([
        (Reg::Csr(Csr::Stvec), shim::VECTOR),
        (Reg::Csr(Csr::Scause), cause),
        (Reg::Csr(Csr::Sepc), RAM.base),
        (Reg::Csr(Csr::Stval), tval),
        (Reg::Csr(Csr::Sstatus), SPIE),
    ])
}

fn bare() -> (MachineContext, FakeUart) {
    with(Firmware::new(Patches::none(), vec![CsrValue { number: 0xf14, value: 0x1234 }], None))
}

#[test]
fn a_csr_of_machine_mode_is_read_and_the_guest_goes_on_in_its_own_mode() {
    let (context, _) = bare();
    let word: u32 = 0xf140_25f3; // csrr a1,mhartid
    context.ram.write(RAM.base, &word.to_le_bytes()).unwrap();
    // Hardware may write the instruction to stval, or 0.
    for tval in [word.into(), 0] {
        let mut hart = trapped(2, tval, &[]);
        assert_eq!(step(&mut hart, &context), None);
        assert_eq!((reg(&hart, Reg::X(11)), reg(&hart, Reg::Pc)), (0x1234, RAM.base + 4));
        assert_eq!(
            (reg(&hart, Reg::Mode), reg(&hart, Reg::Csr(Csr::Sstatus)) & (SIE | SPIE | SPP)),
            (0, SIE | SPIE)
        );
    }
}

#[test]
fn an_unhandled_trap_without_a_vector_stops_the_guest_with_advice() {
    let (context, _) = bare();
    for (cause, tval, word) in
        [(2, 0x1002_6073, "--start-mode vs"), (13, 0x40, "trap 13"), (2, 0, "illegal")]
    {
        let Some(StopReason::HartFault { what, .. }) =
            step(&mut trapped(cause, tval, &[]), &context)
        else {
            panic!("trap {cause} does not stop")
        };
        assert!(what.contains(word), "{what}");
    }
}

#[test]
fn a_call_from_user_mode_is_handled_or_forwarded() {
    let (context, _) = bare();
    assert_eq!(
        step(&mut trapped(8, 0, &[0, 0, 0, 0, 0, 0, 0, 8]), &context),
        Some(StopReason::PowerOff)
    );
    let mut hart = trapped(8, 0, &[1, 2, 3, 4, 5, 6, 3, 0x10]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!(reg(&hart, Reg::Pc), shim::KERNEL_CALL);
    let mut hart = hart.with([(Reg::Pc, shim::RETURN), (Reg::X(10), 0), (Reg::X(11), 77)]);
    step(&mut hart, &context);
    assert_eq!(
        (reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11)), reg(&hart, Reg::X(12))),
        (0, 77, 3)
    );
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::Mode)), (RAM.base + 4, 0));
}

/// A machine with a timer driven by user space, whose calls are patched.
fn timed() -> MachineContext {
    let control = Arc::new(Control::new());
    let timer = Arc::new(UserTimer::start(1, 10_000_000, &control, None).unwrap());
    let wanted = Wanted { v01: false, timer: true };
    let mut patches = Patches::new(wanted, false, Box::new(|| Ok(())));
    let (mut context, _) = context(Unassigned::Zero);
    let code = bytes(&[0x0000_0893, ECALL]); // li a7,0
    for site in sites::find(&code) {
        assert!(patches.insert(&context.ram, SITE - 4, &code, site).unwrap());
    }
    context.firmware = Some(Firmware::new(patches, Vec::new(), Some(timer)));
    context
}

fn timer_events(hart: &ScriptHart) -> Vec<bool> {
    let pending = |event| match event {
        Event::TimerPending(on) => Some(on),
        _ => None,
    };
    hart.log().events().into_iter().filter_map(pending).collect()
}

#[test]
fn a_timer_of_user_space_raises_its_interrupt_once_it_expires() {
    let context = timed();
    let firmware = context.firmware.as_ref().unwrap();
    let mut hart = at(SITE, &[0, 0, 0, 0, 0, 0, 0, eid::TIME]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((timer_events(&hart), reg(&hart, Reg::Pc)), (vec![false], SITE + 4));
    while timer_events(&hart).len() < 2 {
        firmware.handle_kick(&mut hart).unwrap();
        std::thread::yield_now();
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    firmware.handle_kick(&mut hart).unwrap();
    assert_eq!(timer_events(&hart), [false, true], "once");
    // Setting the timer to never clears it.
    let mut hart = hart.with([(Reg::Pc, SITE), (Reg::X(10), u64::MAX), (Reg::X(17), 0)]);
    step(&mut hart, &context);
    firmware.handle_kick(&mut hart).unwrap();
    assert_eq!(timer_events(&hart), [false, true, false]);
    // None of that writes sip, which contains other interrupts.
    assert_eq!(reg(&hart, Reg::Csr(Csr::Sip)), 0);
}

#[test]
fn without_sstc_the_guest_itself_clears_its_timer_interrupt_before_the_next_is_raised() {
    let context = timed();
    let firmware = context.firmware.as_ref().unwrap();
    let mut hart = at(SITE, &[0, 5, 6, 7, 8, 9, 0, 0]).without_sstc();
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::X(10))), (shim::KERNEL_CALL, u64::MAX));
    assert_eq!((reg(&hart, Reg::X(17)), reg(&hart, Reg::X(16))), (eid::TIME, 0));
    // The timer has expired, but the pending call to the kernel would clear a new interrupt as well.
    std::thread::sleep(std::time::Duration::from_millis(20));
    firmware.handle_kick(&mut hart).unwrap();
    assert_eq!(timer_events(&hart), [false]);
    let mut hart = hart.with([(Reg::Pc, shim::RETURN), (Reg::X(10), 0)]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!((reg(&hart, Reg::Pc), reg(&hart, Reg::X(17))), (SITE + 4, 0));
    while timer_events(&hart).len() < 2 {
        firmware.handle_kick(&mut hart).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(timer_events(&hart), [false, true]);
}

#[test]
fn a_v01_call_clears_the_harts_own_software_interrupt_inside_the_guest() {
    let (context, _) = patched_v01();
    let mut hart = at(SITE, &[1, 2, 3, 4, 5, 6, 7, 3]);
    assert_eq!(step(&mut hart, &context), None);
    assert_eq!(reg(&hart, Reg::Pc), shim::CLEAR_IPI);
    let mut hart = hart.with([(Reg::Pc, shim::CLEARED)]);
    assert_eq!(step(&mut hart, &context), None);
    let answer = (reg(&hart, Reg::Pc), reg(&hart, Reg::X(10)), reg(&hart, Reg::X(11)));
    assert_eq!(answer, (SITE + 4, 0, 2));
    assert_eq!((reg(&hart, Reg::X(16)), reg(&hart, Reg::X(17))), (7, 3));
    assert_eq!(reg(&hart, Reg::Csr(Csr::Sip)), 0, "user space has not written it");
}

#[test]
fn the_shims_page_consists_of_breakpoints_and_two_instructions() {
    let code = shim::code();
    let word = |addr: u64| {
        let at = usize::try_from(addr - shim::PAGE).unwrap();
        u32::from_le_bytes(code[at..at + 4].try_into().unwrap())
    };
    let ebreak = EBREAK;
    assert_eq!(
        (word(shim::VECTOR), word(shim::KERNEL_CALL), word(shim::RETURN)),
        (ebreak, 0x73, ebreak)
    );
    assert_eq!((word(shim::CLEAR_IPI), word(shim::CLEARED)), (0x1441_7073, ebreak));
}
