//! Standard output of a lab.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cli::output::report_result;
use crate::host::deliver;

/// Standard output for a run that continues without it: the first error is kept for the end.
#[derive(Debug, Clone, Default)]
pub(super) struct Stdout(Arc<Mutex<Option<io::Error>>>);

impl Stdout {
    fn error(&self) -> MutexGuard<'_, Option<io::Error>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports the first error, if there was one, and returns the exit code.
    pub(super) fn end(&self) -> u8 {
        report_result(self.error().take().map_or(Ok(()), Err))
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut error = self.error();
        if error.is_none() {
            *error = deliver(io::stdout(), bytes).err();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
