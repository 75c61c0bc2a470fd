//! Every SBI call with any arguments is answered, and so is the one CSR that the kernel leaves to user space.
//!
//! Boot arguments: `input` also reads bytes from the debug console, and suspends the machine if SUSP exists: its timer, an
//! interrupt and input wake it. `suspend` does only the second.

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use runtime::sbi::{self, Ret};
use runtime::{
    Board, Failure, csr, csr_read, csr_set, ensure, ensure_eq, println, report, rtc, smp, time,
    uart,
};

runtime::guest!(run);

/// Maximum number of bytes that rvmm copies in one call.
const AT_ONCE: usize = 4096;
const OUTSIDE: usize = 0x5000_0000;

static LARGE: [u8; 3 * AT_ONCE] = {
    let mut text = [b'='; 3 * AT_ONCE];
    let mut at = 63;
    while at < text.len() {
        text[at] = b'\n';
        at += 64;
    }
    text
};

fn run(board: &'static Board) {
    let asked = |wanted| board.bootargs.split(' ').any(|word| word == wanted);
    let input = asked("input");
    let ok = report::run(
        "sbi",
        board,
        &[
            ("base", base),
            ("vendor and experimental", vendor),
            ("unknown", unknown),
            ("version 0.1", version_0_1),
            ("console write", console_write),
            ("console write, hostile", console_write_hostile),
            ("console read, hostile", console_read_hostile),
            ("hart state", hart_state),
            ("suspend, hostile", suspend_hostile),
            ("reset, hostile", reset_hostile),
            ("seed", seed),
        ],
    );
    if ok && input {
        report::run("sbi input", board, &[("console read", console_read)]);
    }
    if ok && (input || asked("suspend")) {
        suspend();
    }
}

fn base(_: &'static Board) -> Result<(), Failure> {
    let version = sbi::call2(sbi::BASE, 0, 0, 0);
    ensure_eq!(version.error, 0, "get_spec_version");
    ensure!(version.value >> 24 >= 2, "SBI {}.{}", version.value >> 24, version.value & 0xff_ffff);
    for function in 1..=6 {
        ensure_eq!(
            sbi::call2(sbi::BASE, function, sbi::TIME, 0).error,
            0,
            "base function {function}"
        );
    }
    for extension in [sbi::BASE, sbi::TIME, sbi::IPI, sbi::RFENCE, sbi::HSM, sbi::SRST, sbi::DBCN] {
        ensure!(sbi::has(extension), "extension {extension:#x} is missing");
    }
    // (KVM uses the last number as its placeholder for SBI 0.1 calls.)
    for extension in [
        0x0800_0000,
        0x08ff_ffff,
        0x0900_0000,
        0x09ff_ffff,
        0x0a00_0000,
        0x1234_5678,
        usize::MAX - 1,
    ] {
        let ret = sbi::call2(sbi::BASE, 3, extension, 0);
        ensure_eq!(ret, Ret { error: 0, value: 0 }, "probe of {extension:#x}");
    }
    Ok(())
}

fn vendor(_: &'static Board) -> Result<(), Failure> {
    let garbage = [usize::MAX, 0x8000_0000, OUTSIDE, 1, !7, 0x5555_5555_5555_5555];
    for extension in [0x0800_0000, 0x0800_0001, 0x08ff_ffff, 0x0900_0000, 0x0912_3456, 0x09ff_ffff]
    {
        for bit in 0..=64 {
            let function = if bit == 64 { 0 } else { 1 << bit };
            let ret = sbi::call(extension, function, garbage);
            ensure_eq!(
                ret.error,
                sbi::NOT_SUPPORTED,
                "extension {extension:#x} function {function:#x}"
            );
        }
    }
    Ok(())
}

