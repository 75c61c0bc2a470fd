//! A reset gives a new machine: memory zero, devices in power-on state, the files loaded again.
//!
//! The guest keeps no state, so the host selects the next action, one byte per boot: `c` SBI cold reboot, `w` SBI warm
//! reboot, `s` reboot by the syscon, `b` reboot by the last hart while the others run, `p` power off by SBI, `q` power off
//! by the syscon, `f` failure 42 by the syscon, `F` power off by SBI because of a system failure.

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use runtime::irqchip::Irqchip;
use runtime::trap::{self, Interrupt};
use runtime::uart::{self, reg};
use runtime::{
    Board, Failure, csr, csr_read, csr_set, ensure, ensure_eq, entry, mmio, println, report, rtc,
    sbi, smp, time,
};

runtime::guest!(run);

const FINISHER: usize = 0x10_0000;
/// Initialised data: must have the value from the file at each boot.
static MARK: AtomicU32 = AtomicU32::new(0x600d_f11e);

fn run(board: &'static Board) {
    println!("reboot: boot");
    report::run("reboot", board, &[("memory", memory), ("devices", devices), ("harts", harts)]);
    println!("reboot: what next?");
    let next = uart::receive();
    spoil(board);
    match next {
        b'c' => reset(1),
        b'w' => reset(2),
        b's' => mmio::write32(FINISHER, 0x7777),
        b'b' => {
            let last = board.cpus().iter().rfind(|cpu| cpu.hart != board.boot_hart);
            smp::start(last.expect("a second hart").hart, || reset(1));
            loop {
                csr::wait_for_interrupt();
            }
        }
        b'p' => sbi::power_off(),
        b'F' => sbi::power_off_with_failure(),
        b'q' => mmio::write32(FINISHER, 0x5555),
        b'f' => mmio::write32(FINISHER, 42 << 16 | 0x3333),
        other => panic!("unknown wish {other:#x}"),
    }
    // The machine stops a moment after the store to the finisher.
    time::pause(60_000);
    println!("FAIL reboot: still here");
}

fn reset(kind: usize) {
    let ret = sbi::system_reset(kind, 0);
    println!("FAIL reboot: reset {kind} came back: {ret:?}");
}

/// Free memory: after the image, up to the tree (or the end of RAM), a page in every 64 KiB.
fn free_pages(board: &'static Board) -> impl Iterator<Item = usize> {
    let fdt = entry::fdt_address() & !0xfff
        ..(entry::fdt_address() + board.fdt.len()).next_multiple_of(4096);
    let end = board.ram.0 + board.ram.1;
    (entry::image().end.next_multiple_of(0x1_0000)..end)
        .step_by(0x1_0000)
        .filter(move |page| !fdt.contains(page))
}

fn memory(board: &'static Board) -> Result<(), Failure> {
    ensure_eq!(MARK.load(SeqCst), 0x600d_f11e, "initialised data");
    for page in free_pages(board) {
        for at in (page..page + 4096).step_by(512) {
            ensure_eq!(mmio::read64(at), 0, "memory at {at:#x}");
        }
    }
    if sbi::is_kvm() {
        ensure_eq!(mmio::read64(board.ram.0), 0, "the first word of RAM");
    }
    Ok(())
}

fn devices(board: &'static Board) -> Result<(), Failure> {
    ensure_eq!(uart::read(reg::SCR), 0, "the UART's scratch register");
    ensure_eq!(rtc::read(rtc::reg::IRQ_ENABLED), 0, "the clock's interrupt enable");
    ensure_eq!(rtc::read(rtc::reg::ALARM_STATUS), 0, "the clock's alarm");
    match &board.irqchip {
        Irqchip::Plic(plic) => {
            ensure_eq!(mmio::read32(plic.priority(uart::IRQ)), 0, "a priority in the PLIC");
            let context = plic.context(board.boot_hart);
            ensure_eq!(
                mmio::read32(plic.enables(context, uart::IRQ)),
                0,
                "an enable word of the PLIC"
            );
            ensure_eq!(mmio::read32(plic.threshold(context)), 0, "a threshold of the PLIC");
            ensure!(!plic.is_pending(uart::IRQ), "the UART is pending in the PLIC");
        }
        Irqchip::Aia(aia) => {
            let source = aia.register(runtime::aia::reg::SOURCECFG + 4 * (uart::IRQ as usize - 1));
            ensure_eq!(mmio::read32(source), 0, "the UART's sourcecfg in the APLIC");
            ensure_eq!(runtime::aia::read_imsic(runtime::aia::imsic::EIDELIVERY), 0, "eidelivery");
        }
        Irqchip::None => {}
    }
    ensure_eq!(csr_read!("sip") & csr::SIE_SOFTWARE, 0, "sip.SSIP");
    Ok(())
}

fn harts(board: &'static Board) -> Result<(), Failure> {
    ensure_eq!(board.boot_hart, board.cpus()[0].hart, "the boot hart");
    for cpu in &board.cpus()[1..] {
        ensure_eq!(sbi::hart_status(cpu.hart).value, 1, "state of hart {}", cpu.hart);
    }
    Ok(())
}

/// Changes all state that a reset must restore.
fn spoil(board: &'static Board) {
    MARK.store(0xbad, SeqCst);
    for page in free_pages(board) {
        mmio::write64(page + 512, 0xbad);
    }
    if sbi::is_kvm() {
        mmio::write64(board.ram.0, 0xbad);
    }
    // Also the tree: a reset must not reuse it from memory. (It is not read from here on.)
    for at in (entry::fdt_address()..entry::fdt_address() + board.fdt.len()).step_by(4) {
        mmio::write32(at, 0xbad);
    }
    uart::write(reg::SCR, 0xbd);
    rtc::write(rtc::reg::IRQ_ENABLED, 1);
    rtc::set_alarm_ns(rtc::now_ns() + 3_600_000_000_000);
    trap::on(Interrupt::External, || {});
    board.irqchip.init(board.boot_hart);
    board.irqchip.route(uart::IRQ, board.boot_hart);
    board.irqchip.unmask(uart::IRQ, board.boot_hart);
    csr_set!("sip", csr::SIE_SOFTWARE);
    // All except the last, which may have to reset the machine.
    for cpu in board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart).rev().skip(1) {
        smp::start(cpu.hart, || {
            loop {
                csr::wait_for_interrupt();
            }
        });
    }
}
