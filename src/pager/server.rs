//! A pager: has the pages of one machine, and fills each when the machine waits for it.
//!
//! A page is fetched with those around it, since the guest is likely to need them next, and a request to another host takes its time.
//! The page that is waited for is filled first.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::handshake::{self, Region};
use super::source::{Contents, Source};
use super::wire::{PATIENCE, wait};
use crate::error::Error;
use crate::memory::{PAGE, Placed, Userfault};
use crate::sockets::Listening;

/// Bytes that are fetched at once.
const BLOCK: u64 = 64 << 10;

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

const _: () = assert!(PAGE_BYTES as u64 == PAGE);

/// What a pager has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Served {
    /// Pages that it has filled.
    pub(crate) pages: u64,
    /// Pages that the machine has waited for.
    pub(crate) faults: u64,
}

/// Waits for a machine at `path` and serves it until it ends. `ready` is called once it can connect.
///
/// # Errors
/// The contents are out of reach, another program listens, or the machine's message is none: the machine ends then.
pub(crate) fn serve_machine(
    path: &Path,
    contents: Contents,
    ready: impl FnOnce(),
) -> Result<Served, Error> {
    let (mut source, fetches_all) = contents.open()?;
    let listening = Listening::open(path, 1)?;
    ready();
    let stream = loop {
        wait(&listening, PollFlags::IN, None).map_err(|error| failed("wait for", error))?;
        match listening.accept() {
            Ok(stream) => break stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed("accept", error)),
        }
    };
    // It serves no other one: who comes later is refused.
    drop(listening);
    Machine::receive(stream, source.size(), PATIENCE)?.serve(source.as_mut(), fetches_all)
}

/// A machine whose memory is served.
pub(super) struct Machine {
    stream: OwnedFd,
    faults: Userfault,
    parts: Vec<Part>,
    buffer: Vec<u8>,
    served: Served,
}

/// A region, and which of its pages were filled: a bit for each.
struct Part {
    region: Region,
    filled: Vec<u64>,
}

impl Part {
    fn pages(&self) -> u64 {
        self.region.size / PAGE
    }

    fn is_filled(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|at| self.filled.get(at));
        word.is_none_or(|word| word >> (page % 64) & 1 == 1)
    }

    fn set_filled(&mut self, page: u64) {
        let word = usize::try_from(page / 64).ok().and_then(|at| self.filled.get_mut(at));
        _ = word.map(|word| *word |= 1 << (page % 64));
    }

    /// The number of the page at an address of the machine.
    fn page_at(&self, address: u64) -> Option<u64> {
        let at = address.checked_sub(self.region.base_host_virt_addr)?;
        (at < self.region.size).then_some(at / PAGE)
    }

    /// The pages that are fetched with one.
    fn block(&self, page: u64) -> Range<u64> {
        let start = page / (BLOCK / PAGE) * (BLOCK / PAGE);
        start..(start + BLOCK / PAGE).min(self.pages())
    }

    /// The first page from `page` on that was not filled.
    fn next_missing(&self, page: u64) -> Option<u64> {
        (page..self.pages()).find(|page| !self.is_filled(*page))
    }
}

impl Machine {
    /// Receives the memory of a machine, which has this size.
    pub(super) fn receive(stream: OwnedFd, size: u64, limit: Duration) -> Result<Self, Error> {
        let refused = |error| failed("take over the memory of", error);
        let (regions, faults) = handshake::receive(&stream, limit).map_err(refused)?;
        handshake::check(&regions, size).map_err(refused)?;
        let first = regions.first().copied();
        let (base, len) = first.map_or((0, 0), |first| (first.base_host_virt_addr, first.size));
        let faults = Userfault::received(faults, base, len).map_err(refused)?;
        let words = |region: &Region| usize::try_from((region.size / PAGE).div_ceil(64));
        let parts = regions.into_iter().map(|region| {
            let filled = vec![0; words(&region).map_err(|error| refused(io::Error::other(error)))?];
            Ok(Part { region, filled })
        });
        let parts = parts.collect::<Result<_, Error>>()?;
        let buffer = vec![0; usize::try_from(BLOCK).unwrap_or(0)];
        Ok(Self { stream, faults, parts, buffer, served: Served::default() })
    }

