//! The end of the guest: ends the programs, unmounts the disks, and leaves the rest to the kernel.

use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::sync;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use rustix::system::{RebootCommand, reboot};

use super::{Signals, print_line, tables};

/// Time that programs have after SIGTERM before they are killed.
const GRACE: Duration = Duration::from_millis(500);

/// The way in which the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It powers off.
    PowerOff,
    /// It reboots.
    Reboot,
}

/// Ends all programs, writes all data to the disks, and ends the machine.
pub(super) fn end(ending: Ending, signals: &dyn Signals) -> ! {
    // A shell ends on SIGHUP only, and a stopped program on no signal before SIGCONT.
    for signal in [Signal::TERM, Signal::HUP, Signal::CONT] {
        signal_all(signal);
    }
    let deadline = Instant::now() + GRACE;
    while !is_alone() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            signal_all(Signal::KILL);
            break;
        }
        let limit = Timespec::try_from(left).ok();
        let _ = poll(&mut [PollFd::new(&signals, PollFlags::IN)], limit.as_ref());
        signals.take();
    }
    sync();
    unmount_disks();
    now(ending)
}

/// Ends the machine at once.
pub(super) fn now(ending: Ending) -> ! {
    sync();
    let command = match ending {
        Ending::PowerOff => RebootCommand::PowerOff,
        Ending::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        print_line(format_args!("rvmm: the kernel refused to end the machine: {error}"));
    }
    // Process 1 must not return: that would be a kernel panic.
    loop {
        sleep(Duration::from_secs(3600));
    }
}

/// Sends a signal to every process but this one (kill(2), pid -1).
fn signal_all(signal: Signal) {
    // It is no failure if there is no other process.
    let _ = kill_process_group(Pid::INIT, signal);
}

/// Reaps all processes that have ended; true if no other process is left.
fn is_alone() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

/// Unmounts the file systems on disks, the last one mounted first.
fn unmount_disks() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let disks: Vec<_> =
        tables::mounts(&mounts).filter(|mount| mount.source.starts_with("/dev/")).collect();
    for disk in disks.iter().rev() {
        if let Err(error) = unmount(disk.place.as_str(), UnmountFlags::empty()) {
            print_line(format_args!("rvmm: cannot unmount {}: {error}", disk.place));
        }
    }
}
