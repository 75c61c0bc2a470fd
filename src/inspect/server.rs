//! The machine's end of the socket. Only the machine's owner can connect, by the permissions of the socket's file. Each
//! connection has a thread that answers; the machine itself never waits for a client.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use log::debug;

use super::attached::WithDescriptor;
use super::query::{Inspectable, Order, Query, Reply};
use crate::error::Error;
use crate::io_loop::EventSource;
use crate::sockets::Acceptor;

/// Maximum number of connections; further ones are closed.
const MAX_CLIENTS: usize = 8;

/// Maximum number of connections that wait to be accepted.
const BACKLOG: i32 = 8;

/// Maximum size of a query or an order in bytes: a path of 4095 bytes in hexadecimal, and some more.
const MAX_LINE: u64 = 16 << 10;

/// Time-out of the next query of a client, and of a reply that it does not read.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Stack size of a client's thread.
const STACK: usize = 256 << 10;

/// The inspection socket, and the machine that answers.
pub struct InspectionServer {
    acceptor: Acceptor,
    target: Arc<dyn Inspectable>,
    clients: Arc<AtomicUsize>,
    /// Number of clients whose line is being answered.
    busy: Arc<AtomicUsize>,
}

/// Time-out of the replies that are under way when the machine ends: that to an order which ends it is one of them.
const LAST_REPLIES: Duration = Duration::from_secs(10);

impl Drop for InspectionServer {
    fn drop(&mut self) {
        let began = Instant::now();
        while self.busy.load(Ordering::Acquire) > 0 && began.elapsed() < LAST_REPLIES {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl InspectionServer {
    /// Creates the socket at `path`; its file is removed with it.
    ///
    /// # Errors
    /// The file cannot be created, or another process listens there.
    pub fn open(path: &Path, target: Arc<dyn Inspectable>) -> Result<Self, Error> {
        let acceptor = Acceptor::open(path, BACKLOG)?;
        Ok(Self { acceptor, target, clients: Arc::default(), busy: Arc::default() })
    }

    fn serve_client(&self, stream: UnixStream) -> io::Result<()> {
        let slot = ClientSlot::begin(&self.clients).ok_or_else(|| {
            io::Error::other(format!("there are {MAX_CLIENTS} connections already"))
        })?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let (target, busy) = (Arc::clone(&self.target), Arc::clone(&self.busy));
        let body = move || {
            let ended = serve(&stream, target.as_ref(), &busy);
            debug!("A client disconnected: {ended:?}");
            drop(slot);
        };
        thread::Builder::new().name("inspect".into()).stack_size(STACK).spawn(body)?;
        Ok(())
    }
}

impl EventSource for InspectionServer {
    fn fd(&self) -> RawFd {
        self.acceptor.fd()
    }

    fn ready(&self) {
        let Some(stream) = self.acceptor.accept() else { return };
        if let Err(error) = self.serve_client(stream.into()) {
            debug!("Cannot serve a client: {error}");
        }
    }
}

/// A line that is being answered.
struct Busy<'a>(&'a AtomicUsize);

impl<'a> Busy<'a> {
    fn begin(busy: &'a AtomicUsize) -> Self {
        busy.fetch_add(1, Ordering::AcqRel);
        Self(busy)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The slot of a connected client.
struct ClientSlot(Arc<AtomicUsize>);

impl ClientSlot {
    fn begin(clients: &Arc<AtomicUsize>) -> Option<Self> {
        // Only the I/O loop accepts clients.
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

/// Answers queries until the client disconnects.
fn serve(stream: &UnixStream, target: &dyn Inspectable, busy: &AtomicUsize) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(256, WithDescriptor { stream, attached: None });
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let _busy = Busy::begin(busy);
        let attached = reader.get_mut().attached.take();
        let text = std::str::from_utf8(&line).ok().filter(|line| line.ends_with('\n'));
        let (reply, is_known) = match (text.and_then(Query::read), text.and_then(Order::read)) {
            (Some(query), _) => (target.answer(query), true),
            (None, Some(Ok(order))) => {
                let mut tell = |reply: &Reply| write_reply(stream, reply).is_ok();
                (target.carry_out(order, attached, &mut tell), true)
            }
            (None, Some(Err(error))) => {
                (Reply::Error(format!("The order is invalid: {error}")), false)
            }
            (None, None) => (
                Reply::Error("Queries are info, stat, regs, and walk ADDRESS [HART]".into()),
                false,
            ),
        };
        write_reply(stream, &reply)?;
        if !is_known {
            return Ok(());
        }
    }
}

fn write_reply(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut text = serde_json::to_vec(reply)?;
    text.push(b'\n');
    stream.write_all(&text)
}
