//! The serial port from the side of the guest's driver and of the host's console.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rvmm_devices::testing::{MemoryConsole, TestIrq, create, turn, wiring};
use rvmm_devices::{
    AccessError, ConsoleBackend, Interest, MmioDevice, Port, Ports, SerialLine, Wiring,
};

/// RBR, THR, DLL.
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const RDI: u8 = 1;
const THRI: u8 = 2;
const DR: u8 = 1;
const THRE: u8 = 0x20;
const TEMT: u8 = 0x40;
const DLAB: u8 = 0x80;
const RTS: u8 = 2;
const LOOP: u8 = 0x10;
const NO_INT: u8 = 1;

/// Number of bytes that a guest may send after it has read THRE.
const TX_FIFO: usize = 64;

struct Board {
    uart: Box<dyn MmioDevice>,
    irq: TestIrq,
    console: MemoryConsole,
}

fn uart(console: Option<Box<dyn ConsoleBackend>>, irq: &TestIrq) -> Box<dyn MmioDevice> {
    let wiring = Wiring { irq: Arc::new(irq.clone()), console, ..wiring() };
    create("serial", wiring).unwrap()
}

fn board() -> Board {
    let (irq, console) = (TestIrq::default(), MemoryConsole::new().unwrap());
    Board { uart: uart(Some(Box::new(console.clone())), &irq), irq, console }
}

/// A board whose guest reads input.
fn listening() -> Board {
    let mut board = board();
    board.write(IER, RDI);
    board.settle();
    board
}

fn read(uart: &mut dyn MmioDevice, register: u64) -> u8 {
    let mut data = [0xee];
    uart.read(register, &mut data).unwrap();
    data[0]
}

impl Board {
    fn read(&mut self, register: u64) -> u8 {
        read(self.uart.as_mut(), register)
    }

    fn write(&mut self, register: u64, value: u8) {
        self.uart.write(register, &[value]).unwrap();
    }

    /// Sends bytes like a driver that waits for THRE before each burst; stops when the line is busy and
    /// returns the number of bytes sent.
    fn send(&mut self, bytes: &[u8]) -> usize {
        for (count, burst) in bytes.chunks(TX_FIFO).enumerate() {
            if self.read(LSR) & THRE == 0 {
                return count * TX_FIFO;
            }
            burst.iter().for_each(|byte| self.write(DATA, *byte));
        }
        self.read(LSR);
        bytes.len()
    }

    /// Runs the I/O loop until it is idle; fails after 100 turns.
    fn settle(&mut self) {
        let turns = (0..100).take_while(|_| turn(self.uart.as_mut(), 0).unwrap() != 0).count();
        assert!(turns < 100, "the I/O loop spins");
    }

    /// Reads as long as LSR reports data.
    fn receive(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(LSR) & DR != 0 {
            bytes.push(self.read(DATA));
        }
        bytes
    }
}

#[test]
fn registers_have_their_values_after_power_on() {
    let mut board = board();
    let registers = [0, 0, NO_INT, 0x03, 0x08, THRE | TEMT, 0xb0, 0];
    for (offset, value) in (0..).zip(registers) {
        assert_eq!(board.read(offset), value, "register {offset}");
    }
    board.write(LCR, DLAB);
    assert_eq!((board.read(DATA), board.read(IER)), (0x0c, 0));
}

#[test]
fn a_wide_store_writes_its_low_byte_and_a_wide_load_is_zero_extended() {
    for width in [1, 2, 4, 8] {
        let mut board = board();
        board.uart.write(DATA, &[b'H', 0xff, 0xff, 0xff, 1, 2, 3, 4][..width]).unwrap();
        board.read(LSR);
        assert_eq!(board.console.output(), b"H", "{width} bytes");
        for register in (0..8).filter(|register| register % width as u64 == 0) {
            let mut wide = [0xee; 8];
            board.uart.read(register, &mut wide[..width]).unwrap();
            let narrow = board.read(register);
            assert_eq!(wide[0], narrow, "{width} bytes at {register}");
            assert!(wide[1..width].iter().all(|byte| *byte == 0), "{width} bytes at {register}");
        }
    }
}

