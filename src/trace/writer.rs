//! The writer: a thread that empties the harts' rings into a file. It has the lowest priority, so that harts on its CPU run
//! first; their records wait in the rings.

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

/// How long the writer sleeps after it has found the rings empty: short enough that a ring of the default size does not fill at 300,000
/// exits a second, and long enough that it hardly slows down harts on its CPU.
const SLEEP: Duration = Duration::from_millis(100);

/// Bytes of text that are written at once, so that the events of a whole ring are not held in memory.
const CHUNK: usize = 256 << 10;

/// The lowest priority of ordinary threads (setpriority(2)).
const LOWEST_PRIORITY: i32 = 19;

/// The thread's input.
pub(super) struct Job {
    pub(super) file: File,
    pub(super) format: Format,
    pub(super) rings: Vec<Arc<Ring>>,
    pub(super) ticks: Ticks,
    /// The header of the file.
    pub(super) text: String,
    /// For messages.
    pub(super) path: String,
}

/// The running thread. Dropping it ends the thread once all records are in the file.
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
            let _ = setpriority_process(Some(own_thread()), LOWEST_PRIORITY);
            WriterThread::new(job).run(&seen)
        })?;
        Ok(Self { is_over, thread: Some(thread) })
    }

    /// Ends the thread once all records are in the file.
    ///
    /// # Errors
    /// The error that kept records out of the file.
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
        // For the result there is `finish`.
        let _ = self.end();
    }
}

/// On Linux a thread has a priority of its own, under its own number.
fn own_thread() -> Pid {
    gettid()
}

/// The thread's state.
struct WriterThread {
    job: Job,
    /// Number of exits in the file or in the text.
    recorded: u64,
    /// By hart: number of lost exits that the file reports.
    reported: Vec<u64>,
    /// Bytes and exits in the file, up to the last whole event.
    written: (u64, u64),
    /// The error of a write: later records are discarded, and counted.
    failed: Option<io::Error>,
    discarded: u64,
}

impl WriterThread {
    fn new(job: Job) -> Self {
        let reported = vec![0; job.rings.len()];
        Self { job, recorded: 0, reported, written: (0, 0), failed: None, discarded: 0 }
    }

    fn run(mut self, is_over: &AtomicBool) -> io::Result<()> {
        loop {
            // Read before the rings: records that were put in before are found.
            let last = is_over.load(Ordering::Acquire);
            let found = self.drain_rings();
            if last {
                return self.end();
            }
            if found == 0 {
                self.write();
                thread::park_timeout(SLEEP);
            }
        }
    }

    /// Empties every ring once.
    fn drain_rings(&mut self) -> usize {
        let mut found = 0;
        for hart in 0..self.job.rings.len() {
            let Some(ring) = self.job.rings.get(hart).cloned() else { continue };
            let number = u32::try_from(hart).unwrap_or(u32::MAX);
            found += ring.drain(|words| {
                let Some(record) = Record::read(words) else { return };
                if self.failed.is_some() {
                    self.discarded += 1;
                    return;
                }
                self.job.format.exit(&mut self.job.text, number, &record);
                self.recorded += 1;
                if self.job.text.len() >= CHUNK {
                    self.write();
                }
            });
            let lost = ring.lost();
            if let Some(reported) =
                self.reported.get_mut(hart).filter(|reported| **reported != lost)
            {
                let now = (self.job.ticks.now)();
                self.job.format.lost(&mut self.job.text, number, lost.wrapping_sub(*reported), now);
                *reported = lost;
            }
        }
        found
    }

    /// Writes the text, or restores the file: it always ends with a whole event.
    fn write(&mut self) {
        let text = std::mem::take(&mut self.job.text);
        if self.failed.is_none() {
            let (len, exits) = self.written;
            match self.job.file.write_all(text.as_bytes()) {
                Ok(()) => self.written = (len.saturating_add(text.len() as u64), self.recorded),
                Err(error) => {
                    info!("Cannot write the trace {} any further: {error}", self.job.path);
                    self.discarded += self.recorded - exits;
                    self.recorded = exits;
                    self.truncate();
                    self.failed = Some(error);
                }
            }
        }
        self.job.text = text;
        self.job.text.clear();
    }

    /// Truncates the file after the last whole event.
    fn truncate(&mut self) {
        let (len, _) = self.written;
        // If that fails, the file ends with a part of a line.
        let _ = self.job.file.set_len(len);
        let _ = self.job.file.seek(SeekFrom::Start(len));
    }

    fn end(mut self) -> io::Result<()> {
        // Only exits in the file are counted as recorded.
        self.write();
        let lost = self
            .reported
            .iter()
            .fold(self.discarded, |sum, reported| sum.saturating_add(*reported));
        let recorded = self.recorded;
        self.job.format.end(&mut self.job.text, recorded, lost);
        let (len, _) = self.written;
        match self.failed.take() {
            None => self.write(),
            Some(error) => {
                // The truncation left room for a line.
                if len > 0 && self.job.file.write_all(self.job.text.as_bytes()).is_err() {
                    self.truncate();
                }
                self.failed = Some(error);
            }
        }
        let path = &self.job.path;
        info!("Recorded {recorded} exits in the trace {path}");
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
