//! Descriptions of files that cannot boot, with advice.

use crate::source::{le_u16, le_u32};

/// A magic number, the kind of file that has it, and advice for such a file.
struct Magic {
    at: usize,
    bytes: &'static [u8],
    what: &'static str,
    advice: &'static str,
}

const fn magic(at: usize, bytes: &'static [u8], what: &'static str, advice: &'static str) -> Magic {
    Magic { at, bytes, what, advice }
}

const UNPACK: &str = "unpack it first, or pack it with gzip or zstd";
const DISK: &str = "take the kernel out of it: rvmm boots a kernel file, not a disk";
const PACKAGE: &str = "unpack it and give the kernel inside";
const DOWNLOAD: &str = "was it a download that failed?";

/// The first match wins, so the longer and more specific magics come first.
const MAGICS: &[Magic] = &[
    magic(0x202, b"HdrS", "an x86 bzImage", "give an Image built for riscv64"),
    magic(0x38, b"ARM\x64", "an arm64 Image", "give an Image built for riscv64"),
    magic(0, b"\xfd7zXZ\0", "a file compressed with xz", UNPACK),
    magic(0, b"BZh", "a file compressed with bzip2", UNPACK),
    magic(0, b"\x04\x22\x4d\x18", "a file compressed with lz4", UNPACK),
    magic(0, b"\x02\x21\x4c\x18", "a file compressed with lz4", UNPACK),
    magic(0, b"\x89LZO", "a file compressed with lzop", UNPACK),
    magic(0, b"\x5d\0\0", "a file compressed with lzma", UNPACK),
    magic(0, b"\x1f\x8b", "a gzip file of an unknown kind", UNPACK),
    magic(0, b"\x28\xb5\x2f\xfd", "a file compressed with zstd", UNPACK),
    magic(0, b"QFI\xfb", "a qcow2 disk image", DISK),
    magic(0x8001, b"CD001", "an ISO 9660 image (CD or DVD)", DISK),
    magic(0, b"KDMV", "a VMDK disk image", DISK),
    magic(0, b"vhdxfile", "a VHDX disk image", DISK),
    magic(0x200, b"EFI PART", "a disk image with a GPT", DISK),
    magic(0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system", DISK),
    magic(0, b"hsqs", "a squashfs file system", DISK),
    magic(0, b"070701", "an initramfs", "give it with --initrd"),
    magic(
        0,
        b"\xd0\x0d\xfe\xed",
        "a device tree or a U-Boot FIT image",
        "give the kernel inside, or --dtb",
    ),
    magic(
        0,
        b"\x27\x05\x19\x56",
        "a U-Boot uImage",
        "take the Image out of it: dumpimage -p 0 -o Image FILE",
    ),
    magic(0, b"!<arch>\n", "a Debian package or a library", PACKAGE),
    magic(0, b"\xed\xab\xee\xdb", "an RPM package", PACKAGE),
    magic(0, b"PK\x03\x04", "a zip archive", PACKAGE),
    magic(257, b"ustar", "a tar archive", PACKAGE),
    magic(0, b"#!", "a script", "give a kernel file"),
    magic(0, b"<!DOCTYPE", "a web page", DOWNLOAD),
    magic(0, b"<html", "a web page", DOWNLOAD),
    magic(0x1fe, b"\x55\xaa", "a disk image with a boot sector", DISK),
];

/// Describes a file of `len` bytes that starts with `head` in a few words, with advice in parentheses.
/// Completes the sentence "Cannot use FILE as a kernel: ...".
#[must_use]
pub fn describe(head: &[u8], len: u64) -> String {
    if len == 0 || head.is_empty() {
        return "it is empty (give a RISC-V Image)".into();
    }
    if head.get(4..8) == Some(b"zimg") {
        return zboot(head);
    }
    if let Some(what) = pe(head) {
        return what;
    }
    let matches =
        |magic: &&Magic| head.get(magic.at..).is_some_and(|rest| rest.starts_with(magic.bytes));
    if let Some(Magic { what, advice, .. }) = MAGICS.iter().find(matches) {
        return format!("it is {what} ({advice})");
    }
    if head.iter().all(|byte| *byte == 0) {
        return "it begins with nothing but zeros (copy it again)".into();
    }
    if len < crate::image::HEADER_LEN as u64 {
        return format!("it is {len} bytes long, too short for a kernel (copy it again)");
    }
    "it has no kernel's magic \
     (give a RISC-V Image, or place a flat binary with --load FILE@ADDR --entry ADDR)"
        .into()
}

/// An EFI zboot image (Linux drivers/firmware/efi/libstub/zboot-header.S): a program that unpacks the
/// `Image` inside it and that firmware has to run; so the advice is how to extract the `Image`.
fn zboot(head: &[u8]) -> String {
    let name = head.get(24..56).and_then(|name| name.split(|byte| *byte == 0).next());
    let name = name.and_then(|name| std::str::from_utf8(name).ok()).unwrap_or_default();
    let tool = match name {
        "gzip" => "gzip -dc",
        "zstd" | "zstd22" => "zstd -dc",
        "xzkern" => "xz -dc",
        "lzma" => "lzma -dc",
        "lz4" => "lz4 -dc",
        "lzo" => "lzop -dc",
        _ => "unpack",
    };
    match (le_u32(head, 8), le_u32(head, 12)) {
        (Some(offset), Some(size)) => format!(
            "it is an EFI zboot image, which needs EFI firmware (take the Image out of it: \
             tail -c +{} FILE | head -c {size} | {tool} > Image)",
            u64::from(offset) + 1
        ),
        _ => "it is an EFI zboot image cut short (copy it again)".into(),
    }
}

/// An EFI program, such as a boot loader or a kernel without the RISC-V header.
fn pe(head: &[u8]) -> Option<String> {
    let start = usize::try_from(le_u32(head, 0x3c)?).ok()?;
    let pe = head.strip_prefix(b"MZ").and_then(|_| head.get(start..))?;
    let machine = match le_u16(pe.strip_prefix(b"PE\0\0")?, 0)? {
        // The x86 boot header is more specific.
        0x8664 | 0x014c if head.get(0x202..0x206) == Some(b"HdrS") => return None,
        0x8664 => "x86-64",
        0x014c => "32-bit x86",
        0xaa64 if head.get(0x38..0x3c) == Some(b"ARM\x64") => return None,
        0xaa64 => "arm64",
        0x5064 => "riscv64",
        0x5032 => "32-bit RISC-V",
        0x6264 | 0x6232 => "LoongArch",
        _ => "another machine",
    };
    Some(format!("it is an EFI program for {machine} (give the RISC-V Image of a kernel)"))
}
