//! The terminal's mode: raw while a guest uses it, restored whenever rvmm exits or stops, and unchanged in the background.
//!
//! A process has one controlling terminal and its mode outlives the process, so the mode to restore is in a static, which
//! the panic hook and the signals also use.

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

use super::foreground::{JobState, controls, job_state};

/// The terminal that a console uses.
static TAKEN: Mutex<Option<Taken>> = Mutex::new(None);

/// Interval at which a process in the background checks if it is in the foreground: no signal reports it if a shell's `fg` finds
/// the process running. Shorter than a user notices.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// The terminal and the state of its mode.
struct Taken {
    terminal: OwnedFd,
    /// It is the controlling one of this process.
    controls: bool,
    /// The mode to restore. `None` until this process is in the foreground for the first time: before, the mode is another program's.
    before: Option<Termios>,
    mode: Mode,
    timer: OwnedFd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Not set by rvmm; becomes raw as soon as this process is in the foreground.
    Untouched,
    /// Raw.
    Raw,
    /// Restored before the process stops; becomes raw again afterwards, or if it does not stop.
    Suspended,
    /// Restored before the process exits; becomes raw again only by [`resume`].
    Restored,
}

/// Keeps a terminal raw until it is dropped, while the process is in the foreground. There is one at a time in a process.
#[derive(Debug)]
pub(super) struct RawMode {
    /// The timer's descriptor, which is open as long as this exists.
    event_fd: RawFd,
}

