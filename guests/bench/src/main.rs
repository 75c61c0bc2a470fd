//! The duration of exits of several kinds in nanoseconds, one line per kind: `NAME NUMBER`. scripts/bench runs it
//! on a machine where one instruction takes one nanosecond, so that the numbers are instructions.
//!
//! `rows=NAME,NAME` in the boot arguments selects; by default all are measured, except `dbcn_write`: the time for a
//! mebibyte through the SBI debug console, 4 KiB per call, which is visible on the console. Output is written to the UART
//! without reading its status, because the minimal VMM (bench/floor.c) implements nothing else of a UART.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::fmt::{self, Write};

use runtime::{Board, mmio, sbi, time, uart};

runtime::guest!(run);

/// Number of consecutive round trips over which the mean is taken.
const ROUNDS: u64 = 10_000;
/// Number of round trips before that, to warm up the kernel's caches.
const WARM_UP: u64 = 100;

/// The first extension of the range for firmware vendors (SBI 3.0, chapter 18), which KVM forwards to user space.
const VENDOR: usize = 0x0900_0000;

/// A kind of exit.
struct Row {
    name: &'static str,
    once: fn(),
}

const ROWS: [Row; 4] = [
    Row { name: "mmio_read", once: || _ = mmio::read8(uart::BASE + uart::reg::LSR) },
    Row { name: "mmio_write", once: || mmio::write8(uart::BASE + uart::reg::SCR, 0x55) },
    Row { name: "sbi_forwarded", once: || _ = sbi::call2(VENDOR, 0, 0, 0) },
    Row { name: "sbi_kernel", once: || _ = sbi::call2(sbi::BASE, 0, 0, 0) },
];

/// Number of bytes for the debug console in total, and per call.
const TEXT: usize = 1 << 20;
const CALL: usize = 4096;

/// Lines of 64 bytes.
static LINES: [u8; CALL] = {
    let mut lines = [b'.'; CALL];
    let mut at = 63;
    while at < CALL {
        lines[at] = b'\n';
        at += 64;
    }
    lines
};

fn run(board: &'static Board) {
    let wanted = board.arg("rows");
    if wanted.is_some_and(|names| names.split(',').any(|name| name == "dbcn_write")) {
        write_text(board.timebase_hz);
    }
    for row in &ROWS {
        if wanted.is_none_or(|names| names.split(',').any(|name| name == row.name)) {
            measure(row, board.timebase_hz);
        }
    }
}

fn measure(row: &Row, hz: u64) {
    repeat(row.once, WARM_UP);
    let start = time::now();
    repeat(row.once, ROUNDS);
    let ticks = time::now() - start;
    let total_ns = ticks.saturating_mul(1_000_000_000) / hz.max(1);
    // Text into the UART cannot fail.
    let _ = writeln!(Unpolled, "{} {}", row.name, total_ns / ROUNDS);
}

/// Writes a mebibyte to the debug console.
fn write_text(hz: u64) {
    let start = time::now();
    let mut left = TEXT;
    while left > 0 {
        let part = LINES.get(LINES.len().saturating_sub(left)..).unwrap_or_default();
        let done = sbi::console_write(part.len(), part.as_ptr() as usize, 0);
        if done.error != sbi::SUCCESS {
            return;
        }
        left = left.saturating_sub(done.value);
    }
    let ticks = time::now() - start;
    // Text into the UART cannot fail.
    let _ = writeln!(Unpolled, "dbcn_write {}", ticks.saturating_mul(1_000_000_000) / hz.max(1));
}

#[inline(never)]
fn repeat(once: fn(), rounds: u64) {
    for _ in 0..rounds {
        once();
    }
}

/// The UART, without polling its status.
struct Unpolled;

impl Write for Unpolled {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| uart::write(uart::reg::THR, byte));
        Ok(())
    }
}
