//! The four memory functions that the compiler calls, as there is no C library. In assembly, because the compiler
//! would replace a loop in Rust by a call of the same function.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .text.memory, "ax"
    .globl memcpy
    .globl memmove
    .globl memset
    .globl memcmp
    .globl bcmp
memmove:
    bgtu a0, a1, 3f
memcpy:
    or t0, a0, a1
    or t0, t0, a2
    andi t0, t0, 7
    add t1, a0, a2
    mv t2, a0
    bnez t0, 2f
1:  bgeu t2, t1, 9f
    ld t3, 0(a1)
    sd t3, 0(t2)
    addi a1, a1, 8
    addi t2, t2, 8
    j 1b
2:  bgeu t2, t1, 9f
    lbu t3, 0(a1)
    sb t3, 0(t2)
    addi a1, a1, 1
    addi t2, t2, 1
    j 2b
3:  add t1, a0, a2
    add a1, a1, a2
4:  bgeu a0, t1, 9f
    addi a1, a1, -1
    addi t1, t1, -1
    lbu t3, 0(a1)
    sb t3, 0(t1)
    j 4b
9:  ret

memset:
    add t1, a0, a2
    mv t2, a0
1:  bgeu t2, t1, 2f
    sb a1, 0(t2)
    addi t2, t2, 1
    j 1b
2:  ret

memcmp:
bcmp:
    add t1, a0, a2
1:  bgeu a0, t1, 2f
    lbu t2, 0(a0)
    lbu t3, 0(a1)
    addi a0, a0, 1
    addi a1, a1, 1
    beq t2, t3, 1b
    sub a0, t2, t3
    ret
2:  li a0, 0
    ret
"#
);
