//! Job control: a process in the background may neither read its controlling terminal nor set its mode
//! (termios(3), "Job control"; the kernel's rules are in `drivers/tty/tty_jobctrl.c`).

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use vmm_sys_util::signal::block_signal;

/// This process's present relation to a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JobState {
    /// It may read the terminal and set its mode.
    Foreground,
    /// It may do neither: another process group is in the foreground, and the kernel would stop this one for trying. That may
    /// change at any time, and no signal reports it if a running job is put into the foreground.
    Background,
    /// It may do neither any more: the session has ended, or the terminal is gone.
    Gone,
}

/// True if `terminal` is the controlling one of this process: only that one has a foreground group.
pub(super) fn controls(terminal: BorrowedFd<'_>) -> bool {
    match tcgetpgrp(terminal) {
        // Zero: the foreground group is in another PID namespace.
        Ok(_) | Err(Errno::OPNOTSUPP) => true,
        Err(_) => false,
    }
}

/// The state of this process for `terminal`, which is or was its controlling one if `controls`.
pub(super) fn job_state(terminal: BorrowedFd<'_>, controls: bool) -> JobState {
    match tcgetpgrp(terminal) {
        _ if !controls => JobState::Foreground,
        Ok(foreground) if foreground == getpgrp() => JobState::Foreground,
        Ok(_) => JobState::Background,
        // The group is not visible in this PID namespace; a read fails if it is another one.
        Err(Errno::OPNOTSUPP) => JobState::Foreground,
        Err(_) => JobState::Gone,
    }
}

/// Makes reads of this thread in the background fail with `EIO` instead of stopping the whole process group.
pub(super) fn fail_in_background() {
    // Fails if the signal is blocked already.
    let _ = block_signal(libc::SIGTTIN);
}
