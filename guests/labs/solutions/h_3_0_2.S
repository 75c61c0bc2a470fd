# h_3_0, exercise 2: do without interrupts. The guest looks for the timer's bit itself, twice.
#
# sip.STIP is there whether or not anybody lets it interrupt: sstatus.SIE stays 0, and there is no trap vector. Setting the timer
# anew takes the bit back, so that the second turn waits, too.

    .equ SLICE, 50000                   # ticks of 100 ns: 5 ms

guest_start:
    la sp, stack_top
    li t0, SIE_STIE
    csrw sie, t0
    li s0, 2
1:  rdtime a0
    li t0, SLICE
    add a0, a0, t0
    li a6, 0
    li a7, EID_TIME
    ecall
2:  csrr t0, sip
    andi t0, t0, SIE_STIE
    beqz t0, 2b
    addi s0, s0, -1
    bnez s0, 1b
    print "Multi-task(Preemptible) ok!\n"
    shutdown

    .bss
    .balign 16
    .zero 256
stack_top:
