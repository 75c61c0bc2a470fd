//! Whole sessions over a socket, with harts that run short programs.

use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

mod lldb;

use super::testing::HEADS;
use super::testing::client::{CODE, Client, TestGuest, TestServer, VECTOR, framed};
use super::testing::hart::TIMER;
use crate::riscv::insn::{EBREAK, WFI};
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::RAM;

/// `addi a0,a0,1`
const COUNT: u32 = 0x0015_0513;
/// `j .-4`
const BACK: u32 = 0xffdf_f06f;
const NOP: u32 = 0x0000_0013;
/// Counts forever.
const COUNTER: &[u32] = &[NOP, COUNT, BACK];
/// Waits forever, also after a step over its `wfi`.
const WAITER: &[u32] = &[WFI, BACK];

const PC: usize = 32;
const A0: usize = 10;
const STVEC: usize = 65 + 0x105;
const SIE: usize = 65 + 0x104;
const SSTATUS: usize = 65 + 0x100;
const SATP: usize = 65 + 0x180;
const SCAUSE: usize = 65 + 0x142;
const SEPC: usize = 65 + 0x141;
const SISELECT: usize = 65 + 0x150;
const HVIPRIO1: usize = 65 + 0x646;

fn hex(value: u64) -> String {
    format!("{:016x}", value.swap_bytes())
}

/// A guest that waits for a debugger, and the connected client.
fn debugged(programs: &[&[u32]]) -> (TestServer, TestGuest, Client) {
    let (fixture, guest) = (TestServer::new(true), TestGuest::new(programs));
    fixture.begin(&guest);
    let client = Client::new(&fixture.socket);
    (fixture, guest, client)
}

/// Ends a run whose debugger has disconnected or does so now.
fn finish(fixture: TestServer, guest: TestGuest) {
    guest.control.stop(StopReason::PowerOff);
    assert_eq!(guest.end(), StopReason::PowerOff);
    fixture.server.over();
    fixture.server.end(0);
}

#[test]
fn a_guest_waits_for_its_debugger_and_runs_once_it_detaches() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    assert_eq!(gdb.register(PC), CODE);
    assert_eq!(guest.harts[0].a0(), 0);
    assert_eq!(gdb.ask("D"), "OK");
    assert!(guest.harts[0].await_a0(0) > 0);
    assert!(gdb.is_at_its_end());
    assert!(!guest.harts[0].traps_ebreaks.load(SeqCst));
    finish(fixture, guest);
}

#[test]
fn a_guest_that_need_not_wait_runs_until_a_debugger_connects() {
    let (fixture, guest) = (TestServer::new(false), TestGuest::new(&[COUNTER]));
    fixture.begin(&guest);
    guest.harts[0].await_a0(0);
    let mut gdb = Client::new(&fixture.socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    let before = gdb.register(A0);
    assert_eq!(gdb.register(A0), before, "it is stopped");
    assert_eq!(guest.harts[0].a0(), before);
    drop(gdb);
    guest.harts[0].await_a0(before);
    finish(fixture, guest);
}

/// Reads the target description, which is sent in pieces.
fn description(gdb: &mut Client) -> String {
    let mut xml = String::new();
    loop {
        let part = gdb.ask(&format!("qXfer:features:read:target.xml:{:x},4000", xml.len()));
        xml.push_str(&part[1..]);
        match &part[..1] {
            "m" => assert!(part.len() > 1),
            last => return if last == "l" { xml } else { panic!("{part}") },
        }
    }
}

#[test]
fn registers_are_read_and_written_by_packet_and_by_number() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER, COUNTER]);
    assert_eq!(gdb.ask("Hg2"), "OK");
    let all = gdb.ask("g");
    assert_eq!(all.len(), 33 * 16);
    assert_eq!(&all[32 * 16..], hex(CODE + 0x1000));
    let changed = format!("{}{}{}", &all[..10 * 16], hex(0x1234), &all[11 * 16..]);
    assert_eq!(gdb.ask(&format!("G{changed}")), "OK");
    assert_eq!(gdb.ask("g"), changed);
    for (number, value) in [
        (A0, 5),
        (33, u64::MAX),
        (64, 1 << 63),
        (STVEC, 0x8000_0001),
        (SISELECT, 0x70),
        (HVIPRIO1, 0x0102 << 48),
        (4161, 0),
    ] {
        assert_eq!(gdb.ask(&format!("P{number:x}={}", hex(value))), "OK");
        assert_eq!(gdb.register(number), value, "{number}");
    }
    // fcsr and its parts have 32 bits.
    assert_eq!(gdb.ask("P44=e5000000"), "OK");
    assert_eq!(gdb.ask("p42"), "05000000");
    assert_eq!(gdb.ask("p43"), "07000000");
    assert_eq!(gdb.ask("P43=01000000"), "OK");
    assert_eq!(gdb.ask("p44"), "25000000");
    // The other hart has its own.
    assert_eq!(gdb.ask("Hg1"), "OK");
    assert_eq!(gdb.register(A0), 0);
    // Invalid packets are errors, and change nothing.
    for packet in ["P0a=00", "p10c9", "Pffff=00", "p14d"] {
        assert!(gdb.ask(packet).len() <= 3, "{packet}");
    }
    let xml = description(&mut gdb);
    assert!(xml.starts_with("<?xml") && xml.contains("riscv.fpu") && !xml.contains("sstateen0"));
    assert!(xml.contains("siselect") && xml.ends_with("</target>"));
    assert!(gdb.ask("qXfer:features:read:other.xml:0,10").starts_with('E'));
    assert_eq!(gdb.ask("qXfer:features:read:target.xml:ffffff,10"), "l");
    finish(fixture, guest);
}

