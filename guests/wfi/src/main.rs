//! Timers wake a sleeping hart, by SBI TIME and by Sstc's `stimecmp`; then every hart sleeps for ever, so that the host can
//! try to stop a machine without any pending events.
//!
//! Boot argument `end=armed`: instead of the sleep a timer is set and its interrupt enabled but never taken, and the host selects the
//! end with one byte: `p` power off, `c` cold reboot.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use runtime::trap::{self, Interrupt};
use runtime::{
    Board, Failure, csr, csr_clear, csr_read, csr_set, csr_write, ensure, ensure_eq, println,
    report, sbi, smp, time, uart,
};

runtime::guest!(run);

static TICKS: AtomicUsize = AtomicUsize::new(0);
static ASLEEP: AtomicUsize = AtomicUsize::new(0);

fn run(board: &'static Board) {
    trap::on(Interrupt::Timer, tick);
    csr_set!("sie", csr::SIE_TIMER);
    report::run(
        "wfi",
        board,
        &[
            ("SBI timer", sbi_timer),
            ("timers in the past and never", edge_timers),
            ("WFI with interrupts off", masked_wfi),
            ("stimecmp", sstc),
            ("every hart", every_hart),
        ],
    );
    if board.arg("end") == Some("armed") {
        return armed();
    }
    for cpu in board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart) {
        smp::start(cpu.hart, sleep);
    }
    time::wait_until(|| ASLEEP.load(SeqCst) + 1 == board.cpus().len());
    println!("wfi: {} harts asleep", board.cpus().len());
    sleep();
}

fn sleep() {
    ASLEEP.fetch_add(1, SeqCst);
    sbi::set_timer(u64::MAX);
    sbi::sleep_forever()
}

/// Ends the guest with an armed timer.
fn armed() {
    csr::interrupts_off();
    csr_set!("sie", csr::SIE_TIMER);
    let due = time::now() + time::ticks(50);
    time::set_timer(due);
    println!("wfi: armed");
    match uart::receive() {
        b'p' => sbi::power_off(),
        b'c' => println!("FAIL wfi: no reset: {:?}", sbi::system_reset(1, 0)),
        other => println!("FAIL wfi: what is {other:#x}?"),
    }
}

fn tick() {
    TICKS.fetch_add(1, SeqCst);
    sbi::set_timer(u64::MAX);
}

fn ticks() -> usize {
    TICKS.load(SeqCst)
}

/// Sleeps until `ticks` has changed; the hart takes the interrupt meanwhile.
fn sleep_until_tick() {
    let before = ticks();
    while ticks() == before {
        csr::wait_for_interrupt();
        csr::interrupts_on();
        csr::interrupts_off();
    }
}

fn sbi_timer(_: &'static Board) -> Result<(), Failure> {
    for wait_ms in [1, 5, 20] {
        let due = time::now() + time::ticks(wait_ms);
        ensure_eq!(time::set_timer(due).error, 0, "set_timer");
        sleep_until_tick();
        let now = time::now();
        ensure!(now >= due, "the timer came {} ticks early", due - now);
    }
    Ok(())
}

fn edge_timers(_: &'static Board) -> Result<(), Failure> {
    for past in [0, 1, time::now()] {
        time::set_timer(past);
        sleep_until_tick();
    }
    // Pending and then set to a later time: no longer pending.
    csr::interrupts_off();
    time::set_timer(0);
    let pending = time::wait_until(|| csr_read!("sip") & csr::SIE_TIMER != 0);
    ensure!(pending, "a timer in the past is not pending");
    time::set_timer(u64::MAX);
    ensure_eq!(csr_read!("sip") & csr::SIE_TIMER, 0, "sip.STIP after the timer was moved away");
    Ok(())
}

fn masked_wfi(_: &'static Board) -> Result<(), Failure> {
    csr::interrupts_off();
    let before = ticks();
    let due = time::now() + time::ticks(5);
    time::set_timer(due);
    while csr_read!("sip") & csr::SIE_TIMER == 0 {
        csr::wait_for_interrupt();
    }
    ensure!(time::now() >= due, "WFI came back before the timer");
    ensure_eq!(ticks(), before, "interrupts taken while they are off");
    sbi::set_timer(u64::MAX);
    Ok(())
}

fn sstc(board: &'static Board) -> Result<(), Failure> {
    if !board.has_extension("sstc") {
        println!("wfi: no Sstc here");
        return Ok(());
    }
    for wait_ms in [1, 5, 20] {
        let due = time::now() + time::ticks(wait_ms);
        csr_write!("0x14d", due as usize);
        ensure_eq!(csr_read!("0x14d"), due as usize, "stimecmp read back");
        sleep_until_tick();
        ensure!(time::now() >= due, "the timer came early");
    }
    csr_write!("0x14d", usize::MAX);
    ensure_eq!(csr_read!("sip") & csr::SIE_TIMER, 0, "sip.STIP with stimecmp at its end");
    Ok(())
}

fn every_hart(board: &'static Board) -> Result<(), Failure> {
    fn job() {
        csr_set!("sie", csr::SIE_TIMER);
        time::set_timer(time::now() + time::ticks(5));
        sleep_until_tick();
        csr_clear!("sie", csr::SIE_TIMER);
    }
    for cpu in board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart) {
        let before = ticks();
        ensure_eq!(smp::start(cpu.hart, job).error, 0, "start of hart {}", cpu.hart);
        ensure!(time::wait_until(|| ticks() > before), "no tick at hart {}", cpu.hart);
        let stopped = time::wait_until(|| sbi::hart_status(cpu.hart).value == 1);
        ensure!(stopped, "hart {} does not stop", cpu.hart);
    }
    Ok(())
}
