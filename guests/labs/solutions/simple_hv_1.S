# simple_hv, exercise 1: read marchid, add it to the value at 0x40, and ask for shutdown only if the sum is 0x78bc.

guest_start:
    csrr a1, marchid
    ld a0, 64(zero)
    add a0, a0, a1
    li t0, 0x78bc           # 0x1234 + 0x6688
    bne a0, t0, 1f
    li a7, 8
    ecall
1:  unimp
