//! The generated initramfs, read back by an independent reader of the format.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod samples;

use std::path::Path;

use proptest::prelude::*;
use rvmm_boot::cpio::Node;
use rvmm_boot::{Cpio, Initrd, Source};
use samples::Folder;

/// One entry of an archive.
#[derive(Debug, Eq, PartialEq)]
struct Entry {
    name: String,
    mode: u32,
    links: u32,
    device: (u32, u32),
    data: Vec<u8>,
}

/// Reads an archive as Linux does: header, name and data, each aligned to four bytes.
fn read(archive: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = 0;
    let mut inodes = std::collections::BTreeSet::new();
    loop {
        assert_eq!(at % 4, 0);
        let header = &archive[at..at + 110];
        assert_eq!(&header[..6], b"070701");
        let field = |index: usize| {
            let digits = &header[6 + 8 * index..14 + 8 * index];
            u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
        };
        let name_len = field(11) as usize;
        let name = &archive[at + 110..at + 110 + name_len];
        let name = std::str::from_utf8(name.strip_suffix(&[0]).unwrap()).unwrap();
        let data = (at + 110 + name_len).next_multiple_of(4);
        at = (data + field(6) as usize).next_multiple_of(4);
        assert_eq!(
            [field(2), field(3), field(5), field(12)],
            [0; 4],
            "root's, and without a clock"
        );
        if name == "TRAILER!!!" {
            assert_eq!((at, field(6)), (archive.len(), 0), "nothing follows");
            return entries;
        }
        assert!(inodes.insert(field(0)), "an inode twice is a hard link");
        entries.push(Entry {
            name: name.into(),
            mode: field(1),
            links: field(4),
            device: (field(9), field(10)),
            data: archive[data..data + field(6) as usize].to_vec(),
        });
    }
}

fn bytes(data: &[u8]) -> Source {
    Source::Bytes(data.to_vec())
}

/// A small system, with a file that is `init`.
fn system(init: &Source) -> Cpio {
    let mut cpio = Cpio::new();
    cpio.dir("dev", 0o755).unwrap();
    cpio.node("dev/console", 0o600, Node::Char, (5, 1)).unwrap();
    cpio.node("dev/vda", 0o660, Node::Block, (254, 0)).unwrap();
    cpio.file("init", 0o755, init.clone()).unwrap();
    cpio.dir("bin", 0o755).unwrap().symlink("bin/sh", "../init").unwrap();
    cpio.file("empty", 0o4644, bytes(b"")).unwrap();
    cpio
}

#[test]
fn everything_that_was_put_in_is_read_back() {
    let entry = |name: &str, mode, links, device, data: &[u8]| Entry {
        name: name.into(),
        mode,
        links,
        device,
        data: data.to_vec(),
    };
    let archive = system(&bytes(b"\x7fELF!")).finish().unwrap();
    let expected = [
        entry("dev", 0o040_755, 2, (0, 0), b""),
        entry("dev/console", 0o020_600, 1, (5, 1), b""),
        entry("dev/vda", 0o060_660, 1, (254, 0), b""),
        entry("init", 0o100_755, 1, (0, 0), b"\x7fELF!"),
        entry("bin", 0o040_755, 2, (0, 0), b""),
        entry("bin/sh", 0o120_777, 1, (0, 0), b"../init"),
        entry("empty", 0o104_644, 1, (0, 0), b""),
    ];
    assert_eq!(read(&archive), expected);
}

#[test]
fn an_archive_of_nothing_is_only_its_end() {
    assert_eq!(read(&Cpio::new().finish().unwrap()), []);
}

#[test]
fn the_same_calls_give_the_same_bytes() {
    let archive = || system(&bytes(b"abc")).finish().unwrap();
    assert_eq!(archive(), archive());
}

#[test]
fn a_file_on_disk_stays_a_file_and_gives_the_same_archive() {
    let folder = Folder::new();
    for len in [1, 2, 3, 4, 5000] {
        let data = vec![0x5a; len];
        let file = Source::open(&folder.write("init", &data)).unwrap();
        let initrd = system(&file).into_initrd("built-in initramfs");
        let [_, Source::File { offset: 0, len: file_len, .. }, _] = initrd.sources() else {
            panic!("{:?}", initrd.sources())
        };
        assert_eq!(*file_len, len as u64);
        let archive = system(&file).finish().unwrap();
        assert_eq!(archive, system(&bytes(&data)).finish().unwrap());
        assert_eq!(initrd.len(), archive.len() as u64);
        assert_eq!(initrd.name().to_string(), "built-in initramfs");
    }
}

