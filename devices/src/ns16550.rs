//! The registers of an NS16550A as a state machine: those of `vm-superio`, with additions for drivers.
//!
//! Used by the device in `serial.rs`, which connects the line.

use std::convert::Infallible;
use std::io::{Sink, sink};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Registers, SerialState};

use crate::device::AccessError;

mod saved;

pub(crate) use saved::UartState;

/// Size in bytes of the receive FIFO (`vm-superio`'s).
pub(crate) const FIFO: usize = 64;

/// Number of reads without input, each directly after another, from which on the guest counts as polling. A driver
/// that only waits for the transmitter reads LSR once and then sends.
const POLLS: u8 = 16;

/// Line status: read by drivers before and after every byte.
pub(crate) const LSR: u8 = 5;

mod reg {
    /// RBR, THR; with DLAB the divisor's low byte.
    pub(super) const DATA: u8 = 0;
    /// Interrupt enable; with DLAB the divisor's high byte.
    pub(super) const IER: u8 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub(super) const IIR_FCR: u8 = 2;
    pub(super) const LCR: u8 = 3;
    pub(super) const MCR: u8 = 4;
    pub(super) const MSR: u8 = 6;
    pub(super) const SCR: u8 = 7;
}

/// The data sheet's name of the register at `offset`. With DLAB the first two are the divisor's bytes, DLL and DLM, which
/// the access alone does not show.
pub(crate) fn register_name(offset: u64, is_write: bool) -> Option<&'static str> {
    Some(match u8::try_from(offset).ok()? {
        reg::DATA if is_write => "THR",
        reg::DATA => "RBR",
        reg::IER => "IER",
        reg::IIR_FCR if is_write => "FCR",
        reg::IIR_FCR => "IIR",
        reg::LCR => "LCR",
        reg::MCR => "MCR",
        LSR => "LSR",
        reg::MSR => "MSR",
        reg::SCR => "SCR",
        _ => return None,
    })
}

mod bit {
    pub(super) const IER_RDI: u8 = 1 << 0;
    pub(super) const IER_THRI: u8 = 1 << 1;
    pub(super) const IER_ALL: u8 = 0x0f;
    pub(super) const IIR_NONE: u8 = 1 << 0;
    pub(super) const IIR_THRI: u8 = 1 << 1;
    pub(super) const IIR_RDI: u8 = 1 << 2;
    pub(super) const IIR_FIFO: u8 = 0xc0;
    pub(super) const FCR_ENABLE: u8 = 1 << 0;
    pub(super) const FCR_CLEAR_RX: u8 = 1 << 1;
    pub(super) const LCR_DLAB: u8 = 1 << 7;
    pub(super) const MCR_RTS: u8 = 1 << 1;
    pub(super) const MCR_LOOP: u8 = 1 << 4;
    pub(super) const MCR_ALL: u8 = 0x1f;
    pub(super) const LSR_DR: u8 = 1 << 0;
    pub(super) const LSR_THRE: u8 = 1 << 5;
    pub(super) const LSR_TEMT: u8 = 1 << 6;
}

/// The guest-visible state.
pub(crate) struct UartRegisters {
    /// DLL, DLM, LCR, MCR, MSR, SCR and the receive FIFO.
    registers: Registers<NoTrigger, NoEvents, Sink>,
    /// Copies of IER, LCR and MCR: reading them from `registers` depends on DLAB, or needs a copy of
    /// the whole state.
    ier: u8,
    lcr: u8,
    mcr: u8,
    /// FCR's enable bit.
    fifo_enabled: bool,
    /// The interrupt of an empty transmitter is pending: set when it becomes empty or the interrupt is
    /// enabled, cleared when IIR reports it.
    thr_empty_pending: bool,
    /// The line accepts no more bytes: THRE and TEMT are clear.
    held: bool,
    /// All output has been sent: TEMT is set.
    idle: bool,
    /// The guest receives input.
    receives: bool,
    /// Number of reads without input that directly followed another one.
    polls: u8,
    /// The last access was a read without input.
    polled: bool,
    /// The interrupt or the room for input may have changed since the last [`take_changed`](Self::take_changed).
    changed: bool,
}

/// DLL and DLM, SCR, and the received bytes that the guest has not read.
fn stored(registers: &Registers<NoTrigger, NoEvents, Sink>) -> ([u8; 2], u8, Vec<u8>) {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        // Copied in `UartRegisters`, derived from the FIFO, or without effect here.
        interrupt_enable: _,
        interrupt_identification: _,
        line_control: _,
        line_status: _,
        modem_control: _,
        modem_status: _,
        scratch,
        in_buffer,
    } = registers.state();
    ([baud_divisor_low, baud_divisor_high], scratch, in_buffer)
}

/// Ignores the edges of `vm-superio`; the line follows [`UartRegisters::interrupts`] instead.
#[derive(Debug)]
struct NoTrigger;

impl Trigger for NoTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl UartRegisters {
    pub(crate) fn at_power_on() -> Self {
        Self {
            registers: Registers::new(NoTrigger, sink()),
            ier: 0,
            lcr: 0x03,
            mcr: 0x08,
            fifo_enabled: false,
            thr_empty_pending: false,
            held: false,
            idle: true,
            receives: false,
            polls: 0,
            polled: false,
            changed: true,
        }
    }

    /// Reads a register for the guest.
    pub(crate) fn read(&mut self, register: u8) -> u8 {
        if register == LSR {
            return self.read_lsr();
        }
        let polled = std::mem::take(&mut self.polled);
        match register {
            reg::DATA if !self.is_dlab_set() => {
                self.note_poll(polled, self.data_ready());
                self.changed = true;
                self.registers.read(reg::DATA)
            }
            reg::IER if !self.is_dlab_set() => self.ier,
            reg::IIR_FCR => self.read_iir(),
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            other => self.registers.read(other),
        }
    }

    /// Writes a register for the guest. Returns the byte that it sends, if any; the caller then has to
    /// call [`set_line`].
    ///
    /// [`set_line`]: Self::set_line
    pub(crate) fn write(&mut self, register: u8, value: u8) -> Result<Option<u8>, AccessError> {
        self.polled = false;
        self.changed |= register != reg::SCR;
        match register {
            reg::DATA if !self.is_dlab_set() => {
                self.thr_empty_pending = !self.held;
                if !self.is_loopback() {
                    return Ok(Some(value));
                }
                self.set(reg::DATA, value);
            }
            reg::IER if !self.is_dlab_set() => self.write_ier(value & bit::IER_ALL),
            reg::IIR_FCR => self.write_fcr(value),
            reg::LCR => {
                self.lcr = value;
                self.set(reg::LCR, value);
            }
            reg::MCR => {
                self.mcr = value & bit::MCR_ALL;
                self.set(reg::MCR, self.mcr);
                self.receives |= self.mcr & bit::MCR_RTS != 0;
            }
            LSR | reg::MSR => return Err(AccessError::ReadOnly),
            other => self.set(other, value),
        }
        Ok(None)
    }

    /// Sets the state of the line: `held` if it accepts no more bytes, `idle` if all output has been sent.
    pub(crate) fn set_line(&mut self, held: bool, idle: bool) {
        if held != self.held {
            self.thr_empty_pending = !held;
            self.changed = true;
        }
        (self.held, self.idle) = (held, idle);
    }

    /// Number of bytes of input that fit now.
    pub(crate) fn room(&self) -> usize {
        if self.receives && !self.is_loopback() { self.registers.fifo_capacity() } else { 0 }
    }

    /// Puts input into the FIFO, at most [`room`](Self::room) bytes.
    pub(crate) fn receive(&mut self, input: &[u8]) {
        if !input.is_empty() {
            self.changed = true;
            drop(self.registers.enqueue_raw_bytes(input));
        }
    }

    /// Reads received bytes, bypassing the registers, at most `buffer.len()`, and returns their number. Enables input from now on.
    pub(crate) fn take(&mut self, buffer: &mut [u8]) -> usize {
        self.receives = true;
        self.changed = true;
        // With DLAB `vm-superio` would return the divisor.
        self.set(reg::LCR, self.lcr & !bit::LCR_DLAB);
        let mut taken = 0;
        for byte in buffer {
            if !self.data_ready() {
                break;
            }
            *byte = self.registers.read(reg::DATA);
            taken += 1;
        }
        self.set(reg::LCR, self.lcr);
        taken
    }

