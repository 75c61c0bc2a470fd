//! Disks in qcow2 images, created by imago, and by qemu-img if it is installed.
#![allow(clippy::cast_possible_truncation, reason = "a test's sizes are small")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, file};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use rvmm_devices::testing::{leave_out, skip};
use rvmm_devices::virtio::blk::{DiskBackend, DiskCache, DiskFormat, DiskOp};
use tempfile::{TempDir, tempdir};

use super::super::tests::{Bench, RAM, WRITE, pattern, segment, zeroes};
use super::*;

const SIZE: u64 = 4 << 20;

/// Creates an image of format version 3 in a folder.
fn image(folder: &TempDir, name: &str, size: u64, cluster: usize, backing: Option<(&str, &str)>) {
    let path = folder.path().join(name);
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    let storage = file::File::try_from(file.unwrap()).unwrap();
    let mut builder = Qcow2::<file::File>::create_builder(storage).size(size).cluster_size(cluster);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.into(), format.into());
    }
    builder.create().unwrap();
}

fn at(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

/// `options`: `ro`, `none`, `unsafe`, `backing`.
fn plan(path: &str, options: &str) -> DiskPlan {
    DiskPlan {
        path: path.into(),
        is_read_only: options.contains("ro"),
        cache: match options {
            text if text.contains("none") => DiskCache::None,
            text if text.contains("unsafe") => DiskCache::Unsafe,
            _ => DiskCache::Writeback,
        },
        format: DiskFormat::Qcow2 { has_backing: options.contains("backing") },
    }
}

fn refusal(path: &str, options: &str) -> String {
    Bench::over(&plan(path, options)).err().map_or("opened".into(), |error| error.to_string())
}

impl Bench {
    fn open(path: &str, options: &str) -> Self {
        Self::over(&plan(path, options)).unwrap()
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> bool {
        self.fill(RAM, bytes);
        self.run(WRITE, offset, &[segment(RAM, bytes.len() as u32)])
    }

    fn get(&mut self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let is_ok = self.run(DiskOp::Read, offset, &[segment(RAM, len as u32)]);
        is_ok.then(|| self.ram(RAM, len))
    }

    fn flush(&mut self) -> bool {
        self.run(DiskOp::Flush, 0, &[])
    }

    fn wipe(&mut self, op: DiskOp, offset: u64, len: u64) -> bool {
        self.clear(3, op, offset, len);
        self.ended(1)[0].is_ok
    }
}

/// Runs qemu-img. False if it is not installed.
fn qemu_img(arguments: &[&str]) -> bool {
    let output = match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => output,
        Err(error) => {
            leave_out(&format!("there is no qemu-img: {error}"));
            return false;
        }
    };
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&text));
    true
}

#[test]
fn after_a_write_back_another_program_finds_everything_without_a_flush() {
    let folder = tempdir().unwrap();
    image(&folder, "image", SIZE, 64 << 10, None);
    let mut disk = Bench::open(&at(&folder, "image"), "");
    let text = pattern(8192, 3);
    assert!(disk.put(300 << 10, &text));
    // As a copy: the disk is locked.
    let copied = |name: &str| {
        fs::copy(at(&folder, "image"), at(&folder, name)).unwrap();
        Bench::open(&at(&folder, name), "ro").get(300 << 10, 8192)
    };
    assert_ne!(copied("before").as_ref(), Some(&text), "a write-back is not needed here");
    disk.disk.write_back().unwrap();
    assert_eq!(copied("after"), Some(text));
    // Without anything to be written it changes nothing, not even the file's time.
    let time = || fs::metadata(at(&folder, "image")).unwrap().modified().unwrap();
    let before = time();
    disk.disk.write_back().unwrap();
    drop(disk);
    assert_eq!(time(), before);
}

/// An access to a disk.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, usize),
    Discard(u64, u64),
    Zero(bool, u64, u64),
    Flush,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sector = 0_u64..SIZE / 512;
    let step = prop_oneof![
        4 => (sector.clone(), 1_usize..300, any::<u8>())
            .prop_map(|(at, count, seed)| Step::Write(at, count, seed.into())),
        2 => (sector.clone(), 1_u64..2000).prop_map(|(at, count)| Step::Discard(at, count)),
        2 => (any::<bool>(), sector, 1_u64..2000)
            .prop_map(|(unmap, at, count)| Step::Zero(unmap, at, count)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..24)
}

