# h_1_0, exercise 2: print `hi` and a line feed by SBI 0.1 before the call for shutdown.
#
# Each call is a trap as the one for shutdown is: rvmm tells them apart by a7, and goes on behind the ecall.

guest_start:
    li a7, 1                # SBI 0.1: console_putchar
    li a0, 'h'
    ecall
    li a0, 'i'              # the call has left its answer in a0, and everything else alone
    ecall
    li a0, '\n'
    ecall
    li a7, 8                # SBI 0.1: shutdown
    ecall
