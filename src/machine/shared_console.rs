//! One console for every life of the guest: a restart makes a new UART, the terminal behind it stays.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvmm_devices::{ConsoleBackend, Ports};

use crate::vcpu::Control;

/// A handle on the console's far end. Only one UART uses it at a time, so the lock is never waited for.
#[derive(Clone)]
pub(super) struct SharedConsole {
    backend: Arc<Mutex<Box<dyn ConsoleBackend>>>,
    /// The life that input wakes, where its guest has suspended itself (SBI SUSP).
    control: Option<Arc<Control>>,
}

impl SharedConsole {
    pub(super) fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        Self { backend: Arc::new(Mutex::new(backend)), control: None }
    }

    /// The same console, for the life that `control` controls.
    pub(super) fn waking(&self, control: &Arc<Control>) -> Self {
        Self { backend: Arc::clone(&self.backend), control: Some(Arc::clone(control)) }
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn ConsoleBackend>> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleBackend for SharedConsole {
    fn ports(&self) -> Ports {
        self.lock().ports()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.lock().read(buffer)?;
        if let Some(control) = self.control.as_ref().filter(|_| count > 0) {
            control.wake();
        }
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn attend(&mut self) {
        self.lock().attend();
    }
}
