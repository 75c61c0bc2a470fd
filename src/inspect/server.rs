//! The machine's end of the socket. Whoever connects is the machine's owner, by the rights of the socket's file, and gets a
//! thread that answers; the machine itself waits for nobody.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use log::debug;

use super::query::{Inspectable, Query, Reply};
use crate::error::Error;
use crate::host::Acceptor;
use crate::io_loop::EventSource;

/// Connections at once; further ones are closed.
const MAX_CLIENTS: usize = 8;

/// Those who wait to be let in.
const BACKLOG: i32 = 8;

/// The longest query, in bytes.
const MAX_LINE: u64 = 128;

/// How long a client may say nothing, and how long one may take to read an answer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The stack of a client's thread.
const STACK: usize = 256 << 10;

/// The socket, and who answers there.
pub struct InspectionServer {
    acceptor: Acceptor,
    target: Arc<dyn Inspectable>,
    clients: Arc<AtomicUsize>,
}

impl InspectionServer {
    /// Makes the socket at `path`; its file goes with it.
    ///
    /// # Errors
    /// There can be no such file, or somebody listens there.
    pub fn open(path: &Path, target: Arc<dyn Inspectable>) -> Result<Self, Error> {
        let acceptor = Acceptor::open(path, BACKLOG)?;
        Ok(Self { acceptor, target, clients: Arc::default() })
    }

    fn receive(&self, stream: UnixStream) -> io::Result<()> {
        let slot = ClientSlot::begin(&self.clients)
            .ok_or_else(|| io::Error::other(format!("{MAX_CLIENTS} others are there already")))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let target = Arc::clone(&self.target);
        let body = move || {
            let ended = serve(&stream, target.as_ref());
            debug!("A client left: {ended:?}");
            drop(slot);
        };
        thread::Builder::new().name("client".into()).stack_size(STACK).spawn(body)?;
        Ok(())
    }
}

impl EventSource for InspectionServer {
    fn fd(&self) -> RawFd {
        self.acceptor.fd()
    }

    fn ready(&self) {
        let Some(stream) = self.acceptor.admit() else { return };
        if let Err(error) = self.receive(stream.into()) {
            debug!("Nobody answers a client: {error}");
        }
    }
}

/// One of the clients, as long as it is there.
struct ClientSlot(Arc<AtomicUsize>);

impl ClientSlot {
    fn begin(clients: &Arc<AtomicUsize>) -> Option<Self> {
        // Only the I/O loop lets clients in.
        if clients.load(Ordering::Acquire) >= MAX_CLIENTS {
            return None;
        }
        clients.fetch_add(1, Ordering::AcqRel);
        Some(Self(Arc::clone(clients)))
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Answers until the client leaves.
fn serve(stream: &UnixStream, target: &dyn Inspectable) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(256, stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let query = std::str::from_utf8(&line).ok().filter(|line| line.ends_with('\n'));
        let (answer, is_known) = match query.and_then(Query::read) {
            Some(query) => (target.answer(query), true),
            None => (Reply::Error("Queries are stat, regs, and walk ADDRESS [HART]".into()), false),
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        let mut writer = stream;
        writer.write_all(&text)?;
        if !is_known {
            return Ok(());
        }
    }
}
