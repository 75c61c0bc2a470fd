//! Ring 1: how `scripts/test` counts the results in logs of the test runner.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::path::Path;
use std::process::{Command, Output};

/// The verdict of `scripts/test` on a log: its last line, and true for success; `None`, with a message, without bash.
fn counted(log: &str) -> Option<(String, bool)> {
    if !Path::new("/bin/bash").exists() {
        harness::skip("there is no bash");
        return None;
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), log).expect("a log");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/test");
    let Output { status, stdout, stderr } =
        Command::new(script).arg("--count").arg(file.path()).output().expect("the script starts");
    assert!(status.code().is_some_and(|code| code < 2), "{}", String::from_utf8_lossy(&stderr));
    Some((String::from_utf8(stdout).expect("a line"), status.success()))
}

/// A log of one test program.
fn log(lines: &str, passed: u32, failed: u32, ignored: u32) -> String {
    format!(
        "     Running tests/a.rs (target/debug/deps/a-0123456789abcdef)\n\nrunning 9 tests\n{lines}\n\
         test result: ok. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out; finished in 0.10s\n"
    )
}

#[test]
fn a_skipped_or_ignored_test_is_not_counted_as_passed() {
    let lines = "test a_b ... ok\nskipped: c::d_e: no AIA\ntest c::d_e ... ok\ntest f ... skipped: g: a: b\nok\nleft out: h: no dtc";
    let Some(counts) = counted(&log(lines, 5, 0, 1)) else { return };
    assert_eq!(counts, ("3 passed, 0 failed, 3 skipped\n".to_owned(), true));
}

#[test]
fn output_of_a_guest_or_a_lab_is_not_a_skipped_test() {
    let lines =
        "lab h_2_0 (passthrough): skipped: this host has no flash\nskipped:\nskipped: all of it";
    let Some(counts) = counted(&log(lines, 2, 0, 0)) else { return };
    assert_eq!(counts, ("2 passed, 0 failed, 0 skipped\n".to_owned(), true));
}

#[test]
fn a_test_program_without_a_result_counts_as_failed() {
    let killed = "   Doc-tests rvmm\n\nrunning 3 tests\ntest a_b ... ok\n";
    let Some(counts) = counted(&format!("{}{killed}", log("", 4, 1, 0))) else { return };
    assert_eq!(counts, ("4 passed, 2 failed, 0 skipped\n".to_owned(), false));
}
