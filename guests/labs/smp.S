# smp: how do the harts of a machine start, how do they call each other, and whose timer is it?
#
# Hart 0 starts the others by SBI HSM. Each hart prints a line, sets its own timer, waits for it in wfi, then is sent an interrupt by
# its left neighbour and sends one to its right neighbour. Hart 0 begins the round and prints the sum when it comes back.

    .equ MOST_HARTS, 8
    .equ STACK, 512
    .equ WAIT, 20000                    # ticks of 100 ns

guest_start:
    mv s0, a0                           # this hart's id
    mv s1, a1                           # unused: the device tree
    call my_stack
    call set_up
    call one_line

    # How many harts there are, the tree would say; or one starts the next one until there is none.
    li s2, 1
1:  mv a0, s2
    la a1, others
    mv a2, s2
    li a7, EID_HSM
    li a6, 0                            # hart_start(hart, address, a1 for it)
    ecall
    bnez a0, 2f
    addi s2, s2, 1
    li t0, MOST_HARTS
    bne s2, t0, 1b
2:  la t0, harts
    sd s2, 0(t0)
4:  la t0, ready                        # all of them have printed and had their timer
    ld t1, 0(t0)
    bne t1, s2, 4b

    call send_right                     # begin the round; with one hart it comes back at once
    call wait_for_ipi
    print "smp: harts: "
    mv a0, s2
    call put_decimal
    print ", timers: "
    la t0, timers
    ld a0, 0(t0)
    call put_decimal
    print ", interrupts between them: "
    la t0, ipis
    ld a0, 0(t0)
    call put_decimal
    print "\nsmp: all harts are up\n"
    shutdown

early:
    sub s5, s4, t0
    call lock
    print "smp: a timer came too early, by ticks: "
    mv a0, s5
    call put_decimal
    print "\n"
    shutdown

# Where the other harts start: a0 is the hart's id.
others:
    mv s0, a0
    call my_stack
    call set_up
    call one_line
    call wait_for_ipi
    la t0, harts                        # known by now: the interrupt came after it
    ld s2, 0(t0)
    call send_right
1:  wfi
    j 1b

my_stack:
    la sp, stacks
    addi t0, s0, 1
    li t1, STACK
    mul t0, t0, t1
    add sp, sp, t0
    ret

# Interrupts are only looked at (sip), never taken: sstatus.SIE stays 0, and wfi wakes all the same.
set_up:
    li t0, SIE_SSIE | SIE_STIE
    csrw sie, t0
    ret

# The line of this hart, and its timer.
one_line:
    addi sp, sp, -16
    sd ra, 0(sp)
    call lock
    print "hart "
    mv a0, s0
    call put_decimal
    print " is up\n"
    call unlock
    rdtime a0
    li t0, WAIT
    add a0, a0, t0
    mv s4, a0
    # Twice: KVM may forget a call when it turns to something else right behind it, and this hart would sleep for ever.
    call set_timer
    call set_timer
1:  wfi
    csrr t0, sip
    andi t0, t0, SIE_STIE
    beqz t0, 1b
    rdtime t0
    bltu t0, s4, early
    li a0, -1                           # never again
    call set_timer
    la t0, timers
    li t1, 1
    amoadd.d zero, t1, (t0)
    la t0, ready
    amoadd.d zero, t1, (t0)
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

# Sets this hart's timer to a0, which it keeps.
set_timer:
    mv t0, a0
    li a7, EID_TIME
    li a6, 0
    ecall
    mv a0, t0
    ret

wait_for_ipi:
1:  wfi
    csrr t0, sip
    andi t0, t0, SIE_SSIE
    beqz t0, 1b
    csrci sip, SIE_SSIE
    la t0, ipis
    li t1, 1
    amoadd.d zero, t1, (t0)
    ret

send_right:
    addi t0, s0, 1
    bltu t0, s2, 1f
    li t0, 0
1:  li a0, 1
    sll a0, a0, t0                      # mask
    li a1, 0                            # of the harts from 0
    li a7, EID_IPI
    li a6, 0
    ecall
    ret

lock:
    la t0, owner
    li t1, 1
1:  amoswap.d.aq t2, t1, (t0)
    bnez t2, 1b
    ret
unlock:
    la t0, owner
    amoswap.d.rl zero, zero, (t0)
    ret

    .balign 8
owner:  .dword 0
harts:  .dword 0
ready:  .dword 0
timers: .dword 0
ipis:   .dword 0
    .bss
    .balign 16
stacks: .zero STACK * MOST_HARTS