#[test]
fn a_wide_access_reaches_no_register_but_its_own() {
    let mut board = board();
    board.write(SCR, 0x5a);
    board.uart.write(MCR, &[0x0b, 0x11, 0x22, 0x33]).unwrap();
    assert_eq!((board.read(MCR), board.read(SCR)), (0x0b, 0x5a));
    board.console.type_in(b"ab");
    board.settle();
    board.uart.read(DATA, &mut [0; 8]).unwrap();
    assert_eq!(board.receive(), b"b", "eight bytes took one from the receiver");
}

#[test]
fn accesses_of_invalid_width_or_offset_are_refused() {
    let mut uart = board().uart;
    for register in 0..8 {
        for width in [0, 3, 5, 6, 7] {
            let refused = Err(AccessError::Width);
            assert_eq!(uart.read(register, &mut [0; 8][..width]), refused);
            assert_eq!(uart.write(register, &[0; 8][..width]), refused);
        }
        for width in [2, 4, 8].into_iter().filter(|width| register % width != 0) {
            let (refused, width) = (Err(AccessError::Misaligned), width as usize);
            assert_eq!(uart.read(register, &mut [0; 8][..width]), refused);
            assert_eq!(uart.write(register, &[0; 8][..width]), refused);
        }
    }
    for offset in 8..0x100 {
        assert_eq!(uart.read(offset, &mut [0]), Err(AccessError::NoRegister));
        assert_eq!(uart.write(offset, &[0]), Err(AccessError::NoRegister));
    }
    assert_eq!(uart.write(LSR, &[0]), Err(AccessError::ReadOnly));
    assert_eq!(uart.write(MSR, &[0]), Err(AccessError::ReadOnly));
}

#[test]
fn scratch_line_control_and_divisor_read_back() {
    let mut board = board();
    for value in [0x55, 0xaa, 0xff, 0] {
        board.write(SCR, value);
        assert_eq!(board.read(SCR), value);
        board.write(LCR, value | DLAB);
        board.write(DATA, value);
        board.write(IER, !value);
        assert_eq!((board.read(DATA), board.read(IER)), (value, !value));
        board.write(LCR, value & !DLAB);
        assert_eq!(board.read(LCR), value & !DLAB);
        assert_eq!(board.read(IER), 0, "the divisor is not IER");
        board.write(MCR, value & !LOOP);
        assert_eq!(board.read(MCR), value & !LOOP & 0x1f);
    }
    assert_eq!(board.console.output(), b"", "the divisor is not THR");
}

#[test]
fn output_reaches_the_console_when_the_guest_reads_lsr() {
    for looks_at in [LSR, IIR] {
        let mut board = board();
        b"hello".iter().for_each(|byte| board.write(DATA, *byte));
        assert_eq!(board.console.writes(), 0);
        board.read(looks_at);
        assert_eq!(board.console.output(), b"hello");
        assert_eq!(board.console.writes(), 1, "one system call for all of it");
    }
}

#[test]
fn output_of_a_guest_that_never_reads_lsr_is_sent_by_a_timer() {
    let mut board = board();
    b"hello".iter().for_each(|byte| board.write(DATA, *byte));
    while board.console.output().is_empty() {
        assert_ne!(turn(board.uart.as_mut(), 5000).unwrap(), 0, "nothing would ever write it");
    }
    assert_eq!(board.console.output(), b"hello");
    board.settle();
}

#[test]
fn the_transmit_interrupt_follows_its_two_causes() {
    let mut board = board();
    board.write(IER, THRI);
    assert!(board.irq.is_high(), "enabling it on an empty transmitter is a cause");
    assert_eq!(board.read(IIR), 0x02);
    assert!(!board.irq.is_high(), "reading IIR clears it");
    assert_eq!(board.read(IIR), NO_INT);
    board.write(IER, THRI);
    assert!(!board.irq.is_high(), "it is enabled already");
    board.write(DATA, b'x');
    assert!(board.irq.is_high(), "the byte is gone, the transmitter empty again");
    board.write(IER, 0);
    assert!(!board.irq.is_high());
}

#[test]
fn the_receive_interrupt_lasts_until_the_fifo_is_empty() {
    let mut board = listening();
    board.console.type_in(b"ab");
    board.settle();
    assert!(board.irq.is_high());
    assert_eq!(board.read(IIR), 0x04);
    assert!(board.irq.is_high(), "reading IIR does not clear it");
    assert_eq!(board.read(DATA), b'a');
    assert!(board.irq.is_high(), "there is more");
    assert_eq!(board.read(DATA), b'b');
    assert!(!board.irq.is_high());
    assert_eq!(board.irq.changes(), 2);
}

