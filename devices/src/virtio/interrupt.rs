//! The interrupt of a virtio device: the status register, the line that follows it, and when results are worth an interrupt.

use std::io;
use std::sync::Arc;

use super::hold::Hold;
use crate::irq::{IrqLine, StatusPin};

/// Bits of the interrupt status register.
pub(super) mod isr {
    pub(crate) const USED_BUFFER: u32 = 1;
    pub(crate) const CONFIG_CHANGE: u32 = 2;
}

/// A device's interrupt. Who changes it under the device's lock drives the line when that is given back.
pub(super) struct Interrupt {
    pin: Arc<StatusPin>,
    is_undriven: bool,
    /// Results that wait for others, where the device allows it.
    pub(super) hold: Option<Hold>,
}

impl Interrupt {
    /// On this line, which is low; `may_hold` where results may wait for others.
    ///
    /// # Errors
    /// The host has no timers left.
    pub(super) fn new(line: Arc<dyn IrqLine>, may_hold: bool) -> io::Result<Self> {
        let hold = may_hold.then(Hold::new).transpose()?;
        Ok(Self { pin: Arc::new(StatusPin::new(line)), is_undriven: false, hold })
    }

    /// The register, for whoever does not hold the device's lock.
    pub(super) fn pin(&self) -> &Arc<StatusPin> {
        &self.pin
    }

    /// Sets bits of the register.
    pub(super) fn raise(&mut self, bits: u32) {
        self.is_undriven |= self.pin.raise(bits);
    }

    /// Clears bits of the register.
    pub(super) fn clear(&mut self, bits: u32) {
        self.is_undriven |= self.pin.clear(bits);
    }

    /// Others raise the line by themselves for results of queues, or nobody does any more.
    pub(super) fn share(&mut self, with_others: bool) {
        self.pin.share(if with_others { isr::USED_BUFFER } else { 0 });
        // They may have raised it.
        self.is_undriven |= !with_others;
    }

    /// Nothing is raised or held; the line is driven whatever it was: nobody's memory of it counts.
    pub(super) fn reset(&mut self) {
        self.clear(u32::MAX);
        self.is_undriven = true;
        self.forget();
    }

    /// Nothing is held any more.
    pub(super) fn forget(&mut self) {
        let _ = self.hold.as_mut().map(Hold::forget);
    }

    /// Drives the line now, where its level has changed.
    pub(super) fn sync(&mut self) {
        if let Some(pin) = self.undriven() {
            pin.drive();
        }
    }

    /// What has to be driven, once.
    pub(super) fn undriven(&mut self) -> Option<Arc<StatusPin>> {
        std::mem::take(&mut self.is_undriven).then(|| Arc::clone(&self.pin))
    }
}
