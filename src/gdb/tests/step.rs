//! The addresses that instructions next_of to; the encodings are the GNU assembler's.

use proptest::prelude::*;

use super::*;

const PC: u64 = 0x8000_1000;
const A0: usize = 10;
const A1: usize = 11;

fn frame() -> Frame {
    let mut frame = Frame {
        pc: PC,
        mode: SUPERVISOR,
        sepc: 0x5000,
        stvec: 0x6001,
        satp: 0xf0,
        ..Frame::default()
    };
    frame.x[A0] = 0x1_0001;
    frame.x[A1] = 0xffff_ffff_ffff_fff0;
    frame
}

/// The code `words` from the program counter on; compressed instructions take 16 bits.
fn code(words: &[u32]) -> impl Fn(u64) -> Option<u16> {
    let mut halves = Vec::new();
    for word in words {
        halves.push((word & 0xffff) as u16);
        if word & 3 == 3 {
            halves.push((word >> 16) as u16);
        }
    }
    move |va| halves.get(usize::try_from(va.wrapping_sub(PC) / 2).ok()?).copied()
}

fn next_of(frame: &Frame, words: &[u32]) -> Next {
    next(frame, &code(words)).unwrap()
}

/// Checks that the only target is `distance` from the program counter.
#[track_caller]
fn check(word: u32, distance: i64) {
    let next = next_of(&frame(), &[word]);
    assert_eq!(next.places, [PC.wrapping_add_signed(distance)], "{word:#x}");
    assert!(!next.is_wfi && !next.needs_interrupts && next.satp.is_none(), "{word:#x}");
}

#[test]
fn branches_are_evaluated() {
    // a0 is small and positive, a1 negative, or huge if unsigned.
    check(0x7eb5_0f63, 4); // beq a0,a1,.+0x7fe
    check(0x80b5_10e3, -0x800); // bne a0,a1,.-0x800
    check(0x00b5_4863, 4); // blt a0,a1,.+16
    check(0x00b5_5863, 16); // bge a0,a1,.+16
    check(0x00b5_6863, 16); // bltu a0,a1,.+16
    check(0xfeb5_7fe3, 4); // bgeu a0,a1,.-2
    let mut equal = frame();
    equal.x[A1] = equal.x[A0];
    for (word, distance) in [
        (0x7eb5_0fe3, 0xffe),   // beq a0,a1,.+0xffe
        (0x80b5_0063, -0x1000), // beq a0,a1,.-0x1000
        (0x80b5_10e3, 4),       // bne a0,a1,.-0x800
        (0xfeb5_7fe3, -2),      // bgeu a0,a1,.-2
    ] {
        let place = PC.wrapping_add_signed(distance);
        assert_eq!(next_of(&equal, &[word]).places, [place], "{word:#x}");
    }
}

#[test]
fn jumps_lead_to_their_targets() {
    check(0x7fff_f0ef, 0xf_fffe); // jal ra,.+0xffffe
    check(0x8000_006f, -0x10_0000); // j .-0x100000
    check(0x0010_006f, 0x800); // j .+0x800
    check(0xffff_f06f, -2); // j .-2
    check(0xaffd, 2046); // c.j .+2046
    check(0xb001, -2048); // c.j .-2048
    check(0xbffd, -2); // c.j .-2
    let to = |word| next_of(&frame(), &[word]).places;
    assert_eq!(to(0x8005_00e7), [0x1_0001 - 0x801]); // jalr ra,-2048(a0), without its lowest bit
    assert_eq!(to(0x7ff5_8067), [0x7ee]); // jr 2047(a1), which wraps
    assert_eq!(to(0x8502), [0x1_0000]); // c.jr a0
    assert_eq!(to(0x9582), [0xffff_ffff_ffff_fff0]); // c.jalr a1
}

#[test]
fn compressed_branches_are_evaluated() {
    check(0xcd7d, 2); // c.beqz a0,.+254
    check(0xf101, -256); // c.bnez a0,.-256
    check(0xdc7d, -2); // c.beqz s0,.-2, and s0 is zero
}