#[test]
fn every_hart_is_a_thread() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER, COUNTER, &[WFI]]);
    assert!(gdb.ask("qSupported:multiprocess-;swbreak+").contains("swbreak+"));
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02,03");
    assert_eq!(gdb.ask("qsThreadInfo"), "l");
    assert_eq!(gdb.ask("T2"), "OK");
    assert!(gdb.ask("T4").starts_with('E'));
    let words = |text: String| {
        let bytes = text
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
        String::from_utf8(bytes.collect()).unwrap()
    };
    assert_eq!(words(gdb.ask("qThreadExtraInfo,3")), "hart 2");
    assert_eq!(gdb.ask("Hg4"), "OK");
    assert!(gdb.ask("g").starts_with('E'), "there is no hart 3");
    finish(fixture, guest);
}

#[test]
fn a_breakpoint_stops_every_hart_and_is_never_seen_by_its_debugger() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER, COUNTER]);
    let before = guest.memory(CODE, 12);
    let at = CODE + 4;
    let read = format!("m{CODE:x},c");
    let shown = gdb.ask(&read);
    assert_eq!(gdb.ask(&format!("Z0,{at:x},4")), "OK");
    assert_eq!(gdb.ask(&format!("Z0,{at:x},4")), "OK", "inserting twice is the same as once");
    assert_ne!(guest.memory(CODE, 12), before);
    assert_eq!(gdb.ask(&read), shown);
    for _ in 0..3 {
        assert_eq!(gdb.ask("vCont;c"), "T05thread:01;swbreak:;");
        assert_eq!(gdb.register(PC), at);
        // As GDB does: remove it, step, insert it again.
        assert_eq!(gdb.ask(&format!("z0,{at:x},4")), "OK");
        assert_eq!(guest.memory(CODE, 12), before);
        assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
        assert_eq!(gdb.register(PC), at + 4);
        assert_eq!(gdb.ask(&format!("Z0,{at:x},4")), "OK");
    }
    assert_eq!(gdb.register(A0), 3);
    assert_eq!(gdb.ask("Hg2"), "OK");
    let other = gdb.register(A0);
    assert_eq!(gdb.register(A0), other, "the other hart is stopped as well");
    // A write over a breakpoint changes the code, and the breakpoint stays.
    assert_eq!(gdb.ask(&format!("M{at:x},4:13000000")), "OK");
    assert_eq!(&gdb.ask(&read)[8..16], "13000000");
    assert_eq!(gdb.ask("vCont;c"), "T05thread:01;swbreak:;");
    assert_eq!(gdb.ask("D"), "OK");
    // The reply is sent before the breakpoints are removed.
    while guest.memory(at, 4) != [0x13, 0, 0, 0] {
        std::thread::yield_now();
    }
    finish(fixture, guest);
}

#[test]
fn a_debugger_that_dies_leaves_no_breakpoint_and_a_guest_that_runs() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    let before = guest.memory(CODE, 12);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 4)), "OK");
    assert_eq!(gdb.ask("c"), "T05thread:01;swbreak:;");
    drop(gdb);
    guest.harts[0].await_a0(0);
    assert_eq!(guest.memory(CODE, 12), before);
    // While the guest runs, as well.
    let mut gdb = Client::new(&fixture.socket);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 0x800)), "OK");
    gdb.send("vCont;c");
    let seen = guest.harts[0].a0();
    guest.harts[0].await_a0(seen);
    drop(gdb);
    let mut gdb = Client::new(&fixture.socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    assert_eq!(guest.memory(CODE + 0x800, 2), [0, 0]);
    assert_eq!(gdb.ask("D"), "OK");
    finish(fixture, guest);
}

