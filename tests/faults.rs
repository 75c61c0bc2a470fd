//! Ring 1: a snapshot is saved while system calls fail, one after the other: what was there before stays whole, or the new one is.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use rvmm::config::VmConfig;
use rvmm::hypervisor::VmState;
use rvmm::layout::Span;
use rvmm::memory::GuestRam;
use rvmm::snapshot::{SavedMachine, Snapshot, SnapshotWriter};
use rvmm_devices::testing::skip;

const SPAN: Span = Span { base: 0x8000_0000, size: 16 << 20 };

/// Names the folder to save to, in the environment of the program whose system calls fail.
const FOLDER: &str = "RVMM_TEST_SAVE_TO";

/// Saves a machine whose memory begins with `first`.
fn save(folder: &Path, first: u8) -> Result<(), rvmm::error::Error> {
    let ram = GuestRam::new(SPAN, false)?;
    ram.write(SPAN.base, &[first; 8192]).unwrap();
    let read = |at: u64, to: &mut [u8]| ram.read(SPAN.base + at, to).map_err(io::Error::other);
    let failed = |source| rvmm::error::Error::File { verb: "save to", path: folder.into(), source };
    let mut writer = SnapshotWriter::create(folder, SPAN.size, None)?;
    writer.add_pages(std::slice::from_ref(&(0..1 << 20)), &read).map_err(failed)?;
    let complete = writer.finish_memory(&read).map_err(failed)?;
    let vm = VmState { time: first.into(), harts: Vec::new(), irqchip: None };
    let config = VmConfig { mem: SPAN.size, ..VmConfig::default() };
    let (disks, devices) = (Vec::new(), Vec::new());
    complete.finish(SavedMachine { saved_at_ns: 0, config, disks, vm, devices }, folder)?;
    Ok(())
}

/// The first byte of memory in a snapshot, which is the time, too.
fn first(folder: &Path) -> u8 {
    let snapshot = Snapshot::open(folder).expect("it is whole");
    let ram = GuestRam::new(SPAN, false).unwrap();
    snapshot.fill(&ram).unwrap();
    let mut byte = [0];
    ram.read(SPAN.base + 8191, &mut byte).unwrap();
    assert_eq!(u64::from(byte[0]), snapshot.machine().vm.time);
    byte[0]
}

/// Runs in the program whose system calls fail; does nothing otherwise.
#[test]
fn a_program_saves_where_it_is_told() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let code = if save(folder.as_ref(), 2).is_ok() { 0 } else { 9 };
        // Without the test runner, whose own output may fail.
        std::process::exit(code);
    }
}

#[test]
fn whatever_system_call_of_a_save_fails_the_old_snapshot_or_the_new_one_is_whole() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    let strace = |kind: &str, effect: &str| {
        let mut command = Command::new("strace");
        command.args(["-f", "-qqq", "-o", "/dev/null", "-e", &format!("trace={kind}")]);
        command.args(["-e", &format!("inject={kind}:{effect}")]);
        command.arg(std::env::current_exe().unwrap());
        command.args(["--exact", "a_program_saves_where_it_is_told", "--test-threads=1"]);
        command.env(FOLDER, &folder).stdout(Stdio::null()).stderr(Stdio::null());
        command.status()
    };
    match Command::new("strace").args(["-e", "trace=none", "true"]).stderr(Stdio::null()).status() {
        Err(error) => return skip(&format!("there is no strace: {error}")),
        Ok(status) if !status.success() => return skip("strace may not trace programs here"),
        Ok(_) => {}
    }
    let (mut failures, mut saved_despite) = (0, 0);
    // System calls, and some more of each than the program makes.
    let kinds = [
        ("mkdir", 2),
        ("flock", 2),
        ("openat", 14),
        ("ftruncate", 2),
        ("pwrite64", 2),
        ("write", 6),
        ("fsync", 6),
        ("renameat2", 2),
        ("getdents64", 3),
    ];
    for effect in ["error=EIO", "error=ENOSPC", "signal=SIGKILL"] {
        for (kind, number) in
            kinds.iter().flat_map(|(kind, most)| (1..=*most).map(move |number| (kind, number)))
        {
            save(&folder, 1).unwrap();
            let code = strace(kind, &format!("{effect}:when={number}")).unwrap().code();
            let found = first(&folder);
            if code == Some(0) {
                assert_eq!(found, 2, "{kind} {number}");
            } else {
                // After the rename the new snapshot is in place, even if a later call fails.
                failures += 1;
                saved_despite += usize::from(found == 2);
            }
            let left = fs::read_dir(temporary.path()).unwrap().count();
            assert!(left <= 2, "{kind} {number}: {left} files are left");
        }
    }
    assert!(failures > 40, "only {failures} failures");
    assert!(saved_despite < failures / 3, "{saved_despite} of {failures} after the rename");
    // What the killed ones have left is gone after the next save.
    save(&folder, 1).unwrap();
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 1);
}
