//! NS16550A UART: the board's serial port.
//!
//! Source: National Semiconductor PC16550D data sheet; the registers, the loopback, and the receive
//! FIFO are those of `vm-superio`. What is added here, because that model only has edges and an
//! ever-ready line: the interrupt as a level (RX data or an empty transmitter, IIR with one cause
//! at a time and in order), THRE and TEMT that tell whether the host keeps up, and the FIFO bits of
//! FCR and IIR by which drivers know a 16550A.
//!
//! Registers are one byte each, at consecutive addresses (`reg-shift` 0), and take one-byte
//! accesses. As the line has no noise there are no receive errors, and as nothing is wired to the
//! modem inputs they never change: neither of those interrupts occurs. The receive interrupt comes
//! with the first byte whatever the trigger level. Baud rate and word length are kept and have no
//! effect. Clearing the transmit FIFO does nothing: what the guest has sent is on its way.
//!
//! Input is taken from the host only once the guest listens: it has enabled the receive interrupt,
//! raised RTS, or polls for data. Before that a driver would throw it away when it starts, and a
//! script piped into a booting guest would lose its first lines.

use std::convert::Infallible;
use std::io::{Sink, sink};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Registers};

use crate::catalog::{BuildError, Built, Model, Placement, Wiring};
use crate::console::NullConsole;
use crate::device::{Access, AccessError, FdtDesc, FdtProperty, MmioDevice, Source};
use crate::irq::IrqPin;
use crate::link::Link;
use crate::options::Options;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "serial",
    summary: "NS16550A serial port, connected to the console",
    keys: &[],
    placement: Placement::Fixed,
    irqs: 1,
    build,
};

/// Bytes in each direction that the FIFOs hold: the receive FIFO of `vm-superio`, and what a guest
/// may send after it has seen THRE, with room to spare.
const FIFO: u32 = 64;

/// The clock of QEMU's `virt` board, from which drivers compute a divisor, in Hz.
const CLOCK_FREQUENCY_HZ: u32 = 3_686_400;

/// So many looks for input, one right after the other, mean that the guest polls. Drivers that only
/// wait for the transmitter look once and then send.
const POLLS: u8 = 16;

mod reg {
    /// RBR, THR; with DLAB the divisor's low byte.
    pub(super) const DATA: u8 = 0;
    /// Interrupt enable; with DLAB the divisor's high byte.
    pub(super) const IER: u8 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub(super) const IIR_FCR: u8 = 2;
    pub(super) const LCR: u8 = 3;
    pub(super) const MCR: u8 = 4;
    pub(super) const LSR: u8 = 5;
    pub(super) const MSR: u8 = 6;
    pub(super) const SCR: u8 = 7;
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

/// The device.
pub struct Serial {
    link: Link,
    irq: IrqPin,

