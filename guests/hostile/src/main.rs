//! No invalid access harms the machine; and the last one, a trap whose vector is outside of memory, ends it with a
//! documented stop.
//!
//! Boot argument `end=vector` (the trap vector is outside of memory), `end=spin` (it is on an unmapped page: the hart
//! takes page faults for ever), or none (power off).

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use runtime::trap::{self, Interrupt};
use runtime::uart::{self, reg};
use runtime::{
    Board, Failure, csr, csr_set, csr_write, ensure, ensure_eq, mmio, paging, println, report, rtc,
    sbi, smp, time,
};

mod controller;

use controller::{absent, claims, control_registers, every_register, put_back, wrong_widths};

runtime::guest!(run);

const FINISHER: usize = 0x10_0000;
pub(crate) const WORDS: [u32; 9] =
    [0, 1, 7, 8, 0x7fff_ffff, 0x8000_0000, 0xaaaa_aaaa, 0xffff_fffe, 0xffff_ffff];

fn run(board: &'static Board) {
    report::run(
        "hostile",
        board,
        &[
            ("interrupt controller, every register", every_register),
            ("interrupt controller, wrong widths", wrong_widths),
            ("interrupt controller, contexts and harts that are not there", absent),
            ("claims and completions of nothing", claims),
            ("UART, every register and width", uart_registers),
            ("UART, loopback overflow", loopback),
            ("UART, interrupt storm", storm),
            ("clock", clock),
            ("power register", power),
            ("across the end of memory", across),
            ("timers", timers),
            ("all harts at once", all_harts),
            ("interrupts still come", still_alive),
        ],
    );
    match board.arg("end") {
        Some("vector") => vector(),
        Some("spin") => spin(),
        _ => {}
    }
}

fn uart_registers(_: &'static Board) -> Result<(), Failure> {
    // Loopback, so that bytes written to THR are not printed.
    for value in [0x10, 0x1f, 0xff, 0x30] {
        uart::write(reg::MCR, value);
        for lcr in [0, 0x80, 0xff, 3] {
            uart::write(reg::LCR, lcr);
            for register in [reg::THR, reg::IER, reg::FCR, reg::LSR, reg::MSR, reg::SCR] {
                for byte in [0, 0x55, 0xaa, 0xff] {
                    uart::write(register, byte);
                }
            }
            for at in 0..0x100 {
                let _ = uart::read(at);
            }
        }
    }
    for at in (0..0x100).step_by(8) {
        let _ = (
            mmio::read64(uart::BASE + at),
            mmio::read32(uart::BASE + at),
            mmio::read16(uart::BASE + at),
        );
    }
    uart::write(reg::FCR, 6);
    uart::init();
    Ok(())
}

fn loopback(_: &'static Board) -> Result<(), Failure> {
    uart::write(reg::MCR, uart::MCR_LOOP);
    for byte in 0..10_000u32 {
        uart::write(reg::THR, byte as u8);
    }
    let mut received = 0;
    while uart::try_receive().is_some() {
        received += 1;
        ensure!(received <= 64, "more than 64 bytes in the receiver");
    }
    uart::init();
    ensure!(received > 0, "nothing came back");
    Ok(())
}

fn storm(board: &'static Board) -> Result<(), Failure> {
    board.irqchip.init(board.boot_hart);
    board.irqchip.route(uart::IRQ, board.boot_hart);
    board.irqchip.unmask(uart::IRQ, board.boot_hart);
    for round in 0..5_000u32 {
        uart::write(reg::IER, (round & 0xf) as u8);
    }
    // High, claimed and not completed; the host must not spin (which only the host can detect).
    uart::write(reg::IER, uart::IER_THRE);
    let _ = board.irqchip.claim(board.boot_hart);
    time::pause(20);
    uart::init();
    board.irqchip.complete(uart::IRQ, board.boot_hart);
    put_back(board);
    Ok(())
}

fn clock(_: &'static Board) -> Result<(), Failure> {
    rtc::write(rtc::reg::IRQ_ENABLED, 1);
    for word in WORDS {
        for register in (0..0x40).step_by(4) {
            rtc::write(register, word);
            let _ = rtc::read(register);
        }
    }
    for alarm in [0, 1, u64::MAX, u64::MAX / 2, 1 << 63] {
        rtc::set_alarm_ns(alarm);
    }
    for _ in 0..1000 {
        rtc::set_alarm_ns(rtc::now_ns() + 1);
    }
    rtc::write(rtc::reg::IRQ_ENABLED, 0);
    rtc::write(rtc::reg::CLEAR_ALARM, 1);
    rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
    ensure_eq!(rtc::read(rtc::reg::ALARM_STATUS), 0, "the alarm after it was cleared");
    Ok(())
}

