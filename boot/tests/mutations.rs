//! Damaged kernel files of every format: opened or refused, without a panic and within bounded time.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod samples;

use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;
use rvmm_boot::{Kernel, Region, Request, place};
use samples::{Folder, Load, MIB2, RAM, Work, efi_image, elf, gzip, image, zstd};

/// Size of guest memory, and so the maximum size of a decompressed kernel.
const MEM: u64 = 16 << 20;

/// A change to a file: some bytes, some numbers, its length.
#[derive(Clone, Debug)]
struct Damage {
    bytes: Vec<(Index, u8)>,
    numbers: Vec<(Index, u64)>,
    cut: Option<Index>,
}

/// Damage, most of it near the start, where the headers are.
fn damage() -> impl Strategy<Value = Damage> {
    let number = prop_oneof![
        any::<u64>(),
        Just(u64::MAX),
        Just(1 << 63),
        Just(0),
        (0_u32..64).prop_map(|bit| 1 << bit),
        (0_u32..64).prop_map(|bit| u64::MAX >> bit),
    ];
    let bytes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..4);
    let numbers = prop::collection::vec((any::<Index>(), number), 0..3);
    let cut = prop::option::weighted(0.3, any::<Index>());
    (bytes, numbers, cut).prop_map(|(bytes, numbers, cut)| Damage { bytes, numbers, cut })
}

impl Damage {
    fn apply(&self, file: &[u8], header: usize) -> Vec<u8> {
        let mut file = file.to_vec();
        for (at, value) in &self.bytes {
            let at = at.index(file.len());
            file[at] = *value;
        }
        for (at, value) in &self.numbers {
            let at = at.index(header / 4) * 4;
            for (to, from) in file[at..].iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
        if let Some(cut) = &self.cut {
            file.truncate(cut.index(file.len()));
        }
        file
    }
}

/// Opens and places a kernel file; checks the invariants of every result.
fn try_out(file: &[u8]) -> Result<(), TestCaseError> {
    let folder = Folder::new();
    let path = folder.write("kernel", file);
    let work = Work::begin();
    let error = match Kernel::open(&path, MEM) {
        Ok(kernel) => {
            for segment in kernel.segments() {
                prop_assert!(segment.source.len() <= segment.mem_len);
                let mut last = [0];
                if let Some(at) = segment.source.len().checked_sub(1) {
                    segment.source.read_exact_at(at, &mut last).unwrap();
                }
            }
            let ram = [Region::new(RAM, MEM)];
            let (kernel, loads, entry, initrd) = (Some(&kernel), &[][..], None, None);
            place(&Request {
                ram: &ram,
                kernel,
                loads,
                entry,
                initrd,
                fdt_len: 5000,
                fdt_at: None,
                ..Request::default()
            })
            .err()
        }
        Err(error) => Some(error),
    };
    prop_assert!(work.is_little(), "{work:?}");
    if let Some(error) = error {
        let text = error.to_string();
        prop_assert!(!text.contains('\n') && text.starts_with("Cannot "), "{}", text);
    }
    Ok(())
}

/// A compressible body, with long and short matches.
fn body() -> Vec<u8> {
    let mut file = image(MIB2, 1 << 20, 3000);
    for i in 0..3000_u32 {
        file.extend_from_slice(&(i * i / 7).to_le_bytes()[..3]);
        file.extend_from_slice(&b"the quick brown fox jumps over"[..(i % 30) as usize]);
    }
    file
}

static GZIP: LazyLock<Vec<u8>> = LazyLock::new(|| gzip(&body()));
static ZSTD: LazyLock<Vec<u8>> = LazyLock::new(|| zstd(&body()));

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_damaged_image_is_opened_or_refused(damage in damage()) {
        try_out(&damage.apply(&efi_image(0x5064, 2000, 2000), 256))?;
    }

    #[test]
    fn a_damaged_elf_file_is_opened_or_refused(damage in damage()) {
        let loads = [
            Load(RAM, 0x1000, 0x800, 0x1000),
            Load(RAM + 0x1000, 0x1800, 0x800, 0x9000),
            Load(RAM + 0x20_0000, 0, 0, 0x1000),
        ];
        try_out(&damage.apply(&elf(RAM, &loads, 0x2000), 64 + 3 * 56))?;
    }

    #[test]
    fn a_damaged_gzip_file_is_opened_or_refused(damage in damage()) {
        try_out(&damage.apply(&GZIP, 64))?;
    }

    #[test]
    fn a_damaged_zstd_file_is_opened_or_refused(damage in damage()) {
        try_out(&damage.apply(&ZSTD, 64))?;
    }

    #[test]
    fn a_damaged_image_inside_is_opened_or_refused(damage in damage(), in_gzip in any::<bool>()) {
        let inside = damage.apply(&efi_image(0x5064, 2000, 2000), 256);
        try_out(&if in_gzip { gzip(&inside) } else { zstd(&inside) })?;
    }

    #[test]
    fn any_bytes_behind_any_magic_are_opened_or_refused(
        magic in prop::sample::select(vec![
            (0, &b"\x7fELF\x02\x01\x01"[..]), (0, b"\x1f\x8b\x08"), (0, b"\x28\xb5\x2f\xfd"),
            (0x38, b"RSC\x05"), (0, b"MZ"), (0, b"MZ\0\0zimg"), (0x202, b"HdrS"), (0, b""),
        ]),
        mut bytes in prop::collection::vec(any::<u8>(), 0..1200),
    ) {
        for (to, from) in bytes.iter_mut().skip(magic.0).zip(magic.1) {
            *to = *from;
        }
        try_out(&bytes)?;
    }
}
