//! SBI 0.1 calls are answered no matter how their number is loaded, and similar code is left unchanged: system calls of a
//! program embedded in the kernel, in place and copied, and breakpoints.
//!
//! Boot arguments: with `unpatched` such calls fail, and everything else is the same. With `timer` (needs two harts and
//! `--timer user`) timer calls of a hart lose no interrupts that other harts send to it.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};

use runtime::trap::{self, Trap};
use runtime::{
    Board, Failure, csr, csr_clear, csr_read, csr_set, ensure, ensure_eq, mmio, paging, report,
    sbi, smp, time,
};

runtime::guest!(run);

/// A heap in the BSS.
static HEAP: [AtomicU8; 32 << 20] = [const { AtomicU8::new(0) }; 32 << 20];

const PUTCHAR: usize = 1;
/// A number of SBI 0.1 with another meaning in programs, such as `exec` in xv6.
const EXEC: usize = 7;

global_asm!(
    r#"
    .section .text
    .option push
    .option norvc
    .globl calls_generic
calls_generic:
    mv a7, a0
    mv a0, a1
    li a6, 0
    ecall
    ret

    .globl calls_stacked
calls_stacked:
    addi sp, sp, -16
    sd a0, 8(sp)
    ld a7, 8(sp)
    mv a0, a1
    ecall
    addi sp, sp, 16
    ret

    # A program: its system call, and a breakpoint behind.
    .balign 8
    .globl calls_program
calls_program:
    li a7, 7
    ecall
    ebreak
    .globl calls_program_generic
calls_program_generic:
    mv a7, a0
    ecall
    ebreak
    .globl calls_program_end
calls_program_end:
    .option pop
"#
);

unsafe extern "C" {
    fn calls_generic(number: usize, argument: usize) -> isize;
    fn calls_stacked(number: usize, argument: usize) -> isize;
    static calls_program: u8;
    static calls_program_generic: u8;
    static calls_program_end: u8;
}

fn run(board: &'static Board) {
    if board.bootargs.split(' ').any(|word| word == "timer") {
        report::run("calls timer", board, &[("timer", timer), ("IPIs meanwhile", ipis)]);
        return;
    }
    report::run(
        "calls",
        board,
        &[
            ("constant numbers", constants),
            ("numbers that are moved", moved),
            ("newer calls", newer),
            // Copies first: running in place reverts the patches, and later copies would be of the reverted code.
            ("system calls of copies", copies),
            ("system calls in place", in_place),
            ("calls of a copy", copied_calls),
        ],
    );
}

/// Sends a byte by a call whose number is loaded right before it.
fn put(byte: u8) -> isize {
    let answer;
    // SAFETY: the legacy console call changes only a0.
    unsafe { asm!("li a7, 1", "ecall", inlateout("a0") usize::from(byte) => answer, out("a7") _) }
    answer
}

fn answered(board: &Board, answer: isize, what: &str) -> Result<(), Failure> {
    let expected = if is_patched(board) { 0 } else { sbi::NOT_SUPPORTED };
    ensure_eq!(answer, expected, "{what}");
    Ok(())
}

fn is_patched(board: &Board) -> bool {
    !board.bootargs.split(' ').any(|word| word == "unpatched")
}

fn constants(board: &'static Board) -> Result<(), Failure> {
    HEAP[0].store(1, SeqCst);
    HEAP[HEAP.len() - 1].store(2, SeqCst);
    for byte in b"one\n" {
        answered(board, put(*byte), "putchar")?;
    }
    ensure_eq!(HEAP[0].load(SeqCst) + HEAP[HEAP.len() - 1].load(SeqCst), 3, "the heap");
    Ok(())
}

fn moved(board: &'static Board) -> Result<(), Failure> {
    for byte in b"two\n" {
        // SAFETY: as above.
        answered(board, unsafe { calls_generic(PUTCHAR, (*byte).into()) }, "putchar, moved")?;
    }
    for byte in b"three\n" {
        // SAFETY: as above.
        answered(board, unsafe { calls_stacked(PUTCHAR, (*byte).into()) }, "putchar, stacked")?;
    }
    Ok(())
}

/// Calls that the kernel answers, made by the same instructions.
fn newer(board: &'static Board) -> Result<(), Failure> {
    for _ in 0..1000 {
        // SAFETY: `get_spec_version` and similar calls change only a0 and a1.
        let error = unsafe { calls_generic(sbi::BASE, 0) };
        ensure_eq!(error, 0, "a call of the base extension");
    }
    let text = b"by the debug console\n";
    let ret = sbi::console_write(text.len(), text.as_ptr() as usize, 0);
    ensure_eq!(ret, sbi::Ret { error: 0, value: text.len() }, "the debug console");
    ensure_eq!(sbi::hart_status(board.boot_hart).value, 0, "the boot hart's state");
    // SAFETY: as above.
    answered(board, unsafe { calls_generic(PUTCHAR, b'\n'.into()) }, "putchar, after the others")
}