fn power(_: &'static Board) -> Result<(), Failure> {
    for word in WORDS {
        mmio::write32(FINISHER, word & !0xffff | 0x1111);
        mmio::write32(FINISHER + 4, word);
        mmio::write32(FINISHER + 0xffc, word);
        mmio::write8(FINISHER, word as u8);
        mmio::write64(FINISHER, u64::from(word));
        let _ = mmio::read64(FINISHER);
    }
    Ok(())
}

/// Accesses that begin in memory and end after it, or that begin in one page of a device and end in the next: a fault or a
/// result, and the machine continues.
fn across(board: &'static Board) -> Result<(), Failure> {
    let end = board.ram.0 + board.ram.1;
    for at in [end - 4, end - 1, end - 7, rtc::BASE + 0xffd, uart::BASE + 0xffc + 1, rtc::BASE - 2]
    {
        let _ = trap::expect(|| _ = mmio::read64(at));
        let _ = trap::expect(|| mmio::write64(at, 0));
        let _ = trap::expect(|| _ = mmio::read32(at));
    }
    Ok(())
}

fn timers(_: &'static Board) -> Result<(), Failure> {
    for time in [0, 1, u64::MAX, u64::MAX - 1, 1 << 63] {
        ensure_eq!(sbi::set_timer(time).error, 0, "set_timer({time:#x})");
    }
    Ok(())
}

static RUNNING: AtomicUsize = AtomicUsize::new(0);

fn all_harts(board: &'static Board) -> Result<(), Failure> {
    fn job() {
        let board = Board::get();
        let (base, _) = control_registers(board);
        for round in 0..3_000 {
            let _ = mmio::read32(base + 4 * (round % 90));
            let _ = mmio::read32(0x6000_0000 + 4 * round);
            let _ = uart::read(reg::LSR);
            let _ = rtc::now_ns();
            sbi::call2(0x0900_0000 + round, 0, 0, 0);
        }
        RUNNING.fetch_sub(1, SeqCst);
    }
    RUNNING.store(board.cpus().len(), SeqCst);
    for cpu in board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart) {
        ensure_eq!(smp::start(cpu.hart, job).error, 0, "start of hart {}", cpu.hart);
    }
    job();
    ensure!(time::wait_until(|| RUNNING.load(SeqCst) == 0), "{} harts hang", RUNNING.load(SeqCst));
    Ok(())
}

static TAKEN: AtomicUsize = AtomicUsize::new(0);

fn still_alive(board: &'static Board) -> Result<(), Failure> {
    trap::on(Interrupt::External, || {
        let board = Board::get();
        let source = board.irqchip.claim(board.boot_hart);
        let _ = uart::read(reg::IIR);
        uart::write(reg::IER, 0);
        if source == uart::IRQ {
            TAKEN.fetch_add(1, SeqCst);
            board.irqchip.complete(source, board.boot_hart);
        }
    });
    put_back(board);
    board.irqchip.route(uart::IRQ, board.boot_hart);
    board.irqchip.unmask(uart::IRQ, board.boot_hart);
    csr_set!("sie", csr::SIE_EXTERNAL);
    csr::interrupts_on();
    uart::write(reg::IER, uart::IER_THRE);
    let came = time::wait_until(|| TAKEN.load(SeqCst) > 0);
    csr::interrupts_off();
    ensure!(came, "no interrupt from the UART");
    Ok(())
}

fn vector() {
    println!("hostile: a trap whose vector is nowhere");
    csr_write!("stvec", 0x6000_0000);
    jump(0x6000_1000);
}

fn spin() {
    println!("hostile: page faults for ever");
    csr_write!("stvec", paging::UNMAPPED);
    paging::on();
    jump(paging::UNMAPPED);
}

fn jump(target: usize) {
    // SAFETY: there is no memory, and the access is not expected to return.
    let code: extern "C" fn() = unsafe { core::mem::transmute(target) };
    code();
}
