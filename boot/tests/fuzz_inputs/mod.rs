//! Files and texts of a user, derived from bytes: opened or refused in one line, without a panic and within bounded time.
#![allow(unreachable_pub, reason = "fuzz/ includes this file")]

use std::io::Write;

use rvmm_boot::fdt::{self, blob};
use rvmm_boot::{Cmdline, Cpio, Kernel, Region, Request, Source, place};

const RAM: u64 = 0x8000_0000;

/// Size of guest memory, and so the maximum size of a decompressed kernel.
const MEM: u64 = 4 << 20;

/// Checks that an error is one line.
fn check(error: &dyn std::error::Error) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
}

/// A kernel file of any format. The first byte selects what is put over the rest: nothing, a magic at its offset, or a
/// compression around it.
pub fn kernel(bytes: &[u8]) {
    let Some((how, rest)) = bytes.split_first() else { return };
    let mut file = rest.to_vec();
    let magic: (usize, &[u8]) = match how % 8 {
        1 => (0, b"\x7fELF\x02\x01\x01"),
        2 => (0, b"\x1f\x8b\x08"),
        3 => (0, b"\x28\xb5\x2f\xfd"),
        4 | 5 => (0x30, b"RISCV\0\0\0RSC\x05"),
        6 => (0, b"MZ\0\0zimg"),
        _ => (0, b""),
    };
    file.iter_mut().skip(magic.0).zip(magic.1).for_each(|(to, from)| *to = *from);
    if how % 8 == 5 {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&file).unwrap();
        file = gzip.finish().unwrap();
    }
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.write_all(&file).unwrap();
    let kernel = match Kernel::open(on_disk.path(), MEM) {
        Ok(kernel) => kernel,
        Err(error) => return check(&error),
    };
    for segment in kernel.segments() {
        assert!(segment.source.len() <= segment.mem_len);
        let mut last = [0];
        if let Some(at) = segment.source.len().checked_sub(1) {
            segment.source.read_exact_at(at, &mut last).unwrap();
        }
    }
    let ram = [Region::new(RAM, MEM)];
    let request = Request {
        ram: &ram,
        kernel: Some(&kernel),
        loads: &[],
        entry: None,
        initrd: None,
        fdt_len: 5000,
        fdt_at: None,
        ..Request::default()
    };
    if let Err(error) = place(&request) {
        check(&error);
    }
}

/// A tree supplied by the user: one that is accepted can be walked to its end and is balanced. The first byte selects if
/// the rest is the file, or a structure block and strings after a header that matches them.
pub fn device_tree(bytes: &[u8]) {
    let Some((how, rest)) = bytes.split_first() else { return };
    let tree = if how % 4 == 0 { rest.to_vec() } else { with_header(rest, *how) };
    walk_tree(&tree);
}

/// A header (Devicetree Specification 0.4, section 5.2) and an empty memory reservation block before `rest`, of which the
/// last `how` bytes are the strings.
fn with_header(rest: &[u8], how: u8) -> Vec<u8> {
    let strings = usize::from(how / 4).min(rest.len());
    let structure = (rest.len() - strings) / 4 * 4;
    let total = 56 + rest.len();
    let words =
        [0xd00d_feed, total, 56, 56 + structure, 40, 17, 16, 0, rest.len() - structure, structure];
    let mut tree: Vec<u8> = words.iter().flat_map(|word| (*word as u32).to_be_bytes()).collect();
    tree.extend([0; 16]);
    tree.extend(rest);
    tree
}

fn walk_tree(bytes: &[u8]) {
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.write_all(bytes).unwrap();
    let opened = fdt::UserTree::open(on_disk.path());
    let mut depth = 0_i64;
    let walked = blob::walk(bytes, |item| match item {
        blob::Item::Begin(_) => depth += 1,
        blob::Item::End => depth -= 1,
        blob::Item::Property(..) => assert!(depth > 0),
    });
    match walked {
        Ok(len) => assert!(depth == 0 && len <= bytes.len()),
        Err(ref fault) => check(fault),
    }
    match opened {
        Ok(tree) => {
            assert!(walked.is_ok() && tree.blob().len() <= bytes.len());
            for initrd in [None, Some(Region::new(RAM, 4096))] {
                let completed = tree.completed(initrd);
                assert_eq!(blob::check(&completed), Ok(completed.len()));
            }
        }
        Err(error) => check(&error),
    }
}

/// A command line, and an archive of files with such names.
pub fn command_line(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Cmdline::new(&text) {
        Ok(line) => {
            assert!(line.as_str().len() < rvmm_boot::cmdline::COMMAND_LINE_SIZE);
            let _ = (line.has_key("console"), line.console());
            if let Err(error) = line.with("initrd", &text) {
                check(&error);
            }
        }
        Err(error) => check(&error),
    }
    let mut archive = Cpio::new();
    for (index, path) in text.split('\n').enumerate() {
        let added = match index % 3 {
            0 => archive.dir(path, 0o755).map(drop),
            1 => archive.file(path, 0o644, Source::Bytes(path.into())).map(drop),
            _ => archive.symlink(path, path).map(drop),
        };
        if let Err(error) = added {
            check(&error);
        }
    }
    match archive.finish() {
        Ok(archive) => assert!(archive.len().is_multiple_of(4)),
        Err(error) => check(&error),
    }
}

/// Runs one of the functions above on an input.
pub type Target = fn(&[u8]);

/// The fuzz targets of these functions, by name.
pub const TARGETS: [(&str, Target); 3] =
    [("kernel", kernel), ("device_tree", device_tree), ("command_line", command_line)];
