//! The host's side of the power button: SIGTERM presses it once, and a guest that does not power off in time is stopped.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A machine's power button, which is kept across reboots of the guest. Its descriptor is readable once the grace period after
/// a press has expired.
#[derive(Debug)]
pub struct Button {
    presses: EventFd,
    timer: OwnedFd,
    grace: Duration,
    was_pressed: AtomicBool,
}

impl Button {
    /// Creates a button; the guest has `grace` (greater than zero) to power off after a press.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(grace: Duration) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            presses: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            grace,
            was_pressed: AtomicBool::new(false),
        })
    }

    /// A descriptor for the device: readable after a press.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn device_event(&self) -> io::Result<EventFd> {
        self.presses.try_clone()
    }

    /// Presses the button and starts the grace period. False if it was pressed before, or the press fails: then the caller stops
    /// the machine.
    pub fn press(&self) -> bool {
        if self.was_pressed.swap(true, Ordering::SeqCst) {
            return false;
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(it_value) = Timespec::try_from(self.grace) else { return false };
        let timer = Itimerspec { it_interval: none, it_value };
        let is_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok();
        is_set && self.presses.write(1).is_ok()
    }

    /// True once after the grace period has expired.
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
    fn only_the_first_press_counts() {
        let button = Button::new(Duration::from_secs(3600)).unwrap();
        let device = button.device_event().unwrap();
        assert!(device.read().is_err());
        assert!(button.press());
        assert_eq!(device.read().unwrap(), 1);
        assert!(!button.press());
        assert!(device.read().is_err() && !button.is_over());
    }

    #[test]
    fn the_grace_period_expires_once_after_a_press() {
        let button = Button::new(Duration::from_millis(1)).unwrap();
        assert!(!button.is_over(), "not pressed");
        assert!(button.press());
        let mut fds = [PollFd::new(&button.timer, PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        assert!(button.is_over());
        assert!(!button.is_over(), "once");
    }
}
