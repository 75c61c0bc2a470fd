//! Pages from another host: the client of `store.rs`. Nothing that it receives is believed: sizes, places and checksums are checked.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::protocol::{self, GREETING, MOST, REPLY, Reply};
use super::source::Source;
use super::wire::{PATIENCE, Wire};
use crate::error::Error;
use crate::snapshot::checksum;
use crate::sockets::LocalAddress;

/// A connection to a `rvmm pager --serve`.
pub(super) struct Remote {
    wire: Wire,
    /// What it is called in messages.
    name: String,
    size: u64,
}

impl Remote {
    /// Connects to one, and learns how large the memory is.
    ///
    /// # Errors
    /// Nobody listens there, or something else.
    pub(super) fn connect(address: &LocalAddress) -> Result<Self, Error> {
        let socket = address.connect().map_err(|source| Error::Host {
            what: format!("Cannot connect to {address} (start rvmm pager --serve there first)"),
            source,
        })?;
        Self::over(socket, address.to_string(), PATIENCE)
    }

    pub(super) fn over(socket: OwnedFd, name: String, patience: Duration) -> Result<Self, Error> {
        let wire = Wire::new(socket, patience).map_err(|error| failed(&name, error))?;
        let mut greeting = [0; GREETING];
        wire.receive(&mut greeting).map_err(|error| failed(&name, error))?;
        let size = protocol::read_greeting(&greeting);
        let size = size.map_err(|what| failed(&name, io::Error::other(what)))?;
        Ok(Self { wire, name, size })
    }

    fn fetch(&self, offset: u64, bytes: &mut [u8]) -> io::Result<bool> {
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MOST);
        let len = len.ok_or(io::ErrorKind::InvalidInput)?;
        self.wire.send(&protocol::request(offset, len))?;
        let mut reply = [0; REPLY];
        self.wire.receive(&mut reply)?;
        match protocol::read_reply(&reply, offset, len) {
            None => Err(io::Error::other("it replies to another request")),
            Some(Reply::Refused) => Err(io::Error::other("it cannot read them")),
            Some(Reply::Zeroes) => {
                bytes.fill(0);
                Ok(false)
            }
            Some(Reply::Bytes(expected)) => {
                self.wire.receive(bytes)?;
                if checksum(bytes) == expected {
                    Ok(true)
                } else {
                    Err(io::Error::other("they were changed on the way (the checksum is another)"))
                }
            }
        }
    }
}

impl Source for Remote {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<bool, Error> {
        self.fetch(offset, bytes).map_err(|error| failed(&self.name, error))
    }
}

fn failed(name: &str, source: io::Error) -> Error {
    let source = match source.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("it has closed the connection"),
        io::ErrorKind::TimedOut => io::Error::other("it does not reply"),
        _ => source,
    };
    Error::Host { what: format!("Cannot get the guest's pages from {name}"), source }
}
