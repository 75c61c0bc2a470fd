# rvm-2: which traps of a guest are the guest's own, and who gives it those that the hardware does not?
#
# The guest of the RVM tutorial's second lab: a batch kernel at 0x9000_0000 that runs eight user programs one after the other. One
# executes an instruction that it may not (sret), one stores to address 0, where nothing is; both must come to this kernel as
# traps, which kills the program and goes on. On hardware without a page table the store is an access fault; KVM makes an exit
# of it, and the hypervisor injects the fault.

    .equ PROGRAMS, 8

guest_start:
    la sp, kernel_stack_top
    la t0, trap
    csrw stvec, t0
    print "[kernel] Hello, world!\n"
    li s11, 0                           # the next program; no program changes what is in sscratch

next:
    li t0, PROGRAMS
    beq s11, t0, all_done
    print "[kernel] Loading app_"
    mv a0, s11
    call put_decimal
    print "\n"
    la t0, table                        # offsets of the programs from the table
    slli t1, s11, 2
    add t1, t0, t1
    lw t1, 0(t1)
    add t0, t0, t1
    csrw sepc, t0
    li t0, SSTATUS_SPP
    csrc sstatus, t0
    la t0, kernel_sp
    sd sp, 0(t0)
    sd s11, 8(t0)
    csrw sscratch, t0
    la sp, user_stack_top
    sret

all_done:
    print "[kernel] All applications completed!\n"
    li a7, SBI_SHUTDOWN
    ecall
1:  j 1b

# A trap of a program. Its a0 to a2, a7, sepc and sp are kept; nothing else of it is used here but across the calls of puts.
    .balign 4
trap:
    csrrw t6, sscratch, t6              # t6 = the kernel's block
    sd sp, 16(t6)
    sd t0, 24(t6)
    sd t1, 32(t6)
    sd ra, 40(t6)
    ld sp, 0(t6)
    csrr t0, scause
    li t1, 8
    beq t0, t1, call_of_user
    ld s11, 8(t6)
    li t1, 2
    beq t0, t1, illegal
    li t1, 7
    beq t0, t1, fault
    li t1, 5
    beq t0, t1, fault
    print "[kernel] a trap that it did not expect\n"
    j all_done

illegal:
    print "[kernel] IllegalInstruction in application, core dumped.\n"
    j following
fault:
    print "[kernel] PageFault in application, core dumped.\n"
    j following
following:
    ld t0, kernel_sp
    mv sp, t0
    addi s11, s11, 1
    j next

call_of_user:
    li t1, 93
    beq a7, t1, exit
    li t1, 64
    bne a7, t1, refuse
    # write(a0 = file, a1 = text, a2 = length): only to standard output, and only what lies in the programs.
    li t1, 1
    bne a0, t1, refuse
    la t1, programs
    bltu a1, t1, refuse
    add t0, a1, a2
    bltu t0, a1, refuse
    la t1, programs_end
    bgtu t0, t1, refuse
    sd a2, 48(t6)
    mv t1, a1
1:  beq t1, t0, 2f
    lbu a0, 0(t1)
    li a7, SBI_PUTCHAR
    ecall
    addi t1, t1, 1
    j 1b
2:  ld a0, 48(t6)
    j back
refuse:
    li a0, -1
back:
    csrr t0, sepc
    addi t0, t0, 4
    csrw sepc, t0
    ld sp, 16(t6)
    ld t0, 24(t6)
    ld t1, 32(t6)
    ld ra, 40(t6)
    csrrw t6, sscratch, t6
    sret

exit:
    ld s11, 8(t6)
    mv s10, a0
    print "[kernel] Application exited with code "
    mv a0, s10
    call put_decimal
    print "\n"
    j following

    .balign 8
kernel_sp:  .zero 64

    .balign 4
table:
    .irp n, 0,1,2,3,4,5,6,7
    .word app_\n - table
    .endr

# ---- The programs. They know only write and exit.

.macro say text
    la a1, 7f
    la a2, 8f
    sub a2, a2, a1
    li a0, 1
    li a7, 64
    ecall
    j 9f
7:  .ascii "\text"
8:  .balign 4
9:
.endm

.macro leave code
    li a0, \code
    li a7, 93
    ecall
.endm

    .balign 4
programs:
app_0:
    say "Hello, world from user mode program!\nTry to execute privileged instruction in U Mode\n"
    sret
    leave 1
app_1:
    say "Into Test store_fault, we will insert an invalid store operation...\n"
    sd zero, 0(zero)
    leave 1
app_2:
    # 3 to the power of 10,000, 20,000, ... modulo 10,007
    li s0, 10007
    li s1, 1
    li s2, 0
    li s3, 10000
    li s4, 100000
1:  slli t2, s1, 1
    add s1, s1, t2
    remu s1, s1, s0
    addi s2, s2, 1
    remu t2, s2, s3
    bnez t2, 1b
    say "3^"
    mv a0, s2
    call user_decimal
    say "="
    mv a0, s1
    call user_decimal
    say "(MOD 10007)\n"
    bltu s2, s4, 1b
    say "Test power OK!\n"
    leave 0
app_3:
    leave 1234
app_4:
    say "Hello, world from another user mode program!\n"
    leave 0
app_5:
    say "power once more: "
    li s1, 1
    li s2, 16
1:  slli s1, s1, 1
    addi s2, s2, -1
    bnez s2, 1b
    mv a0, s1
    call user_decimal
    say "\n"
    leave 0
app_6:
    # write takes what is there, all of it, and says how much.
    la a1, 3f
    li a2, 7
    li a0, 1
    li a7, 64
    ecall
    li t2, 7
    bne a0, t2, 2f
    say "Test write1 OK!\n"
    leave 0
2:  leave 1
3:  .ascii "string\n"
    .balign 4
app_7:
    # write refuses what is not the program's, and other files.
    li a1, 0
    li a2, 10
    li a0, 1
    li a7, 64
    ecall
    bgez a0, 2f
    la a1, app_7
    li a2, 1
    li a0, 5
    li a7, 64
    ecall
    bgez a0, 2f
    say "Test write0 OK!\n"
    leave 0
2:  leave 1

# Prints a0 in decimal, by write. Uses t2 to t4.
user_decimal:
    la t4, digits_end
    li t3, 10
1:  addi t4, t4, -1
    remu t2, a0, t3
    addi t2, t2, '0'
    sb t2, 0(t4)
    divu a0, a0, t3
    bnez a0, 1b
    mv a1, t4
    la a2, digits_end
    sub a2, a2, a1
    li a0, 1
    li a7, 64
    ecall
    ret
    .zero 24
digits_end:
programs_end:

    .bss
    .balign 16
    .zero 1024
kernel_stack_top:
    .zero 1024
user_stack_top:
