//! Whole sessions over a socket: packets in, packets out, harts that run tiny programs.

use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

mod lldb;

use super::testing::HEADS;
use super::testing::client::{CODE, Client, Life, Place, VECTOR, framed};
use super::testing::hart::TIMER;
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::RAM;

/// `addi a0,a0,1`
const COUNT: u32 = 0x0015_0513;
/// `j .-4`
const BACK: u32 = 0xffdf_f06f;
const NOP: u32 = 0x0000_0013;
const WFI: u32 = 0x1050_0073;
const EBREAK: u32 = 0x0010_0073;
/// Counts for ever: at CODE + 4 a0 has just grown.
const COUNTER: &[u32] = &[NOP, COUNT, BACK];
/// Waits for ever, also where a step takes it past its `wfi`.
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

/// A machine whose guest waits, and its debugger.
fn debugged(programs: &[&[u32]]) -> (Place, Life, Client) {
    let (place, life) = (Place::new(true), Life::new(programs));
    place.begin(&life);
    let client = Client::new(&place.socket);
    (place, life, client)
}

/// Ends a life whose debugger is gone or lets it go.
fn finish(place: Place, life: Life) {
    life.control.stop(StopReason::PowerOff);
    assert_eq!(life.end(), StopReason::PowerOff);
    place.server.over();
    place.server.end(0);
}

#[test]
fn a_guest_waits_for_its_debugger_and_runs_when_that_says_so() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    assert_eq!(gdb.register(PC), CODE);
    assert_eq!(life.harts[0].a0(), 0);
    assert_eq!(gdb.ask("D"), "OK");
    assert!(life.harts[0].await_a0(0) > 0);
    assert!(gdb.is_at_its_end());
    assert!(!life.harts[0].traps_ebreaks.load(SeqCst));
    finish(place, life);
}

#[test]
fn a_guest_that_need_not_wait_runs_until_a_debugger_connects() {
    let (place, life) = (Place::new(false), Life::new(&[COUNTER]));
    place.begin(&life);
    life.harts[0].await_a0(0);
    let mut gdb = Client::new(&place.socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    let before = gdb.register(A0);
    assert_eq!(gdb.register(A0), before, "it stands still");
    assert_eq!(life.harts[0].a0(), before);
    drop(gdb);
    life.harts[0].await_a0(before);
    finish(place, life);
}

/// The target's description, which comes in pieces.
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
    let (place, life, mut gdb) = debugged(&[COUNTER, COUNTER]);
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
    // What is wrong is an error, and changes nothing.
    for packet in ["P0a=00", "p10c9", "Pffff=00", "p14d"] {
        assert!(gdb.ask(packet).len() <= 3, "{packet}");
    }
    let xml = description(&mut gdb);
    assert!(xml.starts_with("<?xml") && xml.contains("riscv.fpu") && !xml.contains("sstateen0"));
    assert!(xml.contains("siselect") && xml.ends_with("</target>"));
    assert!(gdb.ask("qXfer:features:read:other.xml:0,10").starts_with('E'));
    assert_eq!(gdb.ask("qXfer:features:read:target.xml:ffffff,10"), "l");
    finish(place, life);
}

#[test]
fn every_hart_is_a_thread() {
    let (place, life, mut gdb) = debugged(&[COUNTER, COUNTER, &[WFI]]);
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
    finish(place, life);
}

