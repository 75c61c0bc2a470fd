# rvm-1, exercise 1: the same line, a7 loaded from memory before each ecall.
#
# rvmm looks backwards from an ecall for a constant in a7 (sites.rs). What a load brings is known only when the guest runs: that ecall
# stays one, goes to the kernel, and is answered with -2, "not supported". The calls of the prelude have constants.

guest_start:
    la sp, stack_top
    la s0, line
    la s1, number
1:  lbu a0, 0(s0)
    beqz a0, 2f
    lw a7, 0(s1)
    ecall
    mv s2, a0                           # what the call came back with
    addi s0, s0, 1
    j 1b
2:  print "answer: "
    mv a0, s2
    call put_hex
    print "\n"
    shutdown

line:   .asciz "[INFO][GUEST] Hello, world!\n"
    .balign 4
number: .word SBI_PUTCHAR

    .bss
    .balign 16
    .zero 256
stack_top:
