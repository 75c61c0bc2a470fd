//! The saved state of the registers.

use serde::{Deserialize, Serialize};

use super::{FIFO, UartRegisters, bit, reg, stored};
use crate::lifecycle::RestoreError;

/// The guest-visible state, saved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UartState {
    divisor: [u8; 2],
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    fifo_enabled: bool,
    /// Received bytes that the guest has not read.
    received: Vec<u8>,
    thr_empty_pending: bool,
    held: bool,
    receives: bool,
    polls: u8,
    polled: bool,
}

impl UartRegisters {
    pub(crate) fn save(&self) -> UartState {
        let Self {
            registers,
            ier,
            lcr,
            mcr,
            fifo_enabled,
            thr_empty_pending,
            held,
            // Follows from the output that is not sent yet.
            idle: _,
            receives,
            polls,
            polled,
            // A restored device always updates its line.
            changed: _,
        } = self;
        let (divisor, scratch, received) = stored(registers);
        UartState {
            divisor,
            ier: *ier,
            lcr: *lcr,
            mcr: *mcr,
            scratch,
            fifo_enabled: *fifo_enabled,
            received,
            thr_empty_pending: *thr_empty_pending,
            held: *held,
            receives: *receives,
            polls: *polls,
            polled: *polled,
        }
    }

    /// Takes over a state, by the writes of a driver that lead to it.
    pub(crate) fn restore(&mut self, state: &UartState) -> Result<(), RestoreError> {
        let UartState {
            divisor: [low, high],
            ier,
            lcr,
            mcr,
            scratch,
            fifo_enabled,
            received,
            thr_empty_pending,
            held,
            receives,
            polls,
            polled,
        } = state;
        if received.len() > FIFO {
            return Err(RestoreError::invalid("the length of the input"));
        }
        *self = Self::at_power_on();
        self.set(reg::LCR, bit::LCR_DLAB);
        self.set(reg::DATA, *low);
        self.set(reg::IER, *high);
        self.set(reg::LCR, 0);
        self.set(reg::SCR, *scratch);
        // Not in loopback mode yet, in which there is no input.
        self.receive(received);
        (self.ier, self.lcr, self.mcr) = (ier & bit::IER_ALL, *lcr, mcr & bit::MCR_ALL);
        self.set(reg::IER, self.ier);
        self.set(reg::MCR, self.mcr);
        self.set(reg::LCR, self.lcr);
        self.fifo_enabled = *fifo_enabled;
        self.thr_empty_pending = *thr_empty_pending;
        self.held = *held;
        self.receives = *receives;
        (self.polls, self.polled) = (*polls, *polled);
        self.changed = true;
        Ok(())
    }
}