#[test]
fn an_interrupt_stops_a_guest_that_runs() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER, &[WFI]]);
    for _ in 0..3 {
        gdb.send("vCont;c");
        let seen = guest.harts[0].a0();
        guest.harts[0].await_a0(seen);
        gdb.raw(&[3]);
        assert_eq!(gdb.reply().unwrap(), "T02thread:01;");
    }
    // A stopped guest reports no second stop.
    gdb.raw(&[3]);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    finish(fixture, guest);
}

#[test]
fn kill_ends_the_machine() {
    for (packet, answer) in [("k", "OK"), ("vKill;1", "OK")] {
        let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
        assert_eq!(gdb.ask(packet), answer);
        assert_eq!(guest.end(), StopReason::Requested);
        fixture.server.over();
        fixture.server.end(0);
    }
}

#[test]
fn one_hart_steps_while_the_others_are_stopped_or_run() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER, COUNTER]);
    for round in 1..=4 {
        assert_eq!(gdb.ask("vCont;s:2"), "T05thread:02;");
        assert_eq!(gdb.ask("Hg2"), "OK");
        let expected = [CODE + 0x1004, CODE + 0x1008, CODE + 0x1004, CODE + 0x1008];
        assert_eq!(gdb.register(PC), expected[round - 1]);
    }
    assert_eq!(guest.harts[0].a0(), 0, "the first hart has not run");
    // The other hart may run during the step, but need not have run before it ends: continue hart 0 alone until it has.
    assert_eq!(gdb.ask("vCont;s:2;c"), "T05thread:02;");
    gdb.send("vCont;c:1");
    guest.harts[0].await_a0(guest.harts[0].a0());
    let second = guest.harts[1].a0();
    gdb.raw(&[3]);
    assert!(gdb.reply().unwrap().starts_with("T02"));
    assert_eq!(guest.harts[1].a0(), second, "the second hart has not run");
    finish(fixture, guest);
}

#[test]
fn a_step_from_a_breakpoint_and_of_a_wait_and_to_itself_ends() {
    let (fixture, guest, mut gdb) = debugged(&[&[NOP, WFI, 0x0000_006f]]);
    assert_eq!(gdb.ask(&format!("Z0,{CODE:x},4")), "OK");
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 4)), "OK");
    let mut places = Vec::new();
    for _ in 0..4 {
        assert!(gdb.ask("vCont;s:1").starts_with("T05thread:01;"));
        places.push(gdb.register(PC) - CODE);
    }
    assert_eq!(places, [4, 8, 8, 8]);
    assert_eq!(guest.memory(CODE, 2), [0x02, 0x90], "the breakpoint is there again");
    finish(fixture, guest);
}

#[test]
fn interrupts_wait_for_a_step_and_traps_do_not() {
    let (fixture, guest, mut gdb) = debugged(&[&[NOP, COUNT, 0xffff_ffff, NOP]]);
    let set = |gdb: &mut Client, number: usize, value: u64| {
        assert_eq!(gdb.ask(&format!("P{number:x}={}", hex(value))), "OK");
    };
    set(&mut gdb, STVEC, CODE + VECTOR);
    set(&mut gdb, SIE, 0x222);
    set(&mut gdb, SSTATUS, 2);
    guest.harts[0].timer.store(true, SeqCst);
    for pc in [CODE + 4, CODE + 8] {
        assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
        assert_eq!(gdb.register(PC), pc);
        assert_eq!(gdb.register(SIE), 0x222, "interrupts are as they were");
    }
    // An illegal instruction.
    assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
    assert_eq!(gdb.register(PC), CODE + VECTOR);
    assert_eq!(gdb.register(SCAUSE), 2);
    // Once it continues, the interrupt is taken.
    set(&mut gdb, PC, CODE);
    set(&mut gdb, SSTATUS, 2);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + VECTOR)), "OK");
    assert_eq!(gdb.ask("c"), "T05thread:01;swbreak:;");
    assert_eq!(gdb.register(SCAUSE), TIMER);
    assert_eq!(gdb.register(SEPC), CODE);
    finish(fixture, guest);
}

