//! The labs, as a student and as a grader run them.

#![cfg(feature = "labs")]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use harness::{Session, guest, host, rvmm};
use tempfile::TempDir;

fn lab(arguments: &[&str]) -> Session {
    rvmm(&["lab"]).args(arguments).no_input().start()
}

fn text(session: &Session) -> String {
    String::from_utf8_lossy(&session.output()).into_owned()
}

#[test]
fn every_lab_prints_what_its_grader_looks_for() {
    let Some(_) = host() else { return };
    let mut session = lab(&["all", "--check", "--limit", "600"]);
    assert_eq!(session.exit_code(), 0, "{}", session.all_errors());
    let text = text(&session);
    for name in [
        "h_1_0",
        "simple_hv",
        "h_2_0 (map)",
        "h_2_0 (lazy)",
        "h_3_0 (kernel)",
        "h_3_0 (user)",
        "h_4_0",
        "rvm-1",
        "rvm-2",
        "smp",
        "two-vms",
        "dtb (generated)",
        "dtb (moved)",
        "dtb (own)",
        "linux-smp",
    ] {
        assert!(text.contains(&format!("lab {name}: passed")), "{name}: {text}");
    }
    // Only root has access to the host's flash, and only if there is one.
    let is_there = text.contains("lab h_2_0 (passthrough): passed");
    assert!(is_there || text.contains("lab h_2_0 (passthrough): skipped: "), "{text}");
}

#[test]
fn a_lab_explains_every_exit() {
    let Some(_) = host() else { return };
    let mut session = lab(&["simple_hv", "--explain"]);
    assert_eq!(session.exit_code(), 0);
    let text = text(&session);
    for part in [
        "[exit 1, hart 0] an illegal instruction",
        "[exit 2, hart 0] a load of 8 bytes from 0x40",
        "[exit 3, hart 0] an ecall",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("[exit 4"), "{text}");
}

#[test]
fn explanations_leave_the_guests_lines_intact() {
    let Some(_) = host() else { return };
    let mut session = lab(&["rvm-1", "--explain", "--check"]);
    assert_eq!(session.exit_code(), 0, "{}", session.all_errors());
    let text = text(&session);
    assert!(text.contains("  1. U         puts an ebreak"), "{text}");
    // The line's bytes are sent by one call, which is explained once.
    assert_eq!(text.matches(", a7 = 0x1.").count(), 1, "{text}");
    assert!(text.contains("[INFO][GUEST] Hello, world!\n"), "{text}");
}

#[test]
fn a_students_payload_is_graded_as_the_labs_is() {
    let Some(_) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("skernel2");
    // csrr a1,mhartid; ld a0,64(zero); then one executes the labs' own shutdown, one an undefined instruction.
    let start = [0xf3, 0x25, 0x40, 0xf1, 0x03, 0x35, 0x00, 0x04];
    for (end, code) in [(vec![0xa1, 0x48, 0x73, 0, 0, 0], 0), (vec![0, 0], 3)] {
        fs::write(&path, [&start[..], &end].concat()).expect("a payload");
        let mut session =
            lab(&["simple_hv", "--check", "--payload", path.to_str().expect("a plain path")]);
        assert_eq!(session.exit_code(), code, "{}", session.all_errors());
    }
}

#[test]
fn a_guest_that_does_not_end_fails_its_lab_in_time() {
    let Some(_) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("endless");
    fs::write(&path, [0x6f, 0, 0, 0]).expect("a payload");
    let mut session = lab(&[
        "h_1_0",
        "--check",
        "--limit",
        "2",
        "--payload",
        path.to_str().expect("a plain path"),
    ]);
    assert_eq!(session.exit_code(), 3);
    assert!(session.all_errors().contains("did not end within 2 seconds"));
}

#[test]
fn the_same_exercise_runs_by_plain_flags() {
    let Some(_) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("skernel2");
    fs::write(&path, [0xf3, 0x25, 0x40, 0xf1, 0x03, 0x35, 0x00, 0x04, 0xa1, 0x48, 0x73, 0, 0, 0])
        .expect("a payload");
    let load = format!("{}@0x80200000", path.display());
    let mut session =
        rvmm(&["--mem", "16M", "--load", &load, "--entry", "0x80200000", "--start-mode", "vu"])
            .args(&["--csr", "mhartid=0x1234", "--device", "const,addr=0x40,value=0x6688"])
            .start();
    assert_eq!(session.exit_code(), 0, "{}", session.all_errors());
    // Without the CSR option the machine reports what is missing.
    let mut session =
        rvmm(&["--mem", "16M", "--load", &load, "--entry", "0x80200000", "--start-mode", "vu"])
            .start();
    assert_eq!(session.exit_code(), 3);
    let errors = session.all_errors();
    assert!(
        errors.contains("instruction 0xf14025f3 at 0x80200000") && errors.contains("--csr"),
        "{errors}"
    );
}

