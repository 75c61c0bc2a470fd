//! Harts start, stop, start again and interrupt each other, by SBI HSM, IPI and RFENCE.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use runtime::board::Cpu;
use runtime::entry::MAX_HARTS;
use runtime::trap::{self, Interrupt};
use runtime::{
    Board, Failure, csr, csr_clear, csr_read, csr_set, ensure, ensure_eq, println, report, sbi,
    smp, time,
};

runtime::guest!(run);

/// The harts that have started, one bit per hart.
static STARTED: AtomicUsize = AtomicUsize::new(0);
static WRONG_STATE: AtomicUsize = AtomicUsize::new(0);
/// Number of IPIs that each hart has taken.
static IPIS: [AtomicUsize; MAX_HARTS] = [const { AtomicUsize::new(0) }; MAX_HARTS];
static LEAVE: AtomicBool = AtomicBool::new(false);

fn run(board: &'static Board) {
    trap::on(Interrupt::Software, ipi);
    csr_set!("sie", csr::SIE_SOFTWARE);
    report::run(
        "smp",
        board,
        &[
            ("states before", stopped_before),
            ("start", start_all),
            ("IPI to each", ipi_to_each),
            ("IPI to all", ipi_to_all),
            ("IPI between the others", ipi_ring),
            ("remote fences", fences),
            ("stop", stop_all),
            ("start again", start_again),
            ("time in user mode", user_time),
            ("all at once", counters),
        ],
    );
}

fn others(board: &'static Board) -> impl Iterator<Item = &'static Cpu> {
    board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart)
}

fn all_mask(board: &'static Board) -> usize {
    board.cpus().iter().fold(0, |mask, cpu| mask | 1 << cpu.hart)
}

fn ipi() {
    csr_clear!("sip", csr::SIE_SOFTWARE);
    IPIS[trap::hart().id].fetch_add(1, SeqCst);
}

fn ipis(hart: usize) -> usize {
    IPIS[hart].load(SeqCst)
}

/// Runs on a started hart: reports the start, and sleeps between IPIs until `LEAVE` is set.
fn sleeper() {
    let me = trap::hart().id;
    if csr_read!("satp") != 0
        || csr_read!("sie") != 0
        || csr_read!("sstatus") & csr::SSTATUS_SIE != 0
    {
        WRONG_STATE.fetch_or(1 << me, SeqCst);
    }
    csr_set!("sie", csr::SIE_SOFTWARE);
    STARTED.fetch_or(1 << me, SeqCst);
    while !LEAVE.load(SeqCst) {
        csr::wait_for_interrupt();
        csr::interrupts_on();
        csr::interrupts_off();
    }
    csr_clear!("sie", csr::SIE_SOFTWARE);
}

fn stopped_before(board: &'static Board) -> Result<(), Failure> {
    println!("smp: {} harts, boot hart {}", board.cpus().len(), board.boot_hart);
    ensure_eq!(
        sbi::hart_status(board.boot_hart),
        sbi::Ret { error: 0, value: 0 },
        "the boot hart's state"
    );
    for cpu in others(board) {
        ensure_eq!(
            sbi::hart_status(cpu.hart),
            sbi::Ret { error: 0, value: 1 },
            "hart {}'s state",
            cpu.hart
        );
    }
    Ok(())
}

fn start_all(board: &'static Board) -> Result<(), Failure> {
    for cpu in others(board) {
        ensure_eq!(smp::start(cpu.hart, sleeper).error, 0, "start of hart {}", cpu.hart);
    }
    let expected = all_mask(board) & !(1 << board.boot_hart);
    ensure!(
        time::wait_until(|| STARTED.load(SeqCst) == expected),
        "only harts {:#x} report",
        STARTED.load(SeqCst)
    );
    ensure_eq!(WRONG_STATE.load(SeqCst), 0, "harts with interrupts or translation on");
    for cpu in others(board) {
        ensure_eq!(sbi::hart_status(cpu.hart).error, 0, "hart {}'s state", cpu.hart);
        ensure_eq!(
            smp::start(cpu.hart, sleeper).error,
            sbi::ALREADY_AVAILABLE,
            "second start of hart {}",
            cpu.hart
        );
    }
    Ok(())
}

fn ipi_to_each(board: &'static Board) -> Result<(), Failure> {
    csr::interrupts_on();
    for round in 1..=20 {
        for cpu in board.cpus() {
            ensure_eq!(sbi::send_ipi(1, cpu.hart).error, 0, "IPI to hart {}", cpu.hart);
            let arrived = time::wait_until(|| ipis(cpu.hart) == round);
            ensure!(
                arrived,
                "IPI {round} did not reach hart {}, which took {}",
                cpu.hart,
                ipis(cpu.hart)
            );
        }
    }
    Ok(())
}

fn ipi_to_all(board: &'static Board) -> Result<(), Failure> {
    for (mask, base) in [(all_mask(board), 0), (0, usize::MAX)] {
        let before = IPIS.each_ref().map(|count| count.load(SeqCst));
        ensure_eq!(sbi::send_ipi(mask, base).error, 0, "IPI to mask {mask:#x} base {base:#x}");
        for cpu in board.cpus() {
            let arrived = time::wait_until(|| ipis(cpu.hart) > before[cpu.hart]);
            ensure!(
                arrived,
                "IPI to mask {mask:#x} base {base:#x} did not reach hart {}",
                cpu.hart
            );
        }
    }
    Ok(())
}

