//! One console for every life of the guest: a restart makes a new UART, the terminal behind it stays.

use std::io;
use std::sync::Arc;

use rvmm_devices::{ConsoleBackend, Ports};

use crate::terminal::Shared;
use crate::vcpu::Control;

/// A handle on the console's far end.
#[derive(Clone)]
pub(super) struct SharedConsole {
    end: Shared,
    /// The life that input wakes, where its guest has suspended itself (SBI SUSP).
    control: Option<Arc<Control>>,
}

impl SharedConsole {
    pub(super) fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        Self { end: Shared::new(backend), control: None }
    }

    /// The same console, for the life that `control` controls.
    pub(super) fn waking(&self, control: &Arc<Control>) -> Self {
        Self { end: self.end.clone(), control: Some(Arc::clone(control)) }
    }
}

impl ConsoleBackend for SharedConsole {
    fn ports(&self) -> Ports {
        self.end.ports()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.end.read(buffer)?;
        if let Some(control) = self.control.as_ref().filter(|_| count > 0) {
            control.wake();
        }
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.end.write(bytes)
    }

    fn size(&self) -> Option<(u16, u16)> {
        self.end.size()
    }

    fn attend(&mut self) {
        self.end.attend();
    }
}