    /// True if the next [`take_changed`](Self::take_changed) returns true.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed
    }

    /// Returns true if the interrupt or the room for input may have changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// True if an interrupt is enabled and pending: the level of the interrupt line.
    pub(crate) fn interrupts(&self) -> bool {
        self.cause() != bit::IIR_NONE
    }

    /// Reads LSR. There are no line errors and no break, only data ready and the transmitter's bits.
    #[inline]
    pub(crate) fn read_lsr(&mut self) -> u8 {
        let polled = std::mem::take(&mut self.polled);
        let data = if self.data_ready() { bit::LSR_DR } else { 0 };
        match (self.held, self.idle) {
            (true, _) => data,
            (false, false) => data | bit::LSR_THRE,
            (false, true) => {
                self.note_poll(polled, data != 0);
                data | bit::LSR_THRE | bit::LSR_TEMT
            }
        }
    }

    fn read_iir(&mut self) -> u8 {
        let cause = self.cause();
        if cause == bit::IIR_THRI {
            self.thr_empty_pending = false;
            self.changed = true;
        }
        if self.fifo_enabled { cause | bit::IIR_FIFO } else { cause }
    }

    fn write_ier(&mut self, value: u8) {
        let rising = value & !self.ier;
        self.ier = value;
        self.set(reg::IER, value);
        if rising & bit::IER_THRI != 0 {
            self.thr_empty_pending = !self.held;
        }
        self.receives |= rising & bit::IER_RDI != 0;
    }

    fn write_fcr(&mut self, value: u8) {
        self.fifo_enabled = value & bit::FCR_ENABLE != 0;
        if value & bit::FCR_CLEAR_RX != 0 {
            self.clear_fifo();
        }
    }

    /// Clears the receive FIFO, as a driver does when it starts, and stops input until the driver
    /// receives.
    fn clear_fifo(&mut self) {
        self.set(reg::LCR, self.lcr & !bit::LCR_DLAB);
        for _ in 0..FIFO {
            self.registers.read(reg::DATA);
        }
        self.set(reg::LCR, self.lcr);
        self.polls = 0;
        self.receives = self.ier & bit::IER_RDI != 0 || self.mcr & bit::MCR_RTS != 0;
    }

    /// Counts a read for input; `polled` is true if the previous access was one, too.
    fn note_poll(&mut self, polled: bool, found: bool) {
        self.polled = !found;
        if polled && !found && !self.receives {
            self.polls += 1;
            self.receives = self.polls >= POLLS;
            self.changed |= self.receives;
        }
    }

    /// The interrupt that IIR reports: the most urgent one that is enabled and pending.
    fn cause(&self) -> u8 {
        if self.ier & bit::IER_RDI != 0 && self.data_ready() {
            bit::IIR_RDI
        } else if self.ier & bit::IER_THRI != 0 && self.thr_empty_pending {
            bit::IIR_THRI
        } else {
            bit::IIR_NONE
        }
    }

    /// Writes a register of `vm-superio`; that fails only if its sink or its trigger fails, which
    /// these never do.
    fn set(&mut self, register: u8, value: u8) {
        drop(self.registers.write(register, value));
    }

    /// True if the line accepts no more bytes.
    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// True if there is received data.
    pub(crate) fn data_ready(&self) -> bool {
        self.registers.fifo_capacity() < FIFO
    }

    fn is_dlab_set(&self) -> bool {
        self.lcr & bit::LCR_DLAB != 0
    }

    fn is_loopback(&self) -> bool {
        self.mcr & bit::MCR_LOOP != 0
    }
}

/// The register of an access of `width` bytes at this offset.
#[inline]
pub(crate) fn register(offset: u64, width: usize) -> Result<u8, AccessError> {
    match width {
        1 => {}
        2 | 4 | 8 if offset.is_multiple_of(width as u64) => {}
        2 | 4 | 8 => return Err(AccessError::Misaligned),
        _ => return Err(AccessError::Width),
    }
    let register = u8::try_from(offset).ok();
    register.filter(|&register| register <= reg::SCR).ok_or(AccessError::NoRegister)
}

/// True if the register shows the guest the state of its output.
pub(crate) fn reports_transmitter(register: u8) -> bool {
    matches!(register, LSR | reg::IIR_FCR)
}