    state: State,
}

/// All that the guest can see, but for the output that waits in the link.
struct State {
    /// DLL, DLM, LCR, MCR, MSR, SCR, the receive FIFO and LSR's data-ready bit.
    registers: Registers<NoTrigger, NoEvents, Sink>,
    /// IER, LCR and MCR once more: those of `registers` can only be read through DLAB, or by a
    /// copy of everything.
    ier: u8,
    lcr: u8,
    mcr: u8,
    /// FCR's enable bit.
    fifo_enabled: bool,
    /// The interrupt of an empty transmitter is due: set when it becomes empty or the interrupt is
    /// enabled, cleared when IIR reports it or THR is written.
    thr_empty_due: bool,
    /// The guest takes input.
    listening: bool,
    /// Looks for input that found none and came right after another.
    polls: u8,
    /// The last access was a look for input that found none.
    polled: bool,
}

/// `vm-superio` announces edges; the line follows [`Serial::sync_irq`] instead.
#[derive(Debug)]
struct NoTrigger;

impl Trigger for NoTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

fn build(_: &Options, wiring: Wiring) -> Built {
    let backend = wiring.console.unwrap_or_else(|| Box::new(NullConsole));
    let link = Link::new(MODEL.name, backend).map_err(|source| BuildError::Host {
        model: MODEL.name,
        what: "event descriptors",
        source,
    })?;
    Ok(Box::new(Serial { link, irq: IrqPin::new(wiring.irq), state: State::at_power_on() }))
}

impl MmioDevice for Serial {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn size(&self) -> u64 {
        0x100
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let register = register(offset)?;
        let [data] = data else { return Err(AccessError::Width) };
        let polled = std::mem::take(&mut self.state.polled);
        *data = match register {
            reg::LSR => self.read_lsr(polled),
            reg::DATA if !self.state.dlab() => self.read_rbr(polled),
            reg::IER if !self.state.dlab() => self.state.ier,
            reg::IIR_FCR => self.read_iir(),
            reg::LCR => self.state.lcr,
            reg::MCR => self.state.mcr,
            other => self.state.registers.read(other),
        };
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let register = register(offset)?;
        let &[value] = data else { return Err(AccessError::Width) };
        self.state.polled = false;
        match register {
            reg::DATA if !self.state.dlab() => self.write_thr(value),
            reg::IER if !self.state.dlab() => self.write_ier(value),
            reg::IIR_FCR => self.write_fcr(value),
            reg::LCR => {
                self.state.lcr = value;
                self.state.set(reg::LCR, value);
            }
            reg::MCR => {
                self.state.mcr = value & bit::MCR_ALL;
                self.state.set(reg::MCR, self.state.mcr);
                self.state.listening |= value & bit::MCR_RTS != 0;
                self.sync_room();
            }
            reg::LSR | reg::MSR => return Err(AccessError::ReadOnly),
            other => self.state.set(other, value),
        }
        self.sync_irq();
        Ok(())
    }

    fn reset(&mut self) {
        self.state = State::at_power_on();
        self.link.flush();
        self.sync_room();
        self.irq.reset();
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "serial",
            compatible: vec!["ns16550a"],
            properties: vec![
                FdtProperty::cells("clock-frequency", &[CLOCK_FREQUENCY_HZ]),
                FdtProperty::cells("fifo-size", &[FIFO]),
            ],
            companions: Vec::new(),
        })
    }

    fn sources(&self) -> Vec<Source> {
        self.link.sources()
    }

    fn ready(&mut self, token: u32) {
        let was_held = self.link.is_held();
        let mut buffer = [0; FIFO as usize];
        let room = self.state.room();
        let input = self.link.ready(token, buffer.get_mut(..room).unwrap_or_default());
        self.state.receive(input);
        self.after_flush(was_held);
        self.sync_room();
        self.sync_irq();
    }
}

impl Serial {
    fn read_rbr(&mut self, polled: bool) -> u8 {
        if !self.state.data_ready() {
            self.saw_nothing(polled);
        }
        let byte = self.state.registers.read(reg::DATA);
        self.sync_room();
        self.sync_irq();
        byte
    }

    fn read_lsr(&mut self, polled: bool) -> u8 {
        self.flush();
        let lsr = self.state.registers.read(reg::LSR);
        if self.link.is_held() {
            return lsr & !(bit::LSR_THRE | bit::LSR_TEMT);
        }
        if !self.link.is_empty() {
            return lsr & !bit::LSR_TEMT;
        }
        if lsr & bit::LSR_DR == 0 {
            self.saw_nothing(polled);
        }
        lsr
    }

    fn read_iir(&mut self) -> u8 {
        self.flush();
        let cause = self.state.cause();
        if cause == bit::IIR_THRI {
            self.state.thr_empty_due = false;
            self.sync_irq();
        }
        if self.state.fifo_enabled { cause | bit::IIR_FIFO } else { cause }
    }

    fn write_thr(&mut self, value: u8) {
        if self.state.looped() {
            self.state.set(reg::DATA, value);
        } else {
            self.link.push(value);
        }
        self.state.thr_empty_due = !self.link.is_held();
    }

