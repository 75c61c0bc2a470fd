# simple_hv, exercise 2: load with a compressed instruction, and see that the one behind it was not left out.
#
# The two low bits of an instruction of four bytes are 1 (insn.rs: length); those of 0x6388 are 0, so it has two. Who adds 4 all the
# same leaves out the c.addi.

guest_start:
    li a5, 0x40
    c.ld a0, 0(a5)          # 0x6388
    c.addi a0, 1
    li t0, 0x6689
    bne a0, t0, 1f
    li a7, 8
    ecall
1:  unimp
