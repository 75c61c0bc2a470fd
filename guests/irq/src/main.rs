//! Level-triggered interrupts reach the hart through the interrupt controller in the device tree: they are taken when
//! the line is high and they are enabled, they stay pending while the line is high, and they end when it is low.
//!
//! Boot argument `input`: also waits for a line of console input by interrupt.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};

use runtime::aia::imsic;
use runtime::irqchip::Irqchip;
use runtime::trap::{self, Interrupt};
use runtime::uart::{self, reg};
use runtime::{
    Board, Failure, aia, csr, csr_clear, csr_set, ensure, ensure_eq, mmio, println, report, rtc,
    smp, time,
};

runtime::guest!(run);

/// Number of claims of each source.
static TAKEN: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
/// The hart that took the last interrupt.
static TAKER: AtomicUsize = AtomicUsize::new(usize::MAX);
/// True if the hook leaves a source claimed.
static HOLD: AtomicBool = AtomicBool::new(false);
/// True if the UART's interrupt hook clears the cause; it adds received bytes to `RECEIVED`.
static QUIET: AtomicBool = AtomicBool::new(true);
static RECEIVED: AtomicU32 = AtomicU32::new(0);
static LINE_ENDED: AtomicBool = AtomicBool::new(false);

fn run(board: &'static Board) {
    trap::on(Interrupt::External, external);
    board.irqchip.init(board.boot_hart);
    csr_set!("sie", csr::SIE_EXTERNAL);
    let checks: &[report::Check] = &[
        ("transmitter empty", transmitter_empty),
        ("received data, by loopback", received),
        ("masked while asserted", masked),
        ("claimed and not completed", held),
        ("no claim without a cause", spurious),
        ("priority and threshold", thresholds),
        ("alarm of the clock", alarm),
        ("every hart", every_hart),
        ("console input", console_input),
    ];
    let asked = board.bootargs.split(' ').any(|word| word == "input");
    report::run("irq", board, &checks[..checks.len() - usize::from(!asked)]);
}

fn external() {
    let irqchip = &Board::get().irqchip;
    let hart = trap::hart().id;
    let source = irqchip.claim(hart);
    let Some(count) = TAKEN.get(source as usize) else { panic!("claimed source {source}") };
    count.fetch_add(1, SeqCst);
    TAKER.store(hart, SeqCst);
    if source == uart::IRQ && QUIET.load(SeqCst) {
        clear_cause();
    }
    if source == rtc::IRQ {
        rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
    }
    if source != 0 && !HOLD.load(SeqCst) {
        irqchip.complete(source, hart);
    }
}

/// Clears the UART's cause, as a driver does.
fn clear_cause() {
    loop {
        match uart::read(reg::IIR) & uart::IIR_MASK {
            id if id & uart::IIR_NONE != 0 => return,
            uart::IIR_THRE => {}
            _ => {
                while let Some(byte) = uart::try_receive() {
                    RECEIVED.fetch_add(byte.into(), SeqCst);
                    if byte == b'\n' {
                        LINE_ENDED.store(true, SeqCst);
                    }
                }
            }
        }
    }
}

fn taken(source: u32) -> u32 {
    TAKEN[source as usize].load(SeqCst)
}

/// Routes and unmasks an idle UART at the calling hart, and enables the hart's interrupts.
fn begin(board: &'static Board) {
    csr::interrupts_off();
    let hart = trap::hart().id;
    uart::init();
    clear_cause();
    QUIET.store(true, SeqCst);
    HOLD.store(false, SeqCst);
    board.irqchip.init(hart);
    board.irqchip.route(uart::IRQ, hart);
    while board.irqchip.claim(hart) != 0 {
        board.irqchip.complete(uart::IRQ, hart);
    }
    board.irqchip.unmask(uart::IRQ, hart);
    for count in &TAKEN {
        count.store(0, SeqCst);
    }
    csr::interrupts_on();
}

fn end(board: &'static Board) {
    uart::init();
    csr::interrupts_off();
    board.irqchip.mask(uart::IRQ, trap::hart().id);
}

/// Waits long enough for an unexpected interrupt.
fn settle() {
    time::pause(5);
}

fn transmitter_empty(board: &'static Board) -> Result<(), Failure> {
    ensure!(!matches!(board.irqchip, Irqchip::None), "no interrupt controller in the tree");
    begin(board);
    settle();
    ensure_eq!(taken(uart::IRQ), 0, "interrupts of a UART with nothing enabled");
    uart::write(reg::IER, uart::IER_THRE);
    ensure!(
        time::wait_until(|| taken(uart::IRQ) == 1),
        "no interrupt after IER was set: {}",
        taken(uart::IRQ)
    );
    settle();
    ensure_eq!(taken(uart::IRQ), 1, "interrupts after IIR was read");
    for sent in 2..6 {
        uart::write(reg::THR, b'.');
        ensure!(
            time::wait_until(|| taken(uart::IRQ) >= sent),
            "no interrupt {sent} after a byte was sent"
        );
    }
    uart::write(reg::THR, b'\n');
    settle();
    uart::write(reg::IER, 0);
    settle();
    let before = taken(uart::IRQ);
    uart::write(reg::THR, b'\n');
    settle();
    ensure_eq!(taken(uart::IRQ), before, "interrupts after IER was cleared");
    end(board);
    Ok(())
}

