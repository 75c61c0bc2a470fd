#!/usr/bin/env bash
# QEMU 10.0.2 (TCG, riscv64): mip.SGEIP stays 0 although hgeip & hgeie is not, when one hart sets hgeie while another sends an MSI to its guest file.
#
# Seen with Debian's qemu-system-riscv 10.0.2 on two CPUs: the privileged specification (hypervisor extension, "hgeip and hgeie") has SGEIP set whenever hgeip & hgeie is
# not zero. QEMU computes it in the thread of the hart that writes hgeie, and stores it after it has got the lock under which the other thread changes hgeip:
# the older result wins. SGEIP comes back with the next change of either register. KVM sets hgeie before it lets a vCPU sleep, so a guest whose
# interrupts go to an IMSIC guest file may sleep on until something else wakes it. With both harts in one thread (-accel tcg,thread=single) nothing is lost.
#
# Needs Debian's archive with QEMU 10.0, the libraries of its qemu-system-riscv package, gcc-riscv64-linux-gnu, two CPUs. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
version=$(apt-cache madison qemu-system-riscv | awk '$3 ~ /^1:10\.0\./ { print $3; exit }')
[[ -n $version ]] || { echo "No QEMU 10.0 in the archives that apt knows" >&2; exit 1; }
(cd "$folder" && apt-get download -qq "qemu-system-riscv=$version" 2>/dev/null && dpkg -x qemu-system-riscv_*.deb .)
qemu=$folder/usr/bin/qemu-system-riscv64
"$qemu" --version | head -n 1
cat >"$folder/race.S" <<'ASM'
# Two harts in M-mode: one clears and sets hgeie again and again, the other sends one MSI each time.
    .equ FILE, 0x28001000          # hart 0, guest 1: setipnum
    .equ UART, 0x10000000
    .equ TEST, 0x100000
    .globl _start
_start:
    la   t0, 1f                    # hart 0 ends with its message
    csrw mtvec, t0
    csrr t0, mhartid
    la   s0, go
    la   s1, done
    bnez t0, sender

    li   t0, 1 << 12               # hstatus.VGEIN = 1: the file's registers are at vsiselect and vsireg
    csrs 0x600, t0
    li   t0, 0x70
    csrw 0x250, t0                 # eidelivery
    li   t0, 1
    csrw 0x251, t0
    li   t0, 0xc0
    csrw 0x250, t0                 # eie0
    li   t0, 2                     # identity 1
    csrw 0x251, t0
    li   s2, 0                     # rounds
    li   s3, 0                     # lost
    li   s4, 0                     # arrived
round:
    addi s2, s2, 1
    csrw 0x607, zero               # hgeie
2:  csrrw t0, 0x25c, zero          # vstopei: claim
    bnez t0, 2b
    fence
    sd   s2, 0(s0)
    andi t0, s2, 2047
3:  addi t0, t0, -1
    bgez t0, 3b
    li   t1, 2
    csrs 0x607, t1                 # hgeie, bit 1
4:  ld   t0, 0(s1)
    bne  t0, s2, 4b
    fence
    # the writes of both harts are complete
    csrr t0, 0xe12                 # hgeip
    andi t0, t0, 2
    beqz t0, fail
    csrr t0, mip
    srli t0, t0, 12                # SGEIP
    andi t0, t0, 1
    add  s4, s4, t0
    xori t0, t0, 1
    add  s3, s3, t0
    li   t0, ROUNDS
    bne  s2, t0, round
    la   a0, lost
    call text
    mv   a0, s3
    call number
    la   a0, of
    call text
    mv   a0, s2
    call number
    la   a0, end
    call text
    li   t0, TEST
    li   t1, 0x5555
    sw   t1, 0(t0)
5:  j    5b
    .align 2
1:  csrr t0, mhartid
    bnez t0, 5b
fail:
    la   a0, failed
    call text
    csrr a0, mcause
    call number
    la   a0, end
    call text
    li   t0, TEST
    li   t1, 0x5555
    sw   t1, 0(t0)
    j    5b

sender:
    li   s2, 0
7:  addi s2, s2, 1
8:  ld   t0, 0(s0)
    bne  t0, s2, 8b
    fence
    andi t0, s2, 63
9:  addi t0, t0, -1
    bgez t0, 9b
    li   t0, FILE
    li   t1, 1
    sw   t1, 0(t0)
    fence
    sd   s2, 0(s1)
    j    7b

text:
    lbu  t0, 0(a0)
    beqz t0, 2f
    li   t1, UART
    sb   t0, 0(t1)
    addi a0, a0, 1
    j    text
2:  ret

number:                            # decimal, a0
    la   t3, digits_end
    li   t4, 10
3:  remu t0, a0, t4
    divu a0, a0, t4
    addi t0, t0, '0'
    addi t3, t3, -1
    sb   t0, 0(t3)
    bnez a0, 3b
    mv   a0, t3
    j    text

    .data
    .align 3
go:   .dword 0
done: .dword 0
      .space 24
digits_end: .byte 0
lost: .asciz "lost "
of:   .asciz " of "
end:  .asciz "\n"
failed: .asciz "failed "
ASM
run() { # ROUNDS OPTIONS...
    riscv64-linux-gnu-gcc -nostdlib -nostartfiles -static -march=rv64gc_zicsr -mno-relax -Wa,--defsym,ROUNDS="$1" \
        -Wl,-Ttext=0x80000000,--build-id=none -o "$folder/race" "$folder/race.S"
    timeout 300 "$qemu" -M virt,aia=aplic-imsic,aia-guests=1 -cpu rv64 -smp 2 -m 64M -bios none -kernel "$folder/race" \
        -display none -serial stdio -monitor none "${@:2}"
}
run 100000 | tee "$folder/seen"
grep -q '^lost [1-9][0-9]* of 100000' "$folder/seen"
# The harts take turns then, so there are fewer rounds.
run 100 -accel tcg,thread=single | tee "$folder/seen"
grep -q '^lost 0 of 100' "$folder/seen"
echo "as described"