    fn write_ier(&mut self, value: u8) {
        let value = value & bit::IER_ALL;
        let rising = value & !self.state.ier;
        self.state.ier = value;
        self.state.set(reg::IER, value);
        if rising & bit::IER_THRI != 0 {
            self.state.thr_empty_due = !self.link.is_held();
        }
        if rising & bit::IER_RDI != 0 {
            self.state.listening = true;
            self.sync_room();
        }
    }

    fn write_fcr(&mut self, value: u8) {
        self.state.fifo_enabled = value & bit::FCR_ENABLE != 0;
        if value & bit::FCR_CLEAR_RX != 0 {
            self.state.clear_fifo();
            self.sync_room();
        }
    }

    /// The guest has looked for input and found none, and `polled` says whether that was all that
    /// it did before, too.
    fn saw_nothing(&mut self, polled: bool) {
        self.state.polled = true;
        if polled && !self.state.listening {
            self.state.polls += 1;
            self.state.listening = self.state.polls >= POLLS;
            self.sync_room();
        }
    }

    /// The guest looks at the line: what it has sent so far goes out.
    fn flush(&mut self) {
        if self.link.can_flush() {
            let was_held = self.link.is_held();
            self.link.flush();
            self.after_flush(was_held);
            self.sync_irq();
        }
    }

    /// The transmitter becomes empty when the guest is no longer held back.
    fn after_flush(&mut self, was_held: bool) {
        self.state.thr_empty_due |= was_held && !self.link.is_held();
    }

    /// Tells the link how much input the FIFO takes.
    fn sync_room(&mut self) {
        self.link.set_room(self.state.room());
    }

    /// Derives the line's level from the state.
    fn sync_irq(&mut self) {
        self.irq.set(self.state.cause() != bit::IIR_NONE);
    }
}

impl State {
    fn at_power_on() -> Self {
        let registers = Registers::new(NoTrigger, sink());
        Self {
            registers,
            ier: 0,
            lcr: 0x03,
            mcr: 0x08,
            fifo_enabled: false,
            thr_empty_due: false,
            listening: false,
            polls: 0,
            polled: false,
        }
    }

    fn dlab(&self) -> bool {
        self.lcr & bit::LCR_DLAB != 0
    }

    fn looped(&self) -> bool {
        self.mcr & bit::MCR_LOOP != 0
    }

    fn data_ready(&self) -> bool {
        self.registers.fifo_capacity() < FIFO as usize
    }

    /// Writes a register of `vm-superio`; that fails only if its sink or its trigger does, and
    /// these do not.
    fn set(&mut self, register: u8, value: u8) {
        drop(self.registers.write(register, value));
    }

    /// Puts input into the FIFO, which has room for it.
    fn receive(&mut self, input: &[u8]) {
        if !input.is_empty() {
            drop(self.registers.enqueue_raw_bytes(input));
        }
    }

    /// Bytes of input that can be taken from the host now.
    fn room(&self) -> usize {
        if self.listening && !self.looped() { self.registers.fifo_capacity() } else { 0 }
    }

    /// The interrupt that IIR reports: the most urgent one that is enabled and due.
    fn cause(&self) -> u8 {
        if self.ier & bit::IER_RDI != 0 && self.data_ready() {
            bit::IIR_RDI
        } else if self.ier & bit::IER_THRI != 0 && self.thr_empty_due {
            bit::IIR_THRI
        } else {
            bit::IIR_NONE
        }
    }

    /// Drops what is in the receive FIFO, as a driver does when it takes over, and waits until that
    /// driver listens.
    fn clear_fifo(&mut self) {
        self.set(reg::LCR, self.lcr & !bit::LCR_DLAB);
        while self.data_ready() {
            self.registers.read(reg::DATA);
        }
        self.set(reg::LCR, self.lcr);
        self.polls = 0;
        self.listening = self.ier & bit::IER_RDI != 0 || self.mcr & bit::MCR_RTS != 0;
    }
}

/// The register at this offset.
fn register(offset: u64) -> Result<u8, AccessError> {
    u8::try_from(offset).ok().filter(|&offset| offset <= reg::SCR).ok_or(AccessError::NoRegister)
}
