//! One line per check: `PASS name`, or `FAIL name: reason`.

use core::fmt::{self, Write};

use crate::{Board, println, uart};

/// The reason why a check failed.
pub struct Failure {
    text: [u8; 200],
    len: usize,
}

impl Failure {
    /// A failure with its reason, truncated to 200 bytes.
    #[must_use]
    pub fn new(args: fmt::Arguments<'_>) -> Self {
        let mut failure = Self { text: [0; 200], len: 0 };
        // Longer text is truncated.
        let _ = failure.write_fmt(args);
        failure
    }
}

impl Write for Failure {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes().take(self.text.len() - self.len) {
            self.text[self.len] = if byte.is_ascii() { byte } else { b'?' };
            self.len += 1;
        }
        Ok(())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(core::str::from_utf8(&self.text[..self.len]).unwrap_or("?"))
    }
}

/// A named check.
pub type Check = (&'static str, fn(&'static Board) -> Result<(), Failure>);

/// Runs checks, prints a line for each and one for the guest; true if all passed.
pub fn run(guest: &str, board: &'static Board, checks: &[Check]) -> bool {
    let mut failed = 0;
    for (name, check) in checks {
        let outcome = check(board);
        // A check may have left the UART in loopback.
        uart::init();
        match outcome {
            Ok(()) => println!("PASS {guest}: {name}"),
            Err(why) => {
                println!("FAIL {guest}: {name}: {why}");
                failed += 1;
            }
        }
    }
    match failed {
        0 => println!("PASS {guest}"),
        _ => println!("FAIL {guest}: {failed} of {} checks", checks.len()),
    }
    failed == 0
}

/// Ends a check with a reason unless `cond` holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)+) => {
        if !$cond {
            return Err($crate::Failure::new(format_args!($($arg)+)));
        }
    };
}

/// Ends a check with a reason unless both sides are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($arg:tt)+) => {{
        let (left, right) = ($left, $right);
        if left != right {
            return Err($crate::Failure::new(format_args!(
                "{}: got {left:x?}, expected {right:x?}", format_args!($($arg)+)
            )));
        }
    }};
}
