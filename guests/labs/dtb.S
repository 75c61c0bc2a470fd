# dtb: what does a kernel know when it starts, and who told it?
#
# Two registers: its hart's id and the address of a device tree. The guest says where it runs itself, where the tree is and how
# long it says that it is. Kernel and tree may be anywhere in RAM; the tree may be the hypervisor's or the user's own.

guest_start:
    la sp, stack_top
    mv s0, a0
    mv s1, a1
    la s2, guest_start
    print "dtb: kernel at 0x"
    mv a0, s2
    call put_hex
    print ", tree at 0x"
    mv a0, s1
    call put_hex
    print ", magic 0x"
    lwu a0, 0(s1)
    call big_endian
    mv s3, a0
    call put_hex
    print ", bytes: "
    lwu a0, 4(s1)
    call big_endian
    call put_decimal
    print "\n"
    li t0, 0xd00dfeed
    bne s3, t0, 1f
    bnez s0, 1f
    print "dtb: boots\n"
    shutdown
1:  print "dtb: that is no device tree, or not hart 0\n"
    shutdown

    .bss
    .balign 16
    .zero 256
stack_top:
