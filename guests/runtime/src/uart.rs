//! The ns16550a UART, register by register (National Semiconductor PC16550D data sheet, section 8).

use crate::mmio;

/// Address of the UART on QEMU's `virt` machine and on rvmm's.
pub const BASE: usize = 0x1000_0000;
/// Its interrupt source there.
pub const IRQ: u32 = 10;

/// Register offsets.
pub mod reg {
    /// Receiver buffer (read)
    pub const RBR: usize = 0;
    /// Transmitter holding (write)
    pub const THR: usize = 0;
    /// Divisor latch, low (while LCR.DLAB)
    pub const DLL: usize = 0;
    /// Interrupt enable
    pub const IER: usize = 1;
    /// Divisor latch, high (while LCR.DLAB)
    pub const DLM: usize = 1;
    /// Interrupt identification (read)
    pub const IIR: usize = 2;
    /// FIFO control (write)
    pub const FCR: usize = 2;
    /// Line control
    pub const LCR: usize = 3;
    /// Modem control
    pub const MCR: usize = 4;
    /// Line status
    pub const LSR: usize = 5;
    /// Modem status
    pub const MSR: usize = 6;
    /// Scratch
    pub const SCR: usize = 7;
}

/// IER: received data available
pub const IER_RX: u8 = 1;
/// IER: transmitter holding register empty
pub const IER_THRE: u8 = 2;
/// MCR: loopback
pub const MCR_LOOP: u8 = 0x10;
/// MCR: OUT2, which gates the interrupt line on a PC and does nothing here
pub const MCR_OUT2: u8 = 8;
/// LSR: data ready
pub const LSR_DR: u8 = 1;
/// LSR: transmitter holding register empty
pub const LSR_THRE: u8 = 0x20;
/// LSR: transmitter empty, shift register included
pub const LSR_TEMT: u8 = 0x40;
/// IIR: no interrupt pending
pub const IIR_NONE: u8 = 1;
/// IIR: transmitter holding register empty
pub const IIR_THRE: u8 = 2;
/// IIR: received data available
pub const IIR_RX: u8 = 4;
/// IIR: the identification bits
pub const IIR_MASK: u8 = 0xf;
/// LCR: divisor latch access
pub const LCR_DLAB: u8 = 0x80;
/// LCR: eight bits, one stop bit, no parity
pub const LCR_8N1: u8 = 3;

/// Reads a register.
#[must_use]
pub fn read(reg: usize) -> u8 {
    mmio::read8(BASE + reg)
}

/// Writes a register.
pub fn write(reg: usize, value: u8) {
    mmio::write8(BASE + reg, value);
}

/// Enables the FIFOs and disables the interrupts.
pub fn init() {
    write(reg::IER, 0);
    write(reg::LCR, LCR_8N1);
    write(reg::FCR, 1);
    write(reg::MCR, MCR_OUT2 | 3);
}

/// Sends bytes, reading LSR once per 16 of them, the size of the FIFO.
pub fn send(bytes: &[u8]) {
    for chunk in bytes.chunks(16) {
        while read(reg::LSR) & LSR_THRE == 0 {
            core::hint::spin_loop();
        }
        for &byte in chunk {
            write(reg::THR, byte);
        }
    }
}

/// A received byte, if there is one.
#[must_use]
pub fn try_receive() -> Option<u8> {
    (read(reg::LSR) & LSR_DR != 0).then(|| read(reg::RBR))
}

/// Waits for a byte.
#[must_use]
pub fn receive() -> u8 {
    loop {
        if let Some(byte) = try_receive() {
            return byte;
        }
        core::hint::spin_loop();
    }
}
