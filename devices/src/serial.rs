//! NS16550A UART: the board's serial port.
//!
//! Source: National Semiconductor PC16550D data sheet; the registers, the loopback, and the receive
//! FIFO are those of `vm-superio`. That model only has interrupt edges and a transmitter that is always
//! ready, so this file adds: the interrupt as a level (RX data or an empty transmitter, IIR with one cause
//! at a time and in order), THRE and TEMT that reflect the backend's state, and the FIFO bits of
//! FCR and IIR by which drivers detect a 16550A.
//!
//! Registers are one byte each, at consecutive addresses (`reg-shift` 0). An access of 2, 4 or 8 bytes accesses only the
//! register at its own address, as on QEMU's `virt`: a store writes its low byte, a load returns the
//! register in its low byte and zeroes above. There are no receive errors, and the modem inputs are not connected and
//! never change: neither of those interrupts occurs. The receive interrupt is raised
//! with the first byte whatever the trigger level. Baud rate and word length are stored and have no
//! effect. Clearing the transmit FIFO does nothing: bytes that the guest has written are sent.
//!
//! Input is read from the host only once the guest receives: it has enabled the receive interrupt,
//! raised RTS, polls for data, or reads through the SBI debug console. Before that a driver would discard it when it starts, and a
//! script piped into a booting guest would lose its first lines.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::{Endpoint, FilePath, ModelConfig, Slot};
use crate::console::{ConsoleBackend, NullConsole};
use crate::device::{
    Access, AccessError, FdtDesc, FdtProperty, MmioDevice, RegisterName, SerialLine, Source,
};
use crate::irq::{IrqLine, IrqPin};
use crate::lifecycle::{Lifecycle, PauseError, RestoreError, SaveError, SavedState};
use crate::link::Link;
use crate::ns16550::{
    FIFO, LSR, UartRegisters, UartState, register, register_name, reports_transmitter,
};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "serial",
    summary: "NS16550A serial port, connected to the console",
    keys: &[],
    placement: Placement::Fixed,
    irqs: 1,
    shares_ram: false,
};

/// The catalog's entry for additional ports.
pub(crate) const UART: Model = Model {
    name: "uart",
    summary: "additional NS16550A serial port, connected to another machine or program",
    keys: &[Key {
        name: "to",
        value: "WHERE",
        help: "null, pty, file:PATH, unix:PATH, connect:PATH or stdio (needed)",
    }],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// The configuration of the board's port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {}

/// The configuration of an additional port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UartConfig {
    /// The host end.
    pub to: Endpoint,
    /// The slot on the board; `None` for the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// Bytes that a guest may send after it has read THRE. The queue has room for many times that when the line is busy.
const TX_FIFO: u32 = 64;

/// The clock of QEMU's `virt` board, from which drivers compute the divisor, in Hz.
const CLOCK_FREQUENCY_HZ: u32 = 3_686_400;

/// The device.
pub struct Serial {
    name: &'static str,
    link: Link,
    irq: IrqPin,

    state: UartRegisters,
}

impl ModelConfig for SerialConfig {
    fn build(&self, wiring: Wiring) -> Built {
        let backend = wiring.console.unwrap_or_else(|| Box::new(NullConsole));
        port(MODEL.name, backend, wiring.irq)
    }
}

impl ModelConfig for UartConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        self.to.path_mut().into_iter().collect()
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, wiring: Wiring) -> Built {
        let backend = wiring.host.console(&self.to);
        let backend = backend.map_err(|source| BuildError::Backend { model: UART.name, source })?;
        port(UART.name, backend, wiring.irq)
    }
}

fn port(name: &'static str, backend: Box<dyn ConsoleBackend>, irq: Arc<dyn IrqLine>) -> Built {
    let link = Link::new(name, backend).map_err(|source| BuildError::Host {
        model: name,
        what: "event descriptors",
        source,
    })?;
    let state = UartRegisters::at_power_on();
    Ok(Device::Mmio(Box::new(Serial { name, link, irq: IrqPin::new(irq), state })))
}

/// The state of a serial port.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SerialState {
    registers: UartState,
    /// Output that the host has not accepted.
    output: Vec<u8>,
}

impl Lifecycle for Serial {
    fn pause(&mut self) -> Result<(), PauseError> {
        self.link.flush();
        self.sync_line();
        self.sync();
        Ok(())
    }

    fn resume(&mut self) {
        self.link.flush();
        self.sync_line();
        self.sync();
    }

    fn reset(&mut self) {
        self.state = UartRegisters::at_power_on();
        self.link.flush();
        self.sync_line();
        self.sync();
        self.irq.reset();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self { name: _, link, irq: _, state } = self;
        SavedState::of(&SerialState { registers: state.save(), output: link.pending_output() })
    }

    fn restore(&mut self, state: SavedState) -> Result<(), RestoreError> {
        let SerialState { registers, output } = state.read()?;
        self.state.restore(&registers)?;
        self.link.restore_output(&output, self.state.is_held())?;
        self.sync_line();
        self.sync();
        Ok(())
    }
}

impl MmioDevice for Serial {
    fn name(&self) -> &'static str {
        self.name
    }

    fn size(&self) -> u64 {
        0x100
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        // Fast path: most accesses of a driver read LSR and have no further effect.
        if offset == u64::from(LSR)
            && let [data] = data
            && !self.link.can_flush()
        {
            *data = self.state.read_lsr();
            if self.state.is_changed() {
                self.sync();
            }
            return Ok(());
        }
        let register = register(offset, data.len())?;
        let [data, above @ ..] = data else { return Err(AccessError::Width) };
        above.fill(0);
        *data = self.read_any(register);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let register = register(offset, data.len())?;
        let &[value, ..] = data else { return Err(AccessError::Width) };
        if let Some(byte) = self.state.write(register, value)? {
            self.link.push(byte);
            self.sync_line();
        }
        self.sync();
        Ok(())
    }

    fn register_names(&self) -> RegisterName {
        register_name
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "serial",
            compatible: vec!["ns16550a"],
            properties: vec![
                FdtProperty::cells("clock-frequency", &[CLOCK_FREQUENCY_HZ]),
                FdtProperty::cells("fifo-size", &[TX_FIFO]),
                // THRE means that the FIFO is empty: a driver may fill all of it then; by default Linux would send 16 bytes.
                FdtProperty::cells("tx-threshold", &[0]),
            ],
            companions: Vec::new(),
        })
    }

    fn serial_line(&mut self) -> Option<&mut dyn SerialLine> {
        Some(self)
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        self.link.list_sources(list);
    }

    fn ready(&mut self, token: u32) {
        let mut buffer = [0; FIFO];
        let room = self.state.room();
        let input = self.link.ready(token, buffer.get_mut(..room).unwrap_or_default());
        self.state.receive(input);
        self.sync_line();
        self.sync();
    }
}

impl SerialLine for Serial {
    /// Sends whatever the state of the registers: DLAB and loopback only affect the driver's accesses.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let taken = self.link.send(bytes);
        self.sync_line();
        self.sync();
        taken
    }

    fn take(&mut self, buffer: &mut [u8]) -> usize {
        let taken = self.state.take(buffer);
        self.sync();
        taken
    }

    fn has_input(&mut self) -> bool {
        self.take(&mut []);
        self.state.data_ready()
    }
}

impl Serial {
    /// Passes the state of the line to the registers.
    fn sync_line(&mut self) {
        self.state.set_line(self.link.is_held(), self.link.is_empty());
    }

    /// Reads any register, with all effects.
    #[inline(never)]
    fn read_any(&mut self, register: u8) -> u8 {
        if reports_transmitter(register) && self.link.can_flush() {
            self.link.flush();
            self.sync_line();
        }
        let value = self.state.read(register);
        self.sync();
        value
    }

    /// Derives the room for input and the level of the interrupt line from the registers.
    #[inline(never)]
    fn sync(&mut self) {
        if !self.state.take_changed() {
            return;
        }
        self.link.set_room(self.state.room());
        self.irq.set(self.state.interrupts());
    }
}
