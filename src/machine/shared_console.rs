//! One console across reboots: a reboot creates a new UART, and its backend stays.

use std::io;
use std::sync::Arc;

use rvmm_devices::{ConsoleBackend, Ports};

use crate::terminal::Shared;
use crate::vcpu::Control;

/// A handle on the console's backend.
#[derive(Clone)]
pub(super) struct SharedConsole {
    backend: Shared,
    /// The run whose guest input wakes if it has suspended itself (SBI SUSP).
    control: Option<Arc<Control>>,
}

impl SharedConsole {
    pub(super) fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        Self { backend: Shared::new(backend), control: None }
    }

    /// The same console, for the run that `control` controls.
    pub(super) fn waking(&self, control: &Arc<Control>) -> Self {
        Self { backend: self.backend.clone(), control: Some(Arc::clone(control)) }
    }
}

impl ConsoleBackend for SharedConsole {
    fn ports(&self) -> Ports {
        self.backend.ports()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.backend.read(buffer)?;
        if let Some(control) = self.control.as_ref().filter(|_| count > 0) {
            control.wake();
        }
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.backend.write(bytes)
    }

    fn size(&self) -> Option<(u16, u16)> {
        self.backend.size()
    }

    fn process_event(&mut self) {
        self.backend.process_event();
    }
}
