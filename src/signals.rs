//! Signals of the process as a file descriptor: for the owner of the process, which is the command or a guest's init.
//!
//! A signal handler belongs to the whole process, so this is one of the two places with global state (the other is
//! the terminal's saved mode). The library takes over no signal by itself: see [`crate::io_loop::IoLoop::watch_signals`].

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::signal::register_signal_handler;

/// Readable while a signal is pending.
static WAKE: OnceLock<OwnedFd> = OnceLock::new();
/// Bit N: signal N is pending.
static PENDING: AtomicU64 = AtomicU64::new(0);

/// The signals that [`watch`] took over. Copies share them: each signal is taken by one copy.
#[derive(Debug, Clone, Copy)]
pub struct Signals {
    wake: BorrowedFd<'static>,
}

/// Taken over even if they were ignored: they only notify a process.
const NOTIFICATIONS: [c_int; 2] = [libc::SIGCONT, libc::SIGWINCH];

/// Takes over `signals` (numbers 1 to 63) for the whole process. They no longer end or stop it; programs started from it
/// have their default actions.
///
/// A signal that the process was started to ignore stays ignored, as `nohup` and shells that put a command into the
/// background require (POSIX, XCU 2.12): only SIGCONT and SIGWINCH are taken over in any case.
///
/// # Errors
/// `AlreadyExists` if this process has called it before; else the kernel's error.
pub fn watch(signals: &[c_int]) -> io::Result<Signals> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    WAKE.set(fd).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    let wake = WAKE.get().ok_or(io::ErrorKind::NotFound)?.as_fd();
    let ignored = ignored();
    for signal in signals {
        if ignored & bit(*signal) != 0 && !NOTIFICATIONS.contains(signal) {
            log::info!("Signal {signal} was ignored when this program started and stays ignored");
            continue;
        }
        register_signal_handler(*signal, mark_pending)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    }
    Ok(Signals { wake })
}

/// A descriptor that is readable while a signal waits to be taken; `None` if none was taken over.
pub(crate) fn descriptor() -> Option<BorrowedFd<'static>> {
    WAKE.get().map(AsFd::as_fd)
}

/// True if one of these signals has come and nobody has taken it yet.
pub(crate) fn is_waiting(signals: &[c_int]) -> bool {
    let wanted = signals.iter().fold(0, |bits, signal| bits | bit(*signal));
    PENDING.load(Ordering::SeqCst) & wanted != 0
}

/// The signal handler. Only atomics and one system call that does not change `errno` (rustix makes it without libc).
extern "C" fn mark_pending(signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {
    PENDING.fetch_or(bit(signal), Ordering::SeqCst);
    if let Some(wake) = WAKE.get() {
        // A full counter is readable already.
        let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
    }
}

fn bit(signal: c_int) -> u64 {
    u32::try_from(signal).ok().and_then(|signal| 1u64.checked_shl(signal)).unwrap_or(0)
}

/// The signals that this process ignores, as bits; none without /proc.
fn ignored() -> u64 {
    fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_in(&status))
}

/// The bits of [`PENDING`] for the line `SigIgn:` of a status file, whose lowest bit is signal 1 (proc_pid_status(5)).
fn ignored_in(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).map_or(0, |mask| mask << 1)
}

impl Signals {
    /// Takes the signals received since the last call, each once, in ascending order.
    pub fn take(self) -> impl Iterator<Item = c_int> + use<> {
        // First the descriptor, then the bits: a signal in between causes a spurious wake-up and is not lost.
        let _ = rustix::io::read(self.wake, &mut [0u8; 8]);
        let pending = PENDING.swap(0, Ordering::SeqCst);
        (1..64).filter(move |signal| pending & bit(*signal) != 0)
    }
}

impl rvmm_init::Signals for Signals {
    fn take(&self) -> Vec<c_int> {
        Self::take(*self).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status_file() {
        // The kernel's format after `trap '' HUP INT`.
        let status = "Name:\tsh\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000000003\nSigCgt:\tffffffffffffffff\n";
        assert_eq!(ignored_in(status), bit(libc::SIGHUP) | bit(libc::SIGINT));
        for none in ["", "SigIgn:", "SigIgn:\tnone\n", "SigCgt:\t0000000000000003\n"] {
            assert_eq!(ignored_in(none), 0, "{none:?}");
        }
        // Rust's runtime ignores SIGPIPE.
        assert_ne!(ignored() & bit(libc::SIGPIPE), 0);
        assert_eq!(ignored() & bit(libc::SIGTERM), 0);
    }

    #[test]
    fn each_signal_is_taken_once_and_only_one_caller_may_watch_them() {
        let signals =
            watch(&[libc::SIGUSR1, libc::SIGUSR2]).expect("no other test of this binary watches");
        assert_eq!(signals.take().count(), 0, "none is pending");

        let own = rustix::process::getpid();
        for signal in [rustix::process::Signal::USR2, rustix::process::Signal::USR1] {
            rustix::process::kill_process(own, signal).unwrap();
        }
        assert_eq!(descriptor().map(|fd| fd.as_raw_fd()), Some(signals.as_raw_fd()));
        let mut taken = Vec::new();
        while taken.len() < 2 {
            let mut poll = [rustix::event::PollFd::new(&signals, rustix::event::PollFlags::IN)];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, None)).unwrap();
            let is_first = taken.is_empty();
            assert!(!is_first || is_waiting(&[libc::SIGUSR1, libc::SIGUSR2]));
            assert!(!is_waiting(&[libc::SIGTERM]));
            taken.extend(signals.take());
        }
        taken.sort_unstable();
        assert_eq!(taken, [libc::SIGUSR1, libc::SIGUSR2]);
        assert_eq!(signals.take().count(), 0, "each is taken once");
        assert!(!is_waiting(&[libc::SIGUSR1, libc::SIGUSR2]));

        assert_eq!(watch(&[]).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