fn unknown(_: &'static Board) -> Result<(), Failure> {
    for extension in [0x9, 0xf, 0x11, 0x0a00_0000, 0x0aff_ffff, 0x1234_5678, 1 << 40, usize::MAX] {
        let ret = sbi::call(extension, 0, [usize::MAX; 6]);
        ensure_eq!(ret.error, sbi::NOT_SUPPORTED, "extension {extension:#x}");
    }
    for extension in [sbi::BASE, sbi::TIME, sbi::IPI, sbi::RFENCE, sbi::HSM, sbi::SRST, sbi::DBCN] {
        let ret = sbi::call(extension, 99, [usize::MAX; 6]);
        ensure_eq!(ret.error, sbi::NOT_SUPPORTED, "function 99 of extension {extension:#x}");
    }
    Ok(())
}

/// SBI 0.1 calls: supported or not, depending on the host's kernel; they never end the guest.
fn version_0_1(_: &'static Board) -> Result<(), Failure> {
    sbi::call2(1, 0, b'!'.into(), 0);
    sbi::call2(1, 0, b'\n'.into(), 0);
    sbi::call2(2, 0, 0, 0);
    for extension in 3..=4 {
        sbi::call2(extension, 0, 0, 0);
    }
    Ok(())
}

fn console_write(_: &'static Board) -> Result<(), Failure> {
    let text = b"sbi: written by the debug console\n";
    let ret = sbi::console_write(text.len(), text.as_ptr() as usize, 0);
    ensure_eq!(ret, Ret { error: 0, value: text.len() }, "a write of {} bytes", text.len());
    for byte in b"sbi: byte by byte\n" {
        ensure_eq!(sbi::console_write_byte(usize::from(*byte)).error, 0, "a write of one byte");
    }
    // Only the low eight bits are used.
    ensure_eq!(
        sbi::console_write_byte(usize::MAX << 8 | usize::from(b'\n')).error,
        0,
        "a write of 0xffff...0a"
    );
    let ret = sbi::console_write(0, text.as_ptr() as usize, 0);
    ensure_eq!(ret, Ret { error: 0, value: 0 }, "a write of nothing");
    let (mut done, mut calls) = (0, 0);
    while done < LARGE.len() {
        let ret = sbi::console_write(LARGE.len() - done, LARGE.as_ptr() as usize + done, 0);
        ensure_eq!(ret.error, 0, "a write of {} bytes", LARGE.len() - done);
        ensure!(ret.value <= LARGE.len() - done, "more written than asked for: {}", ret.value);
        ensure!(!sbi::is_kvm() || ret.value <= AT_ONCE, "{} bytes at once", ret.value);
        done += ret.value;
        calls += 1;
        ensure!(calls < 1_000_000, "{done} of {} bytes after {calls} calls", LARGE.len());
    }
    Ok(())
}

/// Addresses and lengths outside of RAM.
fn outside(board: &'static Board) -> [(&'static str, usize, usize, usize); 12] {
    let (ram, size) = board.ram;
    let end = ram + size;
    [
        ("nowhere", 16, OUTSIDE, 0),
        ("a device", 16, uart::BASE, 0),
        ("address 0", 16, 0, 0),
        ("below RAM", 16, ram - 16, 0),
        ("into RAM", 32, ram - 16, 0),
        ("out of RAM", 32, end - 16, 0),
        ("behind RAM", 16, end, 0),
        ("4 GiB", 4 << 30, ram, 0),
        ("all there is", usize::MAX, ram, 0),
        ("around the end", 32, usize::MAX - 15, 0),
        ("beyond 64 bits", 16, ram, 1),
        ("far beyond 64 bits", 16, ram, usize::MAX),
    ]
}

fn console_write_hostile(board: &'static Board) -> Result<(), Failure> {
    if !sbi::is_kvm() {
        // OpenSBI accepts any address that it can access itself, and all of 4 GiB.
        return Ok(());
    }
    for (what, len, lo, hi) in outside(board) {
        ensure_eq!(sbi::console_write(len, lo, hi).error, sbi::INVALID_PARAM, "{what}");
    }
    let last = board.ram.0 + board.ram.1 - 1;
    let error = sbi::console_write(0, last, 0).error;
    ensure_eq!(error, 0, "nothing at the end of RAM");
    Ok(())
}

