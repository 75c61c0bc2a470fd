//! Ring 2: SBI 0.1 calls and a timer in user space, by patching a guest's file.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;

use harness::{Session, guest, host, rvmm};

/// Starts the guest `calls` from an ELF file, which rvmm searches for calls.
fn calls(arguments: &[&str]) -> Session {
    rvmm(&["--no-initrd", "--mem", "64M"]).args(arguments).kernel(&guest("calls.elf")).start()
}

fn passes(mut session: Session, name: &str) -> String {
    session.expect(&format!("PASS {name}\n"));
    assert_eq!(session.exit_code(), 0);
    let output = String::from_utf8_lossy(&session.output()).into_owned();
    assert!(!output.contains("FAIL"), "a check of the guest failed");
    output
}

#[test]
fn calls_of_the_legacy_sbi_are_patched_and_lookalikes_are_not() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        for choice in ["auto", "patch"] {
            let output = passes(calls(&["--irqchip", irqchip, "--sbi-v01", choice]), "calls");
            for said in ["one\n", "two\n", "three\n", "four\n", "by the debug console\n"] {
                assert!(output.contains(said), "{choice}: {said:?} is missing");
            }
        }
    }
}

#[test]
fn without_patches_legacy_calls_fail_and_the_rest_is_the_same() {
    if host().is_none() {
        return;
    }
    let output = passes(calls(&["--sbi-v01", "off", "--cmdline", "unpatched"]), "calls");
    assert!(!output.contains("one\n"));
}

#[test]
fn patches_that_find_nothing_are_reported() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("flat");
    // li t0,0x100000; lui t1,5; addi t1,t1,0x555; sw t1,0(t0); j . - the power register.
    let code = [0x0010_02b7_u32, 0x0000_5337, 0x5553_0313, 0x0062_a023, 0x0000_006f];
    fs::write(&file, code.map(u32::to_le_bytes).concat()).expect("a file");
    for (choice, warns) in [("patch", true), ("auto", false)] {
        let mut session = rvmm(&["--no-initrd", "--mem", "16M", "--sbi-v01", choice])
            .path("--load=", &file, "@0x8020_0000")
            .args(&["--entry", "0x80200000"])
            .start();
        assert_eq!(session.exit_code(), 0);
        let errors = session.all_errors();
        assert_eq!(errors.contains("--sbi-v01 patch has nothing to do"), warns, "{errors}");
    }
}

#[test]
fn a_timer_in_user_space_loses_no_interrupt_from_another_hart() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let arguments =
            ["--irqchip", irqchip, "--cpus", "2", "--timer", "user", "--cmdline", "timer"];
        passes(calls(&arguments), "calls timer");
    }
}