#[test]
fn one_cause_is_reported_at_a_time_and_receiving_comes_first() {
    let mut board = listening();
    board.console.type_in(b"a");
    board.settle();
    board.write(FCR, 1);
    board.write(IER, RDI | THRI);
    assert_eq!(board.read(IIR), 0xc4);
    assert_eq!(board.read(IIR), 0xc4);
    assert_eq!(board.read(DATA), b'a');
    assert!(board.irq.is_high());
    assert_eq!(board.read(IIR), 0xc2);
    assert_eq!(board.read(IIR), 0xc0 | NO_INT);
}

#[test]
fn masking_and_unmasking_loses_no_interrupt() {
    // Linux's console masks IER around each message; input that arrives meanwhile must not be delayed.
    let mut board = listening();
    board.write(IER, 0);
    board.console.type_in(b"a");
    board.settle();
    assert!(!board.irq.is_high());
    board.write(IER, RDI);
    assert!(board.irq.is_high());
}

#[test]
fn toggling_the_mask_ends_in_the_right_level_without_wakeups() {
    let mut board = listening();
    for turn in 0..100_000_u32 {
        board.write(IER, [0, RDI, THRI, RDI | THRI][turn as usize % 4]);
    }
    assert!(board.irq.is_high());
    board.write(IER, RDI);
    assert!(!board.irq.is_high());
    assert_eq!(turn(board.uart.as_mut(), 0).unwrap(), 0);
}

#[test]
fn drivers_find_a_16550a_and_nothing_more() {
    // The differences between the models: FIFO bits in IIR, and no registers behind DLAB or 0xbf.
    let mut board = board();
    board.write(IER, 0x0f);
    assert_eq!(board.read(IER), 0x0f);
    board.write(IER, 0xff);
    assert_eq!(board.read(IER), 0x0f, "no sleep mode, no UUE bit");
    board.write(IER, 0);
    assert_eq!(board.read(IIR) >> 6, 0, "no FIFO before it is enabled");
    board.write(FCR, 1);
    assert_eq!(board.read(IIR) >> 6, 3, "16550A");
    board.write(LCR, 0xbf);
    assert_ne!(board.read(2), 0, "no EFR");
    board.write(LCR, DLAB);
    board.write(FCR, 0x21);
    assert_eq!(board.read(IIR) >> 5, 6, "no 64-byte mode");
    board.write(LCR, 0);
    // The loopback test: RTS, OUT2 out; CTS, DCD in.
    board.write(MCR, LOOP | 0x0a);
    assert_eq!(board.read(MSR) & 0xf0, 0x90);
    board.write(MCR, 0);
    board.write(FCR, 0);
    assert_eq!(board.read(IIR) >> 6, 0);
}

/// The accesses of Linux's driver when the port is opened (`serial8250_do_startup`).
fn open_as_linux_does(board: &mut Board) {
    [1, 7, 0].into_iter().for_each(|value| board.write(FCR, value));
    for register in [LSR, DATA, IIR, MSR] {
        board.read(register);
    }
    board.write(LCR, 3);
    // The test for a missing interrupt when it is enabled with an empty transmitter, done twice.
    board.write(IER, THRI);
    assert_eq!(board.read(IIR) & 0x0f, 0x02);
    board.write(IER, 0);
    board.write(IER, THRI);
    assert_eq!(board.read(IIR) & 0x0f, 0x02, "else UART_BUG_THRE: a timer instead of interrupts");
    board.write(IER, 0);
    board.write(MCR, 0x08);
    board.write(IER, THRI);
    assert_eq!(board.read(LSR) & TEMT, TEMT);
    assert_eq!(board.read(IIR) & NO_INT, 0, "else UART_BUG_TXEN");
    board.write(IER, 0);
    for register in [LSR, DATA, IIR, MSR] {
        board.read(register);
    }
    board.write(IER, 0x05);
    board.write(MCR, 0x0b);
}

