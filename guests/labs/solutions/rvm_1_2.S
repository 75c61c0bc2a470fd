# rvm-1, exercise 2: the whole line with one call, console_write of the debug console (SBI specification, chapter 12).
#
# a0 = how many bytes, a1 and a2 = their address, low and high half. It is a physical one; without a page table there is no other. KVM
# hands the call to rvmm: one exit, and one more for the end.

    .equ EID_DBCN, 0x4442434e

guest_start:
    la a1, line
    la a0, line_end
    sub a0, a0, a1
    li a2, 0
    li a6, 0                            # console_write
    li a7, EID_DBCN
    ecall
    shutdown

line:     .ascii "[INFO][GUEST] Hello, world!\n"
line_end:
