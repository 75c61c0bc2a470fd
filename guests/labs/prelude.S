# What the labs' guests share: how they print and how they end. Assembled in front of each of them.
#
# A guest is position-independent: it runs wherever it is loaded, and uses nothing but its own bytes, the stack that it sets up
# behind them, and SBI calls.

    .option norelax

    .equ SBI_SET_TIMER, 0           # SBI 0.1, which every teaching hypervisor has
    .equ SBI_PUTCHAR, 1
    .equ SBI_SHUTDOWN, 8
    .equ EID_TIME, 0x54494d45       # SBI 2.0: the same services under other numbers
    .equ EID_IPI, 0x735049
    .equ EID_HSM, 0x48534d
    .equ EID_SRST, 0x53525354

    .equ SSTATUS_SIE, 1 << 1
    .equ SSTATUS_SPIE, 1 << 5
    .equ SSTATUS_SPP, 1 << 8
    .equ SSTATUS_SUM, 1 << 18
    .equ SIE_SSIE, 1 << 1
    .equ SIE_STIE, 1 << 5

    .equ PTE_V, 1 << 0
    .equ PTE_R, 1 << 1
    .equ PTE_W, 1 << 2
    .equ PTE_X, 1 << 3
    .equ PTE_U, 1 << 4
    .equ PTE_A, 1 << 6
    .equ PTE_D, 1 << 7
    .equ SATP_SV39, 8

# Powers the machine off by the call that SBI has for it today.
.macro shutdown
    li a7, EID_SRST
    li a6, 0
    li a0, 0
    li a1, 0
    ecall
99: wfi
    j 99b
.endm

# Prints the text behind the macro's name.
.macro print text
    la a0, 7f
    call puts
    j 8f
7:  .asciz "\text"
    .balign 4
8:
.endm

    .text
    j guest_start

# puts(a0 = text that ends with a zero byte): prints it, byte by byte, by the SBI's oldest call. Uses a0, a7, t0.
    .balign 4
puts:
    mv t0, a0
1:  lbu a0, 0(t0)
    beqz a0, 2f
    li a7, SBI_PUTCHAR
    ecall
    addi t0, t0, 1
    j 1b
2:  ret

# put_hex(a0 = number): prints its eight low hexadecimal digits. Uses a0, a7, t0, t1.
put_hex:
    mv t0, a0
    li t1, 28
1:  srlw a0, t0, t1
    andi a0, a0, 15
    addi a0, a0, '0'
    li a7, '9'
    ble a0, a7, 2f
    addi a0, a0, 'A' - '0' - 10
2:  li a7, SBI_PUTCHAR
    ecall
    addi t1, t1, -4
    bgez t1, 1b
    ret

# put_decimal(a0 = number without sign): prints it. Uses a0, a7, t0 to t2, and 32 bytes of stack.
put_decimal:
    addi sp, sp, -32
    li t1, 10
    mv t0, sp
1:  remu t2, a0, t1
    addi t2, t2, '0'
    sb t2, 0(t0)
    addi t0, t0, 1
    divu a0, a0, t1
    bnez a0, 1b
2:  addi t0, t0, -1
    lbu a0, 0(t0)
    li a7, SBI_PUTCHAR
    ecall
    bne t0, sp, 2b
    addi sp, sp, 32
    ret

# big_endian(a0 = four bytes as they lie in memory): turns them round. Uses t0 to t2.
big_endian:
    mv t0, a0
    li a0, 0
    li t1, 4
1:  slli a0, a0, 8
    andi t2, t0, 0xff
    or a0, a0, t2
    srli t0, t0, 8
    addi t1, t1, -1
    bnez t1, 1b
    ret
