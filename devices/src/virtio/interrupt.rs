//! The interrupt of a virtio device: a line with its status register, or messages; and interrupt coalescing.

use std::io;
use std::sync::Arc;

use super::hold::Hold;
use crate::irq::{Interrupt, Messages, PendingInterrupt, StatusPin};

/// Bits of the interrupt status register.
pub(super) mod isr {
    pub(crate) const USED_BUFFER: u32 = 1;
    pub(crate) const CONFIG_CHANGE: u32 = 2;
}

/// A device's interrupt. Changes under the device's lock are delivered after releasing it.
pub(super) struct DriverInterrupt {
    to: Output,
    /// Interrupt coalescing, if the device allows it.
    pub(super) hold: Option<Hold>,
}

enum Output {
    Line {
        pin: Arc<StatusPin>,
        is_pending: bool,
    },
    Messages {
        to: Arc<dyn Messages>,
        /// Queues with used buffers that were not sent yet, a bit each.
        queues: u64,
        configuration: bool,
    },
}

impl DriverInterrupt {
    /// Creates an interrupt on this line, which is low, or these messages; with coalescing if `coalesces_interrupts`.
    ///
    /// # Errors
    /// The host has no timers left.
    pub(super) fn new(interrupt: Interrupt, coalesces_interrupts: bool) -> io::Result<Self> {
        let hold = coalesces_interrupts.then(Hold::new).transpose()?;
        let to = match interrupt {
            Interrupt::Line(line) => {
                Output::Line { pin: Arc::new(StatusPin::new(line)), is_pending: false }
            }
            Interrupt::Messages(to) => Output::Messages { to, queues: 0, configuration: false },
        };
        Ok(Self { to, hold })
    }

    /// The status register, accessible without the device's lock; `None` with messages.
    pub(super) fn pin(&self) -> Option<&Arc<StatusPin>> {
        match &self.to {
            Output::Line { pin, .. } => Some(pin),
            Output::Messages { .. } => None,
        }
    }

    /// The status register; 0 with messages.
    pub(super) fn status(&self) -> u32 {
        self.pin().map_or(0, |pin| pin.status())
    }

    /// The bits of the status register that were raised here, without those that the kernel may raise.
    pub(super) fn raised(&self) -> u32 {
        self.pin().map_or(0, |pin| pin.raised())
    }

    /// Interrupts the driver for used buffers of these queues, a bit each.
    pub(super) fn raise_queues(&mut self, mask: u64) {
        if mask == 0 {
            return;
        }
        match &mut self.to {
            Output::Line { pin, is_pending } => *is_pending |= pin.raise(isr::USED_BUFFER),
            Output::Messages { queues, .. } => *queues |= mask,
        }
    }

    /// Interrupts the driver for a change of the configuration space or of the device's status.
    pub(super) fn raise_configuration(&mut self) {
        match &mut self.to {
            Output::Line { pin, is_pending } => *is_pending |= pin.raise(isr::CONFIG_CHANGE),
            Output::Messages { configuration, .. } => *configuration = true,
        }
    }

    /// Sets the status register to that of a saved device.
    pub(super) fn restore(&mut self, status: u32) {
        if let Output::Line { pin, is_pending } = &mut self.to {
            *is_pending |= pin.raise(status & (isr::USED_BUFFER | isr::CONFIG_CHANGE));
        }
    }

    /// Clears bits of the status register.
    pub(super) fn clear(&mut self, bits: u32) {
        match &mut self.to {
            Output::Line { pin, is_pending } => *is_pending |= pin.clear(bits),
            Output::Messages { .. } => {}
        }
    }

    /// Sets whether remote queues raise the line directly for used buffers.
    pub(super) fn share(&mut self, with_remote: bool) {
        if let Output::Line { pin, is_pending } = &mut self.to {
            pin.set_external(if with_remote { isr::USED_BUFFER } else { 0 });
            // The line may be high.
            *is_pending |= !with_remote;
        }
    }

    /// Clears everything, and always drives a line: its level may differ from the remembered one.
    pub(super) fn reset(&mut self) {
        self.clear(u32::MAX);
        match &mut self.to {
            Output::Line { is_pending, .. } => *is_pending = true,
            Output::Messages { queues, configuration, .. } => {
                (*queues, *configuration) = (0, false)
            }
        }
        self.forget();
    }

    /// Drops the held results.
    pub(super) fn forget(&mut self) {
        let _ = self.hold.as_mut().map(Hold::forget);
    }

    /// Delivers the interrupt now, if there is one.
    pub(super) fn sync(&mut self) {
        if let Some(pending) = self.take_pending() {
            pending.deliver();
        }
    }

    /// Returns the interrupt if it has to be delivered, once per change.
    pub(super) fn take_pending(&mut self) -> Option<PendingInterrupt> {
        match &mut self.to {
            Output::Line { pin, is_pending } => {
                std::mem::take(is_pending).then(|| PendingInterrupt::Line(Arc::clone(pin)))
            }
            Output::Messages { queues: 0, configuration: false, .. } => None,
            Output::Messages { to, queues, configuration } => Some(PendingInterrupt::Messages {
                to: Arc::clone(to),
                queues: std::mem::take(queues),
                configuration: std::mem::take(configuration),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMessages;

    #[test]
    fn each_queue_and_the_configuration_have_a_message_of_their_own() {
        let messages = TestMessages::default();
        let mut interrupt =
            DriverInterrupt::new(Interrupt::Messages(Arc::new(messages.clone())), false).unwrap();
        assert!(interrupt.pin().is_none() && interrupt.take_pending().is_none());
        interrupt.raise_queues(0);
        interrupt.raise_queues(0b101);
        interrupt.raise_queues(0b1);
        interrupt.raise_configuration();
        assert_eq!(messages.take(), [], "not delivered under the device's lock");
        interrupt.sync();
        assert_eq!(messages.take(), [Some(0), Some(2), None]);
        interrupt.sync();
        interrupt.raise_queues(1);
        interrupt.reset();
        interrupt.sync();
        assert_eq!(messages.take(), [], "a reset drops what was not delivered");
    }
}
