//! The terminal's mode: raw while a guest owns it, as it was before on every way out, and untouched in the background.
//!
//! A process has one controlling terminal and its mode outlives the process, so what has to be put back is kept in one
//! place that the panic hook and the signals reach too.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic;
use std::sync::{Mutex, MutexGuard, Once, PoisonError, TryLockError};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_current_process_group, kill_process};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::foreground::{Standing, controls, standing};

/// The terminal that a console has now.
static TAKEN: Mutex<Option<Taken>> = Mutex::new(None);

/// How often a process in the background looks whether it has come to the foreground: nothing tells it where a shell's `fg`
/// finds it running. Shorter than people notice.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The terminal, and how it stands with its mode.
struct Taken {
    terminal: OwnedFd,
    /// It is the controlling one of this process.
    controls: bool,
    /// What is put back. `None` until it was ours for the first time: in the background it is in the mode of somebody else.
    before: Option<Termios>,
    mode: Mode,
    timer: OwnedFd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// As others want it; raw as soon as it is ours.
    Theirs,
    /// Raw: it is the guest's.
    Raw,
    /// Put back for a stop that has not come yet; raw again when that is over, or has not come.
    Suspended,
    /// Put back before an end; raw again after [`resume`] only.
    Restored,
}

/// Keeps a terminal raw as long as it lives and the process is in the foreground. There is one at a time in a process.
#[derive(Debug)]
pub(super) struct RawMode {
    /// The timer's, which lives as long as this.
    attention: RawFd,
}

impl RawMode {
    /// Makes a terminal raw: every key is handed on at once, unechoed, and none makes a signal. In the background that waits for
    /// a [`RawMode::look`] in the foreground.
    ///
    /// Output keeps being processed (a line feed returns the carriage), so that rvmm's own lines stay readable.
    ///
    /// # Errors
    /// `AlreadyExists` while another console has it; else what the kernel says.
    pub(super) fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let mut slot = lock();
        if slot.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let terminal = terminal.try_clone_to_owned()?;
        let controls = controls(terminal.as_fd());
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let attention = timer.as_raw_fd();
        let mut taken = Taken { terminal, controls, before: None, mode: Mode::Theirs, timer };
        taken.look()?;
        *slot = Some(taken);
        drop(slot);
        restore_on_panic();
        Ok(Self { attention })
    }

    /// The descriptor that is readable when [`RawMode::look`] is due, or when the terminal may have another size.
    pub(super) fn attention(&self) -> RawFd {
        self.attention
    }

    /// What made the descriptor readable is being seen to.
    pub(super) fn attend(&self) {
        if let Some(taken) = lock().as_mut() {
            // Empty where the event was stale.
            let _ = rustix::io::read(&taken.timer, &mut [0u8; 8]);
            if taken.mode == Mode::Suspended {
                taken.mode = Mode::Theirs;
            }
        }
    }

    /// Sees whether the terminal is ours now, and makes it raw where it has become so.
    pub(super) fn look(&self) -> Standing {
        lock().as_mut().map_or(Standing::Gone, |taken| taken.look().unwrap_or(Standing::Gone))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(mut taken) = lock().take() {
            taken.restore();
        }
    }
}

impl Taken {
    fn standing(&self) -> Standing {
        standing(self.terminal.as_fd(), self.controls)
    }

    fn look(&mut self) -> io::Result<Standing> {
        let now = self.standing();
        match (now, self.mode) {
            (Standing::Foreground, Mode::Theirs) => {
                self.make_raw()?;
                // It may have another size by now.
                self.look_in(Duration::ZERO);
            }
            (Standing::Background, Mode::Theirs | Mode::Raw | Mode::Suspended) => {
                self.mode = Mode::Theirs;
                self.look_in(LOOK_EVERY);
            }
            _ => {}
        }
        Ok(now)
    }

    fn make_raw(&mut self) -> io::Result<()> {
        let before = match self.before.take() {
            Some(before) => before,
            None => tcgetattr(&self.terminal)?,
        };
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        self.before = Some(before);
        // At once, dropping nothing.
        tcsetattr(&self.terminal, OptionalActions::Now, &raw)?;
        self.mode = Mode::Raw;
        Ok(())
    }

