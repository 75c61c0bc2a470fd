//! Traps: one vector for all harts, a way to catch an expected exception, and hooks for interrupts.
//!
//! `sscratch` holds the address of the hart's [`Hart`], which is on top of its trap stack; while a trap is being handled
//! it holds 0, so that an exception inside the handler is detected and ends the guest instead of looping.

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::{console, csr, csr_read, println, sbi};

/// Trap cause: instruction access fault (Privileged specification, table of `scause`).
pub const INSTRUCTION_ACCESS: usize = 1;
/// Trap cause: illegal instruction
pub const ILLEGAL_INSTRUCTION: usize = 2;
/// Trap cause: `ebreak`
pub const BREAKPOINT: usize = 3;
/// Trap cause: load access fault
pub const LOAD_ACCESS: usize = 5;
/// Trap cause: store or AMO access fault
pub const STORE_ACCESS: usize = 7;
/// Trap cause: `ecall` from U-mode
pub const USER_ECALL: usize = 8;
/// Trap cause: load page fault
pub const LOAD_PAGE: usize = 13;
/// Trap cause: store or AMO page fault
pub const STORE_PAGE: usize = 15;

const INTERRUPT: usize = 1 << 63;
const TRAP_STACK: usize = 16 << 10;

/// A caught exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trap {
    /// `scause`
    pub cause: usize,
    /// `stval`
    pub tval: usize,
    /// `sepc`
    pub epc: usize,
    /// True if the trap came from U-mode (`sstatus.SPP` was 0).
    pub from_user: bool,
}

/// The data of a hart; `tp` points at it outside of user mode. The assembly uses the first three fields.
#[repr(C, align(16))]
pub struct Hart {
    /// Hart id, as given in a0.
    pub id: usize,
    /// The index of its slot (stacks) in the runtime.
    pub slot: usize,
    /// The [`Jump`] of an active [`expect`], or 0.
    probe: usize,
    trap: Trap,
}

/// A hart's trap stack, with its [`Hart`] on top.
#[repr(C, align(16))]
pub(crate) struct TrapStack {
    stack: [u8; TRAP_STACK],
    hart: Hart,
}

impl TrapStack {
    /// Offset of the [`Hart`] in it.
    pub(crate) const HART: usize = core::mem::offset_of!(Self, hart);

    pub(crate) const fn new() -> Self {
        let trap = Trap { cause: 0, tval: 0, epc: 0, from_user: false };
        Self { stack: [0; TRAP_STACK], hart: Hart { id: 0, slot: 0, probe: 0, trap } }
    }
}

/// The registers saved by the vector: x1 to x31, then `sepc` and `sstatus`.
#[repr(C)]
struct Frame {
    x: [usize; 31],
    epc: usize,
    status: usize,
    spare: usize,
}

/// The state with which [`expect`] continues after a trap: sp and s0 to s11; the return address is on the stack.
#[repr(C)]
struct Jump {
    saved: [usize; 13],
}

static ON_SOFTWARE: AtomicUsize = AtomicUsize::new(0);
static ON_TIMER: AtomicUsize = AtomicUsize::new(0);
static ON_EXTERNAL: AtomicUsize = AtomicUsize::new(0);

/// An interrupt to which a function can be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// IPI (cause 1)
    Software,
    /// Timer (cause 5)
    Timer,
    /// External, from the PLIC or the IMSIC (cause 9)
    External,
}

impl Interrupt {
    fn hook(self) -> &'static AtomicUsize {
        match self {
            Self::Software => &ON_SOFTWARE,
            Self::Timer => &ON_TIMER,
            Self::External => &ON_EXTERNAL,
        }
    }
}

/// Attaches `f` to an interrupt on every hart. It runs on the trap stack with interrupts disabled and must clear the cause.
pub fn on(interrupt: Interrupt, f: fn()) {
    interrupt.hook().store(f as usize, Ordering::SeqCst);
}

/// The calling hart.
#[must_use]
pub fn hart() -> &'static Hart {
    let hart: *const Hart;
    // SAFETY: `tp` is set at entry and kept by the vector; the struct exists as long as the guest runs.
    unsafe {
        core::arch::asm!("mv {}, tp", out(reg) hart, options(nomem, nostack));
        &*hart
    }
}

