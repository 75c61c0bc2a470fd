//! Counts of the interrupts of each hart, and the sleep until one of them. Nothing here changes a hash.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use runtime::entry::MAX_HARTS;
use runtime::trap::{self, Interrupt};
use runtime::virtio::{self, Device};
use runtime::{Board, csr, csr_clear, csr_set, csr_write, rtc, sbi, time};

/// The time between two ticks of a hart.
const TICK_MS: u64 = 10;
const ALL: usize = csr::SIE_SOFTWARE | csr::SIE_TIMER | csr::SIE_EXTERNAL;

pub(crate) static IPIS: Counts = Counts::new();
pub(crate) static DEVICES: Counts = Counts::new();
pub(crate) static TICKS: Counts = Counts::new();

/// IPIs of a hart after this number are answered by its main code.
static ANSWERED: AtomicUsize = AtomicUsize::new(0);
/// When the next tick of each hart is due.
static DUE: [AtomicU64; MAX_HARTS] = [const { AtomicU64::new(0) }; MAX_HARTS];
/// The entropy device of each hart: its registers and its source, or 0.
static ENTROPY: [(AtomicUsize, AtomicUsize); MAX_HARTS] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; MAX_HARTS];

/// A number for each hart.
pub(crate) struct Counts([AtomicUsize; MAX_HARTS]);

impl Counts {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicUsize::new(0) }; MAX_HARTS])
    }

    /// The number of a hart.
    pub(crate) fn of(&self, hart: usize) -> usize {
        self.0[hart].load(SeqCst)
    }

    /// Adds 1, and returns the new number.
    pub(crate) fn add(&self, hart: usize) -> usize {
        self.0[hart].fetch_add(1, SeqCst) + 1
    }
}

/// Attaches the hooks. The first `answered` IPIs of each hart are answered at once.
pub(crate) fn attach(answered: usize) {
    ANSWERED.store(answered, SeqCst);
    trap::on(Interrupt::Software, ipi);
    trap::on(Interrupt::Timer, tick);
    trap::on(Interrupt::External, external);
}

/// Enables the interrupts of the calling hart: IPIs, ticks, and those of its devices.
pub(crate) fn begin(board: &Board, hart: usize, entropy: Option<Device>) {
    board.irqchip.init(hart);
    if hart == board.boot_hart {
        rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
        rtc::write(rtc::reg::IRQ_ENABLED, 1);
        board.irqchip.route(rtc::IRQ, hart);
        board.irqchip.unmask(rtc::IRQ, hart);
    }
    if let Some(device) = entropy {
        ENTROPY[hart].0.store(device.base, SeqCst);
        ENTROPY[hart].1.store(device.irq as usize, SeqCst);
        board.irqchip.route(device.irq, hart);
        board.irqchip.unmask(device.irq, hart);
    }
    tick_in(hart, TICK_MS);
    csr_write!("sie", ALL);
    csr::interrupts_on();
}

/// Disables them before the calling hart stops.
pub(crate) fn end() {
    csr::interrupts_off();
    csr_write!("sie", 0);
    time::set_timer(u64::MAX);
}

/// Sets the next tick of the calling hart, whose interrupts are disabled.
pub(crate) fn tick_in(hart: usize, ms: u64) {
    let due = time::now() + time::ticks(ms);
    DUE[hart].store(due, SeqCst);
    // By the comparator and by SBI in turn.
    if TICKS.of(hart) % 2 == 1 && Board::get().has_extension("sstc") {
        csr_write!("0x14d", due as usize);
    } else {
        time::set_timer(due);
    }
}

/// What may end a sleep.
#[derive(Clone, Copy)]
pub(crate) enum Wake {
    /// Any interrupt, as in an idle Linux: the next tick ends it at the latest.
    Any,
    /// This one of `sie`, with everything else disabled and the timer off: a wake-up that is lost leaves the hart asleep.
    Only(usize),
}

impl Wake {
    /// Each of them in turn.
    pub(crate) fn by(interrupt: usize, number: usize) -> Self {
        if number.is_multiple_of(2) { Self::Any } else { Self::Only(interrupt) }
    }
}

/// Sleeps until `done`. Interrupts are disabled while the hart looks and sleeps, and enabled for a moment in between.
pub(crate) fn sleep_until(wake: Wake, done: impl Fn() -> bool) {
    csr::interrupts_off();
    let without_timer = matches!(wake, Wake::Only(interrupt) if interrupt != csr::SIE_TIMER);
    if without_timer {
        time::set_timer(u64::MAX);
    }
    if let Wake::Only(interrupt) = wake {
        csr_write!("sie", interrupt);
    }
    while !done() {
        wait_for_interrupt();
        csr::interrupts_on();
        csr::interrupts_off();
    }
    if without_timer {
        time::set_timer(DUE[trap::hart().id].load(SeqCst));
    }
    csr_set!("sie", ALL);
    csr::interrupts_on();
}

/// Sleeps with numbers in floating-point registers, which have to be there afterwards.
fn wait_for_interrupt() {
    let now = time::now();
    let numbers = [now, now.rotate_left(16), now.rotate_left(32), now.rotate_left(48)];
    let [mut a, mut b, mut c, mut d] = numbers.map(f64::from_bits);
    // SAFETY: `wfi` only waits.
    unsafe {
        asm!("wfi", inout("ft0") a, inout("fa7") b, inout("fs11") c, inout("ft11") d, options(nostack));
    }
    let after = [a, b, c, d].map(f64::to_bits);
    assert!(numbers == after, "floating-point registers: {after:x?}, not {numbers:x?}");
}

fn ipi() {
    csr_clear!("sip", csr::SIE_SOFTWARE);
    let hart = trap::hart().id;
    let count = IPIS.add(hart);
    let boot_hart = Board::get().boot_hart;
    if hart != boot_hart && count <= ANSWERED.load(SeqCst) {
        answer(boot_hart);
    }
}

/// Sends an IPI to the boot hart, which waits for it.
pub(crate) fn answer(boot_hart: usize) {
    let ret = sbi::send_ipi(1, boot_hart);
    assert!(ret.error == 0, "IPI to hart {boot_hart}: {ret:?}");
}

fn tick() {
    let hart = trap::hart().id;
    TICKS.add(hart);
    tick_in(hart, TICK_MS);
}

fn external() {
    let irqchip = &Board::get().irqchip;
    let hart = trap::hart().id;
    let source = irqchip.claim(hart);
    // Nothing is pending any more, which is allowed.
    if source == 0 {
        return;
    }
    let (base, irq) = (ENTROPY[hart].0.load(SeqCst), ENTROPY[hart].1.load(SeqCst));
    if source as usize == irq {
        let device = Device { base, irq: source };
        let reasons = device.read(virtio::reg::INTERRUPT_STATUS);
        device.write(virtio::reg::INTERRUPT_ACK, reasons);
    } else if source == rtc::IRQ {
        rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
    } else {
        panic!("hart {hart} claimed source {source}");
    }
    DEVICES.add(hart);
    irqchip.complete(source, hart);
}