    fn restore(&mut self) {
        if self.mode == Mode::Raw
            // Trying in the background would stop the process (SIGTTOU), and the mode there is somebody else's.
            && self.standing() == Standing::Foreground
            && let Some(before) = &self.before
        {
            // The terminal may be gone; then there is nothing to put back.
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, before);
        }
        self.mode = Mode::Restored;
    }

    /// Has the descriptor of [`RawMode::attention`] be readable after this time.
    fn look_in(&self, time: Duration) {
        // Zero would switch the timer off.
        let nanos = time.max(Duration::from_nanos(1)).as_nanos();
        let it_value = Timespec { tv_sec: 0, tv_nsec: i64::try_from(nanos).unwrap_or(1) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // Refused only for times that are none.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}

/// Puts the terminal back to what it was before a guest got it, if one has it. Does nothing the second time.
///
/// Dropping the console, a panic and the signals that [`crate::io_loop::IoLoop::watch_signals`] takes do this by
/// themselves; a program that leaves through `std::process::exit` calls it first.
pub fn restore() {
    // A panic may have come while the lock was held: then by this very thread, which must not wait for itself.
    let mut taken = match TAKEN.try_lock() {
        Ok(taken) => taken,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(taken) = taken.as_mut() {
        taken.restore();
    }
}

/// SIGTSTP has come: gives the terminal back to the shell and stops this process until SIGCONT.
pub(crate) fn suspend() {
    give_back();
    // By default it stops a process as SIGTSTP does, for which there is a handler: not in a group that no shell looks after
    // (orphaned, POSIX XBD 3.264), where nobody would ever send SIGCONT.
    let _ = kill_process(getpid(), Signal::TTOU);
}

/// The user wants back to the shell: does to all of the process's group what Ctrl-Z does to others.
pub(super) fn suspend_group() {
    give_back();
    let _ = kill_current_process_group(Signal::TSTP);
}

/// Before a stop; afterwards, or if none comes of it, the terminal is taken again.
fn give_back() {
    restore();
    if let Some(taken) = lock().as_mut() {
        taken.mode = Mode::Suspended;
        taken.look_in(LOOK_EVERY);
    }
}

/// SIGWINCH has come: who has the terminal looks at its size.
pub(crate) fn resized() {
    if let Some(taken) = lock().as_ref() {
        taken.look_in(Duration::ZERO);
    }
}

/// SIGCONT has come: takes the terminal again, if the shell has given it to this process. It may have another size by now.
pub(crate) fn resume() {
    if let Some(taken) = lock().as_mut() {
        taken.mode = Mode::Theirs;
        let _ = taken.look();
    }
}

fn lock() -> MutexGuard<'static, Option<Taken>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
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
    use std::thread;

    use rustix::event::{PollFd, PollFlags, poll};
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

    /// Whether the descriptor of its attention is readable, or becomes so at once.
    fn is_due(raw: &RawMode) -> bool {
        let taken = lock();
        let timer = &taken.as_ref().unwrap().timer;
        assert_eq!(timer.as_raw_fd(), raw.attention());
        let mut fds = [PollFd::new(timer, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 })).unwrap() > 0
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
        raw.attend();
        // A new size is told to who has the terminal, once.
        assert!(!is_due(&raw));
        resized();
        resized();
        assert!(is_due(&raw));
        raw.attend();
        assert!(!is_due(&raw));
        restore();
        assert!(!is_raw(&terminal), "restored without the console's help");
        assert_eq!(raw.look(), Standing::Foreground);
        assert!(!is_raw(&terminal), "and nobody takes it back before the end");
        resume();
        assert!(is_raw(&terminal), "taken again after a stop");
        assert!(is_due(&raw));
        thread::spawn(|| panic!("on purpose")).join().unwrap_err();
        assert!(!is_raw(&terminal), "restored by the panic hook");
        drop(raw);
        resume();
        assert!(!is_raw(&terminal), "nobody has it any more");
    }
}
