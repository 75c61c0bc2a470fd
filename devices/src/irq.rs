//! Interrupt lines: a wire with a level, and a device's end of it.

use std::sync::Arc;

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