global_asm!(
    r#"
    .section .text.trap, "ax"
    .balign 4
    .globl trap_vector
trap_vector:
    csrrw tp, sscratch, tp
    beqz tp, 8f
    # Below the hart's struct: the frame. sp itself may be anything.
    sd sp, {frame_sp}(tp)
    addi sp, tp, -{frame}
    sd x1, 0(sp)
    .irp n, 3,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    sd x\n, (\n - 1) * 8(sp)
    .endr
    # sscratch becomes 0 (in a handler); what it held is the tp of before.
    csrrw t0, sscratch, zero
    sd t0, 3 * 8(sp)
    csrr t0, sepc
    sd t0, 31 * 8(sp)
    csrr t0, sstatus
    sd t0, 32 * 8(sp)
    mv a0, sp
    mv s0, sp
    csrr a1, scause
    csrr a2, stval
    call {handler}
    ld t0, 31 * 8(s0)
    csrw sepc, t0
    ld t0, 32 * 8(s0)
    csrw sstatus, t0
    csrw sscratch, tp
    mv sp, s0
    ld x1, 0(sp)
    .irp n, 3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld x\n, (\n - 1) * 8(sp)
    .endr
    ld sp, 8(sp)
    sret

    # A trap inside the handler: say so on a stack of its own and stop.
8:  csrrw tp, sscratch, tp
    lla sp, trap_last_stack_top
    csrr a0, scause
    csrr a1, stval
    csrr a2, sepc
    call {nested}
    j .

    .globl trap_probe
trap_probe:
    addi sp, sp, -16
    sd ra, 8(sp)
    sd sp, 0(a2)
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11
    sd s\n, (\n + 1) * 8(a2)
    .endr
    mv t0, a0
    mv a0, a1
    jalr t0
    li a0, 0
    ld ra, 8(sp)
    addi sp, sp, 16
    ret

trap_probe_resume:
    ld sp, 0(a0)
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11
    ld s\n, (\n + 1) * 8(a0)
    .endr
    li a0, 1
    ld ra, 8(sp)
    addi sp, sp, 16
    ret

    # a0: where to start in U-mode; a1: the a0 it gets. Only a trap comes back.
    .globl trap_enter_user
trap_enter_user:
    csrw sepc, a0
    mv a0, a1
    li t0, 0x100
    csrc sstatus, t0
    sret

    .section .bss.trap_last_stack, "aw", @nobits
    .balign 16
    .skip 4096
trap_last_stack_top:
"#,
    frame = const size_of::<Frame>(),
    frame_sp = const 8 - size_of::<Frame>() as isize,
    handler = sym handle,
    nested = sym nested,
);

unsafe extern "C" {
    fn trap_probe(f: extern "C" fn(*mut ()), arg: *mut (), jump: *mut Jump) -> usize;
    fn trap_probe_resume();
    fn trap_enter_user(pc: usize, arg: usize);
}

/// Runs `f` and returns the exception that ended it, if any. The stack of `f` is discarded then, so it must
/// hold nothing that needs dropping. Cannot be nested.
pub fn expect<F: FnOnce()>(f: F) -> Option<Trap> {
    extern "C" fn call<F: FnOnce()>(f: *mut ()) {
        // SAFETY: `f` is the option below, which still exists and is `Some`.
        let f = unsafe { (*f.cast::<Option<F>>()).take() };
        if let Some(f) = f {
            f();
        }
    }
    let mut f = Some(f);
    let mut jump = Jump { saved: [0; 13] };
    let hart = core::ptr::from_ref(hart()).cast_mut();
    // SAFETY: only this hart uses its struct. The assembly saves the callee-saved registers and, after a trap, returns as
    // if `call` had returned.
    unsafe {
        (&raw mut (*hart).probe).write_volatile((&raw mut jump) as usize);
        let trapped = trap_probe(call::<F>, (&raw mut f).cast(), &raw mut jump);
        (&raw mut (*hart).probe).write_volatile(0);
        (trapped != 0).then(|| (&raw const (*hart).trap).read_volatile())
    }
}

/// Runs the code at `pc` in user mode with `arg` in a0 until it traps. The interrupt state is unchanged.
pub fn user(pc: usize, arg: usize) -> Option<Trap> {
    // SAFETY: user mode returns only by a trap, which `expect` catches.
    expect(|| unsafe { trap_enter_user(pc, arg) })
}

extern "C" fn handle(frame: &mut Frame, cause: usize, tval: usize) {
    if cause & INTERRUPT != 0 {
        let interrupt = match cause & !INTERRUPT {
            1 => Interrupt::Software,
            5 => Interrupt::Timer,
            9 => Interrupt::External,
            other => fatal("unknown interrupt", other, tval, frame.epc),
        };
        let hook = interrupt.hook().load(Ordering::SeqCst);
        if hook == 0 {
            fatal("interrupt nobody waits for", cause & !INTERRUPT, tval, frame.epc);
        }
        // SAFETY: only `on` stores here, and it stores a `fn()`.
        let hook: fn() = unsafe { core::mem::transmute(hook) };
        return hook();
    }
    let hart = core::ptr::from_ref(hart()).cast_mut();
    // SAFETY: only this hart uses its struct, and `expect` reads it only after this returns.
    let jump = unsafe {
        (*hart).trap =
            Trap { cause, tval, epc: frame.epc, from_user: frame.status & csr::SSTATUS_SPP == 0 };
        core::mem::replace(&mut (*hart).probe, 0)
    };
    if jump == 0 {
        fatal("unexpected exception", cause, tval, frame.epc);
    }
    frame.epc = trap_probe_resume as *const () as usize;
    frame.x[9] = jump;
    frame.x[3] = hart as usize;
    frame.status |= csr::SSTATUS_SPP;
}

extern "C" fn nested(cause: usize, tval: usize, epc: usize) -> ! {
    fatal("exception in the trap handler", cause, tval, epc)
}

fn fatal(what: &str, cause: usize, tval: usize, epc: usize) -> ! {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    // A trap in the report itself must not be reported again.
    if !REPORTED.swap(true, Ordering::SeqCst) {
        console::break_lock();
        println!(
            "FAIL {what}: cause {cause} tval {tval:#x} epc {epc:#x} sstatus {:#x}",
            csr_read!("sstatus")
        );
    }
    sbi::power_off_with_failure()
}