fn console_read_hostile(board: &'static Board) -> Result<(), Failure> {
    if !sbi::is_kvm() {
        return Ok(());
    }
    for (what, len, lo, hi) in outside(board) {
        ensure_eq!(sbi::console_read(len, lo, hi).error, sbi::INVALID_PARAM, "{what}");
    }
    let buffer = [0x5au8; 16];
    let ret = sbi::console_read(0, buffer.as_ptr() as usize, 0);
    ensure_eq!(ret, Ret { error: 0, value: 0 }, "a read of nothing");
    Ok(())
}

fn hart_state(board: &'static Board) -> Result<(), Failure> {
    for bad in [board.cpus().len() + 1000, 1 << 31, usize::MAX] {
        // Linux 6.12 reports a nonexistent hart as started.
        let error = sbi::hart_status(bad).error;
        ensure!(error == sbi::INVALID_PARAM || error == 0, "status of hart {bad:#x}: {error}");
        let error = sbi::hart_start(bad, 0x8020_0000, 0).error;
        ensure_eq!(error, sbi::INVALID_PARAM, "start of hart {bad:#x}");
        let error = sbi::send_ipi(1, bad).error;
        ensure!(bad == usize::MAX || error <= 0, "IPI to hart {bad:#x}: {error}");
    }
    // Firmware and kernel use 32 bits of a hart id.
    ensure!(sbi::hart_status(1 << 32).error <= 0, "status of hart 1 << 32");
    let error = sbi::hart_start(board.boot_hart, 0x8020_0000, 0).error;
    ensure_eq!(error, sbi::ALREADY_AVAILABLE, "start of the running hart");
    // An undefined suspend type.
    let error = sbi::call(sbi::HSM, 3, [0x7fff_ffff, 0, 0, 0, 0, 0]).error;
    ensure!(error < 0, "suspend of kind 0x7fffffff: {error}");
    Ok(())
}

fn suspend_hostile(board: &'static Board) -> Result<(), Failure> {
    let there = sbi::has(sbi::SUSP);
    println!("sbi: SUSP is {}", if there { "there" } else { "not there" });
    let bad_kind = sbi::call(sbi::SUSP, 0, [1, 0x8020_0000, 0, 0, 0, 0]).error;
    let bad_address = sbi::call(sbi::SUSP, 0, [0, OUTSIDE, 0, 0, 0, 0]).error;
    let expected = if there { sbi::INVALID_PARAM } else { sbi::NOT_SUPPORTED };
    ensure_eq!(bad_kind, expected, "suspend of kind 1");
    let expected = if there { sbi::INVALID_ADDRESS } else { sbi::NOT_SUPPORTED };
    ensure_eq!(bad_address, expected, "suspend with a resume address outside RAM");
    let _ = board;
    Ok(())
}

fn reset_hostile(_: &'static Board) -> Result<(), Failure> {
    for kind in [3, 0x1234, 0x7fff_ffff, 0xf000_0000, 0xffff_ffff] {
        let error = sbi::system_reset(kind, 0).error;
        let refused = error == sbi::NOT_SUPPORTED || error == sbi::INVALID_PARAM;
        ensure!(refused, "reset of kind {kind:#x}: {error}");
    }
    Ok(())
}

/// The entropy source (Zkr): bits 31:30 are 10 if bits 15:0 are random.
fn seed(board: &'static Board) -> Result<(), Failure> {
    if !board.has_extension("zkr") {
        println!("sbi: no Zkr here");
        return Ok(());
    }
    let (mut different, mut last) = (0, 0);
    for _ in 0..100 {
        let seed = runtime::csr_swap!("0x015", 0);
        ensure!(seed >> 30 != 3, "the entropy source is dead");
        different += usize::from(seed >> 30 == 2 && seed & 0xffff != last);
        last = seed & 0xffff;
    }
    ensure!(different > 90, "{different} of 100 seeds differ from the one before");
    Ok(())
}

