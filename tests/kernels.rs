//! Ring 2: every supported form of a kernel, and files that are not kernels.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use harness::{Launch, Session, guest, host, kernel, rvmm};

fn small(arguments: &[&str]) -> Launch {
    rvmm(&["--mem", "64M", "--no-initrd"]).args(arguments).no_input()
}

fn passes(mut session: Session) {
    session.expect("PASS hello\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn every_form_of_a_kernel_boots() {
    if host().is_none() {
        return;
    }
    for form in ["hello", "hello.elf", "hello.gz", "hello.zst"] {
        passes(small(&[]).kernel(&guest(form)).start());
    }
    let flat = small(&["--entry", "0x80200000"]).path("--load=", &guest("hello"), "@0x8020_0000");
    passes(flat.start());
}

#[test]
fn the_subcommand_run_is_the_default() {
    if host().is_none() {
        return;
    }
    let session = rvmm(&["run", "--mem", "64M", "--no-initrd"]).kernel(&guest("hello")).no_input();
    passes(session.start());
}

#[test]
fn a_flat_binary_beside_a_kernel_is_at_its_address() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("flat");
    fs::write(&file, [0x5a; 10_000]).expect("a file");
    // The guest `reboot` detects memory that is not zero.
    let mut session =
        small(&[]).kernel(&guest("reboot")).path("--load=", &file, "@0x8100_0000").start();
    session.expect("FAIL reboot: memory: memory at 0x81000000: got 5a5a5a5a5a5a5a5a");
    session.signal(rustix::process::Signal::TERM);
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_dumped_tree_is_valid_and_boots_as_the_users_tree() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let tree = folder.path().join("tree.dtb");
    passes(small(&[]).kernel(&guest("hello")).args(&["--dump-dtb"]).path("", &tree, "").start());
    let bytes = fs::read(&tree).expect("the tree");
    assert_eq!(bytes[..4], 0xd00d_feed_u32.to_be_bytes());
    assert_eq!(
        u32::from_be_bytes(bytes[4..8].try_into().expect("four bytes")) as usize,
        bytes.len()
    );
    warnings_of_dtc(&tree);
    passes(small(&[]).kernel(&guest("hello")).args(&["--dtb"]).path("", &tree, "").start());
}

/// A position-independent program: prints F on the UART and powers off through SBI.
const FIRMWARE: [u32; 12] = [
    0x0000_0417, // auipc s0, 0
    0x1000_02b7, // lui t0, 0x10000
    0x0460_0313, // li t1, 'F'
    0x0062_8023, // sb t1, 0(t0)
    0x00a0_0313, // li t1, '\n'
    0x0062_8023, // sb t1, 0(t0)
    0x5352_58b7, // lui a7, 0x53525
    0x3548_889b, // addiw a7, a7, 0x354
    0x0000_0813, // li a6, 0
    0x0000_0513, // li a0, 0
    0x0000_0593, // li a1, 0
    0x0000_0073, // ecall
];

#[test]
fn firmware_in_a_flash_is_executed_in_place() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let code = folder.path().join("CODE.fd");
    let mut bytes: Vec<u8> = FIRMWARE.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.resize(32 << 20, 0xff);
    fs::write(&code, bytes).expect("a file");
    let flash = |rest: &str| {
        let device = format!("flash,addr=0x20000000,file={}{rest}", code.display());
        small(&["--device", &device])
    };
    let mut session = flash("").args(&["--entry", "0x20000000"]).start();
    session.expect("F\n");
    assert_eq!(session.exit_code(), 0, "{}", session.errors());
    refused(flash("").args(&["--entry", "0x22000000"]), "0x22000000", "nothing is loaded there");
    refused(flash(",mode=lazy").args(&["--entry", "0x20000000"]), "0x20000000", "mode=map");
}

#[test]
fn an_elf_file_with_an_invalid_entry_runs_from_its_lowest_address() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("e0.elf");
    let mut bytes = fs::read(guest("hello.elf")).expect("a guest");
    bytes[24..32].copy_from_slice(&0_u64.to_le_bytes());
    fs::write(&path, &bytes).expect("a file");
    passes(small(&[]).kernel(&path).start());
    passes(small(&["--entry", "0x80200000"]).kernel(&path).start());
    let mut session = small(&["--log", "info"]).kernel(&path).start();
    session.expect("PASS hello\n");
    assert_eq!(session.exit_code(), 0);
    let errors = session.all_errors();
    assert!(errors.contains("starts at 0x80200000; the entry it names is 0x0"), "{errors}");
}

#[test]
fn a_users_tree_is_compared_with_the_machine() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let tree = folder.path().join("tree.dtb");
    passes(small(&[]).kernel(&guest("hello")).args(&["--dump-dtb"]).path("", &tree, "").start());
    let other =
        |mem: &str| rvmm(&["--mem", mem, "--no-initrd"]).no_input().path("--dtb=", &tree, "");
    refused(other("32M").kernel(&guest("hello")), "tree.dtb", "describes memory at 0x80000000");
    let mut session = other("128M").kernel(&guest("hello")).start();
    session.expect("PASS hello\n");
    assert_eq!(session.exit_code(), 0);
    let errors = session.all_errors();
    assert!(errors.contains("describes 64M of memory, but the machine has 128M"), "{errors}");
}

/// Checks that dtc, if installed, has no warnings. (Ring 1 checks the trees of every board with dtc.)
fn warnings_of_dtc(tree: &Path) {
    match Command::new("dtc").args(["-I", "dtb", "-O", "dts", "-o", "/dev/null"]).arg(tree).output()
    {
        Err(_) => harness::leave_out("there is no dtc: only a guest looks at the dumped tree"),
        Ok(output) => assert_eq!(String::from_utf8_lossy(&output.stderr), ""),
    }
}

/// Checks that rvmm refuses its arguments: exit code 2 and one line with the name of the file and `words`.
fn refused(launch: Launch, file: &str, words: &str) {
    let mut session = launch.start();
    assert_eq!(session.exit_code(), 2, "{}", session.errors());
    let errors = session.all_errors();
    assert_eq!(errors.lines().count(), 1, "not one line: {errors}");
    assert!(errors.contains(file), "the line does not name {file}: {errors}");
    assert!(
        errors.to_lowercase().contains(&words.to_lowercase()),
        "no {words:?} in the line: {errors}"
    );
    assert_eq!(session.output(), b"");
}

/// A page with `bytes` at `at`.
fn page(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut page = vec![0; 4096];
    for (at, bytes) in parts {
        page[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    page
}

#[test]
fn files_that_are_no_kernel_are_refused_in_one_line() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let image = fs::read(guest("hello")).expect("a guest");
    let elf = fs::read(guest("hello.elf")).expect("a guest");
    let mut other_machine = elf.clone();
    other_machine[18] = 62;
    let files: &[(&str, Vec<u8>, &str)] = &[
        ("bzImage", page(&[(0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS")]), "x86"),
        ("arm64", page(&[(0, b"MZ"), (0x38, b"ARM\x64")]), "arm64"),
        ("zboot", page(&[(0, b"MZ\0\0zimg"), (24, b"gzip")]), "zboot"),
        ("x86-elf", other_machine, "x86"),
        ("empty", Vec::new(), "empty"),
        ("text", b"#!/bin/sh\necho no kernel\n".to_vec(), ""),
        ("zeros", vec![0; 100_000], ""),
        ("short-image", image[..40].to_vec(), ""),
        ("short-elf", elf[..100].to_vec(), ""),
        ("cut-gzip", fs::read(guest("hello.gz")).expect("a guest")[..1000].to_vec(), ""),
        ("cut-zstd", fs::read(guest("hello.zst")).expect("a guest")[..1000].to_vec(), ""),
    ];
    for (name, bytes, words) in files {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("a file");
        refused(small(&[]).kernel(&path), name, words);
    }
}

#[test]
fn paths_that_are_not_regular_files_are_refused_in_one_line() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    refused(small(&[]).kernel(&folder.path().join("absent")), "absent", "no such file");
    refused(small(&[]).kernel(folder.path()), &folder.path().to_string_lossy(), "");
    refused(small(&[]).kernel(Path::new("/dev/zero")), "/dev/zero", "");
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0)
        .expect("a FIFO");
    refused(small(&[]).kernel(&fifo), "fifo", "fifo");
}

#[test]
fn a_sparse_file_of_a_hundred_gibibytes_is_refused_without_being_read() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sparse");
    File::create(&path).and_then(|file| file.set_len(100 << 30)).expect("a sparse file");
    refused(small(&[]).kernel(&path), "sparse", "");
    refused(
        small(&[]).kernel(&guest("hello")).path("--load=", &path, "@0x8100_0000"),
        "sparse",
        "",
    );
}

#[test]
fn too_little_memory_for_a_kernel_is_refused_with_how_much_it_takes() {
    if host().is_none() {
        return;
    }
    let launch = rvmm(&["--mem", "16M", "--no-initrd"]).kernel(&kernel()).no_input();
    let mut session = launch.start();
    assert_eq!(session.exit_code(), 2, "{}", session.errors());
    let errors = session.all_errors();
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains("MiB") || errors.contains("M)"), "{errors}");
}

#[test]
fn the_memory_that_a_refusal_asks_for_is_enough() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("large");
    let mut image = fs::read(guest("hello")).expect("a guest");
    image[16..24].copy_from_slice(&(35_u64 << 20).to_le_bytes());
    fs::write(&path, image).expect("a file");
    for mem in ["16M", "33M", "37M"] {
        let mut session = rvmm(&["--mem", mem, "--no-initrd"]).kernel(&path).no_input().start();
        assert_eq!(session.exit_code(), 2, "{}", session.errors());
        let errors = session.all_errors();
        let (_, advice) = errors.trim_end().rsplit_once("--mem ").expect("how much it takes");
        let enough = advice.trim_end_matches(')');
        passes(rvmm(&["--mem", enough, "--no-initrd"]).kernel(&path).no_input().start());
    }
}

#[test]
fn a_kernel_file_that_shrinks_under_the_guest_is_at_worst_a_documented_stop() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kernel");
    let mut image = fs::read(guest("reboot")).expect("a guest");
    image.resize(8 << 20, 0);
    // The header has to give the size, or the guest would use the memory after the image.
    let size = (image.len() as u64).to_le_bytes();
    image[16..24].copy_from_slice(&size);
    fs::write(&path, image).expect("a file");
    let mut session = rvmm(&["--mem", "64M", "--no-initrd"]).kernel(&path).start();
    session.expect("reboot: what next?\n");
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(4096))
        .expect("a shorter file");
    // The guest may have hit the missing page already.
    let _ = session.try_send(b"c");
    let code = session.exit_code();
    assert!(code == 2 || code == 3, "exit code {code}: {}", session.errors());
}