/// Makes the accesses to an image and to plain bytes, which have to stay the same.
fn compare(path: &str, options: &str, mut model: Vec<u8>, steps: &[Step]) {
    let mut bench = Bench::open(path, options);
    for step in steps {
        let clip = |at: u64, count: u64| (at * 512, count.min(SIZE / 512 - at) * 512);
        match *step {
            Step::Write(sector, count, seed) => {
                let (offset, len) = clip(sector, count as u64);
                let bytes = pattern(len as usize, seed);
                assert!(bench.put(offset, &bytes));
                model[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            Step::Discard(sector, count) => {
                let (offset, len) = clip(sector, count);
                assert!(bench.wipe(DiskOp::Discard, offset, len));
                // The contents of a discarded range are undefined.
                let now = bench.get(offset, len as usize).unwrap();
                model[offset as usize..][..now.len()].copy_from_slice(&now);
            }
            Step::Zero(may_unmap, sector, count) => {
                let (offset, len) = clip(sector, count);
                assert!(bench.wipe(zeroes(may_unmap), offset, len));
                model[offset as usize..][..len as usize].fill(0);
            }
            Step::Flush => assert!(bench.flush()),
            Step::Reopen => {
                drop(bench);
                bench = Bench::open(path, options);
            }
        }
    }
    assert!(bench.get(0, SIZE as usize).unwrap() == model, "{steps:?}");
    drop(bench);
    assert!(Bench::open(path, options).get(0, SIZE as usize).unwrap() == model, "{steps:?}");
}

#[test]
fn an_image_is_a_disk_whatever_is_done_to_it_and_stays_sound() {
    for (cluster, options) in
        [(512, ""), (4096, ""), (65536, ""), (65536, "unsafe"), (2 << 20, ""), (4096, "none")]
    {
        let mut runner = TestRunner::deterministic();
        for _ in 0..8 {
            let steps = steps().new_tree(&mut runner).unwrap().current();
            let folder = tempdir().unwrap();
            image(&folder, "disk", SIZE, cluster, None);
            let path = at(&folder, "disk");
            if refusal(&path, options).contains("O_DIRECT") {
                leave_out("there is no O_DIRECT here");
                break;
            }
            compare(&path, options, vec![0; SIZE as usize], &steps);
            qemu_img(&["check", "-q", "-f", "qcow2", &path]);
        }
    }
}

#[test]
fn an_image_outgrows_its_first_tables_and_stays_sound() {
    let folder = tempdir().unwrap();
    // One refcount block covers 8 MiB here.
    image(&folder, "disk", 20 << 20, 512, None);
    let path = at(&folder, "disk");
    let mut bench = Bench::open(&path, "");
    let bytes = pattern(1 << 20, 3);
    for number in 0..20 {
        assert!(bench.put(number << 20, &bytes));
    }
    assert!(bench.wipe(zeroes(true), 5 << 20, 3 << 20));
    drop(bench);
    qemu_img(&["check", "-q", "-f", "qcow2", &path]);
    let mut bench = Bench::open(&path, "");
    assert!(bench.get(19 << 20, 1 << 20).unwrap() == bytes);
    assert!(bench.get(6 << 20, 512).unwrap() == [0; 512]);
}

#[test]
fn version_2_of_the_format_is_a_disk_too() {
    let mut runner = TestRunner::deterministic();
    for _ in 0..4 {
        let folder = tempdir().unwrap();
        let path = at(&folder, "disk");
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &path, "4M"]) {
            return skip("there is no qemu-img");
        }
        let steps = steps().new_tree(&mut runner).unwrap().current();
        compare(&path, "", vec![0; SIZE as usize], &steps);
        qemu_img(&["check", "-q", "-f", "qcow2", &path]);
    }
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let folder = tempdir().unwrap();
    let (raw, path) = (at(&folder, "raw"), at(&folder, "disk"));
    let words = "all work and no play ".repeat(SIZE as usize / 21 + 1);
    let bytes = &words.as_bytes()[..SIZE as usize];
    fs::write(&raw, bytes).unwrap();
    if !qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &path]) {
        return skip("there is no qemu-img");
    }
    assert!(fs::metadata(&path).unwrap().len() < SIZE / 2);
    let steps = steps().new_tree(&mut TestRunner::deterministic()).unwrap().current();
    assert!(Bench::open(&path, "ro").get(0, SIZE as usize).unwrap() == bytes);
    compare(&path, "", bytes.to_vec(), &steps);
    qemu_img(&["check", "-q", "-f", "qcow2", &path]);
    fs::write(&raw, bytes).unwrap();
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "compression_type=zstd",
        &raw,
        &path,
    ]);
    assert!(refusal(&path, "").contains("not compressed by deflate"));
}