fn console_read(_: &'static Board) -> Result<(), Failure> {
    println!("sbi: waiting for 12 bytes");
    let mut buffer = [0u8; 12];
    let mut done = 0;
    while done < buffer.len() {
        let ret = sbi::console_read(buffer.len() - done, (&raw mut buffer) as usize + done, 0);
        ensure_eq!(ret.error, 0, "a read");
        ensure!(ret.value <= buffer.len() - done, "more read than asked for: {}", ret.value);
        done += ret.value;
    }
    // SAFETY: the console has written it, unknown to the compiler.
    let buffer = unsafe { (&raw const buffer).read_volatile() };
    println!("sbi: read '{}'", core::str::from_utf8(&buffer).unwrap_or("?"));
    Ok(())
}

/// Number of suspends of the machine, and due time of its timer.
static ROUND: AtomicUsize = AtomicUsize::new(0);
static DUE: AtomicU64 = AtomicU64::new(0);

const ALARM_MS: u64 = 100;

/// Suspends the machine four times. It is woken by its timer; by its timer again, and not by a masked interrupt; by an
/// unmasked interrupt; and by input.
fn suspend() {
    if !sbi::has(sbi::SUSP) {
        return;
    }
    // Interrupts before the machine sleeps have to stay pending.
    csr::interrupts_off();
    let board = Board::get();
    let hart = board.boot_hart;
    let timer = |ms| {
        DUE.store(time::now() + time::ticks(ms), SeqCst);
        csr_set!("sie", csr::SIE_TIMER);
        time::set_timer(DUE.load(SeqCst));
    };
    let alarm = || {
        rtc::write(rtc::reg::IRQ_ENABLED, 1);
        rtc::set_alarm_ns(rtc::now_ns() + ALARM_MS * 1_000_000);
    };
    match ROUND.load(SeqCst) {
        0 => timer(ALARM_MS),
        1 => {
            board.irqchip.init(hart);
            board.irqchip.route(rtc::IRQ, hart);
            alarm();
            timer(10 * ALARM_MS);
        }
        2 => {
            rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
            board.irqchip.unmask(rtc::IRQ, hart);
            alarm();
            csr_set!("sie", csr::SIE_EXTERNAL);
            DUE.store(0, SeqCst);
        }
        _ => println!("sbi: suspending"),
    }
    let ret = smp::suspend_system(resumed);
    println!("FAIL sbi: suspend: {ret:?}");
    csr::interrupts_off();
}

/// The start of the resumed hart.
fn resumed() {
    let board = Board::get();
    let late = time::now().checked_sub(DUE.load(SeqCst));
    let round = ROUND.fetch_add(1, SeqCst);
    let outcome = match round {
        0 | 1 => match late {
            Some(_) => Ok("its timer"),
            None => Err("it woke before its timer was due"),
        },
        2 => interrupted(board),
        _ => {
            println!("sbi: resumed with {:?}", uart::try_receive().map(char::from));
            Ok("input")
        }
    };
    // The kernel clears this when it starts a hart.
    let open = time::wait_until(time::is_open_to_user_mode);
    match outcome {
        Err(why) => println!("FAIL sbi: suspend {round}: {why}"),
        Ok(_) if !open => println!("FAIL sbi: suspend {round}: time is closed to user mode"),
        Ok(by) => println!("PASS sbi: suspend {round}, woken by {by}"),
    }
    if round < 3 {
        return suspend();
    }
    println!("PASS sbi: suspend");
    sbi::power_off();
}

/// Checks that the interrupt that woke the machine is still pending.
fn interrupted(board: &'static Board) -> Result<&'static str, &'static str> {
    if !time::wait_until(|| csr_read!("sip") & csr::SIE_EXTERNAL != 0) {
        return Err("no interrupt is pending");
    }
    if board.irqchip.claim(board.boot_hart) != rtc::IRQ {
        return Err("another interrupt is pending");
    }
    rtc::write(rtc::reg::CLEAR_INTERRUPT, 1);
    board.irqchip.complete(rtc::IRQ, board.boot_hart);
    Ok("an interrupt")
}
