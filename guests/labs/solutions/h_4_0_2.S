# h_4_0, exercise 2: a program that prints `hi` by write, and ends itself behind it. Its kernel is h_4_0_2_kernel.patch.

guest_start:
    la a1, text             # relative to pc: right wherever the page is
    li a2, 3
    li a7, 64               # write
    ecall
    li a0, 0
    li a7, 93               # exit
    ecall
text:
    .ascii "hi\n"
