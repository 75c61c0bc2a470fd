//! Where a pager has pages from.

use super::remote::Remote;
use crate::error::Error;
use crate::snapshot::Snapshot;
use crate::sockets::LocalAddress;

/// Pages of a saved guest's memory.
pub(super) trait Source {
    /// Size of the memory in bytes.
    fn size(&self) -> u64;

    /// Reads whole pages at an offset. False if all are zeroes for certain.
    ///
    /// # Errors
    /// They are out of reach: the pager cannot go on.
    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<bool, Error>;
}

/// What a pager serves.
pub(crate) enum Contents {
    /// The files of a snapshot, and of those that it is a difference to.
    Snapshot(Box<Snapshot>),
    /// Another pager's, on the other side of a connection.
    Remote(LocalAddress),
}

impl Source for Snapshot {
    fn size(&self) -> u64 {
        self.machine().config.mem
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<bool, Error> {
        self.read_memory(offset, bytes)
            .map_err(|error| self.refused(format_args!("cannot read its memory: {error}")))
    }
}

impl Contents {
    /// Opens it. The second result is true if all of it is to be fetched as soon as possible, since it may get out of reach.
    pub(super) fn open(self) -> Result<(Box<dyn Source>, bool), Error> {
        Ok(match self {
            Self::Snapshot(snapshot) => (snapshot, false),
            Self::Remote(address) => (Box::new(Remote::connect(&address)?), true),
        })
    }
}
