# h_3_0: who interrupts a guest that never gives up the CPU?
#
# Two tasks share one hart. The first puts 257 numbers into a ring of 16, the second takes them out and checks them; both wait
# by spinning, so that only the timer can make one give way to the other. The timer is set by an SBI call and comes as an
# interrupt; what happens in between is the hypervisor's business.

    .equ ITEMS, 257
    .equ RING, 16
    .equ SLICE, 50000                   # ticks of 100 ns: 5 ms
    .equ FRAME, 33 * 8                  # x1 to x31, sepc, sstatus

guest_start:
    la sp, second_stack_top
    # The second task begins as if it had been interrupted at its first instruction.
    addi sp, sp, -FRAME
    la t0, consumer
    sd t0, 31 * 8(sp)
    li t0, SSTATUS_SPP | SSTATUS_SPIE
    sd t0, 32 * 8(sp)
    la t0, other_task
    sd sp, 0(t0)

    la sp, first_stack_top
    print "guest: two tasks, one hart\n"
    la t0, trap
    csrw stvec, t0
    # Twice: KVM may forget a call when it turns to something else right behind it. Later ones may be forgotten, since the
    # one before them is over then, and comes again.
    call set_timer
    call set_timer
    li t0, SIE_STIE
    csrw sie, t0
    csrsi sstatus, SSTATUS_SIE

# The first task.
producer:
    li s0, 0
1:  la t0, put
    ld t1, 0(t0)
    la t2, got
2:  ld t3, 0(t2)                        # full: spin until the other task has run
    sub t4, t1, t3
    li t5, RING
    beq t4, t5, 2b
    la t4, ring
    andi t5, t1, RING - 1
    slli t5, t5, 3
    add t4, t4, t5
    sd s0, 0(t4)
    fence rw, rw
    addi t1, t1, 1
    sd t1, 0(t0)
    addi s0, s0, 1
    li t5, ITEMS
    bne s0, t5, 1b
3:  j 3b                                # done: the other task ends the machine

# The second task.
consumer:
    li s0, 0
1:  la t0, got
    ld t1, 0(t0)
    la t2, put
2:  ld t3, 0(t2)                        # empty: spin
    beq t1, t3, 2b
    la t4, ring
    andi t5, t1, RING - 1
    slli t5, t5, 3
    add t4, t4, t5
    ld t6, 0(t4)
    bne t6, s0, 9f
    addi t1, t1, 1
    sd t1, 0(t0)
    addi s0, s0, 1
    li t5, ITEMS
    bne s0, t5, 1b
    csrci sstatus, SSTATUS_SIE
    print "guest: 257 numbers went from task to task, switches: "
    la t0, switches
    ld a0, 0(t0)
    call put_decimal
    print "\nMulti-task(Preemptible) ok!\n"
    shutdown
9:  csrci sstatus, SSTATUS_SIE
    print "guest: a number came in the wrong order\n"
    shutdown

# Sets the timer one slice from now. Uses a0, a6, a7.
set_timer:
    rdtime a0
    li a7, SLICE
    add a0, a0, a7
    li a6, 0
    li a7, EID_TIME
    ecall
    ret

# The timer's interrupt: put this task's registers on its stack, and go on with the other task's.
    .balign 4
trap:
    addi sp, sp, -FRAME
    .irp n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    sd x\n, (\n - 1) * 8(sp)
    .endr
    csrr t0, sepc
    sd t0, 31 * 8(sp)
    csrr t0, sstatus
    sd t0, 32 * 8(sp)
    csrr t0, scause
    bgez t0, unexpected                 # no interrupt
    call set_timer

    la t0, switches
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    la t0, other_task
    ld t1, 0(t0)
    sd sp, 0(t0)
    mv sp, t1

    ld t0, 31 * 8(sp)
    csrw sepc, t0
    ld t0, 32 * 8(sp)
    csrw sstatus, t0
    .irp n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld x\n, (\n - 1) * 8(sp)
    .endr
    addi sp, sp, FRAME
    sret

unexpected:
    print "guest: a trap that it did not expect\n"
    shutdown

    .balign 8
put:        .dword 0
got:        .dword 0
switches:   .dword 0
other_task: .dword 0
ring:       .zero RING * 8
    .bss
    .balign 16
    .zero 1024
first_stack_top:
    .zero 1024
second_stack_top:
