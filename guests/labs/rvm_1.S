# rvm-1: what becomes of a guest's call to what it takes for firmware?
#
# The guest of the RVM tutorial's first lab, linked to 0x9000_0000: it prints a line, byte by byte, each by an ecall that leaves the
# guest, and ends.

guest_start:
    la sp, stack_top
    print "[INFO][GUEST] Hello, world!\n"
    li a7, SBI_SHUTDOWN
    ecall
1:  j 1b

    .bss
    .balign 16
    .zero 256
stack_top:
