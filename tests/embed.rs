//! rvmm as a library: the example with two machines in one process.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::path::PathBuf;
use std::process::Command;

use harness::{guest, host};

/// The example, which Cargo builds for a test run, next to the folder of the tests.
fn example() -> PathBuf {
    let mut path = std::env::current_exe().expect("the path of this test");
    path.pop();
    path.pop();
    path.push("examples/embed");
    assert!(
        path.exists(),
        "{} is missing (cargo test builds it where no --test is given; or: cargo build --example embed)",
        path.display()
    );
    path
}

#[test]
fn two_machines_run_in_one_process() {
    let Some(_) = host() else { return };
    let output = Command::new(example()).arg(guest("hello")).output().expect("the example starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let passed = text.lines().filter(|line| *line == "PASS hello").count();
    assert_eq!(passed, 2, "{text}{errors}");
    assert_eq!(text.matches("-- The guest powered off").count(), 2, "{text}{errors}");
}

#[test]
fn the_example_says_how_it_is_used() {
    let output = Command::new(example()).output().expect("the example starts");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("usage: embed KERNEL"));
}