/// The error of adding an entry.
fn refusal(add: impl FnOnce(&mut Cpio) -> Result<(), rvmm_boot::BootError>) -> String {
    let mut cpio = system(&bytes(b""));
    add(&mut cpio).unwrap_err().to_string()
}

#[test]
fn entries_that_linux_would_skip_are_refused_by_name() {
    let dir = |path: &str| refusal(|cpio| cpio.dir(path, 0o755).map(drop));
    for path in ["", "/", "/etc", "etc/", "a//b", ".", "..", "dev/../etc", "./etc", "TRAILER!!!"] {
        let expected =
            format!("Cannot put {path} into the initramfs: its path is not a plain relative path");
        assert_eq!(dir(path), expected);
    }
    assert_eq!(
        dir("usr/bin"),
        "Cannot put usr/bin into the initramfs: the folder it is in was not added before it"
    );
    assert!(
        dir("init/x").ends_with("the folder it is in was not added before it"),
        "a file is none"
    );
    assert!(dir("init").ends_with("there already is an entry of this name"));
    assert!(dir(&"x".repeat(4096)).ends_with("its path is longer than 4095 bytes or holds a NUL"));
    assert!(dir("a\0b").ends_with("its path is longer than 4095 bytes or holds a NUL"));
    assert!(dir("a\nb\0").starts_with("Cannot put a\\nb\\u{0} into"));
}

#[test]
fn numbers_that_the_format_cannot_hold_are_refused() {
    let mode = refusal(|cpio| cpio.dir("etc", 0o10_000).map(drop));
    assert!(mode.ends_with("its mode is not of the form 0o7777"), "{mode}");
    let folder = Folder::new();
    let huge = Source::open(&folder.sparse("huge", b"", 4 << 30)).unwrap();
    let size = refusal(|cpio| cpio.file("huge", 0o644, huge).map(drop));
    assert_eq!(size, "Cannot put huge into the initramfs: it is 4 GiB or larger");
    for target in ["", "a\0b", &"x".repeat(4096)] {
        let link = refusal(|cpio| cpio.symlink("link", target).map(drop));
        assert!(link.ends_with("longer than 4095 bytes, or holds a NUL"), "{link}");
    }
}

#[test]
fn a_file_that_shrinks_is_noticed() {
    let folder = Folder::new();
    let path = folder.write("init", &[1; 100]);
    let cpio = system(&Source::open(&path).unwrap());
    folder.write("init", &[1; 50]);
    assert!(cpio.finish().unwrap_err().to_string().contains("was it changed"));
}

#[test]
fn an_initrd_file_is_taken_as_it_is() {
    let folder = Folder::new();
    let initrd = Initrd::open(&folder.write("initrd", b"anything")).unwrap();
    assert_eq!((initrd.len(), initrd.sources().len()), (8, 1));
    assert_eq!(initrd.name().path(), folder.path("initrd"));
}

#[test]
fn an_initrd_that_is_no_file_or_empty_is_refused() {
    let folder = Folder::new();
    let refusal = |path: &Path| Initrd::open(path).unwrap_err().to_string();
    assert_eq!(
        refusal(&folder.write("empty", b"")).replace(&*folder.path("").to_string_lossy(), ""),
        "Cannot use empty as an initrd: it is empty (give a file with contents)"
    );
    assert!(
        refusal(&folder.path("")).ends_with("as an initrd: it is a folder (give a regular file)")
    );
    assert_eq!(refusal(Path::new("/nowhere")), "Cannot open /nowhere");
}

proptest! {
    #[test]
    fn files_of_any_name_and_length_are_read_back(
        files in prop::collection::btree_map("[!-.0-~]{3,40}", prop::collection::vec(any::<u8>(), 0..70), 0..12),
    ) {
        let mut cpio = Cpio::new();
        for (name, data) in &files {
            cpio.file(name, 0o644, bytes(data)).unwrap();
        }
        let read = read(&cpio.finish().unwrap());
        let got: Vec<(&str, &[u8])> = read.iter().map(|e| (e.name.as_str(), e.data.as_slice())).collect();
        let put: Vec<(&str, &[u8])> = files.iter().map(|(n, d)| (n.as_str(), d.as_slice())).collect();
        prop_assert_eq!(got, put);
    }
}
