//! A debugger finds nested functions, their arguments and a variable, and may change it, which the result shows.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use runtime::{Board, Failure, ensure_eq, println, report};

runtime::guest!(run);

/// The initial value of the sum. A debugger may change it before it is read.
static INPUT: AtomicU64 = AtomicU64::new(5);

fn run(board: &'static Board) {
    report::run("debug", board, &[("sum", sum)]);
}

fn sum(_: &'static Board) -> Result<(), Failure> {
    // Nothing here changes it, so the compiler would otherwise assume its value.
    let from = black_box(&INPUT).load(SeqCst);
    let total = sum_down(from, 0);
    println!("debug: the sum from {from} down is {total}");
    ensure_eq!(total, from * (from + 1) / 2, "the sum");
    Ok(())
}

/// Nested calls, for a backtrace.
#[inline(never)]
fn sum_down(number: u64, so_far: u64) -> u64 {
    // In memory, so that a debugger finds them at any stop.
    black_box((&number, &so_far));
    let total = so_far + number;
    if number == 0 {
        return total;
    }
    black_box(sum_down(number - 1, total))
}