fn received(board: &'static Board) -> Result<(), Failure> {
    begin(board);
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::IER, uart::IER_RX);
    RECEIVED.store(0, SeqCst);
    for byte in 1..=100u8 {
        let before = RECEIVED.load(SeqCst);
        uart::write(reg::THR, byte);
        let arrived = time::wait_until(|| RECEIVED.load(SeqCst) == before + u32::from(byte));
        ensure!(arrived, "byte {byte} looped back and did not arrive");
    }
    let count = taken(uart::IRQ);
    ensure!((100..200).contains(&count), "{count} interrupts for 100 bytes");
    settle();
    ensure_eq!(taken(uart::IRQ), count, "interrupts after the last byte");
    end(board);
    Ok(())
}

fn masked(board: &'static Board) -> Result<(), Failure> {
    begin(board);
    board.irqchip.mask(uart::IRQ, board.boot_hart);
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::IER, uart::IER_RX);
    uart::write(reg::THR, 7);
    ensure!(
        time::wait_until(|| board.irqchip.is_pending(uart::IRQ)),
        "not pending while the line is up"
    );
    settle();
    ensure_eq!(taken(uart::IRQ), 0, "interrupts while masked");
    board.irqchip.unmask(uart::IRQ, board.boot_hart);
    ensure!(time::wait_until(|| taken(uart::IRQ) == 1), "none after it was unmasked");
    settle();
    ensure_eq!(taken(uart::IRQ), 1, "interrupts after it was served");
    end(board);
    Ok(())
}

fn held(board: &'static Board) -> Result<(), Failure> {
    begin(board);
    HOLD.store(true, SeqCst);
    QUIET.store(false, SeqCst);
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::IER, uart::IER_RX);
    uart::write(reg::THR, 7);
    ensure!(time::wait_until(|| taken(uart::IRQ) == 1), "no interrupt");
    settle();
    ensure_eq!(taken(uart::IRQ), 1, "interrupts while claimed and the line is up");
    // Completed with the line still high: it is taken repeatedly.
    for again in 2..5 {
        board.irqchip.complete(uart::IRQ, board.boot_hart);
        ensure!(
            time::wait_until(|| taken(uart::IRQ) == again),
            "not again ({again}) after completion with the line up"
        );
    }
    // Completed with the line low: it is not taken again.
    let _ = uart::read(reg::RBR);
    board.irqchip.complete(uart::IRQ, board.boot_hart);
    settle();
    ensure_eq!(taken(uart::IRQ), 4, "interrupts after the line went down");
    end(board);
    Ok(())
}

fn spurious(board: &'static Board) -> Result<(), Failure> {
    begin(board);
    csr::interrupts_off();
    ensure_eq!(board.irqchip.claim(board.boot_hart), 0, "a claim with nothing pending");
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::IER, uart::IER_RX);
    uart::write(reg::THR, 7);
    let claimed = time::wait_until(|| board.irqchip.is_pending(uart::IRQ));
    ensure!(claimed, "not pending while the line is up");
    ensure_eq!(board.irqchip.claim(board.boot_hart), uart::IRQ, "the first claim");
    ensure_eq!(board.irqchip.claim(board.boot_hart), 0, "the second claim");
    let _ = uart::read(reg::RBR);
    board.irqchip.complete(uart::IRQ, board.boot_hart);
    ensure_eq!(board.irqchip.claim(board.boot_hart), 0, "the claim after completion");
    end(board);
    Ok(())
}

