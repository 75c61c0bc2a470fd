//! Kernel files: those that boot, and the error messages for the others.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod samples;
#[allow(dead_code, unreachable_pub, reason = "one line of two")]
#[path = "../../devices/src/testing/skip.rs"]
mod skip;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use rvmm_boot::compressed::Compression;
use rvmm_boot::kernel::Format;
use rvmm_boot::{BootError, Kernel, Segment, Source};
use samples::{Folder, Load, MIB2, RAM, Work, efi_image, elf, gzip, image, u_boot, zstd};
use skip::skip;

/// Guest memory in most tests.
const LIMIT: u64 = 64 << 20;

const RISCV64: u16 = 0x5064;

/// The error for a file, without its name; checks that it comes quickly and has one line.
fn refusal_at(path: &Path) -> String {
    let work = Work::begin();
    let error = Kernel::open(path, LIMIT).unwrap_err().to_string();
    assert!(work.is_little(), "{work:?}");
    assert!(!error.contains('\n'), "{error}");
    let rest = error.strip_prefix(&format!("Cannot use {} as a kernel: ", path.display()));
    rest.unwrap_or_else(|| panic!("{error}")).to_string()
}

/// The error for a file of these bytes.
fn refusal(bytes: &[u8]) -> String {
    let folder = Folder::new();
    refusal_at(&folder.write("kernel", bytes))
}

fn open(bytes: &[u8]) -> Kernel {
    let folder = Folder::new();
    Kernel::open(&folder.write("kernel", bytes), LIMIT).unwrap()
}

/// The contents of a segment.
fn contents(segment: &Segment) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(segment.source.len()).unwrap()];
    segment.source.read_exact_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn an_image_is_one_segment_with_room_for_its_bss() {
    let bytes = image(MIB2, 3 << 20, 10_000);
    let kernel = open(&bytes);
    let format = Format::Image { text_offset: MIB2, image_size: 3 << 20 };
    assert_eq!((kernel.format(), kernel.compression()), (format, None));
    let [segment] = kernel.segments() else { panic!("not one segment") };
    assert_eq!((segment.address, segment.mem_len), (MIB2, 3 << 20));
    assert!(matches!(segment.source, Source::File { offset: 0, len: 10_064, .. }), "can be mapped");
    assert_eq!(contents(segment), bytes);
}

#[test]
fn an_image_without_a_size_takes_the_memory_of_its_file() {
    assert_eq!(open(&image(0, 0, 10_000)).segments()[0].mem_len, 10_064);
    assert_eq!(open(&image(MIB2, 100, 10_000)).segments()[0].mem_len, 10_064, "too small");
}

#[test]
fn an_image_in_gzip_or_zstd_is_unpacked() {
    let bytes = efi_image(RISCV64, 300_064, 300_000);
    for (packed, how) in [(gzip(&bytes), Compression::Gzip), (zstd(&bytes), Compression::Zstd)] {
        let kernel = open(&packed);
        assert_eq!(kernel.compression(), Some(how));
        let [segment] = kernel.segments() else { panic!("not one segment") };
        assert_eq!((segment.address, segment.mem_len), (MIB2, 4 * MIB2));
        assert!(contents(segment) == bytes, "{how} changed the contents");
        assert!(kernel.to_string().ends_with(&format!("(Image inside {how})")));
    }
}

#[test]
fn what_follows_a_compressed_image_is_left_out_and_counted() {
    let bytes = image(MIB2, 1 << 20, 5000);
    for pack in [gzip, zstd] {
        for (tail, left_out) in
            [(&b"\x12\x34\x56\x78 and more"[..], 13), (&[0; 5000], 0), (b"\x1f", 1), (b"", 0)]
        {
            let kernel = open(&[pack(&bytes).as_slice(), tail].concat());
            assert_eq!(contents(&kernel.segments()[0]), bytes);
            assert_eq!(kernel.left_out(), left_out, "{tail:?}");
        }
    }
}

/// Both kinds of image, compressed by `pack` in pieces of 64 KiB with `between` before and after each.
fn in_pieces(pack: fn(&[u8]) -> Vec<u8>, between: &[u8]) -> [(Vec<u8>, Vec<u8>); 2] {
    [image(MIB2, 8 << 20, 300_000), efi_image(RISCV64, 300_064, 300_000)].map(|bytes| {
        let pieces = bytes.chunks(1 << 16).flat_map(|piece| [pack(piece), between.to_vec()]);
        let packed = [between.to_vec()].into_iter().chain(pieces).flatten().collect();
        (bytes, packed)
    })
}

#[test]
fn a_gzip_file_of_several_members_is_unpacked_whole() {
    for (bytes, packed) in in_pieces(gzip, b"").into_iter().chain(in_pieces(gzip, &gzip(b""))) {
        let kernel = open(&packed);
        assert!(contents(&kernel.segments()[0]) == bytes, "not as gzip -dc does");
        assert_eq!((kernel.compression(), kernel.left_out()), (Some(Compression::Gzip), 0));
    }
}

/// A skippable frame of these many bytes (RFC 8878, section 3.1.2).
fn skippable(kind: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0x50 + kind, 0x2a, 0x4d, 0x18];
    frame.extend((len as u32).to_le_bytes());
    frame.resize(8 + len, 0xee);
    frame
}

#[test]
fn a_zstd_file_of_several_frames_is_unpacked_whole_and_skippable_ones_are_stepped_over() {
    // pzstd writes a skippable frame of four bytes before each other one.
    let between = [skippable(0, 4), skippable(15, 100_000), skippable(7, 0), zstd(b"")].concat();
    for (bytes, packed) in in_pieces(zstd, b"").into_iter().chain(in_pieces(zstd, &between)) {
        let kernel = open(&packed);
        assert!(contents(&kernel.segments()[0]) == bytes, "not as zstd -dc does");
        assert_eq!((kernel.compression(), kernel.left_out()), (Some(Compression::Zstd), 0));
    }
    let nothing = "it is a zstd file without an Image inside; what is inside: it is empty";
    assert!(refusal(&skippable(3, 9)).starts_with(nothing));
}

#[test]
fn damage_in_a_later_member_or_frame_is_found() {
    let bytes = image(MIB2, 1 << 20, 100_000);
    let (head, tail) = bytes.split_at(50_000);
    // Checksums are at the end of a frame, and before the length at the end of a member.
    for (pack, sum) in [(gzip as fn(&[u8]) -> Vec<u8>, 6), (zstd, 2)] {
        let (first, second) = (pack(head), pack(tail));
        let cut = second.len() / 2;
        unpack_error(&[first.as_slice(), &second[..cut]].concat());
        let mut wrong = second.clone();
        let at = wrong.len() - sum;
        wrong[at] ^= 1;
        unpack_error(&[first, wrong].concat());
    }
    let endless = [zstd(&bytes), skippable(0, 50)].concat();
    unpack_error(&endless[..endless.len() - 1]);
    unpack_error(&endless[..endless.len() - 52]);
}

#[test]
fn the_largest_default_window_of_zstd_is_accepted() {
    let bytes = image(MIB2, 0, 50_000);
    // No content size, no checksum, a window of 128 MiB, as `zstd --ultra -22` writes for a pipe. One raw block.
    let mut packed = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3];
    packed.extend(&((bytes.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    packed.extend(&bytes);
    assert_eq!(contents(&open(&packed).segments()[0]), bytes);
    packed[5] = 18 << 3;
    unpack_error(&packed);
}

#[test]
fn an_elf_file_is_loaded_by_its_physical_addresses() {
    let loads = [Load(RAM + 0x10_0000, 0x2000, 0, 0x8000), Load(RAM, 0x1000, 0x800, 0x1000)];
    let kernel = open(&elf(RAM, &loads, 0x3000));
    assert_eq!(kernel.format(), Format::Elf { entry: Some(RAM), e_entry: RAM });
    let shape: Vec<(u64, u64, u64)> =
        kernel.segments().iter().map(|s| (s.address, s.source.len(), s.mem_len)).collect();
    assert_eq!(shape, [(RAM, 0x800, 0x1000), (RAM + 0x10_0000, 0, 0x8000)], "sorted");
    assert_eq!(contents(&kernel.segments()[0]), [0x5a; 0x800]);
}

/// The entry point of an ELF file with these segments.
fn entry(e_entry: u64, loads: &[Load], change: impl FnOnce(&mut Vec<u8>)) -> Option<u64> {
    let mut bytes = elf(e_entry, loads, 0x3000);
    change(&mut bytes);
    let Format::Elf { entry, e_entry: named } = open(&bytes).format() else {
        panic!("no ELF file")
    };
    assert_eq!(named, e_entry);
    entry
}

/// Writes `value` to p_flags of the program header with this index.
fn set_flags(bytes: &mut [u8], index: usize, value: u32) {
    let at = 64 + 56 * index + 4;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn set_vaddr(bytes: &mut [u8], index: usize, value: u64) {
    let at = 64 + 56 * index + 16;
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn an_elf_file_starts_at_its_lowest_load_address_whatever_it_names() {
    let loads = [Load(RAM + 0x10_0000, 0x2000, 0x100, 0x100), Load(RAM, 0x1000, 0x800, 0x1000)];
    let virtual_base = 0xffff_ffc0_0000_0000_u64;
    for e_entry in [0, RAM, RAM + 4, RAM + 0x10_0000, RAM + 0xfff, virtual_base + 0x10, u64::MAX] {
        let high_half = |bytes: &mut Vec<u8>| {
            set_vaddr(bytes, 0, virtual_base + 0x10_0000);
            set_vaddr(bytes, 1, virtual_base);
        };
        assert_eq!(entry(e_entry, &loads, |_| ()), Some(RAM), "{e_entry:#x}");
        assert_eq!(entry(e_entry, &loads, high_half), Some(RAM), "{e_entry:#x}, virtual");
    }
}

#[test]
fn an_elf_file_without_code_at_its_lowest_address_starts_at_its_entry() {
    let loads = [Load(RAM, 0x1000, 0x800, 0x800), Load(RAM + 0x1000, 0x2000, 0x800, 0x800)];
    let only_data = |bytes: &mut Vec<u8>| set_flags(bytes, 0, 4);
    assert_eq!(entry(RAM + 0x1010, &loads, only_data), Some(RAM + 0x1010));
    assert_eq!(entry(0, &loads, only_data), Some(RAM), "there is no other address");
    let virtual_code = |bytes: &mut Vec<u8>| {
        set_flags(bytes, 0, 4);
        set_vaddr(bytes, 1, 0xffff_ffc0_8020_0000);
    };
    assert_eq!(entry(0xffff_ffc0_8020_0010, &loads, virtual_code), Some(RAM + 0x1010));
    let zeros = [Load(RAM, 0x1000, 0, 0x800), loads[1]];
    assert_eq!(entry(RAM + 0x1010, &zeros, |_| ()), Some(RAM + 0x1010));
    assert_eq!(entry(0, &zeros, |_| ()), None, "neither is usable");
}

#[test]
fn a_boot_loader_in_an_elf_file_is_taken() {
    let at = RAM + MIB2;
    assert_eq!(open(&u_boot()).format(), Format::Elf { entry: Some(at), e_entry: at });
}

#[test]
fn files_that_cannot_be_opened_are_named_with_their_cause() {
    let error = Kernel::open(Path::new("/nowhere/Image"), LIMIT).unwrap_err();
    assert_eq!(error.to_string(), "Cannot open /nowhere/Image");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "No such file or directory (os error 2)");
    let error = Kernel::open(Path::new("/nowhere/a\n\u{1b}[2J"), LIMIT).unwrap_err();
    assert_eq!(error.to_string(), "Cannot open /nowhere/a\\n\\u{1b}[2J");
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let folder = Folder::new();
    assert_eq!(refusal_at(&folder.path("")), "it is a folder (give a regular file)");
    let fifo = folder.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert_eq!(refusal_at(&fifo), "it is a FIFO (give a regular file)");
    let _listener = UnixListener::bind(folder.path("socket")).unwrap();
    assert_eq!(refusal_at(&folder.path("socket")), "it is a socket (give a regular file)");
    assert_eq!(refusal_at(Path::new("/dev/zero")), "it is a device (give a regular file)");
    assert_eq!(refusal_at(Path::new("/proc/self/mem")), "it is empty (give a RISC-V Image)");
}

#[test]
fn empty_and_short_and_blank_files_are_refused() {
    assert_eq!(refusal(b""), "it is empty (give a RISC-V Image)");
    assert_eq!(refusal(b"M"), "it is 1 bytes long, too short for a kernel (copy it again)");
    assert_eq!(
        refusal(&image(MIB2, 0, 0)[..0x38]),
        "it is 56 bytes long, too short for a kernel (copy it again)"
    );
    assert_eq!(refusal(&[0; 5000]), "it begins with nothing but zeros (copy it again)");
    let folder = Folder::new();
    let sparse = folder.sparse("nothing", b"", 100 << 30);
    assert_eq!(refusal_at(&sparse), "it begins with nothing but zeros (copy it again)");
}

#[test]
fn a_file_without_any_magic_is_refused_with_a_hint_at_flat_binaries() {
    assert_eq!(
        refusal(&[0x13; 5000]),
        "it has no kernel's magic (give a RISC-V Image, \
         or place a flat binary with --load FILE@ADDR --entry ADDR)"
    );
}

/// A blank file with `magic` at `at`.
fn with_magic(at: usize, magic: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 0x9000];
    bytes[at..at + magic.len()].copy_from_slice(magic);
    bytes
}

#[test]
fn kernels_for_other_machines_are_refused_by_name() {
    let advice = "(give an Image built for riscv64)";
    let mut bzimage = with_magic(0x202, b"HdrS");
    bzimage[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
    assert_eq!(refusal(&bzimage), format!("it is an x86 bzImage {advice}"));
    let mut with_stub = efi_image(0x8664, 2000, 2000);
    with_stub[0x38..0x3c].fill(0);
    with_stub[0x202..0x206].copy_from_slice(b"HdrS");
    assert_eq!(refusal(&with_stub), format!("it is an x86 bzImage {advice}"));
    assert_eq!(refusal(&with_magic(0x38, b"ARM\x64")), format!("it is an arm64 Image {advice}"));
    let mut arm = efi_image(0xaa64, 2000, 2000);
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert_eq!(refusal(&arm), format!("it is an arm64 Image {advice}"));
    assert_eq!(
        refusal(&efi_image(0x5032, 2000, 2000)),
        format!("it is a 32-bit RISC-V kernel {advice}")
    );
}

#[test]
fn efi_programs_without_the_kernel_header_are_refused_by_machine() {
    let machines =
        [(RISCV64, "riscv64"), (0x8664, "x86-64"), (0xaa64, "arm64"), (0x6264, "LoongArch")];
    for (number, machine) in machines {
        let mut program = efi_image(number, 2000, 2000);
        program[0x38..0x3c].fill(0);
        assert_eq!(
            refusal(&program),
            format!("it is an EFI program for {machine} (give the RISC-V Image of a kernel)")
        );
    }
}

#[test]
fn an_efi_zboot_image_is_refused_with_the_way_to_its_kernel() {
    let mut zboot = efi_image(RISCV64, 5000, 5000);
    zboot[4..8].copy_from_slice(b"zimg");
    zboot[8..12].copy_from_slice(&4096_u32.to_le_bytes());
    zboot[12..16].copy_from_slice(&999_u32.to_le_bytes());
    zboot[24..28].copy_from_slice(b"gzip");
    zboot[28..40].fill(0);
    zboot[0x38..0x3c].copy_from_slice(&[0xcd, 0x23, 0x82, 0x81]);
    assert_eq!(
        refusal(&zboot),
        "it is an EFI zboot image, which needs EFI firmware \
         (take the Image out of it: tail -c +4097 FILE | head -c 999 | gzip -dc > Image)"
    );
}

#[test]
fn files_packed_in_another_way_are_refused_by_name() {
    let magics: [(&[u8], &str); 5] = [
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh9", "bzip2"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x5d\0\0\x80\0", "lzma"),
    ];
    for (magic, name) in magics {
        assert_eq!(
            refusal(&with_magic(0, magic)),
            format!(
                "it is a file compressed with {name} (unpack it first, or pack it with gzip or zstd)"
            )
        );
    }
}

#[test]
fn files_for_other_flags_and_other_programs_are_refused_by_name() {
    let magics: [(usize, &[u8], &str); 12] = [
        (0, b"QFI\xfb\0\0\0\x03", "it is a qcow2 disk image (take the kernel out of it"),
        (0x8001, b"CD001", "it is an ISO 9660 image (CD or DVD) (take the kernel out"),
        (0x200, b"EFI PART", "it is a disk image with a GPT (take the kernel out of it"),
        (0x438, b"\x53\xef", "it is an ext2, ext3 or ext4 file system (take the kernel"),
        (0x1fe, b"\x55\xaa", "it is a disk image with a boot sector (take the kernel"),
        (0, b"070701", "it is an initramfs (give it with --initrd)"),
        (0, b"\xd0\x0d\xfe\xed", "it is a device tree or a U-Boot FIT image (give the"),
        (0, b"\x27\x05\x19\x56", "it is a U-Boot uImage (take the Image out of it"),
        (0, b"!<arch>\n", "it is a Debian package or a library (unpack it"),
        (257, b"ustar", "it is a tar archive (unpack it"),
        (0, b"#!/bin/sh\n", "it is a script (give a kernel file)"),
        (0, b"<!DOCTYPE html>", "it is a web page (was it a download that failed?)"),
    ];
    for (at, magic, what) in magics {
        let refusal = refusal(&with_magic(at, magic));
        assert!(refusal.starts_with(what), "{refusal}");
    }
}

#[test]
fn an_invalid_image_header_is_refused() {
    let damaged = "the file is damaged: copy or build it again)";
    for offset in [1, 4096, MIB2 + 1, 1 << 40, u64::MAX] {
        assert_eq!(
            refusal(&image(offset, 0, 100)),
            format!(
                "its header asks for the load offset {offset:#x}, \
                 which is not a multiple of 2 MiB below 1 TiB ({damaged}"
            )
        );
    }
    for size in [1 << 40, u64::MAX] {
        assert_eq!(
            refusal(&image(MIB2, size, 100)),
            format!("its header claims {size:#x} bytes of memory ({damaged}")
        );
    }
    let mut big_endian = image(MIB2, 0, 100);
    big_endian[0x18] = 1;
    assert_eq!(refusal(&big_endian), "it is a big-endian RISC-V kernel (give a little-endian one)");
}

#[test]
fn an_image_that_is_cut_short_is_refused() {
    let bytes = efi_image(RISCV64, 300_064, 300_000);
    let expected = "it is cut short: 200000 of at least 300064 bytes (copy or build it again)";
    assert_eq!(refusal(&bytes[..200_000]), expected);
    assert_eq!(refusal(&gzip(&bytes[..200_000])), expected);
    assert_eq!(
        refusal(&image(MIB2, 0, 0)[..0x3c]),
        "it is cut short: 60 of at least 64 bytes (copy or build it again)"
    );
}

#[test]
fn compressed_files_without_an_image_are_refused_by_what_is_inside() {
    let inside = |bytes: &[u8]| (refusal(&gzip(bytes)), refusal(&zstd(bytes)));
    let (gz, zst) = inside(&with_magic(0, b"070701"));
    let what = "what is inside: it is an initramfs (give it with --initrd)";
    assert_eq!(gz, format!("it is a gzip file without an Image inside; {what}"));
    assert_eq!(zst, format!("it is a zstd file without an Image inside; {what}"));
    let (gz, zst) = inside(&u_boot());
    assert_eq!(gz, "it is an ELF file inside gzip (unpack it first: gzip -dc FILE > ELF)");
    assert_eq!(zst, "it is an ELF file inside zstd (unpack it first: zstd -dc FILE > ELF)");
    assert!(inside(b"").0.ends_with("what is inside: it is empty (give a RISC-V Image)"));
    assert!(inside(b"").1.ends_with("what is inside: it is empty (give a RISC-V Image)"));
}

#[test]
fn a_kernel_that_unpacks_to_too_much_is_refused() {
    let folder = Folder::new();
    let bytes = image(MIB2, 0, 3 << 20);
    let open = |packed: &[u8]| {
        let path = folder.write("kernel", packed);
        Kernel::open(&path, 2 << 20).unwrap_err().to_string()
    };
    let too_large =
        "as a kernel: it unpacks to more than 2M (give the guest more memory with --mem)";
    assert!(open(&gzip(&bytes)).ends_with(too_large));
    assert!(open(&zstd(&bytes)).ends_with(too_large));
    let lies = image(MIB2, 1 << 20, 3 << 20);
    assert!(open(&gzip(&lies)).ends_with("more than its header says (copy or build it again)"));
    assert!(open(&zstd(&lies)).ends_with("more than its header says (copy or build it again)"));
}

/// The error of a file that starts as a compressed one.
fn unpack_error(packed: &[u8]) -> String {
    let folder = Folder::new();
    let work = Work::begin();
    let error = Kernel::open(&folder.write("kernel", packed), LIMIT).unwrap_err();
    assert!(work.is_little(), "{work:?}");
    assert!(matches!(error, BootError::Unpack { .. }), "{error}");
    error.to_string()
}

#[test]
fn damaged_compressed_files_are_refused() {
    let bytes = image(MIB2, 1 << 20, 100_000);
    for (packed, name) in [(gzip(&bytes), "gzip"), (zstd(&bytes), "zstd")] {
        let error = unpack_error(&packed[..packed.len() / 2]);
        let end = format!("its {name} data is damaged (copy or build the file again)");
        assert!(error.starts_with("Cannot unpack ") && error.ends_with(&end), "{error}");
    }
    let mut packed = gzip(&bytes);
    let checksum = packed.len() - 6;
    packed[checksum] ^= 1;
    unpack_error(&packed);
}

#[test]
fn a_compressed_file_of_many_empty_pieces_is_refused() {
    let folder = Folder::new();
    // In zstd, zeros are empty blocks.
    let holes = folder.sparse("zeros.zst", &zstd(b"")[..6], 60 << 20);
    let work = Work::begin();
    let error = Kernel::open(&holes, LIMIT).unwrap_err();
    assert!(work.is_little(), "{work:?}");
    assert!(matches!(error, BootError::Unpack { .. }), "{error}");
    for empty in [gzip(b""), zstd(b""), skippable(0, 0)] {
        let row = empty.repeat((20 << 20) / empty.len());
        unpack_error(&row);
    }
    for head in [&gzip(b"")[..10], &zstd(b"")[..6]] {
        let huge = folder.sparse("huge", head, 100 << 30);
        assert!(refusal_at(&huge).starts_with("it unpacks to more than 64M"));
    }
}

#[test]
fn elf_files_for_other_machines_are_refused_by_machine() {
    let change = |at: usize, value: u8| {
        let mut bytes = u_boot();
        bytes[at] = value;
        refusal(&bytes)
    };
    let advice = "(give one built for riscv64)";
    assert_eq!(change(18, 62), format!("it is an ELF file for x86-64 {advice}"));
    assert_eq!(change(18, 183), format!("it is an ELF file for arm64 {advice}"));
    assert_eq!(
        change(18, 22),
        format!("it is an ELF file for another machine (number 22) {advice}")
    );
    assert_eq!(change(4, 1), format!("it is an ELF file for 32-bit RISC-V {advice}"));
    let mut big_endian = u_boot();
    big_endian[5] = 2;
    big_endian[18..20].copy_from_slice(&[0, 243]);
    assert_eq!(refusal(&big_endian), format!("it is an ELF file for big-endian RISC-V {advice}"));
    assert!(change(4, 7).starts_with("it is an ELF file of unknown class, byte order or version"));
    assert!(change(6, 7).starts_with("it is an ELF file of unknown class, byte order or version"));
    assert_eq!(change(16, 1), "it is an object file (link it first)");
    assert_eq!(change(16, 4), "it is a core dump (give the program itself)");
    assert!(change(16, 9).starts_with("it is an ELF file that is not a program"));
}

#[test]
fn a_vmlinux_is_refused_with_a_hint_at_the_image() {
    let at = 0xffff_ffff_8000_0000;
    assert_eq!(
        refusal(&elf(at, &[Load(at, 0x1000, 0x800, 0x1000)], 0x3000)),
        "it is a vmlinux linked at the virtual address 0xffffffff80000000, without a load address \
         (give the Image made from it: arch/riscv/boot/Image)"
    );
    let mut unplaced = elf(at, &[Load(0, 0x1000, 0x800, 0x1000)], 0x3000);
    unplaced[64 + 16..64 + 24].copy_from_slice(&u64::to_le_bytes(at));
    assert!(refusal(&unplaced).starts_with("it is a vmlinux linked at the virtual address"));
}

#[test]
fn elf_files_that_lie_are_refused() {
    let loads = |loads: &[Load]| refusal(&elf(RAM, loads, 0x3000));
    let damaged = "(the file is damaged: copy or build it again)";
    assert_eq!(loads(&[]), "it is an ELF file without program headers (link it first)");
    assert_eq!(
        loads(&[Load(RAM, 0, 0, 0)]),
        "it is an ELF file without anything to load (link it first)"
    );
    assert_eq!(
        loads(&[Load(RAM, 0, 0x2000, 0x1000)]),
        format!("it is an ELF file with an impossible segment at 0x80000000..0x80001000 {damaged}")
    );
    let overflow = loads(&[Load(RAM, 0, 0x100, u64::MAX)]);
    assert!(overflow.starts_with("it is an ELF file with an impossible segment at"), "{overflow}");
    for (offset, len) in [(0x2001, 0x1000), (u64::MAX, 0x1000), (0, 0x3001)] {
        assert_eq!(
            loads(&[Load(RAM, offset, len, 0x4000)]),
            "it is an ELF file whose segment at 0x80000000..0x80004000 is past its end \
             (copy or build it again)"
        );
    }
    assert_eq!(
        loads(&[Load(RAM + 0x800, 0, 1, 0x10), Load(RAM, 0, 0x100, 0x1000)]),
        "it is an ELF file whose segments at 0x80000000 and 0x80000800 overlap (link it again)"
    );
}

#[test]
fn elf_headers_that_lie_are_refused() {
    let change = |at: usize, value: &[u8]| {
        let mut bytes = u_boot();
        bytes[at..at + value.len()].copy_from_slice(value);
        refusal(&bytes)
    };
    let past_end = "it is an ELF file whose program headers are past its end";
    assert!(change(32, &u64::MAX.to_le_bytes()).starts_with(past_end));
    assert!(change(32, &0x2fff_u64.to_le_bytes()).starts_with(past_end));
    assert!(change(56, &0xfffe_u16.to_le_bytes()).starts_with(past_end));
    let impossible = "it is an ELF file with impossible program headers";
    assert!(change(56, &0xffff_u16.to_le_bytes()).starts_with(impossible));
    assert!(change(54, &55_u16.to_le_bytes()).starts_with(impossible));
    for len in [4, 15, 16, 40, 63] {
        let refusal = refusal(&u_boot()[..len]);
        assert!(refusal.starts_with("it is an ELF file cut short inside its header"), "{refusal}");
    }
}

#[test]
fn a_file_that_shrinks_after_it_was_opened_is_noticed() {
    let folder = Folder::new();
    let path = folder.write("Image", &image(MIB2, 1 << 20, 10_000));
    let kernel = Kernel::open(&path, LIMIT).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = kernel.segments()[0].source.read_exact_at(0, &mut [0; 5000]).unwrap_err();
    assert!(matches!(error, BootError::Changed { .. }));
}

#[test]
fn the_kernels_of_the_setup_script_open() {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let Some(folder) = cache.or_else(home).map(|cache| cache.join("rvmm/kernels")) else {
        return skip("there is no folder for downloads (set HOME)");
    };
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let images: Vec<_> =
        entries.map(|entry| entry.path().join("Image")).filter(|path| path.is_file()).collect();
    if images.is_empty() {
        skip(&format!("there is no kernel in {} (run scripts/setup)", folder.display()));
    }
    for path in images {
        let kernel = Kernel::open(&path, 1 << 30).unwrap();
        let Format::Image { text_offset: MIB2, image_size } = kernel.format() else {
            panic!("{kernel}: {:?}", kernel.format())
        };
        assert!(image_size > kernel.segments()[0].source.len(), "its BSS is not in the file");
    }
}