#[test]
fn everything_else_leads_to_the_next_instruction() {
    for word in [0x0015_0513, 0x0000_100f, 0x18c5_a52f, 0x00c5_a52f, 0x3020_0073, 0x1415_1073] {
        check(word, 4); // addi, fence.i, sc.w, amoadd.w, mret (which traps), csrw sepc
    }
    for word in [0x9002, 0x0001, 0x852e, 0x952e, 0x4188, 0x0505] {
        check(word, 2); // c.ebreak, c.nop, c.mv, c.add, c.lw, c.addi
    }
}

#[test]
fn a_return_from_a_trap_leads_to_sepc_but_not_in_user_mode() {
    assert_eq!(next_of(&frame(), &[0x1020_0073]).places, [0x5000]);
    let user = Frame { mode: 0, ..frame() };
    assert_eq!(next_of(&user, &[0x1020_0073]).places, [PC + 4]);
}

#[test]
fn instructions_that_depend_on_interrupts_keep_them_enabled() {
    assert!(next_of(&frame(), &[0x1050_0073]).is_wfi); // wfi
    for (word, needs) in [
        (0x0000_0073, true),  // ecall
        (0x1040_2573, true),  // csrr a0,sie
        (0x1041_6073, true),  // csrsi sie,2
        (0x0010_0073, false), // ebreak
        (0x1415_1073, false), // csrw sepc,a0
    ] {
        assert_eq!(next_of(&frame(), &[word]).needs_interrupts, needs, "{word:#x}");
    }
}

#[test]
fn a_write_to_satp_is_known_beforehand() {
    for (word, satp) in [
        (0x1805_1073, 0x1_0001), // csrw satp,a0
        (0x1805_2073, 0x1_00f1), // csrs satp,a0
        (0x1805_3073, 0xf0),     // csrc satp,a0
        (0x1802_d073, 5),        // csrwi satp,5
    ] {
        assert_eq!(next_of(&frame(), &[word]).satp, Some(satp), "{word:#x}");
    }
}

const LR: u32 = 0x1005_a52f; // lr.w a0,(a1)
const SC: u32 = 0x18c5_a52f; // sc.w a0,a2,(a1)
const ADD: u32 = 0x0015_0513; // addi a0,a0,1
const BNE: u32 = 0x00b5_1863; // bne a0,a1,.+16

#[test]
fn a_sequence_from_lr_to_sc_is_one_step() {
    let places = |words: &[u32]| next_of(&frame(), words).places;
    assert_eq!(places(&[LR, ADD, SC]), [PC + 12]);
    assert_eq!(places(&[LR, 0x0505, SC, ADD]), [PC + 10]);
    // Branches out of the sequence are targets as well as the end; those within it are not.
    assert_eq!(places(&[LR, BNE, ADD, SC]), [PC + 20, PC + 16]);
    assert_eq!(places(&[LR, BNE, ADD, ADD, ADD, SC]), [PC + 24]);
    // Back to its start.
    assert_eq!(places(&[LR, 0xfeb5_1ee3, SC]), [PC, PC + 12]); // bne a0,a1,.-4
}

#[test]
fn lr_without_a_constrained_sequence_is_one_instruction() {
    for words in [
        &[LR, ADD][..],
        &[LR, 0x0000_006f, SC],
        &[LR, LR, SC],
        &[LR, 0x8082, SC],
        &[LR, 0xa001, SC],
        &[LR, 0x0000_0073, SC],
        &[&[LR][..], &[ADD; 16], &[SC]].concat(),
    ] {
        assert_eq!(next_of(&frame(), words).places, [PC + 4], "{words:x?}");
    }
}

#[test]
fn code_that_cannot_be_read_leads_nowhere() {
    assert_eq!(next(&frame(), &|_| None), None);
    // Half an instruction.
    let half = |va: u64| (va == PC).then_some(0x0513);
    assert_eq!(next(&frame(), &half), None);
}

proptest! {
    #[test]
    fn any_instruction_anywhere_leads_somewhere(words: [u32; 4], pc: u64, x: [u64; 32], mode in 0_u64..2) {
        let frame = Frame { pc: pc & !1, x, mode, ..frame() };
        let base = frame.pc;
        let fetch = |va: u64| {
            let at = usize::try_from(va.wrapping_sub(base) / 2).ok()?;
            let word = words.get(at / 2)?;
            u16::try_from(if at % 2 == 0 { word & 0xffff } else { word >> 16 }).ok()
        };
        let next = next(&frame, &fetch).unwrap();
        prop_assert!(!next.places.is_empty() && next.places.len() <= 17);
    }
}
