//! The console of the first UART: its input wakes a guest that has suspended itself (SBI SUSP).

use std::io;
use std::sync::Arc;

use rvmm_devices::{ConsoleBackend, Ports};

use crate::vcpu::Control;

/// A backend whose input wakes the guest.
pub(super) struct WakingConsole {
    backend: Box<dyn ConsoleBackend>,
    control: Arc<Control>,
}

impl WakingConsole {
    pub(super) fn new(backend: Box<dyn ConsoleBackend>, control: &Arc<Control>) -> Self {
        Self { backend, control: Arc::clone(control) }
    }
}

impl ConsoleBackend for WakingConsole {
    fn ports(&self) -> Ports {
        self.backend.ports()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.backend.read(buffer)?;
        if count > 0 {
            self.control.wake();
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