#[test]
fn what_the_guest_has_flushed_is_in_the_file_and_what_it_has_not_does_no_harm() {
    let folder = tempdir().unwrap();
    image(&folder, "disk", SIZE, 4096, None);
    let (path, copy) = (at(&folder, "disk"), at(&folder, "copy"));
    let mut bench = Bench::open(&path, "");
    let bytes = pattern(100_352, 5);
    assert!(bench.put(512, &bytes) && bench.flush());
    // A copy is equal to the image that a killed machine leaves behind.
    fs::copy(&path, &copy).unwrap();
    assert!(Bench::open(&copy, "").get(512, bytes.len()).unwrap() == bytes);
    assert!(bench.wipe(DiskOp::Discard, 0, 65536) && bench.put(1 << 20, &bytes));
    fs::copy(&path, &copy).unwrap();
    assert!(Bench::open(&copy, "").get(512, 512).is_some());
    let durable = DiskOp::Write { is_durable: true };
    assert!(bench.run(durable, 2 << 20, &[segment(RAM, 512)]));
    fs::copy(&path, &copy).unwrap();
    assert!(Bench::open(&copy, "").get(2 << 20, 512).unwrap() == bytes[..512]);
}

#[test]
fn an_image_has_one_writer() {
    let folder = tempdir().unwrap();
    image(&folder, "disk", SIZE, 4096, None);
    let path = at(&folder, "disk");
    let first = Bench::open(&path, "");
    for options in ["", "ro"] {
        let text = refusal(&path, options);
        assert!(text.contains("another program has it open for writing"), "{text}");
    }
    drop(first);
    let (mut reader, other) = (Bench::open(&path, "ro"), Bench::open(&path, "ro"));
    assert_eq!(other.disk.size(), SIZE);
    assert!(!reader.put(0, &[1; 512]));
}

#[test]
fn a_backing_file_shows_through_only_where_that_is_asked_for_and_is_never_written() {
    let folder = tempdir().unwrap();
    let base = pattern(1 << 20, 9);
    fs::write(at(&folder, "base"), &base).unwrap();
    image(&folder, "middle", SIZE, 4096, Some(("base", "raw")));
    image(&folder, "top", SIZE, 65536, Some(("middle", "qcow2")));
    let path = at(&folder, "top");
    let text = refusal(&path, "");
    assert!(text.contains("backing file 'middle'") && text.contains("backing=on"), "{text}");
    let mut model = vec![0; SIZE as usize];
    model[..base.len()].copy_from_slice(&base);
    let mut bench = Bench::open(&path, "backing");
    assert!(bench.get(0, SIZE as usize).unwrap() == model, "zeroes behind the end of the base");
    // Other programs may read a backing file, and none may write it.
    let other = Bench::open(&at(&folder, "middle"), "ro,backing");
    assert_eq!(other.disk.size(), SIZE);
    drop(other);
    assert!(refusal(&at(&folder, "middle"), "backing").contains("open for reading"));
    assert!(bench.put(512, &[7; 512]));
    model[512..1024].fill(7);
    assert!(bench.get(0, SIZE as usize).unwrap() == model);
    drop(bench);
    let middle = fs::read(at(&folder, "middle")).unwrap();
    let steps = steps().new_tree(&mut TestRunner::deterministic()).unwrap().current();
    compare(&path, "backing", model, &steps);
    assert!(fs::read(at(&folder, "base")).unwrap() == base);
    assert!(fs::read(at(&folder, "middle")).unwrap() == middle);
    qemu_img(&["check", "-q", "-f", "qcow2", &path]);
}