#[test]
fn an_ebreak_of_the_guests_own_is_the_guests() {
    let (fixture, guest, mut gdb) = debugged(&[&[NOP, EBREAK, NOP]]);
    let vector = CODE + VECTOR;
    assert_eq!(gdb.ask(&format!("P{STVEC:x}={}", hex(vector))), "OK");
    assert_eq!(gdb.ask(&format!("Z0,{vector:x},4")), "OK");
    assert_eq!(gdb.ask("c"), "T05thread:01;swbreak:;");
    assert_eq!((gdb.register(PC), gdb.register(SCAUSE)), (vector, 3));
    assert_eq!(gdb.register(SEPC), CODE + 4);
    // A step over it, too, leads into the trap vector.
    assert_eq!(gdb.ask(&format!("P{PC:x}={}", hex(CODE + 4))), "OK");
    assert!(gdb.ask("vCont;s:1").starts_with("T05thread:01;"));
    assert_eq!((gdb.register(PC), gdb.register(SCAUSE)), (vector, 3));
    finish(fixture, guest);
}

/// Creates Sv39 page tables that map page 1 to the first page of code, and page 2 nowhere; returns `satp`.
fn map(guest: &TestGuest) -> u64 {
    let table = |index: u64| RAM.base + 0x10_0000 + index * 0x1000;
    let pointer = |to: u64, flags: u64| (to >> 12 << 10 | flags).to_le_bytes();
    guest.ram.write(table(0), &pointer(table(1), 1)).unwrap();
    guest.ram.write(table(1), &pointer(table(2), 1)).unwrap();
    guest.ram.write(table(2) + 8, &pointer(CODE, 0xcf)).unwrap();
    8 << 60 | table(0) >> 12
}

#[test]
fn memory_is_what_the_harts_page_tables_say() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER, COUNTER]);
    let satp = map(&guest);
    let direct = gdb.ask(&format!("m{CODE:x},c"));
    assert_eq!(gdb.ask("Hg2"), "OK");
    assert_eq!(gdb.ask(&format!("P{SATP:x}={}", hex(satp))), "OK");
    assert_eq!(gdb.ask("m1000,c"), direct);
    // A read stops before the unmapped page; if that is the first, it fails.
    assert_eq!(gdb.ask("m1ff8,10"), "0000000000000000");
    assert_eq!(gdb.ask("m2000,1"), "E0e");
    assert_eq!(gdb.ask(&format!("m{CODE:x},1")), "E0e", "the other hart's address");
    assert_eq!(gdb.ask("M1ffc,8:0102030405060708"), "E0e");
    assert_eq!(guest.memory(CODE + 0xffc, 4), [0; 4], "all or nothing");
    assert_eq!(gdb.ask("X1ffc,4:abcd"), "OK");
    assert_eq!(guest.memory(CODE + 0xffc, 4), b"abcd");
    // The other hart has no page tables; devices and unassigned addresses are not RAM.
    assert_eq!(gdb.ask("Hg1"), "OK");
    assert_eq!(gdb.ask(&format!("m{CODE:x},c")), direct);
    for packet in ["m1000,1", "m10000000,1", "mffffffffffffffff,1", "mfffffffffffffff0,20"] {
        assert_eq!(gdb.ask(packet), "E0e", "{packet}");
    }
    // A breakpoint is set if any hart maps its address to RAM, but never at an odd address.
    assert_eq!(gdb.ask("Z0,1004,4"), "OK");
    assert_eq!(gdb.ask("z0,1004,4"), "OK");
    assert_eq!(gdb.ask("Z0,1005,2"), "E0e");
    assert_eq!(gdb.ask("Z0,2000,2"), "E0e");
    finish(fixture, guest);
}

#[test]
fn a_breakpoint_is_met_by_every_address_of_its_memory() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    let satp = map(&guest);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 4)), "OK");
    assert_eq!(gdb.ask(&format!("P{SATP:x}={}", hex(satp))), "OK");
    assert_eq!(gdb.ask(&format!("P{PC:x}={}", hex(0x1000))), "OK");
    // The debugger set it for another address: it sees no breakpoint here, and does not remove it.
    for round in 0..3 {
        assert_eq!(gdb.ask("vCont;c"), "T05thread:01;");
        assert_eq!((gdb.register(PC), gdb.register(A0)), (0x1004, round));
    }
    finish(fixture, guest);
}

#[test]
fn a_guest_that_runs_is_not_waited_for() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    gdb.send("vCont;c");
    for packet in [
        "g",
        "p20",
        "m80010000,4",
        "Z0,80010004,4",
        "z0,80010004,4",
        "M80010000,1:00",
        "P0a=0000000000000000",
    ] {
        assert!(gdb.ask(packet).starts_with('E'), "{packet}");
    }
    gdb.send("vCont;c");
    gdb.send("vCont;s:1;c");
    gdb.raw(&[3]);
    assert_eq!(gdb.reply().unwrap(), "T02thread:01;");
    finish(fixture, guest);
}

