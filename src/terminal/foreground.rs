//! Job control as a reader of the terminal sees it: who is in the background reads nothing and sets nothing there
//! (termios(3), "Job control"; the kernel's rules are in `drivers/tty/tty_jobctrl.c`).

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use vmm_sys_util::signal::block_signal;

/// What this process may do with a terminal now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Read it and set its mode.
    Foreground,
    /// Neither: another process group has it, and the kernel would stop this one for trying. That may change at any time,
    /// without a word where a running job is put into the foreground.
    Background,
    /// Neither, ever again: the session that it belonged to has ended, or the terminal is gone.
    Gone,
}

/// Whether `terminal` is the controlling one of this process: only there is a foreground and a background.
pub(super) fn controls(terminal: BorrowedFd<'_>) -> bool {
    match tcgetpgrp(terminal) {
        // Zero: the foreground group is in another PID namespace.
        Ok(_) | Err(Errno::OPNOTSUPP) => true,
        Err(_) => false,
    }
}

/// How this process stands to `terminal`, which is or was its controlling one if `controls`.
pub(super) fn standing(terminal: BorrowedFd<'_>, controls: bool) -> Standing {
    match tcgetpgrp(terminal) {
        _ if !controls => Standing::Foreground,
        Ok(foreground) if foreground == getpgrp() => Standing::Foreground,
        Ok(_) => Standing::Background,
        // Who that is cannot be told from in here; a read will tell.
        Err(Errno::OPNOTSUPP) => Standing::Foreground,
        Err(_) => Standing::Gone,
    }
}

/// Has reads of this thread in the background fail with `EIO` instead of stopping all of the process's group.
pub(super) fn fail_in_background() {
    // An error means that it is so already.
    let _ = block_signal(libc::SIGTTIN);
}
