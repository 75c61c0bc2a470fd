//! A console backend that stays open when its device is dropped: after a reboot the guest has the same terminal.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::{ConsoleBackend, Ports};

/// A handle of the backend. Only one device uses it at a time, so the lock is never contended.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<Box<dyn ConsoleBackend>>>);

impl Shared {
    pub(crate) fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        Self(Arc::new(Mutex::new(backend)))
    }

    /// True if there is another handle of the same backend.
    pub(crate) fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn ConsoleBackend>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleBackend for Shared {
    fn ports(&self) -> Ports {
        self.lock().ports()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.lock().read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn size(&self) -> Option<(u16, u16)> {
        self.lock().size()
    }

    fn process_event(&mut self) {
        self.lock().process_event();
    }
}