#[test]
fn linux_opens_the_port_and_finds_no_bug() {
    let mut board = board();
    open_as_linux_does(&mut board);
    assert!(!board.irq.is_high());
}

#[test]
fn input_from_before_the_driver_started_is_kept() {
    let mut board = board();
    board.console.type_in(b"root\nls\n");
    // Boot messages, each of which ends with a read of LSR.
    for _ in 0..1000 {
        board.write(IER, 0);
        assert_eq!(board.send(b"message\r\n"), 9);
        board.settle();
    }
    open_as_linux_does(&mut board);
    board.settle();
    assert_eq!(board.receive(), b"root\nls\n");
}

#[test]
fn a_guest_that_polls_gets_its_input() {
    for polls in [LSR, DATA] {
        let mut board = board();
        board.console.type_in(b"a");
        let found = (0..100).any(|_| {
            board.settle();
            board.read(polls) & 1 == 1
        });
        assert!(found, "polling register {polls}");
    }
}

#[test]
fn a_guest_that_polls_between_dots_gets_its_input() {
    let mut board = board();
    board.console.type_in(b"a");
    let found = (0..100).any(|_| {
        board.settle();
        let ready = board.read(LSR) & DR != 0;
        board.send(b".");
        ready
    });
    assert!(found);
}

#[test]
fn raising_rts_starts_the_input() {
    let mut board = board();
    board.console.type_in(b"a");
    board.settle();
    assert_eq!(board.console.unread(), 1);
    board.write(MCR, RTS);
    board.settle();
    assert_eq!(board.receive(), b"a");
}

#[test]
fn clearing_the_receive_fifo_drops_what_is_in_it() {
    for lcr in [0, DLAB] {
        let mut board = listening();
        board.console.type_in(b"abc");
        board.settle();
        board.write(LCR, lcr);
        board.write(FCR, 1);
        assert!(board.irq.is_high());
        board.write(FCR, 3);
        assert!(!board.irq.is_high());
        assert_eq!(board.read(LCR), lcr);
        assert_eq!(board.read(LSR) & DR, 0);
    }
}

#[test]
fn a_paste_waits_in_the_host_and_arrives_whole() {
    let paste: Vec<u8> = (0..10_000_u32).map(|byte| byte as u8).collect();
    let mut board = listening();
    board.console.type_in(&paste);
    board.settle();
    assert_eq!(board.console.unread(), paste.len() - 64, "one FIFO full and no more");
    let mut received = Vec::new();
    while received.len() < paste.len() {
        received.extend(board.receive());
        board.settle();
    }
    assert_eq!(received, paste);
}

#[test]
fn a_full_fifo_is_refilled_when_half_of_it_is_free() {
    let mut board = listening();
    board.console.type_in(&[b'x'; 100]);
    board.settle();
    for _ in 0..31 {
        board.read(DATA);
    }
    assert_eq!(turn(board.uart.as_mut(), 0).unwrap(), 0, "not for every byte");
    board.read(DATA);
    board.settle();
    assert_eq!(board.console.unread(), 4);
}

#[test]
fn after_the_end_of_the_input_the_loop_is_idle() {
    let mut board = listening();
    board.console.type_in(b"bye");
    board.console.end_input();
    board.settle();
    assert_eq!(board.receive(), b"bye");
    board.settle();
    board.send(b"still here");
    assert_eq!(board.console.output(), b"still here");
}

#[test]
fn a_new_client_is_read_after_the_last_one_has_disconnected() {
    let mut board = listening();
    board.console.hang_up();
    board.settle();
    assert_eq!(board.send(&[b'x'; 100_000]), 100_000, "nobody there holds nobody back");
    board.console.connect();
    board.console.type_in(b"hi");
    board.settle();
    assert_eq!(board.receive(), b"hi");
    board.send(b"hello");
    assert_eq!(board.console.output(), b"hello");
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let text: Vec<u8> = (0..50_000_u32).map(|byte| byte as u8).collect();
    let mut board = board();
    board.console.set_room(Some(1000));
    let mut sent = board.send(&text);
    assert!(sent < 6000, "{sent} bytes without a reader");
    assert_eq!(board.read(LSR) & (THRE | TEMT), 0);
    while sent < text.len() {
        board.settle();
        board.console.set_room(Some(777));
        board.settle();
        sent += board.send(&text[sent..]);
    }
    board.console.set_room(None);
    board.settle();
    assert_eq!(board.read(LSR) & (THRE | TEMT), THRE | TEMT);
    assert!(board.console.output() == text);
}

