//! The first instructions: the RISC-V Image header (Linux: Documentation/arch/riscv/boot-image-header.rst), the entry of
//! the boot hart and of a started hart into Rust, and the stacks.

use core::arch::global_asm;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::board::Board;
use crate::{sbi, smp, trap};

/// Maximum number of harts of a guest. The boot hart has slot 0.
pub const MAX_HARTS: usize = 8;
/// Size of each hart's stack in bytes.
const STACK: usize = 32 << 10;

/// A hart's stacks, which the assembly below finds at the slot's index times the size of this.
#[repr(C, align(4096))]
struct Slot {
    stack: [u8; STACK],
    trap: trap::TrapStack,
}

static mut SLOTS: [Slot; MAX_HARTS] =
    [const { Slot { stack: [0; STACK], trap: trap::TrapStack::new() } }; MAX_HARTS];

/// The address of the device tree, from a1 of the boot hart.
static FDT: AtomicUsize = AtomicUsize::new(0);

global_asm!(
    r#"
    .section .text.entry, "ax"
    .globl _start
    .option push
    .option norvc
_start:
    j _start_boot
    .word 0
    .option pop
    .quad 0x200000
    .quad _image_end - _image_start
    .quad 0
    .word 2
    .word 0
    .quad 0
    .ascii "RISCV\0\0\0"
    .ascii "RSC\x05"
    .word 0

_start_boot:
    lla t0, _bss_start
    lla t1, _image_end
1:  sd zero, 0(t0)
    addi t0, t0, 8
    bltu t0, t1, 1b
    mv s0, a0
    mv s1, a1
    li a2, 0
    jal 2f
    mv a0, s0
    mv a1, s1
    call {boot}
    j .

    # Gives the hart in slot a2 its stack, its trap stack and its floating point.
2:  lla t0, {slots}
    .option arch, +m
    li t1, {slot_size}
    mul t1, t1, a2
    add t0, t0, t1
    li t1, {stack}
    add sp, t0, t1
    li t1, {hart_at}
    add tp, t0, t1
    sd a0, 0(tp)
    sd a2, 8(tp)
    sd zero, 16(tp)
    csrw sscratch, tp
    lla t1, trap_vector
    csrw stvec, t1
    csrw sie, zero
    li t1, 0x6000
    csrs sstatus, t1
    ret

    # Where HSM starts a hart: a0 is its id, a1 the slot.
    .globl _start_hart
_start_hart:
    mv s0, a0
    mv s1, a1
    mv a2, a1
    jal 2b
    mv a0, s1
    call {hart}
    j .
"#,
    boot = sym boot,
    hart = sym smp::started,
    slots = sym SLOTS,
    slot_size = const size_of::<Slot>(),
    stack = const STACK,
    hart_at = const core::mem::offset_of!(Slot, trap) + trap::TrapStack::HART,
);

unsafe extern "C" {
    /// The address at which HSM starts a hart (assembly above).
    pub(crate) static _start_hart: u8;
    static _image_start: u8;
    static _image_end: u8;
}

unsafe extern "Rust" {
    fn guest_main(board: &'static Board);
}

/// Physical addresses of the guest's image, BSS and stacks included.
#[must_use]
pub fn image() -> core::ops::Range<usize> {
    (&raw const _image_start) as usize..(&raw const _image_end) as usize
}

/// The value of a1 at the start of the boot hart.
#[must_use]
pub fn fdt_address() -> usize {
    FDT.load(Ordering::Relaxed)
}

extern "C" fn boot(hart: usize, fdt: usize) -> ! {
    FDT.store(fdt, Ordering::Relaxed);
    let board = Board::init(hart, fdt);
    // SAFETY: the guest defines it with `guest!`, with this signature.
    unsafe { guest_main(board) };
    sbi::power_off()
}