#[test]
fn a_breakpoint_stops_every_hart_and_is_never_seen_by_its_debugger() {
    let (place, life, mut gdb) = debugged(&[COUNTER, COUNTER]);
    let before = life.memory(CODE, 12);
    let at = CODE + 4;
    let read = format!("m{CODE:x},c");
    let shown = gdb.ask(&read);
    assert_eq!(gdb.ask(&format!("Z0,{at:x},4")), "OK");
    assert_eq!(gdb.ask(&format!("Z0,{at:x},4")), "OK", "a second time is as once");
    assert_ne!(life.memory(CODE, 12), before);
    assert_eq!(gdb.ask(&read), shown);
    for _ in 0..3 {
        assert_eq!(gdb.ask("vCont;c"), "T05thread:01;swbreak:;");
        assert_eq!(gdb.register(PC), at);
        // As GDB does: away with it, one step, and there again.
        assert_eq!(gdb.ask(&format!("z0,{at:x},4")), "OK");
        assert_eq!(life.memory(CODE, 12), before);
        assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
        assert_eq!(gdb.register(PC), at + 4);
        assert_eq!(gdb.ask(&format!("Z0,{at:x},4")), "OK");
    }
    assert_eq!(gdb.register(A0), 3);
    assert_eq!(gdb.ask("Hg2"), "OK");
    let other = gdb.register(A0);
    assert_eq!(gdb.register(A0), other, "the other hart stands still too");
    // What is written over a breakpoint is code, and the breakpoint stays.
    assert_eq!(gdb.ask(&format!("M{at:x},4:13000000")), "OK");
    assert_eq!(&gdb.ask(&read)[8..16], "13000000");
    assert_eq!(gdb.ask("vCont;c"), "T05thread:01;swbreak:;");
    assert_eq!(gdb.ask("D"), "OK");
    // The answer is on its way before the breakpoints are taken out.
    while life.memory(at, 4) != [0x13, 0, 0, 0] {
        std::thread::yield_now();
    }
    finish(place, life);
}

#[test]
fn a_debugger_that_dies_leaves_no_breakpoint_and_a_guest_that_runs() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
    let before = life.memory(CODE, 12);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 4)), "OK");
    assert_eq!(gdb.ask("c"), "T05thread:01;swbreak:;");
    drop(gdb);
    life.harts[0].await_a0(0);
    assert_eq!(life.memory(CODE, 12), before);
    // While the guest runs, too.
    let mut gdb = Client::new(&place.socket);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 0x800)), "OK");
    gdb.send("vCont;c");
    let seen = life.harts[0].a0();
    life.harts[0].await_a0(seen);
    drop(gdb);
    let mut gdb = Client::new(&place.socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    assert_eq!(life.memory(CODE + 0x800, 2), [0, 0]);
    assert_eq!(gdb.ask("D"), "OK");
    finish(place, life);
}

#[test]
fn an_interrupt_stops_a_guest_that_runs() {
    let (place, life, mut gdb) = debugged(&[COUNTER, &[WFI]]);
    for _ in 0..3 {
        gdb.send("vCont;c");
        let seen = life.harts[0].a0();
        life.harts[0].await_a0(seen);
        gdb.raw(&[3]);
        assert_eq!(gdb.reply().unwrap(), "T02thread:01;");
    }
    // One that stands still is not told of another stop.
    gdb.raw(&[3]);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    finish(place, life);
}

#[test]
fn kill_ends_the_machine() {
    for (packet, answer) in [("k", "OK"), ("vKill;1", "OK")] {
        let (place, life, mut gdb) = debugged(&[COUNTER]);
        assert_eq!(gdb.ask(packet), answer);
        assert_eq!(life.end(), StopReason::Requested);
        place.server.over();
        place.server.end(0);
    }
}

#[test]
fn one_hart_steps_while_the_others_stand_or_run() {
    let (place, life, mut gdb) = debugged(&[COUNTER, COUNTER]);
    for round in 1..=4 {
        assert_eq!(gdb.ask("vCont;s:2"), "T05thread:02;");
        assert_eq!(gdb.ask("Hg2"), "OK");
        let expected = [CODE + 0x1004, CODE + 0x1008, CODE + 0x1004, CODE + 0x1008];
        assert_eq!(gdb.register(PC), expected[round - 1]);
    }
    assert_eq!(life.harts[0].a0(), 0, "the first hart has not run");
    // A step does not end before the other hart has run, where that is let go for good.
    assert_eq!(gdb.ask("vCont;s:2;c"), "T05thread:02;");
    gdb.send("vCont;c:1");
    life.harts[0].await_a0(life.harts[0].a0());
    let second = life.harts[1].a0();
    gdb.raw(&[3]);
    assert!(gdb.reply().unwrap().starts_with("T02"));
    assert_eq!(life.harts[1].a0(), second, "the second hart has not run");
    finish(place, life);
}

