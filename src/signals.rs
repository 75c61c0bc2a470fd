//! Signals of the process, turned into a file descriptor: for those who own the process, the command and a guest's init.
//!
//! A signal handler belongs to the whole process, so this is one of the two places that keep something global (the other is
//! the terminal's saved mode). The library takes no signal by itself: see [`crate::io_loop::IoLoop::watch_signals`].

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::signal::register_signal_handler;

/// Readable while a signal waits to be taken.
static WAKE: OnceLock<OwnedFd> = OnceLock::new();
/// Bit N: signal N has come.
static CAME: AtomicU64 = AtomicU64::new(0);

/// The signals that [`watch`] took over. Copies mean the same signals; each signal is taken by one of them.
#[derive(Debug, Clone, Copy)]
pub struct Signals {
    wake: BorrowedFd<'static>,
}

/// Taken even where they were ignored: they ask a process for nothing, they only tell it something.
const ONLY_TELL: [c_int; 2] = [libc::SIGCONT, libc::SIGWINCH];

/// Takes over `signals` (numbers 1 to 63) for the whole process. They no longer end or stop it; programs started from it
/// find them at their defaults.
///
/// A signal that the process was started to ignore stays ignored, as `nohup` and shells that put a command into the
/// background want it (POSIX, XCU 2.12): only SIGCONT and SIGWINCH are taken in any case.
///
/// # Errors
/// `AlreadyExists` where somebody in this process has done so before; else what the kernel says.
pub fn watch(signals: &[c_int]) -> io::Result<Signals> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    WAKE.set(fd).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    let wake = WAKE.get().ok_or(io::ErrorKind::NotFound)?.as_fd();
    let ignored = ignored();
    for signal in signals {
        if ignored & bit(*signal) != 0 && !ONLY_TELL.contains(signal) {
            log::info!("Signal {signal} was ignored when this program started and stays so");
            continue;
        }
        register_signal_handler(*signal, note)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    }
    Ok(Signals { wake })
}

/// The handler. Only atomics and one system call that leaves `errno` alone (rustix makes it without libc).
extern "C" fn note(signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {
    CAME.fetch_or(bit(signal), Ordering::SeqCst);
    if let Some(wake) = WAKE.get() {
        // Full means that it is readable already.
        let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
    }
}

fn bit(signal: c_int) -> u64 {
    u32::try_from(signal).ok().and_then(|signal| 1u64.checked_shl(signal)).unwrap_or(0)
}

/// The signals that this process ignores, as bits; none where there is no /proc to ask.
fn ignored() -> u64 {
    fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_in(&status))
}

/// The bits of [`CAME`] for the line `SigIgn:` of a status file, whose lowest bit is signal 1 (proc_pid_status(5)).
fn ignored_in(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).map_or(0, |mask| mask << 1)
}

impl Signals {
    /// Takes the signals that have come since the last call, each once, in ascending order.
    pub fn take(self) -> impl Iterator<Item = c_int> + use<> {
        // First the descriptor, then the bits: a signal in between costs a wake-up for nothing, never the signal.
        let _ = rustix::io::read(self.wake, &mut [0u8; 8]);
        let came = CAME.swap(0, Ordering::SeqCst);
        (1..64).filter(move |signal| came & bit(*signal) != 0)
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
    fn the_signals_that_are_ignored_stand_in_the_status() {
        // `trap '' HUP INT` and no more, as a kernel writes it.
        let status = "Name:\tsh\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000000003\nSigCgt:\tffffffffffffffff\n";
        assert_eq!(ignored_in(status), bit(libc::SIGHUP) | bit(libc::SIGINT));
        for none in ["", "SigIgn:", "SigIgn:\tnone\n", "SigCgt:\t0000000000000003\n"] {
            assert_eq!(ignored_in(none), 0, "{none:?}");
        }
        // Rust's own start has programs ignore SIGPIPE.
        assert_ne!(ignored() & bit(libc::SIGPIPE), 0);
        assert_eq!(ignored() & bit(libc::SIGTERM), 0);
    }

    #[test]
    fn signals_come_once_each_and_only_one_party_may_watch_them() {
        let signals = watch(&[libc::SIGUSR1, libc::SIGUSR2])
            .expect("nobody else in this test binary watches");
        assert_eq!(signals.take().count(), 0, "none has come");

        let own = rustix::process::getpid();
        for signal in [rustix::process::Signal::USR2, rustix::process::Signal::USR1] {
            rustix::process::kill_process(own, signal).unwrap();
        }
        let mut came = Vec::new();
        while came.len() < 2 {
            let mut poll = [rustix::event::PollFd::new(&signals, rustix::event::PollFlags::IN)];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, None)).unwrap();
            came.extend(signals.take());
        }
        came.sort_unstable();
        assert_eq!(came, [libc::SIGUSR1, libc::SIGUSR2]);
        assert_eq!(signals.take().count(), 0, "each is taken once");

        assert_eq!(watch(&[]).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
