//! Signals of the process, turned into a file descriptor: for those who own the process, the command and a guest's init.
//!
//! A signal handler belongs to the whole process, so this is one of the two places that keep something global (the other is
//! the terminal's saved mode). The library takes no signal by itself: see [`crate::io_loop::IoLoop::watch_signals`].

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Takes over `signals` (numbers 1 to 63) for the whole process. They no longer end or stop it; programs started from it
/// find them at their defaults.
///
/// # Errors
/// `AlreadyExists` where somebody in this process has done so before; else what the kernel says.
pub fn watch(signals: &[c_int]) -> io::Result<Signals> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    WAKE.set(fd).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    let wake = WAKE.get().ok_or(io::ErrorKind::NotFound)?.as_fd();
    for signal in signals {
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
