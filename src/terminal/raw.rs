//! The terminal's mode: raw while a guest owns it, as it was before on every way out.
//!
//! A process has one controlling terminal and its mode outlives the process, so what has to be put back is kept in one
//! place that the panic hook and the signals reach too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, TryLockError};

use rustix::process::{Signal, getpgrp, getpid, kill_process};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The terminal that is raw now.
static RAW: Mutex<Option<Taken>> = Mutex::new(None);

struct Taken {
    terminal: OwnedFd,
    before: Termios,
    raw: Termios,
    resized: Arc<EventFd>,
}

/// Keeps a terminal raw as long as it lives. There is one at a time in a process.
#[derive(Debug)]
pub(super) struct RawMode {
    /// Readable when the terminal may have another size.
    resized: Arc<EventFd>,
}

impl RawMode {
    /// Makes a terminal raw: every key is handed on at once, unechoed, and none makes a signal.
    ///
    /// Output keeps being processed (a line feed returns the carriage), so that rvmm's own lines stay readable.
    ///
    /// # Errors
    /// `AlreadyExists` while another console has it; else what the kernel says.
    pub(super) fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let mut taken = lock();
        if taken.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let terminal = terminal.try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        let resized = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let new = Taken { terminal, before, raw, resized: Arc::clone(&resized) };
        new.apply(&new.raw)?;
        *taken = Some(new);
        drop(taken);
        restore_on_panic();
        Ok(Self { resized })
    }

    /// The descriptor that is readable when the terminal may have another size.
    pub(super) fn resized(&self) -> RawFd {
        self.resized.as_raw_fd()
    }

    /// The new size was looked at, or will be.
    pub(super) fn note_resized(&self) {
        // Empty where the event was stale.
        drop(self.resized.read());
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(taken) = lock().take() {
            // The terminal may be gone; then there is nothing to put back.
            let _ = taken.apply(&taken.before);
        }
    }
}

impl Taken {
    /// Changes the mode at once, dropping nothing. A background process would be stopped for trying (termios(3),
    /// SIGTTOU): there the terminal is somebody else's, and left alone.
    fn apply(&self, mode: &Termios) -> io::Result<()> {
        let in_background =
            tcgetpgrp(&self.terminal).is_ok_and(|foreground| foreground != getpgrp());
        if in_background {
            return Ok(());
        }
        Ok(tcsetattr(&self.terminal, OptionalActions::Now, mode)?)
    }
}

/// Puts the terminal back to what it was before a guest got it, if one has it. Does nothing the second time.
///
/// Dropping the console, a panic and the signals that [`crate::io_loop::IoLoop::watch_signals`] takes do this by
/// themselves; a program that leaves through `std::process::exit` calls it first.
pub fn restore() {
    // A panic may have come while the lock was held: then by this very thread, which must not wait for itself.
    let taken = match RAW.try_lock() {
        Ok(taken) => taken,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(taken) = taken.as_ref() {
        let _ = taken.apply(&taken.before);
    }
}

/// SIGTSTP has come: gives the terminal back to the shell and stops this process until SIGCONT.
pub(crate) fn suspend() {
    restore();
    let _ = kill_process(getpid(), Signal::STOP);
}

/// SIGWINCH has come: who has the terminal looks at its size.
pub(crate) fn resized() {
    if let Some(taken) = lock().as_ref() {
        // Refused means that it is readable already.
        let _ = taken.resized.write(1);
    }
}

/// SIGCONT has come: takes the terminal again, which may have another size by now.
pub(crate) fn resume() {
    resized();
    if let Some(taken) = lock().as_ref() {
        let _ = taken.apply(&taken.raw);
    }
}

fn lock() -> MutexGuard<'static, Option<Taken>> {
    RAW.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The message of a panic has to be readable, and with `panic = "abort"` nothing is dropped after it.
fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            restore();
            report(panic);
        }));
    });
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::thread;

    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{InputModes, LocalModes};

    use super::*;

    fn new_terminal() -> (OwnedFd, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        (master, slave)
    }

    fn is_raw(terminal: &OwnedFd) -> bool {
        let mode = tcgetattr(terminal).unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        !mode.local_modes.intersects(cooked) && !mode.input_modes.contains(InputModes::IXON)
    }

    // One test, because the terminal that is raw is the process's.
    #[test]
    fn the_terminal_is_raw_only_while_a_guest_has_it() {
        let (_master, terminal) = new_terminal();
        let before = tcgetattr(&terminal).unwrap();

        let raw = RawMode::enter(terminal.as_fd()).unwrap();
        assert!(is_raw(&terminal));
        let output = tcgetattr(&terminal).unwrap().output_modes;
        assert!(
            output.contains(OutputModes::OPOST | OutputModes::ONLCR),
            "own lines stay readable"
        );
        let second = RawMode::enter(terminal.as_fd()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        drop(raw);
        assert!(!is_raw(&terminal));
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.output_modes, before.output_modes);

        let raw = RawMode::enter(terminal.as_fd()).unwrap();
        // A new size is told to who has the terminal, once.
        assert!(raw.resized.read().is_err());
        resized();
        resized();
        assert_eq!(raw.resized.read().ok(), Some(2));
        raw.note_resized();
        assert!(raw.resized.read().is_err());
        restore();
        assert!(!is_raw(&terminal), "restored without the console's help");
        resume();
        assert!(is_raw(&terminal), "taken again after a stop");
        assert_eq!(raw.resized.read().ok(), Some(1));
        thread::spawn(|| panic!("on purpose")).join().unwrap_err();
        assert!(!is_raw(&terminal), "restored by the panic hook");
        drop(raw);
        resume();
        assert!(!is_raw(&terminal), "nobody has it any more");
    }
}
