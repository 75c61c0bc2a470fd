//! The host's ends of devices, on Linux: what a virtio device reads from and writes to outside the guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rvmm_devices::{Host, HostError, Listener};

use crate::error::Error;

mod listening;

pub(crate) use listening::Listening;

/// Programs that wait to be let in by a device.
const BACKLOG: i32 = 128;

/// This machine's kernel.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Linux;

impl Host for Linux {
    fn listen(&self, path: &Path) -> Result<Box<dyn Listener>, HostError> {
        Listening::open(path, BACKLOG)
            .map(|listening| Box::new(listening) as Box<dyn Listener>)
            .map_err(refusal)
    }

    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        listening::connect_to(path)
    }
}

/// An error of this crate as a device hands it on.
fn refusal(error: Error) -> HostError {
    match error {
        Error::Host { what, source } => HostError::refused(what, source),
        other => HostError::mistake(other.to_string()),
    }
}