#[test]
fn the_transmit_interrupt_comes_back_with_the_room() {
    let mut board = board();
    board.write(IER, THRI);
    board.console.set_room(Some(0));
    board.send(&[b'x'; 5000]);
    assert!(!board.irq.is_high());
    board.write(IER, 0);
    board.write(IER, THRI);
    assert!(!board.irq.is_high(), "the transmitter is not empty");
    assert_eq!(board.read(IIR), NO_INT);
    board.console.set_room(None);
    board.settle();
    assert!(board.irq.is_high());
    assert_eq!(board.read(IIR), 0x02);
    assert_eq!(board.read(LSR) & (THRE | TEMT), THRE | TEMT);
}

#[test]
fn a_stalled_reader_clears_temt_before_thre() {
    let mut board = board();
    board.console.set_room(Some(0));
    board.send(b"x");
    assert_eq!(board.read(LSR) & (THRE | TEMT), THRE);
}

#[test]
fn polling_a_busy_line_makes_no_system_calls() {
    let mut board = board();
    board.console.set_room(Some(0));
    board.send(&[b'x'; 5000]);
    // The timer that the first bytes have set expires once more.
    std::thread::sleep(Duration::from_millis(20));
    board.settle();
    let writes = board.console.writes();
    for _ in 0..10_000 {
        board.read(LSR);
    }
    assert_eq!(board.console.writes(), writes);
    assert_eq!(turn(board.uart.as_mut(), 0).unwrap(), 0);
}

#[test]
fn a_guest_that_ignores_a_busy_line_loses_its_own_bytes_only() {
    let text: Vec<u8> = (0..1_000_000_u32).map(|byte| (byte >> 4) as u8).collect();
    let mut board = board();
    board.console.set_room(Some(0));
    text.iter().for_each(|byte| board.write(DATA, *byte));
    board.console.set_room(None);
    board.settle();
    let output = board.console.output();
    assert!(output.len() >= 60_000, "{} bytes kept", output.len());
    assert!(output == text[..output.len()]);
    board.send(b"after");
    assert!(board.console.output().ends_with(b"after"));
}

#[test]
fn a_closed_console_never_blocks_the_guest() {
    for kind in [ErrorKind::BrokenPipe, ErrorKind::StorageFull, ErrorKind::Other] {
        let mut board = board();
        board.console.fail_writes(Some(kind));
        assert_eq!(board.send(&[b'x'; 100_000]), 100_000, "{kind}");
        assert_eq!(board.read(LSR) & (THRE | TEMT), THRE | TEMT);
        board.settle();
    }
}

#[test]
fn a_console_that_closes_while_it_is_full_unblocks_the_guest() {
    let mut board = board();
    board.console.set_room(Some(0));
    board.send(&[b'x'; 10_000]);
    assert_eq!(board.read(LSR) & THRE, 0);
    board.console.fail_writes(Some(ErrorKind::BrokenPipe));
    board.settle();
    assert_eq!(board.read(LSR) & (THRE | TEMT), THRE | TEMT);
}

#[test]
fn looped_bytes_are_received_and_not_sent_to_the_console() {
    let mut board = listening();
    board.console.type_in(b"input");
    board.write(MCR, LOOP);
    b"loop".iter().for_each(|byte| board.write(DATA, *byte));
    board.settle();
    assert!(board.irq.is_high());
    assert_eq!(board.receive(), b"loop");
    (0..1_000_000).for_each(|_| board.write(DATA, b'x'));
    assert_eq!(board.receive().len(), 64);
    assert_eq!(board.console.output(), b"");
    assert_eq!(board.console.unread(), 5, "input waits meanwhile");
    board.write(MCR, 0);
    board.settle();
    assert_eq!(board.receive(), b"input");
}

#[test]
fn a_reset_loses_no_output() {
    let mut board = board();
    board.console.set_room(Some(0));
    board.send(b"last words");
    board.uart.reset();
    board.write(DATA, b'!');
    board.console.set_room(None);
    board.settle();
    assert_eq!(board.console.output(), b"last words!");
}

#[test]
fn a_reset_clears_the_interrupt_and_the_input() {
    let mut board = listening();
    board.console.type_in(b"a");
    board.settle();
    assert!(board.irq.is_high());
    board.uart.reset();
    assert!(!board.irq.is_high());
    assert_eq!(board.read(LSR), THRE | TEMT);
    board.console.type_in(b"b");
    board.settle();
    assert_eq!(board.console.unread(), 1, "the new guest does not listen yet");
}

#[test]
fn a_port_without_a_console_discards_output() {
    let mut uart = uart(None, &TestIrq::default());
    for _ in 0..100_000 {
        uart.write(DATA, b"x").unwrap();
        assert_eq!(read(uart.as_mut(), LSR), THRE | TEMT);
    }
}

#[test]
fn the_node_has_the_properties_for_the_driver() {
    let fdt = board().uart.fdt().unwrap();
    assert_eq!((fdt.name, fdt.compatible), ("serial", vec!["ns16550a"]));
    let names: Vec<_> = fdt.properties.iter().map(|property| property.name).collect();
    assert_eq!(names, ["clock-frequency", "fifo-size", "tx-threshold"]);
}

/// A socket with a slow peer.
struct Socket(UnixStream);

impl ConsoleBackend for Socket {
    fn ports(&self) -> Ports {
        let port = Port::Poll(self.0.as_raw_fd());
        Ports { input: port, output: port, event_fd: None }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
}

/// Runs an I/O thread and a guest's thread on one port until the guest has finished and all is written.
fn with_io_thread(uart: Box<dyn MmioDevice>, guest: impl FnOnce(&Mutex<Box<dyn MmioDevice>>)) {
    let uart = Mutex::new(uart);
    let done = std::sync::atomic::AtomicBool::new(false);
    let busy = |uart: &dyn MmioDevice| uart.sources().iter().any(|s| s.interest.writes());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let mut uart = uart.lock().unwrap();
                let slept = turn(uart.as_mut(), 0).unwrap() == 0;
                let over = done.load(std::sync::atomic::Ordering::SeqCst);
                if over && !busy(uart.as_ref()) {
                    break;
                }
                drop(uart);
                if slept {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        });
        guest(&uart);
        done.store(true, std::sync::atomic::Ordering::SeqCst);
    });
}

#[test]
fn a_megabyte_through_a_slow_socket_arrives_byte_for_byte() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let text: Vec<u8> = (0..1_000_000_u32).map(|byte| (byte % 251) as u8).collect();
    let reader = std::thread::spawn(move || {
        let (mut all, mut some) = (Vec::<u8>::new(), [0; 3000]);
        loop {
            match theirs.read(&mut some).unwrap() {
                0 => return all,
                read => all.extend(&some[..read]),
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    });
    let uart = uart(Some(Box::new(Socket(ours))), &TestIrq::default());
    with_io_thread(uart, |uart| {
        for burst in text.chunks(TX_FIFO) {
            while read(uart.lock().unwrap().as_mut(), LSR) & THRE == 0 {
                std::thread::yield_now();
            }
            let mut uart = uart.lock().unwrap();
            burst.iter().for_each(|byte| uart.write(DATA, &[*byte]).unwrap());
        }
    });
    assert!(reader.join().unwrap() == text);
}

#[test]
fn a_socket_with_blocked_output_is_still_read() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let fd = ours.as_raw_fd();
    let mut uart = uart(Some(Box::new(Socket(ours))), &TestIrq::default());
    uart.write(IER, &[RDI]).unwrap();
    for _ in 0..10_000_000 {
        if read(uart.as_mut(), LSR) & THRE == 0 {
            break;
        }
        uart.write(DATA, b"x").unwrap();
    }
    assert_eq!(read(uart.as_mut(), LSR) & THRE, 0, "the socket takes more than 10 MB");
    let sources = uart.sources();
    let console = sources.iter().filter(|source| source.fd == fd).collect::<Vec<_>>();
    assert_eq!(console.len(), 1, "epoll takes a descriptor once");
    assert_eq!(console[0].interest, Interest::ReadWrite);
    theirs.write_all(b"hi").unwrap();
    while turn(uart.as_mut(), 20).unwrap() != 0 && read(uart.as_mut(), LSR) & DR == 0 {}
    assert_eq!([read(uart.as_mut(), DATA), read(uart.as_mut(), DATA)], *b"hi");
}

