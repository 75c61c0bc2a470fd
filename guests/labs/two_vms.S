# two-vms: how do two virtual machines talk, when neither knows of the other?
#
# The same guest runs in both machines; a constant at 0x40 says which it is: 1 is left, 2 is right. Neither knows when the other
# starts, and what is sent before that is lost. So each sends its line again and again until the other has acknowledged it, and
# leaves when it has the other's line, too. A line that was cut at its front lacks START and does not count.
# What came over the line is printed on the console.

    .equ WHO, 0x40
    .equ UART, 0x10001000               # the first free slot of the board
    .equ LSR, 5
    .equ LSR_DATA, 1 << 0
    .equ LSR_EMPTY, 1 << 5
    .equ LSR_ALL_SENT, 1 << 6
    .equ START, 2                       # ASCII's STX and ACK
    .equ ACK, 6
    .equ PAUSE, 100000                  # ticks of 100 ns between two attempts

guest_start:
    la sp, stack_top
    li s0, UART
    lw t0, WHO(zero)
    la s1, left_line
    li t1, 1
    beq t0, t1, 1f
    la s1, right_line
1:  la s2, buffer
    mv s3, zero                         # where the next byte goes; 0 outside a line
    li s4, 0                            # 1 once a line has come whole
    li s5, 0                            # 1 once the other one has ours

again:
    mv s7, s1
1:  lbu a0, 0(s7)
    beqz a0, 2f
    call send
    addi s7, s7, 1
    j 1b
2:  rdtime s6
    li t0, PAUSE
    add s6, s6, t0
listen:
    and t0, s4, s5
    bnez t0, leave
    rdtime t0
    bgtu t0, s6, wait_over
    lbu t0, LSR(s0)
    andi t0, t0, LSR_DATA
    beqz t0, listen
    lbu t1, 0(s0)
    li t0, ACK
    beq t1, t0, acknowledged
    li t0, START
    beq t1, t0, line_starts
    beqz s3, listen                     # the rest of a line whose front was lost
    li t0, '\n'
    beq t1, t0, line_ends
    la t0, buffer_end
    bgeu s3, t0, listen
    sb t1, 0(s3)
    addi s3, s3, 1
    j listen

wait_over:
    bnez s5, 2b                         # nothing to send any more
    j again

acknowledged:
    li s5, 1
    j listen

line_starts:
    mv s3, s2
    j listen

line_ends:
    sb zero, 0(s3)
    mv s3, zero
    li a0, ACK                          # for each, since the answer to the one before may have been lost
    call send
    bnez s4, listen
    li s4, 1
    print "got over the line: "
    mv a0, s2
    call puts
    print "\n"
    j listen

leave:
    lbu t0, LSR(s0)                     # the acknowledgement must have gone out
    andi t0, t0, LSR_ALL_SENT
    beqz t0, leave
    shutdown

# send(a0 = byte): stores it to the port, once there is room. Uses t0.
send:
    lbu t0, LSR(s0)
    andi t0, t0, LSR_EMPTY
    beqz t0, send
    sb a0, 0(s0)
    ret

left_line:  .asciz "\002hello from left\n"
right_line: .asciz "\002hello from right\n"

    .bss
buffer:     .zero 64
buffer_end: .zero 8
    .balign 16
    .zero 256
stack_top:
