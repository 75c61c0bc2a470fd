//! Prints `bytes` bytes of console output as fast as possible, then a line with their number and a checksum.
//!
//! Boot arguments: `bytes=N` (default 1000000), `via=uart` (default) or `via=dbcn`; `read=N`: before that, read N bytes of
//! input slowly and print their checksum. The bytes are lines of 63 letters from a generator that the reader can run as well.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use runtime::{Board, println, sbi, time, uart};

runtime::guest!(run);

/// The lines: a linear congruential generator (Knuth's MMIX constants), one step per byte, `a` to `p` by its top bits.
struct Text {
    state: u64,
    column: u32,
}

impl Text {
    fn next(&mut self) -> u8 {
        self.column = (self.column + 1) % 64;
        if self.column == 0 {
            return b'\n';
        }
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        b'a' + (self.state >> 60) as u8
    }
}

/// FNV-1a, 64 bits.
struct Checksum(u64);

impl Checksum {
    fn add(&mut self, byte: u8) {
        self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

fn run(board: &'static Board) {
    if let Some(count) = board.number("read") {
        read(count);
    }
    let bytes = board.number("bytes").unwrap_or(1_000_000);
    let dbcn = board.arg("via") == Some("dbcn");
    println!("flood: {bytes} bytes begin");
    let mut text = Text { state: 1, column: 0 };
    let mut checksum = Checksum(FNV_START);
    let mut buffer = [0; 4096];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(buffer.len());
        for slot in &mut buffer[..count] {
            *slot = text.next();
            checksum.add(*slot);
        }
        if dbcn {
            send_by_sbi(&buffer[..count])
        } else {
            uart::send(&buffer[..count])
        }
        left -= count;
    }
    println!("\nflood: {bytes} bytes, checksum {:#018x}", checksum.0);
    println!("PASS flood");
}

fn send_by_sbi(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let ret = sbi::console_write(bytes.len(), bytes.as_ptr() as usize, 0);
        assert!(ret.error == 0 && ret.value <= bytes.len(), "console_write: {ret:?}");
        bytes = &bytes[ret.value..];
    }
}

/// Reads with occasional pauses, so that the host's buffers fill up.
fn read(count: usize) {
    println!("flood: reading {count} bytes");
    let mut checksum = Checksum(FNV_START);
    for done in 0..count {
        if done % 4096 == 0 {
            time::pause(2);
        }
        checksum.add(uart::receive());
    }
    println!("flood: read {count} bytes, checksum {:#018x}", checksum.0);
}