#[test]
fn a_socket_without_a_peer_is_no_longer_polled() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut uart = uart(Some(Box::new(Socket(ours))), &TestIrq::default());
    uart.write(IER, &[RDI]).unwrap();
    turn(uart.as_mut(), 0).unwrap();
    drop(theirs);
    turn(uart.as_mut(), 0).unwrap();
    uart.write(DATA, b"x").unwrap();
    assert_eq!(read(uart.as_mut(), LSR), THRE | TEMT);
    while turn(uart.as_mut(), 20).unwrap() != 0 {}
    assert_eq!(uart.sources().len(), 2, "only its own two descriptors are left");
}

proptest! {
    #[test]
    fn the_interrupt_line_always_matches_iir(
        steps in prop::collection::vec((0_u8..4, 0_u64..8, any::<u8>()), 0..300)
    ) {
        let mut board = board();
        for (what, register, value) in steps {
            match what {
                0 => {
                    board.read(register);
                }
                1 => {
                    let _ = board.uart.write(register, &[value]);
                }
                2 => board.console.type_in(&[value]),
                _ => {
                    board.console.set_room((value & 3 != 0).then_some(usize::from(value)));
                    board.settle();
                }
            }
        }
        let high = board.irq.is_high();
        prop_assert_eq!(board.read(IIR) & NO_INT == 0, high);
    }
}

/// The serial line without registers, as used by firmware (SBI).
fn line(board: &mut Board) -> &mut dyn SerialLine {
    board.uart.serial_line().unwrap()
}

#[test]
fn output_of_firmware_is_one_write_and_keeps_its_order() {
    let mut board = board();
    board.write(DATA, b'a');
    assert_eq!(line(&mut board).send(&[b'b'; 1000]), 1000);
    assert_eq!(board.console.writes(), 1);
    board.write(DATA, b'c');
    board.read(LSR);
    let expected: Vec<u8> = [b"a", &[b'b'; 1000][..], b"c"].concat();
    assert_eq!(board.console.output(), expected);
}

#[test]
fn single_bytes_of_firmware_are_combined() {
    let mut board = board();
    for byte in [b'x'; TX_FIFO] {
        assert_eq!(board.console.writes(), 0);
        assert_eq!(line(&mut board).send(&[byte]), 1);
    }
    assert_eq!((board.console.writes(), board.console.output().len()), (1, TX_FIFO));
    assert_eq!(line(&mut board).send(&[]), 0);
}

#[test]
fn a_slow_reader_blocks_output_of_firmware_and_loses_nothing() {
    let mut board = board();
    board.console.set_room(Some(100));
    let sent: Vec<u8> = (0..=255).cycle().take(20_000).collect();
    let mut done = 0;
    while done < sent.len() {
        let taken = line(&mut board).send(&sent[done..]);
        assert!(taken <= 4096, "{taken} bytes wait");
        if taken == 0 {
            board.console.set_room(Some(900));
            board.settle();
        }
        done += taken;
    }
    board.console.set_room(None);
    board.settle();
    assert_eq!(board.console.output(), sent);
}

#[test]
fn firmware_ignores_the_divisor_latch_and_loopback() {
    for (register, value) in [(LCR, DLAB), (MCR, LOOP)] {
        let mut board = listening();
        board.console.type_in(b"in");
        board.settle();
        board.write(register, value);
        assert_eq!(line(&mut board).send(b"out"), 3);
        assert_eq!(board.console.output(), b"out");
        let mut buffer = [0; 8];
        assert_eq!((line(&mut board).take(&mut buffer), &buffer[..2]), (2, &b"in"[..]));
        assert_eq!(board.read(register), value);
    }
}

#[test]
fn a_guest_gets_input_through_its_firmware() {
    let mut board = board();
    board.console.type_in(&[b'k'; 200]);
    board.settle();
    assert!(!line(&mut board).has_input(), "nobody had asked before");
    let mut got = 0;
    while got < 200 {
        board.settle();
        assert!(line(&mut board).has_input());
        got += line(&mut board).take(&mut [0; 100]);
    }
    board.settle();
    assert_eq!((got, line(&mut board).has_input()), (200, false));
}
