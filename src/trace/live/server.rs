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

use super::answer::{Answer, Question, Subject};
use crate::error::Error;
use crate::host::Gate;
use crate::io_loop::Visited;

/// Connections at once; further ones are closed.
const MOST_VISITORS: usize = 8;

/// Those who wait to be let in.
const BACKLOG: i32 = 8;

/// The longest question, in bytes.
const LONGEST: u64 = 128;

/// How long a visitor may say nothing, and how long one may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// The stack of a visitor's thread.
const STACK: usize = 256 << 10;

/// The socket, and who answers there.
pub struct Reception {
    gate: Gate,
    subject: Arc<dyn Subject>,
    visitors: Arc<AtomicUsize>,
}

impl Reception {
    /// Makes the socket at `path`; its file goes with it.
    ///
    /// # Errors
    /// There can be no such file, or somebody listens there.
    pub fn open(path: &Path, subject: Arc<dyn Subject>) -> Result<Self, Error> {
        let gate = Gate::open(path, BACKLOG)?;
        Ok(Self { gate, subject, visitors: Arc::default() })
    }

    fn receive(&self, stream: UnixStream) -> io::Result<()> {
        let visit = Visit::begin(&self.visitors)
            .ok_or_else(|| io::Error::other(format!("{MOST_VISITORS} others are there already")))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let subject = Arc::clone(&self.subject);
        let body = move || {
            let ended = serve(&stream, subject.as_ref());
            debug!("A visitor left: {ended:?}");
            drop(visit);
        };
        thread::Builder::new().name("visitor".into()).stack_size(STACK).spawn(body)?;
        Ok(())
    }
}

impl Visited for Reception {
    fn attention(&self) -> RawFd {
        self.gate.attention()
    }

    fn attend(&self) {
        let Some(stream) = self.gate.admit() else { return };
        if let Err(error) = self.receive(stream.into()) {
            debug!("Nobody answers a visitor: {error}");
        }
    }
}

/// One of the visitors, as long as it is there.
struct Visit(Arc<AtomicUsize>);

impl Visit {
    fn begin(visitors: &Arc<AtomicUsize>) -> Option<Self> {
        // Only the I/O loop lets visitors in.
        if visitors.load(Ordering::Acquire) >= MOST_VISITORS {
            return None;
        }
        visitors.fetch_add(1, Ordering::AcqRel);
        Some(Self(Arc::clone(visitors)))
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Answers until the visitor leaves.
fn serve(stream: &UnixStream, subject: &dyn Subject) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(256, stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let question = std::str::from_utf8(&line).ok().filter(|line| line.ends_with('\n'));
        let (answer, is_known) = match question.and_then(Question::read) {
            Some(question) => (subject.answer(question), true),
            None => {
                (Answer::Error("Questions are stat, regs, and walk ADDRESS [HART]".into()), false)
            }
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
