//! Reading a restored guest's memory from its file before the guest does. The file's pages are shared as ever: none is copied.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::layout::Span;
use crate::memory::GuestRam;

/// Bytes that are read before the thread looks whether it is to end.
const CHUNK: u64 = 2 << 20;

/// Stack of the thread; its deepest call is a log line.
const STACK: usize = 128 << 10;

/// The thread `prefetch`. Dropping this ends it, after the chunk that it reads.
pub(crate) struct Prefetch {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    /// Starts to read what is mapped of a snapshot.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn start(ram: &Arc<GuestRam>) -> io::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let (ram, over) = (Arc::clone(ram), Arc::clone(&is_over));
        let thread = thread::Builder::new().name("prefetch".into()).stack_size(STACK);
        let thread = thread.spawn(move || {
            match read_ahead(&ram, &over) {
                Ok(bytes) => log::info!("{} MiB of the saved memory are read ahead", bytes >> 20),
                // The guest runs on: each page is read when it needs it.
                Err(error) => log::warn!("Cannot read the saved memory ahead: {error}"),
            }
        })?;
        Ok(Self { is_over, thread: Some(thread) })
    }

    /// Waits until all is read.
    #[cfg(test)]
    pub(super) fn finish(mut self) {
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Reads until the end, or until it `is_over`. Returns the number of bytes.
pub(super) fn read_ahead(ram: &GuestRam, is_over: &AtomicBool) -> io::Result<u64> {
    let mut done = 0;
    for range in ram.saved_ranges() {
        let mut at = range.base;
        while at < range.end() && !is_over.load(Ordering::Relaxed) {
            let size = CHUNK.min(range.end() - at);
            ram.populate(Span { base: at, size })?;
            at += size;
            done += size;
        }
    }
    Ok(done)
}