#[test]
fn a_step_from_a_breakpoint_and_of_a_wait_and_to_itself_ends() {
    let (place, life, mut gdb) = debugged(&[&[NOP, WFI, 0x0000_006f]]);
    assert_eq!(gdb.ask(&format!("Z0,{CODE:x},4")), "OK");
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 4)), "OK");
    let mut places = Vec::new();
    for _ in 0..4 {
        assert!(gdb.ask("vCont;s:1").starts_with("T05thread:01;"));
        places.push(gdb.register(PC) - CODE);
    }
    assert_eq!(places, [4, 8, 8, 8]);
    assert_eq!(life.memory(CODE, 2), [0x02, 0x90], "the breakpoint is there again");
    finish(place, life);
}

#[test]
fn interrupts_wait_for_a_step_and_traps_do_not() {
    let (place, life, mut gdb) = debugged(&[&[NOP, COUNT, 0xffff_ffff, NOP]]);
    let set = |gdb: &mut Client, number: usize, value: u64| {
        assert_eq!(gdb.ask(&format!("P{number:x}={}", hex(value))), "OK");
    };
    set(&mut gdb, STVEC, CODE + VECTOR);
    set(&mut gdb, SIE, 0x222);
    set(&mut gdb, SSTATUS, 2);
    life.harts[0].timer.store(true, SeqCst);
    for place in [CODE + 4, CODE + 8] {
        assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
        assert_eq!(gdb.register(PC), place);
        assert_eq!(gdb.register(SIE), 0x222, "interrupts are as they were");
    }
    // An instruction that does not exist.
    assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
    assert_eq!(gdb.register(PC), CODE + VECTOR);
    assert_eq!(gdb.register(SCAUSE), 2);
    // Where it goes on, the interrupt comes.
    set(&mut gdb, PC, CODE);
    set(&mut gdb, SSTATUS, 2);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + VECTOR)), "OK");
    assert_eq!(gdb.ask("c"), "T05thread:01;swbreak:;");
    assert_eq!(gdb.register(SCAUSE), TIMER);
    assert_eq!(gdb.register(SEPC), CODE);
    finish(place, life);
}

#[test]
fn an_ebreak_of_the_guests_own_is_the_guests() {
    let (place, life, mut gdb) = debugged(&[&[NOP, EBREAK, NOP]]);
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
    finish(place, life);
}

/// Tables of Sv39 that lead page 1 to the first page of code, and page 2 nowhere; gives `satp`.
fn map(life: &Life) -> u64 {
    let table = |index: u64| RAM.base + 0x10_0000 + index * 0x1000;
    let pointer = |to: u64, flags: u64| (to >> 12 << 10 | flags).to_le_bytes();
    life.ram.write(table(0), &pointer(table(1), 1)).unwrap();
    life.ram.write(table(1), &pointer(table(2), 1)).unwrap();
    life.ram.write(table(2) + 8, &pointer(CODE, 0xcf)).unwrap();
    8 << 60 | table(0) >> 12
}

#[test]
fn memory_is_what_the_harts_page_tables_say() {
    let (place, life, mut gdb) = debugged(&[COUNTER, COUNTER]);
    let satp = map(&life);
    let direct = gdb.ask(&format!("m{CODE:x},c"));
    assert_eq!(gdb.ask("Hg2"), "OK");
    assert_eq!(gdb.ask(&format!("P{SATP:x}={}", hex(satp))), "OK");
    assert_eq!(gdb.ask("m1000,c"), direct);
    // Up to the page that is not there, or nothing.
    assert_eq!(gdb.ask("m1ff8,10"), "0000000000000000");
    assert_eq!(gdb.ask("m2000,1"), "E0e");
    assert_eq!(gdb.ask(&format!("m{CODE:x},1")), "E0e", "the other hart's address");
    assert_eq!(gdb.ask("M1ffc,8:0102030405060708"), "E0e");
    assert_eq!(life.memory(CODE + 0xffc, 4), [0; 4], "all or nothing");
    assert_eq!(gdb.ask("X1ffc,4:abcd"), "OK");
    assert_eq!(life.memory(CODE + 0xffc, 4), b"abcd");
    // The other hart has no page tables; devices and nothing are no memory.
    assert_eq!(gdb.ask("Hg1"), "OK");
    assert_eq!(gdb.ask(&format!("m{CODE:x},c")), direct);
    for packet in ["m1000,1", "m10000000,1", "mffffffffffffffff,1", "mfffffffffffffff0,20"] {
        assert_eq!(gdb.ask(packet), "E0e", "{packet}");
    }
    // A breakpoint is set where any hart finds memory, an odd one nowhere.
    assert_eq!(gdb.ask("Z0,1004,4"), "OK");
    assert_eq!(gdb.ask("z0,1004,4"), "OK");
    assert_eq!(gdb.ask("Z0,1005,2"), "E0e");
    assert_eq!(gdb.ask("Z0,2000,2"), "E0e");
    finish(place, life);
}

