//! Text on the UART, one writer at a time.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::uart;

static BUSY: AtomicBool = AtomicBool::new(false);

struct Console {
    line: [u8; 256],
    len: usize,
}

impl Console {
    fn flush(&mut self) {
        uart::send(&self.line[..self.len]);
        self.len = 0;
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.len == self.line.len() {
                self.flush();
            }
            self.line[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// Writes formatted text; lines of several harts do not mix. For `print!` and `println!`.
pub fn print(args: fmt::Arguments<'_>) {
    while BUSY.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        core::hint::spin_loop();
    }
    let mut console = Console { line: [0; 256], len: 0 };
    // Formatting into memory and a UART cannot fail.
    let _ = console.write_fmt(args);
    console.flush();
    BUSY.store(false, Ordering::Release);
}

/// Releases the lock, for a report from a trap that may have interrupted the writer.
pub(crate) fn break_lock() {
    BUSY.store(false, Ordering::Release);
}

/// Prints on the UART.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::print(format_args!($($arg)*)) };
}

/// Prints a line on the UART.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($arg)*))) };
}
