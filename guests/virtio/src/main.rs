//! A virtio device handles notifications and interrupts, through the interrupt controller in the device tree; a driver's
//! errors break only its device, until the next reset. The device is the entropy device, which needs no backend.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};

use runtime::trap::{self, Interrupt};
use runtime::virtio::{self, Device, EVENT_IDX, NEEDS_RESET, NEXT, Queue, SIZE, WRITE, reg};
use runtime::{Board, Failure, csr, csr_set, ensure, ensure_eq, mmio, report, time};

runtime::guest!(run);

/// The entropy device's id.
const RNG: u32 = 4;

/// Number of interrupts taken from the device, and the values of its status register then.
static TAKEN: AtomicU32 = AtomicU32::new(0);
static REASONS: AtomicU32 = AtomicU32::new(0);
static BASE: AtomicUsize = AtomicUsize::new(0);

fn run(board: &'static Board) {
    trap::on(Interrupt::External, external);
    board.irqchip.init(board.boot_hart);
    csr_set!("sie", csr::SIE_EXTERNAL);
    report::run(
        "virtio",
        board,
        &[
            ("random numbers", numbers),
            ("an interrupt for each answer", interrupts),
            ("no interrupt where none is wanted", suppressed),
            ("interrupts by index", by_index),
            ("a thousand requests", many),
            ("chains that are none", malformed),
            ("rings that are broken", broken),
            ("a hundred resets under load", resets),
        ],
    );
}

fn external() {
    let irqchip = &Board::get().irqchip;
    let hart = trap::hart().id;
    let source = irqchip.claim(hart);
    if source == 0 {
        return;
    }
    let device = Device { base: BASE.load(SeqCst), irq: source };
    let reasons = device.read(reg::INTERRUPT_STATUS);
    device.write(reg::INTERRUPT_ACK, reasons);
    REASONS.fetch_or(reasons, SeqCst);
    TAKEN.fetch_add(1, SeqCst);
    irqchip.complete(source, hart);
}

fn device(board: &Board) -> Result<Device, Failure> {
    Device::find(board, RNG)
        .ok_or_else(|| Failure::new(format_args!("no entropy device in the tree")))
}

/// A started device whose interrupts are masked.
fn quiet(board: &Board, features: u64) -> Result<(Device, Queue), Failure> {
    csr::interrupts_off();
    let device = device(board)?;
    let [queue] = device.start(features)?;
    Ok((device, queue))
}

/// A started device whose interrupts are counted.
fn counted(board: &'static Board, features: u64) -> Result<(Device, Queue), Failure> {
    let (device, queue) = quiet(board, features)?;
    let hart = trap::hart().id;
    BASE.store(device.base, SeqCst);
    board.irqchip.init(hart);
    board.irqchip.route(device.irq, hart);
    board.irqchip.unmask(device.irq, hart);
    // An interrupt pending in the controller from an earlier check, although the line is low now.
    while board.irqchip.claim(hart) != 0 {
        board.irqchip.complete(device.irq, hart);
    }
    TAKEN.store(0, SeqCst);
    REASONS.store(0, SeqCst);
    csr::interrupts_on();
    Ok((device, queue))
}

fn numbers(board: &'static Board) -> Result<(), Failure> {
    let (device, mut queue) = quiet(board, 0)?;
    ensure_eq!(queue.fill(&device, 64)?, 64, "bytes");
    let at = queue.buffer(0);
    let first = (mmio::read64(at), mmio::read64(at + 56));
    ensure_eq!(queue.fill(&device, 64)?, 64, "bytes");
    ensure!(
        first != (mmio::read64(at), mmio::read64(at + 56)),
        "the same numbers twice: {first:x?}"
    );
    Ok(())
}

fn interrupts(board: &'static Board) -> Result<(), Failure> {
    let (device, mut queue) = counted(board, 0)?;
    for count in 1..=20 {
        queue.fill(&device, 8)?;
        ensure!(time::wait_until(|| TAKEN.load(SeqCst) >= count), "no interrupt {count}");
    }
    time::pause(5);
    ensure_eq!((TAKEN.load(SeqCst), REASONS.load(SeqCst)), (20, 1), "interrupts and their reasons");
    Ok(())
}

