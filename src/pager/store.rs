//! Pages for pagers on other hosts: each client asks for ranges of a snapshot's memory.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;

use super::protocol::{self, MOST, REQUEST, Reply};
use super::wire::{PATIENCE, Wire, wait};
use crate::error::Error;
use crate::snapshot::{Snapshot, checksum};
use crate::sockets::LocalAddress;

/// Limit of clients at a time. Each has a thread and a buffer.
const MOST_CLIENTS: usize = 64;

/// Stack of a client's thread, whose buffer is elsewhere.
const STACK: usize = 128 << 10;

/// Serves the memory of a snapshot to all clients, until the process is ended. `ready` is called once they can connect.
///
/// # Errors
/// Another program listens on the address.
pub(crate) fn serve_pages(
    address: &LocalAddress,
    snapshot: Snapshot,
    ready: impl FnOnce(&str),
) -> Result<Infallible, Error> {
    let acceptor = address.listen()?;
    ready(&acceptor.tcp_address().map_or(address.clone(), LocalAddress::Tcp).to_string());
    let snapshot = Arc::new(snapshot);
    loop {
        wait(&acceptor, PollFlags::IN, None).map_err(|source| Error::Host {
            what: format!("Cannot wait for clients at {address}"),
            source,
        })?;
        let Some(client) = acceptor.accept() else { continue };
        // One for this thread, one for each client.
        if Arc::strong_count(&snapshot) > MOST_CLIENTS {
            log::warn!("More than {MOST_CLIENTS} pagers at a time: one is turned away");
            continue;
        }
        let snapshot = Arc::clone(&snapshot);
        let thread = thread::Builder::new().name("client".into()).stack_size(STACK);
        let spawned = thread.spawn(move || {
            if let Err(error) = serve_client(client, &snapshot, PATIENCE) {
                log::warn!("A pager's connection ends: {error}");
            }
        });
        if let Err(error) = spawned {
            log::warn!("Cannot serve a pager: {error}");
        }
    }
}

/// Serves a client until it closes the connection.
pub(super) fn serve_client(
    client: OwnedFd,
    snapshot: &Snapshot,
    patience: Duration,
) -> io::Result<()> {
    let wire = Wire::new(client, patience)?;
    let size = snapshot.machine().config.mem;
    wire.send(&protocol::greeting(size))?;
    let mut buffer = vec![0; usize::try_from(MOST).unwrap_or(0)];
    let mut request = [0; REQUEST];
    while wire.receive_next(&mut request)? {
        let Some(range) = protocol::read_request(&request, size) else {
            wire.send(&protocol::reply(Reply::Refused, 0, 0))?;
            return Err(io::Error::other("it asks for what is no range of the memory"));
        };
        let len = u32::try_from(range.end - range.start).unwrap_or(0);
        let bytes = usize::try_from(len).ok().and_then(|len| buffer.get_mut(..len));
        let bytes = bytes.unwrap_or_default();
        let (reply, data) = match snapshot.read_memory(range.start, bytes) {
            Ok(true) => (Reply::Bytes(checksum(bytes)), &*bytes),
            Ok(false) => (Reply::Zeroes, &[][..]),
            Err(error) => {
                wire.send(&protocol::reply(Reply::Refused, range.start, len))?;
                return Err(error);
            }
        };
        wire.send(&protocol::reply(reply, range.start, len))?;
        wire.send(data)?;
    }
    Ok(())
}