#[test]
fn an_invalid_chain_is_refused() {
    let folder = tempdir().unwrap();
    image(&folder, "self", SIZE, 4096, Some(("self", "qcow2")));
    image(&folder, "one", SIZE, 4096, Some(("two", "qcow2")));
    image(&folder, "two", SIZE, 4096, Some(("one", "qcow2")));
    image(&folder, "lost", SIZE, 4096, Some(("nowhere", "qcow2")));
    image(&folder, "odd", SIZE, 4096, Some(("one", "vmdk")));
    image(&folder, "wrong", SIZE, 4096, Some(("text", "qcow2")));
    fs::write(at(&folder, "text"), "no image").unwrap();
    image(&folder, "folder", SIZE, 4096, Some((".", "raw")));
    for number in 0..20 {
        let below = format!("deep{}", number + 1);
        image(&folder, &format!("deep{number}"), SIZE, 4096, Some((&below, "qcow2")));
    }
    for (name, part) in [
        ("self", "has a loop"),
        ("one", "has a loop"),
        ("deep0", "more than 16"),
        ("lost", "No such file"),
        ("odd", "the format 'vmdk' for its backing file 'one'"),
        ("wrong", "is not a qcow2 image"),
        ("folder", "it is a folder"),
    ] {
        for options in ["backing", "backing,ro"] {
            let text = refusal(&at(&folder, name), options);
            assert!(text.contains(part), "{name}: {text}");
        }
    }
    assert!(refusal(&at(&folder, "wrong"), "backing").contains("a backing file of"));
}

fn poke(path: &str, offset: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn a_header_that_asks_for_too_much_or_the_unknown_is_refused_with_a_sentence() {
    let folder = tempdir().unwrap();
    let path = at(&folder, "disk");
    let huge = u64::MAX.to_be_bytes();
    for (offset, bytes, part) in [
        (0, &b"RAW!"[..], "omit format=qcow2"),
        (4, &[0, 0, 0, 4], "version 4"),
        (8, &huge, "name of its backing file"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 255, 255], "name of its backing file"),
        (20, &[0, 0, 0, 8], "sizes that the format does not allow"),
        (20, &[0, 0, 0, 22], "sizes that the format does not allow"),
        (20, &[255; 4], "sizes that the format does not allow"),
        (24, &huge, "larger tables than rvmm allows"),
        (24, &[0, 0, 1, 0, 0, 0, 0, 0], "L1 table"),
        (24, &[0; 8], "smaller than a sector"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (36, &[0; 4], "L1 table"),
        (36, &[255; 4], "L1 table"),
        (40, &huge, "L1 table is not inside"),
        (40, &[0; 8], "L1 table is not inside"),
        (40, &[0, 0, 0, 0, 0, 0, 16, 1], "L1 table is not inside"),
        (48, &huge, "refcount table is not inside"),
        (56, &[0; 4], "invalid size"),
        (56, &[255; 4], "invalid size"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "data in another file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 7], "data in another file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "deflate"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 16], "extended L2"),
        (72, &[128, 0, 0, 0, 0, 0, 0, 0], "does not support"),
        (96, &[0, 0, 0, 7], "sizes that the format does not allow"),
        (100, &[0, 0, 0, 8], "invalid length"),
        (100, &[255; 4], "invalid length"),
    ] {
        image(&folder, "disk", SIZE, 4096, None);
        poke(&path, offset, bytes);
        for options in ["", "ro"] {
            let text = refusal(&path, options);
            assert!(text.contains(part) && text.starts_with("Cannot "), "{offset}: {text}");
        }
    }
    for len in [0, 3, 71, 103] {
        image(&folder, "disk", SIZE, 4096, None);
        File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert!(refusal(&path, "").contains("not a qcow2 image"), "{len}");
    }
    // Extensions: one that extends beyond the cluster, and a feature name table whose last entry is incomplete.
    for extension in [[0x12, 0x34, 0x56, 0x78, 0, 0, 32, 0], [0x68, 3, 0xf8, 0x57, 0, 0, 0, 49]] {
        image(&folder, "disk", SIZE, 4096, None);
        let mut length = [0; 4];
        File::open(&path).unwrap().read_exact_at(&mut length, 100).unwrap();
        poke(&path, u32::from_be_bytes(length).into(), &extension);
        assert!(refusal(&path, "").contains("do not end"), "{extension:?}");
    }
}

