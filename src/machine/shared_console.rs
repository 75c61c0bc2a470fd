//! One console for every life of the guest: a restart makes a new UART, the terminal behind it stays.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::{ConsoleBackend, Ports};

/// A handle on the console's far end. Only one UART uses it at a time, so the lock is never waited for.
#[derive(Clone)]
pub(super) struct SharedConsole(Arc<Mutex<Box<dyn ConsoleBackend>>>);

impl SharedConsole {
    pub(super) fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        Self(Arc::new(Mutex::new(backend)))
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn ConsoleBackend>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleBackend for SharedConsole {
    fn ports(&self) -> Ports {
        self.lock().ports()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.lock().read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn attend(&mut self) {
        self.lock().attend();
    }
}
