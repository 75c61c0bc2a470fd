//! Ring 3: third-party guests from the crates registry (`guests/foreign`, built by `scripts/foreign`).

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::path::Path;
use std::time::Duration;

use harness::{Launch, Session, blank_fat, foreign, one_host, rvmm};

/// Time-out from one line of ArceOS to the next: about ten times its usual time.
const PATIENCE: Duration = Duration::from_secs(240);

/// A machine with a flat binary at the address where QEMU's firmware would start it.
fn machine(irqchip: &str, program: &Path) -> Launch {
    rvmm(&["--mem", "128M", "--no-initrd", "--irqchip", irqchip, "--entry", "0x80200000"]).path(
        "--load=",
        program,
        "@0x80200000",
    )
}

/// Starts ArceOS, waits until its threads have run, and returns its output before that.
///
/// KVM 6.12 sometimes loses a call of set_timer (see `runtime::time::set_timer`). ArceOS calls it once on each hart and then waits
/// for ever, which is a bug of neither rvmm nor ArceOS.
fn start_arceos(irqchip: &str, program: &Path, disk: &Path) -> (Session, String) {
    for _ in 0..3 {
        let machine = machine(irqchip, program).args(&["--cpus", "2"]);
        let session = machine.path("--disk=", disk, "").start();
        let banner = session.says_within("app: started\r\n", PATIENCE);
        let threads = "app: threads gave 36, slept long enough: true\r\n";
        if let (Some(banner), Some(_)) = (banner, session.says_within(threads, PATIENCE)) {
            return (session, banner);
        }
    }
    panic!("its threads have not run");
}

#[test]
fn arceos_runs_its_threads_on_two_harts_and_has_its_disk_and_its_console() {
    let Some(host) = one_host("aia") else { return };
    let Some(arceos) = foreign("arceos") else { return };
    for irqchip in &host.irqchips {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = blank_fat(folder.path());
        let (mut session, banner) = start_arceos(irqchip, &arceos, &disk);
        assert!(banner.contains("platform = riscv64-qemu-virt") && banner.contains("smp = 2"));
        session.expect("app: the file says: written by ArceOS\r\n");
        session.expect("app: what is your name?\r\n");
        session.send("Ada\n");
        session.expect("app: hello, Ada\r\n");
        session.expect("app: done\r\n");
        assert_eq!(session.exit_code(), 0, "{}", session.all_errors());
        let bytes = fs::read(&disk).expect("the disk");
        let text = b"written by ArceOS";
        assert!(bytes.windows(text.len()).any(|window| window == text), "no file on the disk");
    }
}

#[test]
fn the_test_suite_of_rustsbi_finds_the_calls_as_the_specification_has_them() {
    let Some(host) = one_host("aia") else { return };
    let Some(suite) = foreign("sbi") else { return };
    for irqchip in &host.irqchips {
        let mut session = machine(irqchip, &suite).args(&["--cpus", "3"]).no_input().start();
        session.expect("the suite is through\n");
        assert_eq!(session.exit_code(), 0, "{}", session.all_errors());
        let output = String::from_utf8_lossy(&session.output()).into_owned();
        for line in [
            r#"base: GetSbiImplId(Ok("KVM"))"#,
            "base: Pass",
            "timer: SetTimer",
            "timer: Pass",
            "ipi: SendIpi",
            "ipi: Pass",
            "Hdbcn: WriteByte",
            "ello, world!",
            "dbcn: WriteSlice",
            "dbcn: Read(0)",
            "dbcn: Pass",
        ] {
            assert!(output.lines().any(|said| said.trim_end() == line), "no {line:?}: {output}");
        }
        for word in ["Failed", "Unexpected", "Accepted", "Partial", "NotExist", "FAIL"] {
            assert!(!output.contains(word), "{word}: {output}");
        }
        // KVM has no HSM suspend, without which the suite's HSM cases wait for ever (-2: not supported).
        let left_out = "hsm: left out: a suspend that keeps no state answers -2";
        assert!(output.contains("hsm: Pass") || output.contains(left_out), "{output}");
    }
}