/// An image of format version 2 with the backing file `base`, whose name follows these extensions.
fn old_image(folder: &TempDir, extensions: &[u8]) -> String {
    image(folder, "old", SIZE, 4096, None);
    let path = at(folder, "old");
    let name_at = 72 + extensions.len() as u64;
    poke(&path, 4, &2_u32.to_be_bytes());
    poke(&path, 8, &name_at.to_be_bytes());
    poke(&path, 16, &4_u32.to_be_bytes());
    poke(&path, 72, extensions);
    poke(&path, name_at, b"base");
    path
}

#[test]
fn version_2_names_the_format_of_its_backing_file_as_version_3_does() {
    let folder = tempdir().unwrap();
    let base = pattern(SIZE as usize, 9);
    fs::write(at(&folder, "base"), &base).unwrap();
    let raw = *b"\xe2\x79\x2a\xca\0\0\0\x03raw\0\0\0\0\0";
    // With an end mark of the extensions, as QEMU writes it, and without.
    for extensions in [[&raw[..], &[0; 8]].concat(), raw.to_vec()] {
        let path = old_image(&folder, &extensions);
        let mut bench = Bench::open(&path, "backing");
        assert!(bench.get(0, SIZE as usize).unwrap() == base);
        assert!(bench.put(0, &[7; 512]) && bench.get(512, 512).unwrap() == base[512..1024]);
        drop(bench);
        assert!(
            Bench::open(&path, "backing").get(0, 512).unwrap() == [7; 512],
            "the format is still named"
        );
    }
    let text = refusal(&old_image(&folder, &[]), "backing");
    assert!(text.contains("names no format for its backing file 'base'"), "{text}");
    let text = refusal(&old_image(&folder, b"\xe2\x79\x2a\xca\0\0\0\x09raw\0\0\0\0\0"), "backing");
    assert!(text.contains("do not end"), "{text}");
}

#[test]
fn what_qemu_img_makes_of_version_2_is_an_overlay_and_its_advice_helps() {
    let folder = tempdir().unwrap();
    let base = pattern(SIZE as usize, 9);
    fs::write(at(&folder, "base"), &base).unwrap();
    let path = at(&folder, "top");
    let make =
        ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-F", "raw", "-b", "base", &path];
    if !qemu_img(&make) {
        return skip("there is no qemu-img");
    }
    assert!(Bench::open(&path, "backing").get(0, SIZE as usize).unwrap() == base);
    // An image without a format, as QEMU created all before 6.1, and the command of the advice.
    let path = old_image(&folder, &[]);
    assert!(refusal(&path, "backing").contains("qemu-img rebase -u -f qcow2 -b NAME -F FORMAT"));
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", &path]);
    assert!(Bench::open(&path, "backing").get(0, SIZE as usize).unwrap() == base);
}

#[test]
fn the_name_of_a_backing_file_is_resolved_as_qemu_does() {
    let folder = tempdir().unwrap();
    let base = pattern(SIZE as usize, 9);
    for name in ["base", "a:b"] {
        fs::write(at(&folder, name), &base).unwrap();
    }
    let absolute = at(&folder, "base");
    let file = format!("file:{absolute}");
    let slashes = format!("file://{absolute}");
    for (name, format) in [
        ("base", "raw"),
        ("base", "file"),
        ("./a:b", "raw"),
        (&absolute, "raw"),
        (&file, "raw"),
        (&slashes, "raw"),
    ] {
        image(&folder, "top", SIZE, 4096, Some((name, format)));
        let mut bench = Bench::open(&at(&folder, "top"), "backing");
        assert!(bench.get(0, SIZE as usize).unwrap() == base, "{name}");
    }
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base"}}"#;
    for (name, part) in [
        (json, json),
        ("nbd://host/disk", "'nbd://host/disk', which is not a path"),
        ("a:b", "./NAME"),
        ("file:", "'file:', which is not a path"),
        // Relative to the current directory, not to the image's folder.
        ("file:base", "Cannot open disk base"),
        ("json:\u{1b}[31m", "'json:\\u{1b}[31m'"),
    ] {
        image(&folder, "top", SIZE, 4096, Some((name, "raw")));
        let text = refusal(&at(&folder, "top"), "backing");
        assert!(text.contains(part) && !text.contains('\u{1b}'), "{name}: {text}");
    }
}

#[test]
fn an_image_that_waits_for_its_repair_is_read_and_not_written() {
    let folder = tempdir().unwrap();
    let path = at(&folder, "disk");
    image(&folder, "disk", SIZE, 4096, None);
    let bytes = pattern(65536, 5);
    assert!(Bench::open(&path, "").put(0, &bytes));
    image(&folder, "top", SIZE, 4096, Some(("disk", "qcow2")));
    for (mark, part) in [(1, "not closed properly"), (2, "marked as corrupt"), (3, "corrupt")] {
        poke(&path, 79, &[mark]);
        let before = fs::read(&path).unwrap();
        let text = refusal(&path, "");
        assert!(text.contains(part) && text.contains("or add ro=on"), "{text}");
        for (path, options) in [(&path, "ro"), (&path, "ro,none"), (&at(&folder, "top"), "backing")]
        {
            if refusal(path, options).contains("O_DIRECT") {
                leave_out("there is no O_DIRECT here");
                continue;
            }
            assert!(Bench::open(path, options).get(0, bytes.len()).unwrap() == bytes, "{options}");
        }
        assert!(fs::read(&path).unwrap() == before, "the mark stays until the image is repaired");
    }
    if qemu_img(&["check", "-q", "-f", "qcow2", "-r", "all", &path]) {
        assert!(Bench::open(&path, "").put(0, &bytes));
    }
}

#[test]
fn bitmaps_that_a_writer_loses_are_logged_and_a_reader_keeps_them() {
    let folder = tempdir().unwrap();
    image(&folder, "disk", SIZE, 65536, None);
    let path = at(&folder, "disk");
    let lost = || {
        let file = File::open(&path).unwrap();
        let header = header::ImageHeader::read(&file, file.metadata().unwrap().len()).unwrap();
        chain::lost_bitmaps(&header)
    };
    assert_eq!(lost(), None);
    if !qemu_img(&["bitmap", "--add", "-f", "qcow2", &path, "monday"])
        || !qemu_img(&["bitmap", "--add", "-f", "qcow2", &path, "tuesday"])
    {
        return skip("there is no qemu-img");
    }
    assert!(Bench::open(&path, "ro").get(0, 512).is_some());
    let text = lost().unwrap();
    assert!(text.contains("loses its 2 dirty bitmaps") && text.contains("a full one"), "{text}");
    assert!(Bench::open(&path, "").put(0, &[1; 512]));
    assert_eq!(lost(), None, "once is enough");
    qemu_img(&["check", "-q", "-f", "qcow2", "-r", "all", &path]);
    assert!(Bench::open(&path, "").get(0, 512).unwrap() == [1; 512]);
}