fn thresholds(board: &'static Board) -> Result<(), Failure> {
    begin(board);
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::IER, uart::IER_RX);
    match &board.irqchip {
        Irqchip::None => {}
        Irqchip::Plic(plic) => {
            let threshold = plic.threshold(plic.context(board.boot_hart));
            mmio::write32(plic.priority(uart::IRQ), 3);
            ensure_eq!(mmio::read32(plic.priority(uart::IRQ)), 3, "priority read back");
            mmio::write32(threshold, 3);
            uart::write(reg::THR, 7);
            settle();
            ensure_eq!(taken(uart::IRQ), 0, "interrupts at a priority equal to the threshold");
            mmio::write32(threshold, 2);
            ensure!(time::wait_until(|| taken(uart::IRQ) == 1), "none above the threshold");
            mmio::write32(threshold, 0);
            mmio::write32(plic.priority(uart::IRQ), 0);
            uart::write(reg::THR, 7);
            settle();
            ensure_eq!(taken(uart::IRQ), 1, "interrupts at priority 0");
            mmio::write32(plic.priority(uart::IRQ), 7);
            ensure!(
                time::wait_until(|| taken(uart::IRQ) == 2),
                "none after the priority was raised"
            );
        }
        Irqchip::Aia(_) => {
            aia::write_imsic(imsic::EITHRESHOLD, uart::IRQ as usize);
            uart::write(reg::THR, 7);
            settle();
            ensure_eq!(taken(uart::IRQ), 0, "interrupts of the identity that is the threshold");
            aia::write_imsic(imsic::EITHRESHOLD, uart::IRQ as usize + 1);
            ensure!(time::wait_until(|| taken(uart::IRQ) == 1), "none below the threshold");
            aia::write_imsic(imsic::EITHRESHOLD, 0);
            aia::write_imsic(imsic::EIDELIVERY, 0);
            uart::write(reg::THR, 7);
            settle();
            ensure_eq!(taken(uart::IRQ), 1, "interrupts while delivery is off");
            aia::write_imsic(imsic::EIDELIVERY, 1);
            ensure!(
                time::wait_until(|| taken(uart::IRQ) == 2),
                "none after delivery was switched on"
            );
        }
    }
    end(board);
    Ok(())
}

fn alarm(board: &'static Board) -> Result<(), Failure> {
    begin(board);
    let hart = board.boot_hart;
    board.irqchip.route(rtc::IRQ, hart);
    board.irqchip.unmask(rtc::IRQ, hart);
    rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
    rtc::write(rtc::reg::IRQ_ENABLED, 1);
    let start = rtc::now_ns();
    let due = start + 20_000_000;
    rtc::set_alarm_ns(due);
    ensure!(time::wait_until(|| taken(rtc::IRQ) == 1), "no alarm");
    let now = rtc::now_ns();
    ensure!(now >= due, "the alarm came {} ns early", due - now);
    ensure_eq!(rtc::read(rtc::reg::ALARM_STATUS), 0, "the alarm is still armed");
    // An alarm in the past fires at once; a cleared one does not fire.
    rtc::set_alarm_ns(start);
    ensure!(time::wait_until(|| taken(rtc::IRQ) == 2), "no alarm for a time in the past");
    rtc::set_alarm_ns(rtc::now_ns() + 20_000_000);
    rtc::write(rtc::reg::CLEAR_ALARM, 1);
    time::pause(40);
    ensure_eq!(taken(rtc::IRQ), 2, "alarms after the last was cleared");
    rtc::write(rtc::reg::IRQ_ENABLED, 0);
    board.irqchip.mask(rtc::IRQ, hart);
    end(board);
    Ok(())
}

static TURN: AtomicUsize = AtomicUsize::new(0);

fn every_hart(board: &'static Board) -> Result<(), Failure> {
    for cpu in board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart) {
        TURN.store(0, SeqCst);
        let ret = smp::start(cpu.hart, take_one);
        ensure_eq!(ret.error, 0, "start of hart {}", cpu.hart);
        ensure!(time::wait_until(|| TURN.load(SeqCst) == 1), "hart {} is not ready", cpu.hart);
        // This hart causes it, the other one takes it.
        uart::write(reg::THR, 9);
        let taken = time::wait_until(|| TURN.load(SeqCst) == 2);
        ensure!(taken, "hart {} took no interrupt", cpu.hart);
        ensure_eq!(TAKER.load(SeqCst), cpu.hart, "the hart that took it");
    }
    Ok(())
}

fn take_one() {
    let board = Board::get();
    board.irqchip.init(trap::hart().id);
    csr_set!("sie", csr::SIE_EXTERNAL);
    begin(board);
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::IER, uart::IER_RX);
    csr::interrupts_off();
    TURN.store(1, SeqCst);
    while taken(uart::IRQ) == 0 {
        csr::wait_for_interrupt();
        csr::interrupts_on();
        csr::interrupts_off();
    }
    end(board);
    csr_clear!("sie", csr::SIE_EXTERNAL);
    TURN.store(2, SeqCst);
}

fn console_input(board: &'static Board) -> Result<(), Failure> {
    println!("irq: waiting for a line");
    begin(board);
    RECEIVED.store(0, SeqCst);
    LINE_ENDED.store(false, SeqCst);
    uart::write(reg::IER, uart::IER_RX);
    csr::interrupts_off();
    while !LINE_ENDED.load(SeqCst) {
        csr::wait_for_interrupt();
        csr::interrupts_on();
        csr::interrupts_off();
    }
    end(board);
    println!("irq: received bytes that add up to {}", RECEIVED.load(SeqCst));
    Ok(())
}
