//! Interrupts: level-triggered lines and a device's pin on its line, or messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use vmm_sys_util::eventfd::EventFd;

/// A level-triggered input of an interrupt controller.
///
/// Only the level counts: there are no edges to lose, a pulse is two levels. `set_level` may be
/// called from any thread and with a device's lock held, so it must neither block nor call a
/// device. Setting the level that the line already has does nothing.
pub trait IrqLine: Send + Sync {
    /// Drives the line high (interrupt requested) or low.
    fn set_level(&self, high: bool);

    /// Makes the host's kernel raise the line on each write to `event` (an irqfd), which nothing else may read from now on. The device
    /// still lowers the line, without knowing its level. Returns false, without any effect, if the kernel cannot do that.
    fn attach_irqfd(&self, event: &EventFd) -> bool {
        let _ = event;
        false
    }
}

/// Interrupts by messages (MSI-X), one for each queue of a device and one for its configuration. The transport assigns them.
pub trait Messages: Send + Sync {
    /// Sends the message for used buffers of `queue`.
    fn used_buffers(&self, queue: u16);

    /// Sends the message for a change of the configuration space.
    fn configuration_changed(&self);

    /// Makes the host's kernel send the message of `queue` on each write to `event` (an irqfd). Returns false, without any effect, if the
    /// kernel cannot do that.
    fn attach_irqfd(&self, queue: u16, event: &EventFd) -> bool;
}

/// The interrupt of a device: a line or messages. The device does not know which.
#[derive(Clone)]
pub enum Interrupt {
    /// A line.
    Line(Arc<dyn IrqLine>),
    /// Messages.
    Messages(Arc<dyn Messages>),
}

impl Interrupt {
    /// Makes the host's kernel interrupt the driver for `queue` on each write to `event` (an irqfd): see [`IrqLine::attach_irqfd`] and
    /// [`Messages::attach_irqfd`].
    #[must_use]
    pub fn attach_irqfd(&self, queue: u16, event: &EventFd) -> bool {
        match self {
            Self::Line(line) => line.attach_irqfd(event),
            Self::Messages(messages) => messages.attach_irqfd(queue, event),
        }
    }
}

/// An interrupt to be delivered after the device's lock was released.
#[must_use = "an interrupt that is not delivered is lost"]
pub enum PendingInterrupt {
    /// The line has to be driven.
    Line(Arc<StatusPin>),
    /// Messages have to be sent.
    Messages {
        /// The receiver.
        to: Arc<dyn Messages>,
        /// Queues with used buffers, a bit each.
        queues: u64,
        /// The configuration space has changed.
        configuration: bool,
    },
}

impl PendingInterrupt {
    /// Delivers it.
    pub fn deliver(self) {
        match self {
            Self::Line(pin) => pin.drive(),
            Self::Messages { to, queues, configuration } => {
                let queues = (0..64).filter(|queue| queues >> queue & 1 == 1);
                queues.for_each(|queue| to.used_buffers(queue));
                if configuration {
                    to.configuration_changed();
                }
            }
        }
    }
}

/// An unconnected line, for a device without an interrupt.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set_level(&self, _high: bool) {}
}

/// A device's pin on its line: remembers the level, so that the line is driven only when the
/// level changes.
///
/// Driving a line may cost a system call; a device derives its level after every access.
pub struct IrqPin {
    line: Arc<dyn IrqLine>,
    high: bool,
}

impl IrqPin {
    /// A pin on `line`, which must be low, as every line is after power-on.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, high: false }
    }

    /// Drives the level, if it differs from the current one.
    pub fn set(&mut self, high: bool) {
        if self.high != high {
            self.high = high;
            self.line.set_level(high);
        }
    }

    /// Drives the line low whatever the remembered level: for a reset, after which the two may
    /// differ.
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

/// An interrupt status register and its line, which is high while a bit is set. Both the device and the harts access it without the
/// device's lock: the I/O thread may hold that for as long as it takes to copy a request's data, and the hart that an
/// interrupt wakes reads the cause at once.
///
/// The thread that changes the level drives it afterwards. Several may do so concurrently: each rechecks the register when it is done, so
/// the last one leaves the line at the correct level. In between the line may be high for a moment too long, which a driver sees as
/// a spurious interrupt.
///
/// The kernel may raise the line, too ([`IrqLine::attach_irqfd`]), without changing the register. Its bits read as set as
/// long as it may do so: a driver that reads the cause finds one, and its acknowledgement lowers the line. An event between a
/// driver's acknowledgement and its check of the queues is found by that check; a later one interrupts again.
pub struct StatusPin {
    line: Arc<dyn IrqLine>,
    status: AtomicU32,
    /// Bits for which the kernel raises the line.
    external: AtomicU32,
}

impl StatusPin {
    /// A register without a bit set, and its pin on `line`, which must be low, as every line is after power-on.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, status: AtomicU32::new(0), external: AtomicU32::new(0) }
    }

    /// The bits that are set, or may be.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(SeqCst) | self.external.load(SeqCst)
    }

    /// The bits that are set.
    #[must_use]
    pub fn raised(&self) -> u32 {
        self.status.load(SeqCst)
    }

    /// Sets the bits for which the kernel raises the line from now on; 0 for none, after which the caller has to
    /// [`drive`](Self::drive) the line.
    pub fn set_external(&self, bits: u32) {
        self.external.store(bits, SeqCst);
    }

    /// Sets bits. Returns true if none was set: the caller has to [`drive`](Self::drive) the line.
    #[must_use]
    pub fn raise(&self, bits: u32) -> bool {
        bits != 0 && self.status.fetch_or(bits, SeqCst) == 0
    }

    /// Clears bits. Returns true if none is left and the line may be high: the caller has to [`drive`](Self::drive) it.
    #[must_use]
    pub fn clear(&self, bits: u32) -> bool {
        let before = self.status.fetch_and(!bits, SeqCst);
        before & !bits == 0 && (before != 0 || bits & self.external.load(SeqCst) != 0)
    }

    fn is_high(&self) -> bool {
        self.status.load(SeqCst) != 0
    }

    /// Drives the line to the level of the register.
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

    /// A line that records its level, and yields to other threads at the worst moments.
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
    fn a_line_is_driven_only_when_its_level_changes() {
        let line = Arc::new(Slow::default());
        let pin = StatusPin::new(Arc::clone(&line) as Arc<dyn IrqLine>);
        assert!(!pin.clear(u32::MAX) && !pin.raise(0));
        assert!(pin.raise(1) && !pin.raise(1) && !pin.raise(2));
        assert!(!*line.level.lock().unwrap(), "not driven yet");
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
    fn bits_the_kernel_may_raise_read_as_set_and_acknowledging_lowers_the_line() {
        let line = Arc::new(Slow::default());
        let pin = StatusPin::new(Arc::clone(&line) as Arc<dyn IrqLine>);
        pin.set_external(1);
        assert_eq!(pin.status(), 1);
        assert!(pin.clear(1) && pin.clear(3), "whether it is high or not");
        assert!(!pin.clear(2) && !pin.clear(0), "not one of the kernel's bits");
        assert!(pin.raise(2) && !pin.clear(1), "a bit is left");
        assert_eq!(pin.status(), 3);
        assert!(pin.clear(3));
        *line.level.lock().unwrap() = true;
        pin.drive();
        assert!(!*line.level.lock().unwrap());
        pin.set_external(0);
        assert_eq!(pin.status(), 0);
        assert!(!pin.clear(1));
    }

    #[test]
    fn however_two_threads_race_the_line_ends_at_the_level_of_the_register() {
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