/// Each hart forwards an IPI to the next, for three rounds.
fn ipi_ring(board: &'static Board) -> Result<(), Failure> {
    fn pass_on() {
        ipi();
        let cpus = Board::get().cpus();
        let me = trap::hart().id;
        let index = cpus.iter().position(|cpu| cpu.hart == me).unwrap_or(0);
        let next = cpus[(index + 1) % cpus.len()].hart;
        if next != Board::get().boot_hart || ipis(me) < 3 {
            sbi::send_ipi(1, next);
        }
    }
    for count in &IPIS {
        count.store(0, SeqCst);
    }
    trap::on(Interrupt::Software, pass_on);
    sbi::send_ipi(1, board.boot_hart);
    let done = time::wait_until(|| board.cpus().iter().all(|cpu| ipis(cpu.hart) >= 3));
    trap::on(Interrupt::Software, ipi);
    ensure!(done, "the ring broke: {} IPIs at the boot hart", ipis(board.boot_hart));
    Ok(())
}

fn fences(board: &'static Board) -> Result<(), Failure> {
    let all = all_mask(board);
    for (function, args) in [
        (0, [all, 0, 0, 0, 0, 0]),
        (1, [all, 0, 0x8020_0000, 0x1000, 0, 0]),
        (1, [0, usize::MAX, 0, usize::MAX, 0, 0]),
        (2, [all, 0, 0x8020_0000, 0x1000, 7, 0]),
    ] {
        ensure_eq!(sbi::call(sbi::RFENCE, function, args).error, 0, "remote fence {function}");
    }
    Ok(())
}

fn stop_all(board: &'static Board) -> Result<(), Failure> {
    csr::interrupts_off();
    LEAVE.store(true, SeqCst);
    sbi::send_ipi(all_mask(board) & !(1 << board.boot_hart), 0);
    for cpu in others(board) {
        let stopped = time::wait_until(|| sbi::hart_status(cpu.hart).value == 1);
        ensure!(stopped, "hart {} is in state {:?}", cpu.hart, sbi::hart_status(cpu.hart));
    }
    Ok(())
}

fn start_again(board: &'static Board) -> Result<(), Failure> {
    // LEAVE is still set: each start reports and stops again.
    for round in 0..10 {
        for cpu in others(board) {
            STARTED.store(0, SeqCst);
            ensure_eq!(
                smp::start(cpu.hart, sleeper).error,
                0,
                "start {round} of hart {}",
                cpu.hart
            );
            let done = time::wait_until(|| {
                STARTED.load(SeqCst) == 1 << cpu.hart && sbi::hart_status(cpu.hart).value == 1
            });
            ensure!(done, "hart {} did not start and stop, round {round}", cpu.hart);
        }
    }
    ensure_eq!(WRONG_STATE.load(SeqCst), 0, "harts with interrupts or translation on");
    Ok(())
}

/// Firmware enables `time` for user mode before it starts a hart: on the boot hart from the first instruction, on others
/// shortly after each start.
fn user_time(board: &'static Board) -> Result<(), Failure> {
    static OPEN: AtomicUsize = AtomicUsize::new(0);
    fn job() {
        if time::wait_until(time::is_open_to_user_mode) {
            OPEN.fetch_or(1 << trap::hart().id, SeqCst);
        }
    }
    ensure!(time::is_open_to_user_mode(), "closed on the boot hart");
    for round in 0..3 {
        OPEN.store(0, SeqCst);
        for cpu in others(board) {
            ensure_eq!(smp::start(cpu.hart, job).error, 0, "start {round} of hart {}", cpu.hart);
        }
        for cpu in others(board) {
            let stopped = time::wait_until(|| sbi::hart_status(cpu.hart).value == 1);
            ensure!(stopped, "hart {} is in state {:?}", cpu.hart, sbi::hart_status(cpu.hart));
        }
        let expected = all_mask(board) & !(1 << board.boot_hart);
        ensure_eq!(OPEN.load(SeqCst), expected, "harts that it is open on after start {round}");
        // A kernel does not take a CPU offline and online again at once either.
        time::pause(300);
    }
    Ok(())
}

/// All harts count in the same memory; no count is lost.
fn counters(board: &'static Board) -> Result<(), Failure> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    const EACH: usize = 10_000;
    fn job() {
        for _ in 0..EACH {
            COUNT.fetch_add(1, SeqCst);
        }
    }
    COUNT.store(0, SeqCst);
    for cpu in others(board) {
        ensure_eq!(smp::start(cpu.hart, job).error, 0, "start of hart {}", cpu.hart);
    }
    job();
    let expected = EACH * board.cpus().len();
    ensure!(
        time::wait_until(|| COUNT.load(SeqCst) == expected),
        "{} counts, not {expected}",
        COUNT.load(SeqCst)
    );
    Ok(())
}
