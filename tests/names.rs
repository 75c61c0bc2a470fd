//! Ring 2: running machines by name: listed, described, stopped, killed, restarted, waited for.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "linux/initramfs.rs"]
mod initramfs;

use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use harness::{Session, kernel, one_host, rvmm};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Runs a verb with these sockets.
fn verb(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
    command.args(arguments).env("XDG_RUNTIME_DIR", folder).output().expect("rvmm starts")
}

/// What a verb prints that succeeds.
fn said(folder: &Path, arguments: &[&str]) -> String {
    let output = verb(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

/// The refusal of a verb, which ends with code 1.
fn refused(folder: &Path, arguments: &[&str]) -> String {
    let output = verb(folder, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).expect("text")
}

/// A guest of Debian's kernel at its shell. With `button`, a program there powers off when the power button is pressed.
fn boot(folder: &TempDir, name: &str, irqchip: &str, button: bool) -> Session {
    let at = folder.path().join(format!("{name}.files"));
    std::fs::create_dir(&at).expect("a folder");
    let initrd =
        initramfs::build(&at, &[], &["virtio_mmio", "virtio_input", "evdev", "virtio_balloon"]);
    let mut session = rvmm(&["--mem", "128M", "--irqchip", irqchip, "--name", name])
        .args(&["--cmdline", "console=ttyS0 quiet", "--power-button", "--device", "balloon"])
        .path("--initrd=", &initrd, "")
        .env("XDG_RUNTIME_DIR", folder.path())
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    if button {
        session.ask("(head -c 24 </dev/input/event0 >/dev/null; poweroff -f) & sleep 1");
    }
    session
}

/// Waits until this process watches another one.
fn await_watch(session: &Session) {
    let descriptors = format!("/proc/{}/fd", session.pid().as_raw_nonzero());
    let watches = || {
        let links = std::fs::read_dir(&descriptors).expect("it runs").flatten();
        let mut targets = links.filter_map(|link| std::fs::read_link(link.path()).ok());
        targets.any(|target| target.to_string_lossy().contains("pidfd"))
    };
    while !watches() {
        thread::sleep(Duration::from_millis(10));
    }
}

fn list(folder: &Path) -> Vec<Value> {
    serde_json::from_str(&said(folder, &["list", "--json"])).expect("a list")
}

#[test]
fn machines_are_listed_described_restarted_and_end_by_name() {
    let Some(host) = one_host("plic") else { return };
    let irqchip = host.irqchips[0];
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    assert_eq!(list(at), [Value::Null; 0]);
    let mut web = boot(&folder, "web", irqchip, true);
    let mut db = boot(&folder, "db", irqchip, false);
    let machines = list(at);
    let names: Vec<_> = machines.iter().map(|machine| &machine["name"]).collect();
    assert_eq!(names, ["db", "web"]);
    assert_eq!(machines[1]["pid"].as_i64(), Some(web.pid().as_raw_nonzero().get().into()));
    let table = said(at, &["list"]);
    assert!(table.lines().nth(2).is_some_and(|line| line.starts_with("web ")), "{table}");

    let several = refused(at, &["info"]);
    assert!(several.contains("Several machines are running"), "{several}");
    said(at, &["pause", "web"]);
    let info = said(at, &["info", "web"]);
    for line in ["state  paused", "memory  128 MiB", &format!("controller  {irqchip}")] {
        assert!(info.contains(line), "{line}: {info}");
    }
    said(at, &["resume", "web"]);

    said(at, &["balloon", "db", "32M"]);
    let given = || {
        let info: Value =
            serde_json::from_str(&said(at, &["info", "db", "--json"])).expect("an object");
        info["balloon"]["actual"].as_u64().expect("a number")
    };
    while given() < 32 << 20 {
        thread::sleep(Duration::from_millis(100));
    }
    said(at, &["reboot", "db"]);
    db.expect("own initramfs is up\r\n");

    // It powers off when it is asked.
    said(at, &["stop", "web", "--timeout", "900"]);
    assert_eq!(web.exit_code(), 0);
    let late = refused(at, &["wait", "db", "--timeout", "1"]);
    assert!(late.contains("still runs after 1 s"), "{late}");
    // Nobody there listens to the button.
    let mut waiting = rvmm(&["wait", "db"]).env("XDG_RUNTIME_DIR", at).start();
    await_watch(&waiting);
    let forced = verb(at, &["stop", "db", "--timeout", "1"]);
    assert!(forced.status.success());
    let message = String::from_utf8_lossy(&forced.stderr);
    assert!(message.contains("has not powered off within 1 s"), "{message}");
    assert_eq!(db.exit_code(), 0);
    assert_eq!(waiting.exit_code(), 0);

    let mut third = boot(&folder, "third", irqchip, false);
    // Also one that does not answer.
    third.signal(Signal::STOP);
    said(at, &["kill", "third"]);
    assert!(!third.is_running());
    assert_eq!(list(at), [Value::Null; 0]);
    assert_eq!(std::fs::read_dir(at.join("rvmm")).expect("a folder").count(), 0);
    let gone = refused(at, &["stop", "third"]);
    assert!(gone.contains("No machine 'third'"), "{gone}");
}
