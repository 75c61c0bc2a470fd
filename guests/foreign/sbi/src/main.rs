//! RustSBI's test suite for SBI implementations (the crate sbi-testing), which judges what KVM and rvmm answer a guest. Ours is
//! only the way in, and a line for each case that the suite reports.
//!
//! Its cases of HSM wait for ever for a hart that cannot suspend without keeping its state (SBI 9.4), so that is tried before.

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicIsize, Ordering::SeqCst};

use runtime::{Board, csr, csr_clear, csr_write, println, sbi, smp, time};

runtime::guest!(run);

/// States of a hart (SBI 9.3).
const STOPPED: usize = 1;
const SUSPENDED: usize = 4;

/// What the call that suspends answered.
static ANSWER: AtomicIsize = AtomicIsize::new(sbi::SUCCESS);

fn run(board: &'static Board) {
    sbi_testing::test_base(|case| println!("base: {case:?}"));
    // The suite sets the timer once. Where KVM forgets that call, this one comes in its place.
    time::set_timer(time::now());
    sbi_testing::test_timer(board.timebase_hz / 10, |case| println!("timer: {case:?}"));
    sbi_testing::test_ipi(board.boot_hart, |case| println!("ipi: {case:?}"));
    sbi_testing::test_dbcn(|case| println!("dbcn: {case:?}"));
    let other = board.cpus().iter().map(|cpu| cpu.hart).find(|&hart| hart != board.boot_hart);
    match other.map_or(sbi::SUCCESS, suspend) {
        sbi::SUCCESS => {
            let mask = board.cpus().iter().fold(0, |mask, cpu| mask | 1 << cpu.hart);
            sbi_testing::test_hsm(board.boot_hart, mask, 0, |case| println!("hsm: {case:?}"));
        }
        error => println!("hsm: left out: a suspend that keeps no state answers {error}"),
    }
    println!("the suite is through");
}

/// Has `hart` suspend without keeping its state, wakes it, and gives what the call answered.
fn suspend(hart: usize) -> isize {
    assert_eq!(smp::start(hart, suspend_itself).error, sbi::SUCCESS, "hart_start");
    let mut woken = false;
    loop {
        match sbi::hart_status(hart).value {
            STOPPED => return ANSWER.load(SeqCst),
            SUSPENDED if !woken => {
                sbi::send_ipi(1, hart);
                woken = true;
            }
            _ => core::hint::spin_loop(),
        }
    }
}

fn suspend_itself() {
    csr_write!("sie", csr::SIE_SOFTWARE);
    let ret = smp::suspend(|| csr_clear!("sip", csr::SIE_SOFTWARE));
    ANSWER.store(ret.error, SeqCst);
}
