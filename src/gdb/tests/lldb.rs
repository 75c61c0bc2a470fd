//! LLDB as the debugger, if it is installed, through GDB's protocol.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use rvmm_devices::testing::skip;

use super::super::testing::client::{CODE, TestGuest, TestServer};
use super::{COUNTER, WAITER, finish};
use crate::vcpu::stop::StopReason;

/// The newest LLDB in PATH: `lldb`, or `lldb-19` as Debian has it; or `None`, reported as skipped.
fn lldb() -> Option<PathBuf> {
    let version = |path: &Path| {
        let rest = path.file_name()?.to_str()?.strip_prefix("lldb")?;
        if rest.is_empty() { Some(0) } else { rest.strip_prefix('-')?.parse::<u32>().ok() }
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).filter_map(|folder| fs::read_dir(folder).ok());
    let files = folders.flatten().flatten().map(|entry| entry.path());
    let found = files.filter_map(|file| Some((version(&file)?, file))).max();
    if found.is_none() {
        skip("there is no LLDB in PATH (apt-get install lldb-19)");
    }
    found.map(|(_, path)| path)
}

/// Runs LLDB, connected to `fixture`, and returns its output. It quits at the first command that fails.
fn run_lldb(lldb: &Path, fixture: &TestServer, commands: &[String]) -> String {
    let first = [
        "settings set target.default-arch riscv64".to_owned(),
        "settings set plugin.process.gdb-remote.packet-timeout 120".to_owned(),
        format!("process connect --plugin gdb-remote unix-connect://{}", fixture.socket.display()),
    ];
    let mut command = Command::new(lldb);
    command.args(["--no-lldbinit", "--batch", "--no-use-colors"]).stdin(Stdio::null());
    for one in first.iter().chain(commands) {
        command.args(["--one-line", one]);
    }
    let output = command.output().unwrap();
    let output = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&output).into_owned()
}

/// Checks that `text` contains these pieces in this order.
#[track_caller]
fn check_order(text: &str, pieces: &[&str]) {
    let mut rest = text;
    for piece in pieces {
        let found = rest.split_once(piece);
        rest = found.unwrap_or_else(|| panic!("no {piece:?} at this point in:\n{text}")).1;
    }
}

#[test]
fn lldb_attaches_reads_and_writes_stops_at_a_breakpoint_steps_and_leaves() {
    let Some(lldb) = lldb() else { return };
    let (fixture, guest) = (TestServer::new(true), TestGuest::new(&[COUNTER, WAITER]));
    fixture.begin(&guest);
    let word = CODE + 0x100;
    let commands = [
        "thread list".to_owned(),
        "register read pc a0 satp".to_owned(),
        "register write a0 0x1000".to_owned(),
        format!("memory write --size 8 {word:#x} 0x1122334455667788"),
        format!("memory read --size 8 --format x --count 1 {word:#x}"),
        format!("breakpoint set --address {:#x}", CODE + 8),
        "continue".to_owned(),
        "register read pc a0".to_owned(),
        format!("memory read --size 4 --format x --count 3 {CODE:#x}"),
        "thread step-inst".to_owned(),
        "register read pc".to_owned(),
        "thread step-inst".to_owned(),
        "register read pc a0".to_owned(),
        "breakpoint delete --force".to_owned(),
        "detach".to_owned(),
    ];
    let output = run_lldb(&lldb, &fixture, &commands);
    let seen = [
        "tid = 0x0001, 0x0000000080010000",
        "tid = 0x0002, 0x0000000080011000",
        "pc = 0x0000000080010000",
        "a0 = 0x0000000000000000",
        "satp = 0x0000000000000000",
        "0x80010100: 0x1122334455667788",
        "stop reason = breakpoint 1",
        "pc = 0x0000000080010008",
        "a0 = 0x0000000000001001",
        "0x80010000: 0x00000013 0x00150513 0xffdff06f",
        "pc = 0x0000000080010004",
        "pc = 0x0000000080010008",
        "a0 = 0x0000000000001002",
        "Process 1 detached",
    ];
    check_order(&output, &seen);
    assert_eq!(guest.memory(word, 8), 0x1122_3344_5566_7788_u64.to_le_bytes());
    // It continues from the written value, without the breakpoint.
    assert!(guest.harts[0].await_a0(0x1002) > 0x1002);
    finish(fixture, guest);
}

#[test]
fn lldb_has_no_watchpoints_and_ends_the_machine_where_it_quits_without_detaching() {
    let Some(lldb) = lldb() else { return };
    let (fixture, guest) = (TestServer::new(true), TestGuest::new(&[COUNTER]));
    fixture.begin(&guest);
    let commands = [
        format!("breakpoint set --hardware --address {:#x}", CODE + 4),
        format!("watchpoint set expression -- {:#x}", CODE + 0x100),
    ];
    let output = run_lldb(&lldb, &fixture, &commands);
    check_order(&output, &["ardware breakpoint", "error: Watchpoint creation failed"]);
    assert_eq!(guest.end(), StopReason::Requested);
    fixture.server.over();
    fixture.server.end(0);
}
