# h_2_0: how does a guest come to a device, through two page tables?
#
# The guest switches on Sv39 with three pages of 1 GiB: itself where it is, and the first GiB, where the devices are, at the top
# of its address space as kernels have it. Then it reads the flash at physical address 0x2200_0000 through
# 0xffff_ffc0_2200_0000. Its own table leads from the virtual to the guest-physical address; the hypervisor's table
# (or a trap) from there to the host's.

    .equ FLASH, 0xffffffc022000000

guest_start:
    la sp, stack_top
    la t0, root_table

    li t1, (0 << 28) | PTE_V | PTE_R | PTE_W | PTE_A | PTE_D
    li t2, 8 * 256                      # VA 0xffff_ffc0_0000_0000, the 256th GiB, to the first one
    add t2, t0, t2
    sd t1, 0(t2)
    li t1, (2 << 28) | PTE_V | PTE_R | PTE_W | PTE_X | PTE_A | PTE_D
    sd t1, 8 * 2(t0)                    # the third GiB, where this runs, to itself

    srli t0, t0, 12
    li t1, SATP_SV39 << 60
    or t0, t0, t1
    sfence.vma
    csrw satp, t0
    sfence.vma

    print "guest: translation is on (Sv39)\n"
    li t3, FLASH
    lwu s0, 0(t3)                       # the load that the lab is about
    print "Try to access dev region [0xFFFFFFC022000000], got 0x"
    mv a0, s0
    call put_hex
    print "\n"
    li t0, 0x646c6670                   # "pfld", little-endian
    bne s0, t0, 1f
    print "Got pflash magic: pfld\n"
    j 2f
1:  print "This is no flash of the lab: rvmm mkpflash makes one\n"
2:  shutdown

    .bss
    .balign 4096
root_table:
    .zero 4096
    .zero 1024
stack_top:
