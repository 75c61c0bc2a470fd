# h_1_0: how does a hypervisor enter a guest, and how does it come back?
#
# The smallest guest there is: it asks to be shut down. It has no stack, no trap vector and no memory of its own, so
# whatever the ecall leads to, only the hypervisor can answer it. Loaded at 0x8020_0000, two instructions.

    .option norelax
guest_start:
    li a7, 8                # SBI 0.1: shutdown
    ecall                   # the way out: VU or VS mode to whoever is below
