//! The power button from outside: SIGTERM presses it once, and a guest that does not power off in time is stopped.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A machine's button, over all lives of its guest. Its descriptor is readable once a guest that was asked to power off
/// has had its time.
#[derive(Debug)]
pub struct Button {
    presses: EventFd,
    timer: OwnedFd,
    patience: Duration,
    was_pressed: AtomicBool,
}

impl Button {
    /// A button; a guest has `patience` (more than nothing) to power off after it was pressed.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(patience: Duration) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            presses: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            patience,
            was_pressed: AtomicBool::new(false),
        })
    }

    /// The device's end: readable after a press.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn device_end(&self) -> io::Result<EventFd> {
        self.presses.try_clone()
    }

    /// Presses the button, and gives the guest its time. False where that was done before, or cannot be: the caller ends the
    /// machine then.
    pub fn press(&self) -> bool {
        if self.was_pressed.swap(true, Ordering::SeqCst) {
            return false;
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(it_value) = Timespec::try_from(self.patience) else { return false };
        let timer = Itimerspec { it_interval: none, it_value };
        let is_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok();
        is_set && self.presses.write(1).is_ok()
    }

    /// Whether the guest has had its time; true once.
    #[must_use]
    pub fn is_over(&self) -> bool {
        rustix::io::read(&self.timer, &mut [0_u8; 8]).is_ok()
    }
}

impl AsRawFd for Button {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn the_first_press_is_one_and_the_second_is_not() {
        let button = Button::new(Duration::from_secs(3600)).unwrap();
        let device = button.device_end().unwrap();
        assert!(device.read().is_err());
        assert!(button.press());
        assert_eq!(device.read().unwrap(), 1);
        assert!(!button.press());
        assert!(device.read().is_err() && !button.is_over());
    }

    #[test]
    fn the_time_of_a_guest_that_was_asked_runs_out() {
        let button = Button::new(Duration::from_millis(1)).unwrap();
        assert!(!button.is_over(), "nobody was asked");
        assert!(button.press());
        let mut fds = [PollFd::new(&button.timer, PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        assert!(button.is_over());
        assert!(!button.is_over(), "once");
    }
}