impl RawMode {
    /// Sets a terminal to raw mode: every key is passed on at once, without an echo, and none raises a signal. In the background
    /// this is left to a [`RawMode::update`] in the foreground.
    ///
    /// Output processing stays on (ONLCR), so that rvmm's own lines stay readable.
    ///
    /// # Errors
    /// `AlreadyExists` if another console has it; else the error of the system call.
    pub(super) fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let mut slot = lock();
        if slot.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let terminal = terminal.try_clone_to_owned()?;
        let controls = controls(terminal.as_fd());
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let event_fd = timer.as_raw_fd();
        let mut taken = Taken { terminal, controls, before: None, mode: Mode::Untouched, timer };
        taken.update()?;
        *slot = Some(taken);
        drop(slot);
        restore_on_panic();
        Ok(Self { event_fd })
    }

    /// The descriptor that is readable when [`RawMode::update`] is due, or when the size of the terminal may have changed.
    pub(super) fn event_fd(&self) -> RawFd {
        self.event_fd
    }

    /// Consumes the event of [`RawMode::event_fd`].
    pub(super) fn process_event(&self) {
        if let Some(taken) = lock().as_mut() {
            // Fails if the event was stale.
            let _ = rustix::io::read(&taken.timer, &mut [0u8; 8]);
            if taken.mode == Mode::Suspended {
                taken.mode = Mode::Untouched;
            }
        }
    }

    /// Returns the state of this process, and sets the terminal to raw mode if it is in the foreground.
    pub(super) fn update(&self) -> JobState {
        lock().as_mut().map_or(JobState::Gone, |taken| taken.update().unwrap_or(JobState::Gone))
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
    fn job_state(&self) -> JobState {
        job_state(self.terminal.as_fd(), self.controls)
    }

    fn update(&mut self) -> io::Result<JobState> {
        let now = self.job_state();
        match (now, self.mode) {
            (JobState::Foreground, Mode::Untouched) => {
                self.make_raw()?;
                // Its size may have changed.
                self.set_timer(Duration::ZERO);
            }
            (JobState::Background, Mode::Untouched | Mode::Raw | Mode::Suspended) => {
                self.mode = Mode::Untouched;
                self.set_timer(CHECK_INTERVAL);
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
        // TCSANOW: pending input and output stay.
        tcsetattr(&self.terminal, OptionalActions::Now, &raw)?;
        self.mode = Mode::Raw;
        Ok(())
    }

    fn restore(&mut self) {
        if self.mode == Mode::Raw
            // In the background the call would stop the process (SIGTTOU), and the mode is another program's.
            && self.job_state() == JobState::Foreground
            && let Some(before) = &self.before
        {
            // Fails if the terminal is gone; then there is nothing to restore.
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, before);
        }
        self.mode = Mode::Restored;
    }

    /// Makes the descriptor of [`RawMode::event_fd`] readable after this time.
    fn set_timer(&self, time: Duration) {
        // Zero would disarm the timer.
        let nanos = time.max(Duration::from_nanos(1)).as_nanos();
        let it_value = Timespec { tv_sec: 0, tv_nsec: i64::try_from(nanos).unwrap_or(1) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // Fails only for invalid times.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}

/// Restores the mode that the terminal had before a console used it, if one does. A second call does nothing.
///
/// Dropping the console, a panic and the signals that [`crate::io_loop::IoLoop::watch_signals`] takes do this by
/// themselves; a program that exits through `std::process::exit` calls it first.
pub fn restore() {
    // In the panic hook this thread may hold the lock already, and must not wait for itself.
    let mut taken = match TAKEN.try_lock() {
        Ok(taken) => taken,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(taken) = taken.as_mut() {
        taken.restore();
    }
}

/// Handles SIGTSTP: restores the terminal and stops this process until SIGCONT.
pub(crate) fn suspend() {
    give_back();
    // SIGTTOU stops a process by default, as SIGTSTP would without rvmm's handler, but not in an orphaned process group
    // (POSIX XBD 3.264), which has no shell that could send SIGCONT.
    let _ = kill_process(getpid(), Signal::TTOU);
}

/// Handles Ctrl-A z: stops the whole process group, as Ctrl-Z does.
pub(super) fn suspend_group() {
    give_back();
    let _ = kill_current_process_group(Signal::TSTP);
}

/// Restores the terminal before the process stops; the timer makes it raw again afterwards, or if the process does not stop.
fn give_back() {
    restore();
    if let Some(taken) = lock().as_mut() {
        taken.mode = Mode::Suspended;
        taken.set_timer(CHECK_INTERVAL);
    }
}

/// Handles SIGWINCH: the console that has the terminal reads its size.
pub(crate) fn resized() {
    if let Some(taken) = lock().as_ref() {
        taken.set_timer(Duration::ZERO);
    }
}

/// Handles SIGCONT: sets the terminal to raw mode again, if this process is in the foreground. Its size may have changed.
pub(crate) fn resume() {
    if let Some(taken) = lock().as_mut() {
        taken.mode = Mode::Untouched;
        let _ = taken.update();
    }
}

fn lock() -> MutexGuard<'static, Option<Taken>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs a panic hook: the message has to be readable, and with `panic = "abort"` nothing is dropped after it.
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

    /// True if the descriptor of its event_fd is readable, or becomes so at once.
    fn is_due(raw: &RawMode) -> bool {
        let taken = lock();
        let timer = &taken.as_ref().unwrap().timer;
        assert_eq!(timer.as_raw_fd(), raw.event_fd());
        let mut fds = [PollFd::new(timer, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 })).unwrap() > 0
    }

    // One test, because a process has only one raw terminal.
    #[test]
    fn the_terminal_is_raw_only_while_a_guest_has_it() {
        let (_master, terminal) = new_terminal();
        let before = tcgetattr(&terminal).unwrap();

        let raw = RawMode::enter(terminal.as_fd()).unwrap();
        assert!(is_raw(&terminal));
        let output = tcgetattr(&terminal).unwrap().output_modes;
        assert!(
            output.contains(OutputModes::OPOST | OutputModes::ONLCR),
            "rvmm's lines stay readable"
        );
        let second = RawMode::enter(terminal.as_fd()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        drop(raw);
        assert!(!is_raw(&terminal));
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.output_modes, before.output_modes);

        let raw = RawMode::enter(terminal.as_fd()).unwrap();
        // Set to expire at once, but the kernel may need a moment.
        assert!(is_due(&raw));
        raw.process_event();
        // A new size makes the descriptor readable once.
        assert!(!is_due(&raw));
        resized();
        resized();
        assert!(is_due(&raw));
        raw.process_event();
        assert!(!is_due(&raw));
        restore();
        assert!(!is_raw(&terminal), "restored while the console exists");
        assert_eq!(raw.update(), JobState::Foreground);
        assert!(!is_raw(&terminal), "and an update does not make it raw");
        resume();
        assert!(is_raw(&terminal), "raw again after a stop");
        assert!(is_due(&raw));
        thread::spawn(|| panic!("on purpose")).join().unwrap_err();
        assert!(!is_raw(&terminal), "restored by the panic hook");
        drop(raw);
        resume();
        assert!(!is_raw(&terminal), "no console has it any more");
    }
}
