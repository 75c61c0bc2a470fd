# h_4_0: who answers the system call of a program in a guest?
#
# A small monolithic kernel: it takes a program from the flash (header "pfld", version, size, then the program), gives it a page
# of its own and a stack, and starts it in user mode. Its system call traps into this kernel without the hypervisor: KVM
# has delegated the trap (hedeleg), as the lab's hypervisor does.

    .equ FLASH, 0x22000000
    .equ USER_CODE, 0x40001000          # virtual; nothing else is in that GiB
    .equ USER_STACK_TOP, 0x40003000
    .equ MOST, 4096                     # the program's page

guest_start:
    la sp, stack_top
    print "guest: a monolithic kernel\n"
    la t0, trap
    csrw stvec, t0

    li s0, FLASH
    lwu t0, 0(s0)
    li t1, 0x646c6670                   # "pfld"
    bne t0, t1, no_program
    lwu a0, 8(s0)                       # size, big-endian
    call big_endian
    mv s1, a0
    li t0, MOST
    bgtu s1, t0, no_program
    beqz s1, no_program
    print "guest: a program of "
    mv a0, s1
    call put_decimal
    print " bytes in the flash\n"

    la t0, user_code                    # copy it out of the flash
    addi t1, s0, 16
    mv t2, s1
1:  lbu t3, 0(t1)
    sb t3, 0(t0)
    addi t0, t0, 1
    addi t1, t1, 1
    addi t2, t2, -1
    bnez t2, 1b
    fence.i

# Three tables: the root with this kernel's GiB, one GiB of the program's, and its three pages.
    la t0, root_table
    li t1, (2 << 28) | PTE_V | PTE_R | PTE_W | PTE_X | PTE_A | PTE_D
    sd t1, 8 * 2(t0)
    la t1, middle_table
    srli t1, t1, 2                      # a page number at bit 10
    ori t1, t1, PTE_V
    sd t1, 8 * 1(t0)
    la t2, last_table
    srli t2, t2, 2
    ori t2, t2, PTE_V
    la t3, middle_table
    sd t2, 0(t3)
    la t3, last_table
    la t1, user_code
    srli t1, t1, 2
    ori t1, t1, PTE_V | PTE_R | PTE_X | PTE_U | PTE_A
    sd t1, 8 * 1(t3)
    la t1, user_stack
    srli t1, t1, 2
    ori t1, t1, PTE_V | PTE_R | PTE_W | PTE_U | PTE_A | PTE_D
    sd t1, 8 * 2(t3)
    srli t0, t0, 12
    li t1, SATP_SV39 << 60
    or t0, t0, t1
    sfence.vma
    csrw satp, t0
    sfence.vma

    print "guest: to user mode\n"
    csrw sscratch, sp
    li t0, SSTATUS_SPP
    csrc sstatus, t0
    li t0, USER_CODE
    csrw sepc, t0
    li sp, USER_STACK_TOP
    li a0, 0
    sret

# From user mode: sp is the program's, ours is in sscratch.
    .balign 4
trap:
    csrrw sp, sscratch, sp
    mv s2, a0
    mv s3, a7
    csrr t0, scause
    li t1, 8                            # a call from user mode
    bne t0, t1, 1f
    print "handle_syscall ...\n"
    li t0, 93
    bne s3, t0, 1f
    print "[SYS_EXIT]: process is exiting ..\nmonolithic kernel exit [Some("
    mv a0, s2
    call put_decimal
    print ")] normally!\n"
    shutdown
1:  print "guest: a trap that it did not expect, cause "
    csrr a0, scause
    call put_hex
    print "\n"
    shutdown

no_program:
    print "guest: no program in the flash: rvmm mkpflash makes one\n"
    shutdown

    .bss
    .balign 4096
root_table:   .zero 4096
middle_table: .zero 4096
last_table:   .zero 4096
user_code:    .zero 4096
user_stack:   .zero 4096
    .zero 1024
stack_top:
