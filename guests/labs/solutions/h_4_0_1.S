# h_4_0, exercise 1: a program that ends itself with 42, for the unchanged kernel.

guest_start:
    li a0, 42
    li a7, 93               # exit
    ecall