fn suppressed(board: &'static Board) -> Result<(), Failure> {
    let (device, mut queue) = counted(board, 0)?;
    queue.set_flags(1);
    for _ in 0..10 {
        queue.fill(&device, 8)?;
    }
    time::pause(5);
    ensure_eq!(TAKEN.load(SeqCst), 0, "interrupts that nobody wants");
    Ok(())
}

fn by_index(board: &'static Board) -> Result<(), Failure> {
    let (device, mut queue) = counted(board, EVENT_IDX)?;
    queue.ask_at(4);
    for _ in 0..4 {
        queue.fill(&device, 8)?;
    }
    time::pause(5);
    ensure_eq!(TAKEN.load(SeqCst), 0, "interrupts before the one that is wanted");
    queue.fill(&device, 8)?;
    ensure!(
        time::wait_until(|| TAKEN.load(SeqCst) == 1),
        "no interrupt for the one that is wanted"
    );
    Ok(())
}

fn many(board: &'static Board) -> Result<(), Failure> {
    let (device, mut queue) = quiet(board, EVENT_IDX)?;
    for slot in 0..SIZE {
        queue.describe(slot, (queue.buffer(slot.into()), 16, WRITE, 0));
    }
    let (mut offered, mut back) = (0_u32, 0_u32);
    while back < 1000 {
        while offered < 1000 && offered - back < u32::from(SIZE) {
            queue.offer((offered % u32::from(SIZE)) as u16);
            offered += 1;
        }
        queue.ring(&device);
        let (head, written) = queue.wait()?;
        ensure_eq!((head, written), (back % u32::from(SIZE), 16), "answer {back}");
        back += 1;
    }
    Ok(())
}

fn malformed(board: &'static Board) -> Result<(), Failure> {
    let (device, mut queue) = quiet(board, 0)?;
    let end = board.ram.0 + board.ram.1;
    for chain in [
        (end, 8, WRITE, 0),
        (end - 4, 8, WRITE, 0),
        (usize::MAX - 3, 8, WRITE, 0),
        (0x1000_0000, 8, WRITE, 0),
        (queue.buffer(0), 8, WRITE | NEXT, 0),
        (queue.buffer(0), 8, WRITE | NEXT, SIZE),
        (queue.buffer(0), 8, 0, 0),
    ] {
        queue.describe(0, chain);
        queue.offer(0);
        queue.ring(&device);
        ensure_eq!(queue.wait()?, (0, 0), "{chain:x?} came back as");
    }
    ensure_eq!(queue.fill(&device, 32)?, 32, "bytes afterwards");
    Ok(())
}

fn broken(board: &'static Board) -> Result<(), Failure> {
    for (index, head) in [(SIZE + 1, 0), (0x8000, 0), (1, SIZE), (1, 0xffff)] {
        let (device, mut queue) = counted(board, 0)?;
        queue.offer(head);
        queue.publish(index);
        queue.ring(&device);
        let needs_reset = || device.read(reg::STATUS) & NEEDS_RESET != 0;
        ensure!(time::wait_until(needs_reset), "no NEEDS_RESET for index {index} and head {head}");
        ensure!(time::wait_until(|| REASONS.load(SeqCst) & 2 != 0), "no configuration interrupt");
        let (device, mut queue) = quiet(board, 0)?;
        ensure_eq!(queue.fill(&device, 8)?, 8, "bytes after a reset");
    }
    Ok(())
}

fn resets(board: &'static Board) -> Result<(), Failure> {
    for _ in 0..100 {
        let (device, mut queue) = quiet(board, virtio::EVENT_IDX)?;
        for slot in 0..SIZE {
            queue.describe(slot, (queue.buffer(slot.into()), 4096, WRITE, 0));
            queue.offer(slot);
        }
        queue.ring(&device);
    }
    let (device, mut queue) = quiet(board, 0)?;
    ensure_eq!(queue.fill(&device, 8)?, 8, "bytes after the last reset");
    Ok(())
}
