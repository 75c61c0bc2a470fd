//! Interrupt lines: a wire with a level, and a device's end of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A wire into an interrupt controller.
///
/// The level is the truth: there are no edges to lose, a pulse is two levels. `set_level` may be
/// called from any thread and with a device's lock held, so it must neither block nor call a
/// device. Setting the level that the line already has does nothing.
pub trait IrqLine: Send + Sync {
    /// Drives the line high (interrupt requested) or low.
    fn set_level(&self, high: bool);
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

/// A device's end of its line where the level is decided under the device's lock and may be driven after it: the hart that
/// an interrupt wakes looks at the device at once, and would wait for the lock of whoever raised it.
///
/// Whoever changes the level drives it afterwards. Several may do so at the same time: each looks again when it is done, so
/// the last one leaves the line as it has to be. In between it may be high for a moment too long, which a driver takes for
/// an interrupt without a cause.
pub struct LatePin {
    line: Arc<dyn IrqLine>,
    high: AtomicBool,
}

impl LatePin {
    /// A pin on `line`, which is taken to be low, as every line is after power-on.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, high: AtomicBool::new(false) }
    }

    /// Decides the level. True where it was another: somebody has to [`drive`](Self::drive) it now. Under the device's lock.
    #[must_use]
    pub fn decide(&self, high: bool) -> bool {
        self.high.swap(high, SeqCst) != high
    }

    /// Drives the level that was decided.
    pub fn drive(&self) {
        loop {
            let high = self.high.load(SeqCst);
            self.line.set_level(high);
            if self.high.load(SeqCst) == high {
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
        let pin = LatePin::new(Arc::clone(&line) as Arc<dyn IrqLine>);
        assert!(!pin.decide(false));
        assert!(pin.decide(true) && !pin.decide(true));
        assert!(!*line.level.lock().unwrap(), "nobody has driven it yet");
        pin.drive();
        assert!(*line.level.lock().unwrap());
        assert_eq!(line.calls.load(Relaxed), 1);
    }

    #[test]
    fn however_two_threads_race_the_line_ends_as_it_was_decided_last() {
        for _ in 0..2_000 {
            let line = Arc::new(Slow::default());
            let pin = Arc::new(LatePin::new(Arc::clone(&line) as Arc<dyn IrqLine>));
            // The device's lock.
            let last = Arc::new(Mutex::new(false));
            let turn = |high: bool| {
                let (pin, last) = (Arc::clone(&pin), Arc::clone(&last));
                thread::spawn(move || {
                    let changed = {
                        let mut last = last.lock().unwrap();
                        *last = high;
                        pin.decide(high)
                    };
                    if changed {
                        pin.drive();
                    }
                })
            };
            let threads = [turn(true), turn(false)];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(*line.level.lock().unwrap(), *last.lock().unwrap());
        }
    }
}