    /// Serves the machine until it ends; fetches what it does not wait for, too, if it `fetches_all`.
    pub(super) fn serve(
        mut self,
        source: &mut dyn Source,
        fetches_all: bool,
    ) -> Result<Served, Error> {
        let mut next = fetches_all.then_some((0, 0));
        loop {
            if self.has_ended(next.is_none())? {
                return Ok(self.served);
            }
            let addresses =
                self.faults.faults().map_err(|error| failed("read the faults of", error))?;
            for address in &addresses {
                let found = self.parts.iter().enumerate();
                let mut found = found.filter_map(|(at, part)| Some((at, part.page_at(*address)?)));
                let Some((part, page)) = found.next() else {
                    let what = format!("it waits for {address:#x}, which is not its memory");
                    return Err(failed("serve", io::Error::other(what)));
                };
                self.served.faults += 1;
                if self.fill(source, part, page)? == Placed::Gone {
                    return Ok(self.served);
                }
            }
            if let (true, Some((part, from))) = (addresses.is_empty(), next) {
                let missing = self.parts.get(part).map(|part| part.next_missing(from));
                next = match missing {
                    // All is there.
                    None => None,
                    Some(None) => Some((part + 1, 0)),
                    Some(Some(page)) => {
                        if self.fill(source, part, page)? == Placed::Gone {
                            return Ok(self.served);
                        }
                        Some((part, page))
                    }
                };
            }
        }
    }

    /// True if the machine has ended. Waits for that or a fault, if it `waits`.
    fn has_ended(&self, waits: bool) -> Result<bool, Error> {
        let mut descriptors =
            [PollFd::new(&self.stream, PollFlags::IN), PollFd::new(&self.faults, PollFlags::IN)];
        let at_once = Timespec::default();
        match poll(&mut descriptors, (!waits).then_some(&at_once)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(failed("wait for", error.into())),
        }
        match recv(&self.stream, &mut [0; 64], RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(true),
            Ok(_) => {
                Err(failed("serve", io::Error::other("it says more than where its memory is")))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(failed("serve", error.into())),
        }
    }

    /// Fills a page, and those around it that were not filled yet.
    fn fill(&mut self, source: &mut dyn Source, part: usize, page: u64) -> Result<Placed, Error> {
        let Self { faults, parts, buffer, served, .. } = self;
        let Some(part) = parts.get_mut(part) else { return Ok(Placed::Before) };
        let block = part.block(page);
        let len = usize::try_from((block.end - block.start) * PAGE).unwrap_or(0);
        let bytes = buffer.get_mut(..len).unwrap_or_default();
        let has_data = source.read(part.region.offset + block.start * PAGE, bytes)?;
        let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        let others = block.clone().filter(|other| *other != page && !part.is_filled(*other));
        let wanted: Vec<u64> = std::iter::once(page).chain(others).collect();
        for page in wanted {
            let bytes = usize::try_from(page - block.start).ok().and_then(|at| pages.get(at));
            let bytes = bytes.filter(|bytes| has_data && bytes.iter().any(|byte| *byte != 0));
            let address = part.region.base_host_virt_addr + page * PAGE;
            let placed = match bytes {
                Some(bytes) => faults.copy(address, bytes),
                None => faults.zero(address),
            };
            match placed.map_err(|error| failed("fill a page of", error))? {
                Placed::Gone => return Ok(Placed::Gone),
                Placed::New => served.pages += 1,
                Placed::Before => {}
            }
            part.set_filled(page);
        }
        Ok(Placed::New)
    }
}

fn failed(what: &str, source: io::Error) -> Error {
    let source = match source.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("it has ended"),
        io::ErrorKind::TimedOut => io::Error::other("it does not say where its memory is"),
        _ => source,
    };
    Error::Host { what: format!("Cannot {what} the machine"), source }
}