#[test]
fn linux_starts_at_another_address_with_its_tree_at_another() {
    let Some(_) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let tree = folder.path().join("tree.dtb");
    let kernel = format!("{}@0x90000000", harness::kernel().display());
    let session = rvmm(&[
        "--mem",
        "512M",
        "--load",
        &kernel,
        "--entry",
        "0x90000000",
        "--dtb-addr",
        "0x98000000",
    ])
    .path("--dump-dtb=", &tree, "")
    .no_input()
    .start();
    // Without a root file system it panics, after it has found all its devices.
    session.expect("Kernel panic - not syncing: VFS: Unable to mount root fs");
    drop(session);
    assert!(fs::metadata(&tree).expect("a tree").len() > 1000);
}

/// The ASCII acknowledgement, which the guests of two-vms send as a separate byte.
const ACK: u8 = 6;

/// The files of two-vms, with their paths in a folder.
struct Pair<'a>(&'a TempDir);

impl<'a> Pair<'a> {
    fn new(folder: &'a TempDir) -> Self {
        let pair = Self(folder);
        assert_eq!(lab(&["two-vms", "--save", &pair.path("two_vms.bin")]).exit_code(), 0);
        pair
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("a plain path").to_owned()
    }

    fn start(&self, name: &str) -> Session {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/labs/two_vms");
        let text =
            fs::read_to_string(configs.join(format!("{name}.json"))).expect("a configuration");
        let text = text
            .replace("two_vms.bin", &self.path("two_vms.bin"))
            .replace("link.sock", &self.path("link.sock"));
        fs::write(self.path(name), text).expect("a configuration");
        rvmm(&["--config", &self.path(name)]).no_input().start()
    }
}

fn next_line(from: &mut BufReader<UnixStream>) -> Vec<u8> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line).expect("a line");
    assert!(!line.is_empty(), "the other end has gone");
    line
}

#[test]
fn two_machines_from_two_files_talk_over_a_line() {
    let Some(_) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let pair = Pair::new(&folder);
    // The other machine does not listen yet.
    let mut early = pair.start("right");
    assert_eq!(early.exit_code(), 1);
    assert!(
        early.all_errors().contains("start the machine that listens on it first"),
        "{}",
        early.all_errors()
    );
    let mut left = pair.start("left");
    while !folder.path().join("link.sock").exists() {
        assert!(left.is_running(), "{}", left.all_errors());
        thread::sleep(Duration::from_millis(50));
    }
    let mut right = pair.start("right");
    right.expect("got over the line: hello from left\n");
    left.expect("got over the line: hello from right\n");
    assert_eq!((left.exit_code(), right.exit_code()), (0, 0));
}

/// The left machine of two-vms alone, with the test at the other end of its line.
#[test]
fn an_incomplete_line_is_ignored_and_an_unacknowledged_one_is_sent_again() {
    let Some(_) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut left = Pair::new(&folder).start("left");
    let other = left.connect(&folder.path().join("link.sock"));
    let mut other = BufReader::new(other);
    // Bytes that were sent before there was a reader are lost, including the start of a line.
    next_line(&mut other);
    assert_eq!(next_line(&mut other), b"\x02hello from left\n");
    other.get_mut().write_all(b"m nobody\n\x02hello from the test\n").expect("room");
    left.expect("got over the line: hello from the test\n");
    // The lines sent before the reply have no prefix.
    let answer = loop {
        let line = next_line(&mut other);
        if line.first() == Some(&ACK) {
            break line;
        }
    };
    assert_eq!(answer, b"\x06\x02hello from left\n");
    other.get_mut().write_all(&[ACK]).expect("room");
    assert_eq!(left.exit_code(), 0);
    let text = text(&left);
    assert!(!text.contains("nobody"), "{text}");
}

#[test]
fn a_guest_with_its_own_vector_handles_its_traps_itself() {
    let Some(_) = host() else { return };
    // The guest `fault` has its own vector and causes breakpoints and illegal instructions.
    let mut session =
        rvmm(&["--no-initrd", "--mem", "64M", "--sbi-v01", "patch", "--csr", "mhartid=1"])
            .kernel(&guest("fault"))
            .start();
    session.expect("PASS fault\n");
    assert_eq!(session.exit_code(), 0);
}
