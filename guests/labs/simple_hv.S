# simple_hv: what does a hypervisor do about an instruction that its guest may not execute, and about memory that is not there?
#
# Four instructions, byte for byte those of the exercise. The guest believes that it is alone on the hardware and in machine
# mode: it reads its hart id, then a word from address 0x40, then asks for shutdown with both in its registers.
# Loaded at 0x8020_0000. The hypervisor has to leave a1 = 0x1234 and a0 = 0x6688 behind.

    .option norelax
    .option norvc
guest_start:
    csrr a1, mhartid        # f14025f3: a CSR of machine mode, so an illegal instruction
    ld a0, 64(zero)         # 04003503: no memory there, so a guest page fault
    .option rvc
    c.li a7, 8              # 48a1
    ecall                   # 00000073: SBI 0.1, shutdown
    .zero 18                # what the compiler leaves behind: not reached
