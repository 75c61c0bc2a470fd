//! The end of the guest: everybody is told, disks are left clean, the kernel does the rest.

use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::sync;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use rustix::system::{RebootCommand, reboot};

use super::{tables, tell};
use crate::signals::Signals;

/// How long programs have after SIGTERM before they are killed.
const GRACE: Duration = Duration::from_millis(500);

/// What becomes of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It is switched off.
    PowerOff,
    /// It starts again.
    Reboot,
}

/// Ends all programs, writes everything back and leaves.
pub(super) fn end(ending: Ending, signals: &mut Signals) -> ! {
    // A shell heeds SIGHUP only, and what is stopped heeds nothing before SIGCONT.
    for signal in [Signal::TERM, Signal::HUP, Signal::CONT] {
        tell_all(signal);
    }
    let deadline = Instant::now() + GRACE;
    while !is_alone() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            tell_all(Signal::KILL);
            break;
        }
        let limit = Timespec::try_from(left).ok();
        let _ = poll(&mut [PollFd::new(signals, PollFlags::IN)], limit.as_ref());
        signals.take().for_each(drop);
    }
    sync();
    unmount_disks();
    now(ending)
}

/// Ends the machine without further ado.
pub(super) fn now(ending: Ending) -> ! {
    sync();
    let command = match ending {
        Ending::PowerOff => RebootCommand::PowerOff,
        Ending::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        tell(format_args!("rvmm: the kernel refused to end the machine: {error}"));
    }
    // Process 1 must not return: that would be a kernel panic.
    loop {
        sleep(Duration::from_secs(3600));
    }
}

/// Sends a signal to every process but this one (kill(2), pid -1).
fn tell_all(signal: Signal) {
    // Nobody there to hear it is fine.
    let _ = kill_process_group(Pid::INIT, signal);
}

/// Buries who has died, and says whether nobody is left.
fn is_alone() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

/// What lies on a disk is unmounted, the last one mounted first.
fn unmount_disks() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let disks: Vec<_> =
        tables::mounts(&mounts).filter(|mount| mount.source.starts_with("/dev/")).collect();
    for disk in disks.iter().rev() {
        if let Err(error) = unmount(disk.place.as_str(), UnmountFlags::empty()) {
            tell(format_args!("rvmm: cannot unmount {}: {error}", disk.place));
        }
    }
}
