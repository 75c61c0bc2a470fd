//! SBI calls of well-behaved and of hostile guests.

use super::super::exit::{Exit, SbiCall};
use super::super::testing::{RAM, context};
use super::super::{Flow, MachineContext, dispatch};
use crate::config::Unassigned;
use crate::riscv::sbi::eid::{DBCN, SUSP};
use crate::riscv::sbi::error::{INVALID_PARAM, NOT_SUPPORTED};
use crate::riscv::sbi::fid::{
    CONSOLE_READ as READ, CONSOLE_WRITE as WRITE, CONSOLE_WRITE_BYTE as WRITE_BYTE,
};

fn call(context: &MachineContext, extension: u64, function: u64, args: &[u64]) -> (Flow, [u64; 2]) {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    let mut ret = [NOT_SUPPORTED, 0];
    let call = SbiCall { extension, function, args: &all, ret: &mut ret };
    (dispatch(&mut Exit::Sbi(call), context, &mut context.bus.view()), ret)
}

/// A call after which the guest continues.
#[track_caller]
fn done(context: &MachineContext, extension: u64, function: u64, args: &[u64]) -> [u64; 2] {
    let (flow, ret) = call(context, extension, function, args);
    assert_eq!(flow, Flow::Resume);
    ret
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

#[test]
fn console_write_sends_the_bytes_and_counts_them() {
    for len in [1, 255, 256, 257, 4096] {
        let (context, uart) = context(Unassigned::Zero);
        uart.line().room = usize::MAX;
        context.ram.write(RAM.base + 5, &pattern(len)).unwrap();
        assert_eq!(done(&context, DBCN, WRITE, &[len as u64, RAM.base + 5, 0]), [0, len as u64]);
        assert_eq!(uart.line().sent, pattern(len));
        assert_eq!(uart.line().unexpected, 0);
    }
}

#[test]
fn console_write_moves_at_most_4_kib_per_call() {
    let (context, uart) = context(Unassigned::Zero);
    uart.line().room = usize::MAX;
    assert_eq!(done(&context, DBCN, WRITE, &[RAM.size, RAM.base, 0]), [0, 4096]);
    assert_eq!(uart.line().sent.len(), 4096);
}

#[test]
fn console_write_to_a_full_line_returns_what_was_taken() {
    for room in [0, 1, 255, 256, 300] {
        let (context, uart) = context(Unassigned::Zero);
        uart.line().room = room;
        assert_eq!(done(&context, DBCN, WRITE, &[1000, RAM.base, 0]), [0, room as u64]);
        assert_eq!(uart.line().sent.len(), room);
    }
}

#[test]
fn console_read_gives_what_was_typed() {
    for (typed, asked) in [(0, 10), (3, 10), (10, 10), (300, 200), (5000, 5000), (5000, 1 << 20)] {
        let (context, uart) = context(Unassigned::Zero);
        uart.line().typed = pattern(typed).into();
        let got = typed.min(asked).min(4096);
        assert_eq!(done(&context, DBCN, READ, &[asked as u64, RAM.base, 0]), [0, got as u64]);
        let mut seen = vec![0xee; got + 1];
        context.ram.read(RAM.base, &mut seen).unwrap();
        assert_eq!(seen[..got], pattern(got));
        assert_eq!(seen[got], 0, "nothing is written after the bytes that were read");
        assert_eq!(uart.line().typed.len(), typed - got);
    }
}

#[test]
fn a_range_that_is_not_all_ram_is_an_invalid_parameter() {
    let end = RAM.base + RAM.size;
    let hostile = [
        (1, 0, 0),
        (1, end, 0),
        (2, end - 1, 0),
        (1, RAM.base - 1, 0),
        (RAM.size + 1, RAM.base, 0),
        (1 << 32, RAM.base, 0),
        (u64::MAX, RAM.base, 0),
        (u64::MAX, u64::MAX, 0),
        (2, u64::MAX, 0),
        (1, 0x1000_0000, 0),
        (1, RAM.base, 1),
        (1, RAM.base, u64::MAX),
    ];
    let (context, uart) = context(Unassigned::Zero);
    uart.line().room = usize::MAX;
    uart.line().typed = pattern(9).into();
    for (len, base, high) in hostile {
        for function in [WRITE, READ] {
            let ret = done(&context, DBCN, function, &[len, base, high]);
            assert_eq!(ret, [INVALID_PARAM, 0], "{len:#x} {base:#x} {high:#x}");
        }
    }
    let line = uart.line();
    assert_eq!((line.sent.len(), line.typed.len()), (0, 9));
}

#[test]
fn the_last_byte_of_ram_is_in_reach() {
    let (context, uart) = context(Unassigned::Zero);
    uart.line().room = 9;
    let last = RAM.base + RAM.size - 1;
    assert_eq!(done(&context, DBCN, WRITE, &[1, last, 0]), [0, 1]);
}

#[test]
fn no_bytes_are_moved_with_success_wherever_they_are() {
    let (context, _) = context(Unassigned::Zero);
    for function in [WRITE, READ] {
        assert_eq!(done(&context, DBCN, function, &[0, 7, 7]), [0, 0]);
    }
}

#[test]
fn write_byte_sends_the_low_byte() {
    let (context, uart) = context(Unassigned::Zero);
    uart.line().room = 1;
    assert_eq!(done(&context, DBCN, WRITE_BYTE, &[0xffff_ff41]), [0, 0]);
    assert_eq!(uart.line().sent, b"A");
}

#[test]
fn write_byte_to_a_full_line_is_called_again() {
    let (context, uart) = context(Unassigned::Zero);
    assert_eq!(call(&context, DBCN, WRITE_BYTE, &[0x41]).0, Flow::Retry);
    assert_eq!(call(&context, 1, 0, &[0x41]).0, Flow::Retry);
    assert!(uart.line().sent.is_empty());
    uart.line().room = 1;
    assert_eq!(done(&context, DBCN, WRITE_BYTE, &[0x41]), [0, 0]);
}

#[test]
fn unknown_console_functions_are_not_supported() {
    let (context, _) = context(Unassigned::Zero);
    for function in [3, 4, u64::MAX] {
        assert_eq!(done(&context, DBCN, function, &[1, RAM.base, 0]), [NOT_SUPPORTED, 0]);
    }
}

#[test]
fn console_calls_cost_one_access_a_chunk_and_none_to_the_registers() {
    for (len, accesses) in [(1, 1), (256, 1), (257, 1), (4096, 1)] {
        let (context, uart) = context(Unassigned::Zero);
        uart.line().room = usize::MAX;
        assert_eq!(done(&context, DBCN, WRITE, &[len, RAM.base, 0]), [0, len]);
        let line = uart.line();
        assert_eq!((line.accesses, line.unexpected), (accesses, 0), "{len} bytes");
    }
    let (context, uart) = context(Unassigned::Zero);
    uart.line().typed = pattern(300).into();
    assert_eq!(done(&context, DBCN, READ, &[4096, RAM.base, 0]), [0, 300]);
    assert_eq!(uart.line().accesses, 2);
}

#[test]
fn without_a_console_writes_are_discarded_and_reads_give_nothing() {
    let (mut context, _) = context(Unassigned::Zero);
    context.console = None;
    assert_eq!(done(&context, DBCN, WRITE, &[9000, RAM.base, 0]), [0, 4096]);
    assert_eq!(done(&context, DBCN, READ, &[9000, RAM.base, 0]), [0, 0]);
    assert_eq!(done(&context, DBCN, WRITE_BYTE, &[1]), [0, 0]);
    assert_eq!(done(&context, 1, 0, &[0x41, 3]), [0, 3]);
    assert_eq!(done(&context, 2, 0, &[0, 3]), [u64::MAX, 3]);
}

#[test]
fn the_legacy_console_answers_in_a0_and_keeps_a1() {
    let (context, uart) = context(Unassigned::Zero);
    uart.line().room = 1;
    uart.line().typed = [b'k'].into();
    assert_eq!(done(&context, 1, 0, &[0x41, 0x1234]), [0, 0x1234]);
    assert_eq!(done(&context, 2, 0, &[0, 0x1234]), [u64::from(b'k'), 0x1234]);
    assert_eq!(done(&context, 2, 0, &[0, 0x1234]), [u64::MAX, 0x1234]);
    assert_eq!(uart.line().sent, b"A");
}

#[test]
fn probes_of_vendor_extensions_find_nothing() {
    let (context, _) = context(Unassigned::Zero);
    for extension in [0x0900_0000, 0x0800_0000, 0x08ff_ffff, 0x0901_2345] {
        assert_eq!(done(&context, 0x10, 3, &[extension]), [0, 0]);
    }
    for function in [0, 1, 2, 4, 5, 6, 7, u64::MAX] {
        assert_eq!(done(&context, 0x10, function, &[]), [NOT_SUPPORTED, 0]);
    }
}

#[test]
fn unknown_extensions_are_not_supported() {
    let (context, _) = context(Unassigned::Zero);
    let mut extensions: Vec<u64> = (0..64).map(|bit| 1 << bit).collect();
    extensions.retain(|extension| ![1, 2].contains(extension));
    extensions.extend([
        0,
        0x0800_0000,
        0x08ff_ffff,
        0x0900_0000,
        0x09ff_ffff,
        0x4d50_5859,
        u64::MAX,
    ]);
    for extension in extensions {
        for function in [0, 1, 3, u64::MAX] {
            if (extension, function) == (0x10, 3) {
                continue;
            }
            let ret = done(&context, extension, function, &[u64::MAX; 6]);
            assert_eq!(ret, [NOT_SUPPORTED, 0], "{extension:#x} {function:#x}");
        }
    }
}

#[test]
fn system_suspend_is_honoured() {
    let (context, _) = context(Unassigned::Zero);
    assert_eq!(call(&context, SUSP, 0, &[0, RAM.base, 9]), (Flow::Suspend, [0, 0]));
    assert_eq!(done(&context, SUSP, 1, &[]), [NOT_SUPPORTED, 0]);
}
