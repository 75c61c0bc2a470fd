//! The writer: a thread that empties the harts' rings into a file. It is nice to the harts: where they want its CPU they get
//! it, and what they record meanwhile waits in the rings.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{info, warn};
use rustix::process::{Pid, setpriority_process};
use rustix::thread::gettid;

use super::format::Format;
use super::record::Record;
use super::ring::Ring;
use crate::vcpu::record::Ticks;

/// How long the writer sleeps after it has found the rings empty: not so long that a ring of the usual size fills at 300,000 exits a
/// second, and long enough that it is hardly felt where the harts want its CPU.
const NAP: Duration = Duration::from_millis(100);

/// The text that is written at once, in bytes; a ring's worth of events is not held in memory.
const CHUNK: usize = 256 << 10;

/// The weakest claim to a CPU that there is among ordinary threads (setpriority(2)).
const NICEST: i32 = 19;

/// What the thread has.
pub(super) struct Job {
    pub(super) file: File,
    pub(super) format: Format,
    pub(super) rings: Vec<Arc<Ring>>,
    pub(super) ticks: Ticks,
    /// The head of the file.
    pub(super) text: String,
    /// For messages.
    pub(super) path: String,
}

/// The running thread. Dropping it ends it, when all that is in the rings is in the file.
#[derive(Debug)]
pub(super) struct Writer {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Writer {
    /// Starts the thread, named `trace`.
    ///
    /// # Errors
    /// The host has no threads left.
    pub(super) fn start(job: Job) -> io::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&is_over);
        let thread = thread::Builder::new().name("trace".into()).spawn(move || {
            let _ = setpriority_process(Some(own_thread()), NICEST);
            WriterThread::new(job).work(&seen)
        })?;
        Ok(Self { is_over, thread: Some(thread) })
    }

    /// Ends the thread, when all that is in the rings is in the file.
    ///
    /// # Errors
    /// What kept the rest out of the file.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        self.is_over.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.thread().unpark();
        thread.join().unwrap_or_else(|_| Err(io::Error::other("its writer panicked")))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Who wants to know has asked.
        let _ = self.end();
    }
}

/// On Linux a thread has a priority of its own, under its own number.
fn own_thread() -> Pid {
    gettid()
}

/// The writer at work.
struct WriterThread {
    job: Job,
    /// Exits that are in the file or in the text.
    recorded: u64,
    /// By hart: how many lost exits the file tells of.
    told: Vec<u64>,
    /// Bytes and exits of the file that are whole.
    written: (u64, u64),
    /// Why the file takes no more: what the rings hold from then on is thrown away, and counted.
    failed: Option<io::Error>,
    thrown_away: u64,
}

impl WriterThread {
    fn new(job: Job) -> Self {
        let told = vec![0; job.rings.len()];
        Self { job, recorded: 0, told, written: (0, 0), failed: None, thrown_away: 0 }
    }

    fn work(mut self, is_over: &AtomicBool) -> io::Result<()> {
        loop {
            // Looked at before the rings: what was put in before that is found.
            let last = is_over.load(Ordering::Acquire);
            let found = self.round();
            if last {
                return self.end();
            }
            if found == 0 {
                self.write();
                thread::park_timeout(NAP);
            }
        }
    }

    /// Empties every ring once.
    fn round(&mut self) -> usize {
        let mut found = 0;
        for hart in 0..self.job.rings.len() {
            let Some(ring) = self.job.rings.get(hart).cloned() else { continue };
            let number = u32::try_from(hart).unwrap_or(u32::MAX);
            found += ring.drain(|words| {
                let Some(record) = Record::read(words) else { return };
                if self.failed.is_some() {
                    self.thrown_away += 1;
                    return;
                }
                self.job.format.exit(&mut self.job.text, number, &record);
                self.recorded += 1;
                if self.job.text.len() >= CHUNK {
                    self.write();
                }
            });
            let lost = ring.lost();
            if let Some(told) = self.told.get_mut(hart).filter(|told| **told != lost) {
                let now = (self.job.ticks.now)();
                self.job.format.lost(&mut self.job.text, number, lost.wrapping_sub(*told), now);
                *told = lost;
            }
        }
        found
    }

    /// Writes the text, or leaves the file as it was before: it always ends with a whole event.
    fn write(&mut self) {
        let text = std::mem::take(&mut self.job.text);
        if self.failed.is_none() {
            let (len, exits) = self.written;
            match self.job.file.write_all(text.as_bytes()) {
                Ok(()) => self.written = (len.saturating_add(text.len() as u64), self.recorded),
                Err(error) => {
                    info!("The trace {} ends here, it cannot be written: {error}", self.job.path);
                    self.thrown_away += self.recorded - exits;
                    self.recorded = exits;
                    self.cut();
                    self.failed = Some(error);
                }
            }
        }
        self.job.text = text;
        self.job.text.clear();
    }

    /// Takes back what is behind the last whole event.
    fn cut(&mut self) {
        let (len, _) = self.written;
        // Where not even that is possible, a reader finds half a line at the end.
        let _ = self.job.file.set_len(len);
        let _ = self.job.file.seek(SeekFrom::Start(len));
    }

    fn end(mut self) -> io::Result<()> {
        // What there is counts when it is in the file.
        self.write();
        let lost = self.told.iter().fold(self.thrown_away, |sum, told| sum.saturating_add(*told));
        let recorded = self.recorded;
        self.job.format.end(&mut self.job.text, recorded, lost);
        let (len, _) = self.written;
        match self.failed.take() {
            None => self.write(),
            Some(error) => {
                // What was taken back left room for a line.
                if len > 0 && self.job.file.write_all(self.job.text.as_bytes()).is_err() {
                    self.cut();
                }
                self.failed = Some(error);
            }
        }
        let path = &self.job.path;
        info!("{recorded} exits are in the trace {path}");
        if let Some(error) = self.failed {
            return Err(error);
        }
        if lost > 0 {
            let all = recorded.saturating_add(lost);
            warn!(
                "{lost} of {all} exits are missing in the trace {path}: the harts were faster than its writer (give it a CPU, or a larger ring: --trace FILE,ring=N)"
            );
        }
        Ok(())
    }
}