#[test]
fn a_reset_stops_the_new_guest_before_its_first_instruction() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 0x800)), "OK");
    gdb.send("vCont;c");
    guest.harts[0].await_a0(0);
    guest.control.stop(StopReason::Reset);
    assert_eq!(guest.end(), StopReason::Reset);
    fixture.server.over();
    let next = TestGuest::new(&[COUNTER]);
    fixture.begin(&next);
    assert_eq!(gdb.reply().unwrap(), "T05thread:01;");
    assert_eq!((gdb.register(PC), gdb.register(A0)), (CODE, 0));
    assert_eq!(next.memory(CODE + 0x800, 2), [0, 0], "breakpoints are removed by the reset");
    assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
    assert_eq!(gdb.register(PC), CODE + 4);
    finish(fixture, next);
}

#[test]
fn the_machines_exit_code_is_reported_to_the_debugger() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    gdb.send("vCont;c");
    guest.harts[0].await_a0(0);
    guest.control.stop(StopReason::GuestFailure(1));
    assert_eq!(guest.end(), StopReason::GuestFailure(1));
    fixture.server.over();
    fixture.server.end(3);
    assert_eq!(gdb.reply().unwrap(), "W03");
    assert!(gdb.is_at_its_end());
}

#[test]
fn a_debugger_that_reads_nothing_does_not_delay_the_machines_end() {
    let (fixture, guest, mut gdb) = debugged(&[COUNTER]);
    for _ in 0..16 {
        gdb.send(&format!("m{:x},100000", RAM.base));
    }
    guest.control.stop(StopReason::PowerOff);
    assert_eq!(guest.end(), StopReason::PowerOff);
    fixture.server.over();
    fixture.server.end(0);
}

#[test]
fn bytes_that_are_no_packet_end_the_session_and_nothing_else() {
    let (fixture, guest, _) = debugged(&[COUNTER]);
    let long = [b"$".as_slice(), &[b'm'; 10_000]].concat();
    for bytes in [b"hello\r\n".as_slice(), b"$g#00", b"$g#zz", b"-", &long, b"$m#6d"] {
        let mut gdb = Client::new(&fixture.socket);
        gdb.raw(bytes);
        assert!(gdb.is_at_its_end());
    }
    let mut gdb = Client::new(&fixture.socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    finish(fixture, guest);
}

/// Packets of the protocol, with arguments that may be invalid.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        Just("0".to_owned()),
        Just("1".to_owned()),
        Just("-1".to_owned()),
        Just("ffffffffffffffff".to_owned()),
        Just(format!("{CODE:x}")),
        Just(format!("{:x}", RAM.base + RAM.size - 8)),
        any::<u64>().prop_map(|value| format!("{value:x}")),
        "[0-9a-fxp.]{0,20}",
    ];
    // Packets that do not end the machine.
    let is_harmless = |head: &&str| !["vKill;1", "k", "R00"].contains(head);
    let heads: Vec<_> = HEADS.into_iter().filter(is_harmless).chain(["Z4,", "QTDP:"]).collect();
    let head = prop::sample::select(heads);
    let tail =
        (number.clone(), prop::sample::select(vec![",", ":", "=", ";", "#", "}", "*"]), number);
    let text = (head, tail, any::<Vec<u8>>(), any::<bool>()).prop_map(
        |(head, (a, mark, b), noise, is_noisy)| {
            let mut text = format!("{head}{a}{mark}{b}").into_bytes();
            text.extend(noise.into_iter().filter(|_| is_noisy).take(40));
            text
        },
    );
    prop_oneof![
        8 => text.prop_map(|text| framed(&text)),
        1 => any::<Vec<u8>>(),
        1 => any::<Vec<u8>>().prop_filter("ends the machine", |bytes| bytes != b"k")
            .prop_map(|bytes| framed(&bytes)),
        1 => Just(vec![3]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_packets_do_harm(packets in prop::collection::vec(packet(), 1..20)) {
        let (fixture, guest, mut gdb) = debugged(&[COUNTER, WAITER]);
        for packet in &packets {
            gdb.raw(packet);
        }
        drop(gdb);
        // The next debugger is served, and finds no breakpoint left.
        let mut gdb = Client::new(&fixture.socket);
        prop_assert!(gdb.ask("?").starts_with("T05"));
        prop_assert!(guest.context.is_empty());
        prop_assert_eq!(gdb.ask("D"), "OK");
        finish(fixture, guest);
    }
}