/// A number of the image's header.
fn field(path: &str, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn tables_that_contradict_each_other_are_refused_before_the_image_is_written() {
    let folder = tempdir().unwrap();
    let path = at(&folder, "disk");
    let make = || {
        image(&folder, "disk", SIZE, 4096, None);
        assert!(Bench::open(&path, "").put(0, &[1; 65536]));
        assert_eq!(refusal(&path, ""), "opened");
        let l1 = field(&path, 40);
        let l2 = field(&path, l1) & 0x00ff_ffff_ffff_fe00;
        (l1, l2, field(&path, 48))
    };
    let copied = 1_u64 << 63;
    let (l1, l2, counts) = make();
    for (offset, entry, part) in [
        (l1, copied | 4096, "share a cluster"),
        (l1, copied | (1 << 50), "is no cluster of the file"),
        (l1, copied | (l2 + 512), "is no cluster of the file"),
        (l1, copied | l2 | 1, "reserved bits"),
        (l1 + 8, copied | l2, "share a cluster"),
        (l2, copied | l1, "data overlaps the table"),
        (l2, copied, "opened"),
        (l2, copied | l2, "data overlaps the table"),
        (l2, copied | (1 << 55), "is no cluster of the file"),
        (l2, (1 << 62) | 100, "data overlaps the table"),
        (l2, (1 << 62) | (1 << 50), "is no cluster of the file"),
        (l2, copied | (1 << 62), "reserved bits"),
        (l2, 1 << 60, "reserved bits"),
        (l2 + 8, field(&path, l2), "more references than its refcount"),
        (counts, 0, "more references than its refcount"),
        (counts, 4096, "share a cluster"),
        (counts + 8, field(&path, counts), "share a cluster"),
        (counts, 1 << 50, "is no cluster of the file"),
        (counts, field(&path, counts) | 1, "reserved bits"),
        (field(&path, counts), 0, "more references than its refcount"),
    ] {
        make();
        poke(&path, offset, &entry.to_be_bytes());
        let text = refusal(&path, "");
        assert!(text.contains(part), "{offset:#x}: {text}");
    }
    make();
    poke(&path, 60, &[0, 0, 0, 1]);
    assert!(refusal(&path, "").contains("snapshots"));
    assert_eq!(refusal(&path, "ro"), "opened");
}

#[test]
fn damage_to_an_image_causes_only_errors() {
    let folder = tempdir().unwrap();
    let (path, sound) = (at(&folder, "disk"), at(&folder, "sound"));
    let mut runner = TestRunner::deterministic();
    for cluster in [512, 4096] {
        image(&folder, "sound", 256 << 10, cluster, None);
        let mut bench = Bench::open(&sound, "");
        assert!(bench.put(0, &pattern(65536, 1)) && bench.wipe(DiskOp::Discard, 8192, 8192));
        drop(bench);
        let bytes = fs::read(&sound).unwrap();
        // Tables are at the start, data mostly follows.
        let place = prop_oneof![0..112_usize, 0..cluster * 6, 0..bytes.len()];
        let damage = prop::collection::vec((place, any::<u8>()), 1..4);
        let mut opened = 0;
        for _ in 0..400 {
            let mut bytes = bytes.clone();
            for (place, value) in damage.new_tree(&mut runner).unwrap().current() {
                bytes[place] = value;
            }
            fs::write(&path, &bytes).unwrap();
            for options in ["ro", ""] {
                let Ok(mut bench) = Bench::over(&plan(&path, options)) else { continue };
                opened += 1;
                let size = bench.disk.size();
                let len = size.min(128 << 10) as usize;
                let _ = bench.get(0, len);
                let _ = bench.get(size - 512, 512);
                if options.is_empty() {
                    let _ = bench.put(512, &pattern(1024, 2));
                    let _ = bench.wipe(DiskOp::Discard, 0, len as u64 / 2);
                    let _ = bench.put(0, &pattern(len, 3));
                    let _ = bench.wipe(zeroes(false), size - 512, 512);
                    let _ = bench.flush();
                }
            }
        }
        assert!(opened > 100, "{opened} images were opened at all");
    }
}

#[test]
fn a_file_that_is_cut_short_gives_errors_and_not_zeroes() {
    let folder = tempdir().unwrap();
    image(&folder, "disk", SIZE, 65536, None);
    let path = at(&folder, "disk");
    assert!(Bench::open(&path, "").put(0, &pattern(SIZE as usize / 2, 4)));
    let mut bench = Bench::open(&path, "");
    assert!(bench.get(0, 512).is_some());
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(fs::metadata(&path).unwrap().len() / 2).unwrap();
    assert_eq!(bench.get(SIZE / 2 - 65536, 65536), None);
    assert!(bench.get(0, 512).is_some());
}

#[test]
fn a_disk_that_is_full_is_an_error_and_goes_on_when_there_is_room() {
    // A file system of 1 MiB in a folder of its own.
    let full = || {
        let folder = tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        let size = Some(c"size=1M");
        rustix::mount::mount("tmpfs", folder.path(), "tmpfs", flags, size).ok()?;
        Some(folder)
    };
    let Some(folder) = full() else {
        return skip("mounting is not permitted");
    };
    image(&folder, "disk", SIZE, 4096, None);
    let path = at(&folder, "disk");
    let mut bench = Bench::open(&path, "");
    let all: Vec<bool> =
        (0..SIZE / 65536).map(|number| bench.put(number * 65536, &pattern(65536, 1))).collect();
    assert!(all[0] && !all[all.len() - 1], "{all:?}");
    assert!(bench.get(0, 512).unwrap() == pattern(512, 1));
    rustix::mount::mount_remount(folder.path(), rustix::mount::MountFlags::empty(), c"size=16M")
        .unwrap();
    assert!(bench.put(SIZE - 65536, &pattern(65536, 2)) && bench.flush());
    drop(bench);
    assert!(Path::new(&path).exists());
    qemu_img(&["check", "-q", "-f", "qcow2", &path]);
    assert!(Bench::open(&path, "").get(SIZE - 65536, 65536).unwrap() == pattern(65536, 2));
    rustix::mount::unmount(folder.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
}
