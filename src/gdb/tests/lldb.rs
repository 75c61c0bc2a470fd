//! LLDB as the debugger, where it is installed: it speaks GDB's protocol, to harts of tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use rvmm_devices::testing::skip;

use super::super::testing::client::{CODE, Life, Place};
use super::{COUNTER, WAITER, finish};
use crate::vcpu::stop::StopReason;

/// The newest LLDB in PATH: `lldb`, or `lldb-19` as Debian has it; or `None`, said aloud.
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

/// What LLDB prints for these commands, connected to `place`. It leaves at the first that fails.
fn tell(lldb: &Path, place: &Place, commands: &[String]) -> String {
    let first = [
        "settings set target.default-arch riscv64".to_owned(),
        "settings set plugin.process.gdb-remote.packet-timeout 120".to_owned(),
        format!("process connect --plugin gdb-remote unix-connect://{}", place.socket.display()),
    ];
    let mut command = Command::new(lldb);
    command.args(["--no-lldbinit", "--batch", "--no-use-colors"]).stdin(Stdio::null());
    for one in first.iter().chain(commands) {
        command.args(["--one-line", one]);
    }
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

/// True if these pieces stand in `text` one after the other.
#[track_caller]
fn in_order(text: &str, pieces: &[&str]) {
    let mut rest = text;
    for piece in pieces {
        let found = rest.split_once(piece);
        rest = found.unwrap_or_else(|| panic!("no {piece:?} in its place in:\n{text}")).1;
    }
}

#[test]
fn lldb_attaches_reads_and_writes_stops_at_a_breakpoint_steps_and_leaves() {
    let Some(lldb) = lldb() else { return };
    let (place, life) = (Place::new(true), Life::new(&[COUNTER, WAITER]));
    place.begin(&life);
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
    let said = tell(&lldb, &place, &commands);
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
    in_order(&said, &seen);
    assert_eq!(life.memory(word, 8), 0x1122_3344_5566_7788_u64.to_le_bytes());
    // It goes on from what was written, without the breakpoint.
    assert!(life.harts[0].await_a0(0x1002) > 0x1002);
    finish(place, life);
}

#[test]
fn lldb_has_no_watchpoints_and_ends_the_machine_where_it_quits_without_detaching() {
    let Some(lldb) = lldb() else { return };
    let (place, life) = (Place::new(true), Life::new(&[COUNTER]));
    place.begin(&life);
    let commands = [
        format!("breakpoint set --hardware --address {:#x}", CODE + 4),
        format!("watchpoint set expression -- {:#x}", CODE + 0x100),
    ];
    let said = tell(&lldb, &place, &commands);
    in_order(&said, &["ardware breakpoint", "error: Watchpoint creation failed"]);
    assert_eq!(life.end(), StopReason::Requested);
    place.server.over();
    place.server.end(0);
}