#[test]
fn a_breakpoint_is_met_by_every_address_of_its_memory() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
    let satp = map(&life);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 4)), "OK");
    assert_eq!(gdb.ask(&format!("P{SATP:x}={}", hex(satp))), "OK");
    assert_eq!(gdb.ask(&format!("P{PC:x}={}", hex(0x1000))), "OK");
    // The debugger does not know it by this address: it is no breakpoint to it, and it does not take it away.
    for round in 0..3 {
        assert_eq!(gdb.ask("vCont;c"), "T05thread:01;");
        assert_eq!((gdb.register(PC), gdb.register(A0)), (0x1004, round));
    }
    finish(place, life);
}

#[test]
fn a_guest_that_runs_is_not_waited_for() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
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
    finish(place, life);
}

#[test]
fn a_reset_stops_the_new_guest_before_its_first_instruction() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
    assert_eq!(gdb.ask(&format!("Z0,{:x},4", CODE + 0x800)), "OK");
    gdb.send("vCont;c");
    life.harts[0].await_a0(0);
    life.control.stop(StopReason::Reset);
    assert_eq!(life.end(), StopReason::Reset);
    place.server.over();
    let next = Life::new(&[COUNTER]);
    place.begin(&next);
    assert_eq!(gdb.reply().unwrap(), "T05thread:01;");
    assert_eq!((gdb.register(PC), gdb.register(A0)), (CODE, 0));
    assert_eq!(next.memory(CODE + 0x800, 2), [0, 0], "breakpoints were the old guest's");
    assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
    assert_eq!(gdb.register(PC), CODE + 4);
    finish(place, next);
}

#[test]
fn a_debugger_is_told_how_the_machine_ended() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
    gdb.send("vCont;c");
    life.harts[0].await_a0(0);
    life.control.stop(StopReason::GuestFailure(1));
    assert_eq!(life.end(), StopReason::GuestFailure(1));
    place.server.over();
    place.server.end(3);
    assert_eq!(gdb.reply().unwrap(), "W03");
    assert!(gdb.is_at_its_end());
}

#[test]
fn a_debugger_that_reads_nothing_does_not_hold_the_machines_end_up() {
    let (place, life, mut gdb) = debugged(&[COUNTER]);
    for _ in 0..16 {
        gdb.send(&format!("m{:x},100000", RAM.base));
    }
    life.control.stop(StopReason::PowerOff);
    assert_eq!(life.end(), StopReason::PowerOff);
    place.server.over();
    place.server.end(0);
}

#[test]
fn what_is_no_packet_ends_the_session_and_nothing_else() {
    let (place, life, _) = debugged(&[COUNTER]);
    let long = [b"$".as_slice(), &[b'm'; 10_000]].concat();
    for bytes in [b"hello\r\n".as_slice(), b"$g#00", b"$g#zz", b"-", &long, b"$m#6d"] {
        let mut gdb = Client::new(&place.socket);
        gdb.raw(bytes);
        assert!(gdb.is_at_its_end());
    }
    let mut gdb = Client::new(&place.socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    finish(place, life);
}

/// Packets that mean something, with parts that may not.
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
    // The machine lives on.
    let goes_on = |head: &&str| !["vKill;1", "k", "R00"].contains(head);
    let heads: Vec<_> = HEADS.into_iter().filter(goes_on).chain(["Z4,", "QTDP:"]).collect();
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
        let (place, life, mut gdb) = debugged(&[COUNTER, WAITER]);
        for packet in &packets {
            gdb.raw(packet);
        }
        drop(gdb);
        // Whatever that was, the next one is served, and finds no breakpoint left.
        let mut gdb = Client::new(&place.socket);
        prop_assert!(gdb.ask("?").starts_with("T05"));
        prop_assert!(life.context.is_empty());
        prop_assert_eq!(gdb.ask("D"), "OK");
        finish(place, life);
    }
}
