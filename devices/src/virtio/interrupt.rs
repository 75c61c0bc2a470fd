//! The interrupt of a virtio device: the status register, its line, and interrupt coalescing.

use std::io;
use std::sync::Arc;

use super::hold::Hold;
use crate::irq::{IrqLine, StatusPin};

/// Bits of the interrupt status register.
pub(super) mod isr {
    pub(crate) const USED_BUFFER: u32 = 1;
    pub(crate) const CONFIG_CHANGE: u32 = 2;
}

/// A device's interrupt. Changes under the device's lock are driven onto the line after releasing it.
pub(super) struct Interrupt {
    pin: Arc<StatusPin>,
    has_pending_irq: bool,
    /// Interrupt coalescing, if the device allows it.
    pub(super) hold: Option<Hold>,
}

impl Interrupt {
    /// Creates an interrupt on this line, which is low; with coalescing if `coalesces_interrupts`.
    ///
    /// # Errors
    /// The host has no timers left.
    pub(super) fn new(line: Arc<dyn IrqLine>, coalesces_interrupts: bool) -> io::Result<Self> {
        let hold = coalesces_interrupts.then(Hold::new).transpose()?;
        Ok(Self { pin: Arc::new(StatusPin::new(line)), has_pending_irq: false, hold })
    }

    /// The register, accessible without the device's lock.
    pub(super) fn pin(&self) -> &Arc<StatusPin> {
        &self.pin
    }

    /// Sets bits of the register.
    pub(super) fn raise(&mut self, bits: u32) {
        self.has_pending_irq |= self.pin.raise(bits);
    }

    /// Clears bits of the register.
    pub(super) fn clear(&mut self, bits: u32) {
        self.has_pending_irq |= self.pin.clear(bits);
    }

    /// Sets whether remote queues raise the line directly for used buffers.
    pub(super) fn share(&mut self, with_remote: bool) {
        self.pin.set_external(if with_remote { isr::USED_BUFFER } else { 0 });
        // The line may be high.
        self.has_pending_irq |= !with_remote;
    }

    /// Clears everything, and always drives the line: its level may differ from the remembered one.
    pub(super) fn reset(&mut self) {
        self.clear(u32::MAX);
        self.has_pending_irq = true;
        self.forget();
    }

    /// Drops the held results.
    pub(super) fn forget(&mut self) {
        let _ = self.hold.as_mut().map(Hold::forget);
    }

    /// Drives the line now, if its level has changed.
    pub(super) fn sync(&mut self) {
        if let Some(pin) = self.take_pending_irq() {
            pin.drive();
        }
    }

    /// Returns the pin if it has to be driven, once per change.
    pub(super) fn take_pending_irq(&mut self) -> Option<Arc<StatusPin>> {
        std::mem::take(&mut self.has_pending_irq).then(|| Arc::clone(&self.pin))
    }
}