/// Checks the traps of a program's system call and of the breakpoint after it.
fn traps(at: usize) -> Result<(), Failure> {
    for (pc, cause) in [(at, trap::USER_ECALL), (at + 8, trap::BREAKPOINT)] {
        let got = trap::user(pc, EXEC);
        let epc = if cause == trap::USER_ECALL { pc + 4 } else { pc };
        let is_it = got.is_some_and(|t: Trap| (t.cause, t.epc, t.from_user) == (cause, epc, true));
        ensure!(is_it, "the program at {pc:#x}: {got:x?}");
    }
    Ok(())
}

fn in_place(_: &'static Board) -> Result<(), Failure> {
    for _ in 0..3 {
        traps((&raw const calls_program) as usize)?;
        traps((&raw const calls_program_generic) as usize)?;
    }
    Ok(())
}

/// Copies the program to its own address or to another one.
fn copy_to(to: usize) -> usize {
    let (from, end) =
        ((&raw const calls_program) as usize, (&raw const calls_program_end) as usize);
    for offset in (0..end - from).step_by(2) {
        mmio::write16(to + offset, mmio::read16(from + offset));
    }
    // SAFETY: `fence.i` changes nothing.
    unsafe { asm!("fence.i") }
    (&raw const calls_program_generic) as usize - from
}

fn copies(_: &'static Board) -> Result<(), Failure> {
    // In the middle of the heap; at the second address an instruction crosses a page boundary.
    let page = (HEAP.as_ptr() as usize + (16 << 20)).next_multiple_of(4096);
    for (to, view) in [(page, 0), (page + 4096 - 6, 0), (page + 16384, paging::USER)] {
        let generic = copy_to(to);
        if view != 0 {
            paging::on();
        }
        let outcome = traps(to + view).and_then(|()| traps(to + generic + view));
        paging::off();
        outcome?;
    }
    Ok(())
}

/// Sets the timer by a call whose number is loaded right before it.
fn set_timer(due: u64) {
    // SAFETY: the call changes only a0 and a1.
    unsafe {
        asm!("li a7, 0x54494d45", "li a6, 0", "ecall", inout("a0") due => _, out("a1") _, out("a6") _, out("a7") _);
    }
}

fn is_pending(bit: usize) -> bool {
    csr_read!("sip") & bit != 0
}

fn timer(_: &'static Board) -> Result<(), Failure> {
    for round in 0..20 {
        set_timer(u64::MAX);
        ensure!(!is_pending(csr::SIE_TIMER), "pending after it was taken back, round {round}");
        let due = time::now() + time::ticks(5);
        set_timer(due);
        ensure!(time::wait_until(|| is_pending(csr::SIE_TIMER)), "never pending, round {round}");
        ensure!(time::now() >= due, "pending before it was due, round {round}");
        // A hart that waits for it wakes up.
        csr_set!("sie", csr::SIE_TIMER);
        set_timer(time::now() + time::ticks(5));
        csr::wait_for_interrupt();
        ensure!(time::wait_until(|| is_pending(csr::SIE_TIMER)), "no wake-up, round {round}");
        csr_clear!("sie", csr::SIE_TIMER);
    }
    set_timer(u64::MAX);
    Ok(())
}

/// One hart sets its timer repeatedly; the other sends it IPIs, each after the last has been received.
fn ipis(board: &'static Board) -> Result<(), Failure> {
    const MANY: usize = 300;
    static SENT: AtomicUsize = AtomicUsize::new(0);
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    static STARTED: AtomicUsize = AtomicUsize::new(0);
    fn receive() {
        STARTED.store(1, SeqCst);
        while SEEN.load(SeqCst) < MANY {
            set_timer(u64::MAX);
            if is_pending(csr::SIE_SOFTWARE) {
                csr_clear!("sip", csr::SIE_SOFTWARE);
                SEEN.store(SENT.load(SeqCst), SeqCst);
            }
        }
    }
    let other = board.cpus().iter().find(|cpu| cpu.hart != board.boot_hart).map(|cpu| cpu.hart);
    let Some(other) = other else { return Err(Failure::new(format_args!("one hart only"))) };
    ensure_eq!(smp::start(other, receive).error, 0, "start of hart {other}");
    // KVM resets a started hart when its thread first runs, and loses interrupts sent to it until then.
    ensure!(time::wait_until(|| STARTED.load(SeqCst) == 1), "hart {other} does not start");
    for count in 1..=MANY {
        SENT.store(count, SeqCst);
        ensure_eq!(sbi::send_ipi(1, other).error, 0, "IPI {count}");
        ensure!(time::wait_until(|| SEEN.load(SeqCst) == count), "IPI {count} is lost");
    }
    Ok(())
}

/// A kernel that relocates itself: the SBI calls of the copy work.
fn copied_calls(board: &'static Board) -> Result<(), Failure> {
    let page = (HEAP.as_ptr() as usize + (24 << 20)).next_multiple_of(4096);
    let from = calls_generic as *const () as usize;
    for offset in (0..20).step_by(4) {
        mmio::write32(page + offset, mmio::read32(from + offset));
    }
    // SAFETY: a copy of the function above, all of it.
    let copy: unsafe extern "C" fn(usize, usize) -> isize = unsafe {
        asm!("fence.i");
        core::mem::transmute(page)
    };
    for byte in b"four\n" {
        // SAFETY: as above.
        answered(board, unsafe { copy(PUTCHAR, (*byte).into()) }, "putchar, from a copy")?;
    }
    Ok(())
}
