//! Interrupt lines: a wire with a level, and a device's end of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use vmm_sys_util::eventfd::EventFd;

/// A wire into an interrupt controller.
///
/// The level is the truth: there are no edges to lose, a pulse is two levels. `set_level` may be
/// called from any thread and with a device's lock held, so it must neither block nor call a
/// device. Setting the level that the line already has does nothing.
pub trait IrqLine: Send + Sync {
    /// Drives the line high (interrupt requested) or low.
    fn set_level(&self, high: bool);

    /// Has the host's kernel raise the line whenever somebody writes to `event`, which nobody else may read from now on. Who answers
    /// for the line lowers it as ever, without knowing whether it is high. False, and nothing has changed, where that cannot be had.
    fn raise_by(&self, event: &EventFd) -> bool {
        let _ = event;
        false
    }
}

/// A line that leads nowhere, for a device without an interrupt.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set_level(&self, _high: bool) {}
}

/// A device's end of its line: remembers what it drives, so that the line is touched only when the
/// level changes.
///
/// A line may cost a system call; a device derives its level after every access.
pub struct IrqPin {
    line: Arc<dyn IrqLine>,
    high: bool,
}

impl IrqPin {
    /// A pin on `line`, which is taken to be low, as every line is after power-on.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, high: false }
    }

    /// Drives the level, if it is not the one driven already.
    pub fn set(&mut self, high: bool) {
        if self.high != high {
            self.high = high;
            self.line.set_level(high);
        }
    }

    /// Drives the level low, whatever it was: for a reset, after which nobody's memory of it
    /// counts.
    pub fn reset(&mut self) {
        self.high = false;
        self.line.set_level(false);
    }

    /// The level that the pin drives.
    #[must_use]
    pub fn is_high(&self) -> bool {
        self.high
    }
}

/// A register of interrupt bits and the line that follows it: high while a bit is set. Both sides reach it without the device's
/// lock: whoever works on the device may hold that for as long as it takes to copy a request's data, and the hart that an
/// interrupt wakes asks at once why.
///
/// Whoever changes the level drives it afterwards. Several may do so at the same time: each looks again when it is done, so
/// the last one leaves the line as it has to be. In between it may be high for a moment too long, which a driver takes for
/// an interrupt without a cause.
///
/// Somebody else may raise the line, too ([`IrqLine::raise_by`]), without a word to the register. Their bits are said to be set as
/// long as they may: a driver that looks for a cause finds one, and what it acknowledges lowers the line. What they do between a
/// driver's acknowledgement and its look at the device is seen by that look; later, it interrupts again.
pub struct StatusPin {
    line: Arc<dyn IrqLine>,
    status: AtomicU32,
    /// Bits of those who raise the line by themselves.
    others: AtomicU32,
}

impl StatusPin {
    /// A register without a bit set, and its pin on `line`, which is taken to be low, as every line is after power-on.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, status: AtomicU32::new(0), others: AtomicU32::new(0) }
    }

    /// The bits that are set, or may be.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(SeqCst) | self.others.load(SeqCst)
    }

    /// From now on others raise the line by themselves for these bits, or nobody does where there are none. Who ends that has to
    /// [`drive`](Self::drive) the line afterwards.
    pub fn share(&self, bits: u32) {
        self.others.store(bits, SeqCst);
    }

    /// Sets bits. True where none was: somebody has to [`drive`](Self::drive) the line now.
    #[must_use]
    pub fn raise(&self, bits: u32) -> bool {
        bits != 0 && self.status.fetch_or(bits, SeqCst) == 0
    }

    /// Clears bits. True where none is left and the line may be high: somebody has to [`drive`](Self::drive) it now.
    #[must_use]
    pub fn clear(&self, bits: u32) -> bool {
        let before = self.status.fetch_and(!bits, SeqCst);
        before & !bits == 0 && (before != 0 || bits & self.others.load(SeqCst) != 0)
    }

    fn is_high(&self) -> bool {
        self.status.load(SeqCst) != 0
    }

    /// Drives the level that follows from the bits.
    pub fn drive(&self) {
        loop {
            let high = self.is_high();
            self.line.set_level(high);
            if self.is_high() == high {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use std::thread;

    use super::*;

    /// A line that notes its level, and lets another thread in at the worst moments.
    #[derive(Default)]
    struct Slow {
        level: Mutex<bool>,
        calls: AtomicU32,
    }

    impl IrqLine for Slow {
        fn set_level(&self, high: bool) {
            thread::yield_now();
            *self.level.lock().unwrap() = high;
            self.calls.fetch_add(1, Relaxed);
            thread::yield_now();
        }
    }

    #[test]
    fn a_line_is_driven_only_where_the_level_was_another() {
        let line = Arc::new(Slow::default());
        let pin = StatusPin::new(Arc::clone(&line) as Arc<dyn IrqLine>);
        assert!(!pin.clear(u32::MAX) && !pin.raise(0));
        assert!(pin.raise(1) && !pin.raise(1) && !pin.raise(2));
        assert!(!*line.level.lock().unwrap(), "nobody has driven it yet");
        pin.drive();
        assert!(*line.level.lock().unwrap());
        assert_eq!(line.calls.load(Relaxed), 1);
        assert!(!pin.clear(1), "a bit is left");
        assert_eq!(pin.status(), 2);
        assert!(pin.clear(3) && !pin.clear(3));
        pin.drive();
        assert!(!*line.level.lock().unwrap());
    }

    #[test]
    fn what_others_may_have_raised_reads_as_set_and_is_lowered_when_acknowledged() {
        let line = Arc::new(Slow::default());
        let pin = StatusPin::new(Arc::clone(&line) as Arc<dyn IrqLine>);
        pin.share(1);
        assert_eq!(pin.status(), 1);
        assert!(pin.clear(1) && pin.clear(3), "whether it is high or not");
        assert!(!pin.clear(2) && !pin.clear(0), "that is not theirs");
        assert!(pin.raise(2) && !pin.clear(1), "a bit is left");
        assert_eq!(pin.status(), 3);
        assert!(pin.clear(3));
        *line.level.lock().unwrap() = true;
        pin.drive();
        assert!(!*line.level.lock().unwrap());
        pin.share(0);
        assert_eq!(pin.status(), 0);
        assert!(!pin.clear(1));
    }

    #[test]
    fn however_two_threads_race_the_line_ends_as_the_register_says() {
        for _ in 0..2_000 {
            let line = Arc::new(Slow::default());
            let pin = Arc::new(StatusPin::new(Arc::clone(&line) as Arc<dyn IrqLine>));
            let turn = |raises: bool| {
                let pin = Arc::clone(&pin);
                thread::spawn(move || {
                    let changed = if raises { pin.raise(1) } else { pin.clear(1) };
                    if changed {
                        pin.drive();
                    }
                })
            };
            let threads = [turn(true), turn(false)];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(*line.level.lock().unwrap(), pin.status() != 0);
        }
    }
}
