//! Page tables built by hand, valid and invalid ones.

use proptest::prelude::*;

use super::super::testing::RAM;
use super::super::walk::{WalkError, translate};
use crate::memory::GuestRam;

const SV39: u64 = 8 << 60;
const SV48: u64 = 9 << 60;
const SV57: u64 = 10 << 60;

const TABLE: u64 = 1;
const LEAF: u64 = 0xcf;

/// The address of the `n`th page of RAM.
fn page(n: u64) -> u64 {
    RAM.base + n * 4096
}

fn entry(addr: u64, bits: u64) -> u64 {
    addr >> 12 << 10 | bits
}

/// RAM in which entry `index` of the table on page `table` is `value`.
fn tables(entries: &[(u64, u64, u64)]) -> GuestRam {
    let ram = GuestRam::new(RAM, false).unwrap();
    for (table, index, value) in entries {
        ram.write(page(*table) + index * 8, &value.to_le_bytes()).unwrap();
    }
    ram
}

fn satp(mode: u64) -> u64 {
    mode | 0xffff << 44 | page(0) >> 12
}

#[test]
fn bare_mode_is_the_identity() {
    let ram = tables(&[]);
    for va in [0, page(0), u64::MAX] {
        assert_eq!(translate(&ram, 0, va), Ok(va));
    }
}

#[test]
fn every_mode_walks_its_levels() {
    let down = |table| (table, 0, entry(page(table + 1), TABLE));
    let ram = tables(&[down(0), down(1), (2, 3, entry(0x1234_5000, LEAF))]);
    assert_eq!(translate(&ram, satp(SV39), 0x3abc), Ok(0x1234_5abc));
    let ram = tables(&[down(0), down(1), down(2), (3, 3, entry(0x1234_5000, LEAF))]);
    assert_eq!(translate(&ram, satp(SV48), 0x3abc), Ok(0x1234_5abc));
    let ram = tables(&[down(0), down(1), down(2), down(3), (4, 3, entry(0x1234_5000, LEAF))]);
    assert_eq!(translate(&ram, satp(SV57), 0x3abc), Ok(0x1234_5abc));
}

#[test]
fn the_upper_half_is_reached_by_sign_extension() {
    let down = |from, index, to| (from, index, entry(page(to), TABLE));
    let ram = tables(&[down(0, 511, 1), down(1, 511, 2), (2, 511, entry(page(9), LEAF))]);
    assert_eq!(translate(&ram, satp(SV39), u64::MAX), Ok(page(9) + 0xfff));
}

#[test]
fn an_address_that_is_not_canonical_faults() {
    let all = (0..512).map(|index| (0, index, entry(0, LEAF))).collect::<Vec<_>>();
    let ram = tables(&all);
    for (mode, bits) in [(SV39, 39), (SV48, 48), (SV57, 57)] {
        for va in [1_u64 << (bits - 1), 1 << bits, 1 << 63, !0 << bits, u64::MAX >> 1] {
            assert_eq!(translate(&ram, satp(mode), va), Err(WalkError::Page), "{mode:#x} {va:#x}");
        }
        assert!(translate(&ram, satp(mode), (1 << (bits - 1)) - 1).is_ok());
        assert!(translate(&ram, satp(mode), !0 << (bits - 1)).is_ok());
    }
}

#[test]
fn superpages_keep_the_lower_bits_of_the_address() {
    let ram = tables(&[
        (0, 2, entry(0x40_0000_0000, LEAF)),
        (0, 1, entry(page(1), TABLE)),
        (1, 5, entry(0x1_2340_0000, LEAF)),
    ]);
    assert_eq!(translate(&ram, satp(SV39), 0x8123_4567), Ok(0x40_0123_4567));
    assert_eq!(translate(&ram, satp(SV39), 0x40a1_2345), Ok(0x1_2341_2345));
}

#[test]
fn a_misaligned_superpage_faults() {
    let ram = tables(&[(0, 2, entry(0x8000_1000, LEAF))]);
    assert_eq!(translate(&ram, satp(SV39), 0x8123_4567), Err(WalkError::Page));
}

#[test]
fn a_napot_page_takes_four_bits_from_the_address() {
    let leaf = 1 << 63 | entry(0x1234_8000, LEAF);
    let bad = 1 << 63 | entry(0x1234_4000, LEAF);
    let down = |from, index, to| (from, index, entry(page(to), TABLE));
    let ram = tables(&[down(0, 0, 1), down(1, 0, 2), (2, 0x1d, leaf), (2, 0x2d, bad)]);
    assert_eq!(translate(&ram, satp(SV39), 0x1_dabc), Ok(0x1234_dabc));
    assert_eq!(translate(&ram, satp(SV39), 0x2_dabc), Err(WalkError::Page));
    let ram = tables(&[(0, 0, 1 << 63 | entry(0, LEAF))]);
    assert_eq!(translate(&ram, satp(SV39), 0), Err(WalkError::Page), "no NAPOT superpages");
}

#[test]
fn memory_types_and_software_bits_do_not_matter() {
    let bits = 3 << 61 | 3 << 59 | 3 << 8;
    let down = |from, index, to| (from, index, entry(page(to), TABLE));
    let ram = tables(&[down(0, 0, 1), down(1, 0, 2), (2, 0, bits | entry(0x5000, LEAF))]);
    assert_eq!(translate(&ram, satp(SV39), 0x123), Ok(0x5123));
}

#[test]
fn invalid_and_reserved_entries_fault() {
    for bad in [0, LEAF & !1, 0b101, !1, !0 << 10] {
        let ram = tables(&[(0, 0, bad)]);
        assert_eq!(translate(&ram, satp(SV39), 0), Err(WalkError::Page), "{bad:#x}");
    }
}

#[test]
fn a_table_that_points_to_itself_ends() {
    for mode in [SV39, SV48, SV57] {
        let ram = tables(&[(0, 0, entry(page(0), TABLE))]);
        assert_eq!(translate(&ram, satp(mode), 0x123), Err(WalkError::Page));
    }
}

#[test]
fn a_table_outside_ram_is_an_access_fault() {
    for root in [0, 0x1000_0000, RAM.base + RAM.size, ((1 << 44) - 1) << 12] {
        let ram = tables(&[(0, 0, entry(root, TABLE))]);
        assert_eq!(translate(&ram, SV39 | root >> 12, 0), Err(WalkError::Access), "{root:#x}");
        assert_eq!(translate(&ram, satp(SV39), 0), Err(WalkError::Access), "{root:#x}");
    }
}

#[test]
fn reserved_modes_fault() {
    for mode in [1, 2, 7, 11, 15] {
        assert_eq!(translate(&tables(&[]), satp(mode << 60), 0), Err(WalkError::Page));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_guest_writes_the_walk_ends(
        mode in 0_u64..16,
        vas in proptest::collection::vec(any::<u64>(), 32),
        entries in proptest::collection::vec((0_u64..4, 0_u64..512, any::<u64>(), 0_u64..4), 256),
    ) {
        let entries: Vec<_> = entries
            .into_iter()
            .map(|(table, index, bits, to)| {
                let is_valid = bits % 3 == 0;
                (table, index, if is_valid { entry(page(to), bits & 0x3ff | 1) } else { bits })
            })
            .collect();
        let ram = tables(&entries);
        for va in vas {
            let _ = translate(&ram, satp(mode << 60), va & 0x1f_ffff);
            let _ = translate(&ram, satp(mode << 60), va);
            let _ = translate(&ram, va, va);
        }
    }
}
