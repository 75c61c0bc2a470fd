//! The output of a program so far, filled by a thread, searched by the test.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Position of `text` in `bytes`.
fn position(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

/// Bytes read from one stream of a program.
#[derive(Clone, Default)]
pub(crate) struct Screen {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Start of the next search.
    seen: usize,
    ended: bool,
}

/// The reason why an expected text was not found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The program has closed the stream.
    Ended,
    /// The time-out has expired.
    Late,
}

impl Screen {
    /// Reads `stream` to its end in a separate thread.
    pub(crate) fn read(mut stream: impl Read + Send + 'static) -> Self {
        let screen = Self::default();
        let filled = screen.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16384];
            loop {
                match stream.read(&mut buffer) {
                    Ok(count) if count > 0 => filled.add(&buffer[..count]),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    // A pty returns EIO instead of the end of file.
                    _ => return filled.end(),
                }
            }
        });
        screen
    }

    fn add(&self, bytes: &[u8]) {
        self.state().bytes.extend_from_slice(bytes);
        self.shared.1.notify_all();
    }

    fn end(&self) {
        self.state().ended = true;
        self.shared.1.notify_all();
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `text` after the last match, and returns the bytes before it.
    pub(crate) fn find(&self, text: &str, limit: Duration) -> Result<String, Missing> {
        // Bytes that were searched without success are not searched again.
        let mut from = 0;
        self.wait(limit, |state| {
            from = from.max(state.seen);
            let unseen = &state.bytes[from..];
            let Some(at) = position(unseen, text.as_bytes()) else {
                from += (unseen.len() + 1).saturating_sub(text.len());
                return None;
            };
            let before = &state.bytes[state.seen..from + at];
            let before = String::from_utf8_lossy(before).into_owned();
            state.seen = from + at + text.len();
            Some(before)
        })
    }

    /// Waits for the end of the stream and returns all of it.
    pub(crate) fn to_end(&self, limit: Duration) -> Result<Vec<u8>, Missing> {
        self.wait(limit, |state| state.ended.then(|| state.bytes.clone()))
    }

    /// All bytes so far.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    fn wait<T>(
        &self,
        limit: Duration,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Missing> {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        loop {
            if let Some(found) = look(&mut state) {
                return Ok(found);
            }
            if state.ended {
                return Err(Missing::Ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missing::Late);
            }
            let waited = self.shared.1.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The output for people: control characters escaped, the middle of very long text left out.
    pub(crate) fn transcript(&self) -> String {
        const SHOWN: usize = 12_000;
        let bytes = self.bytes();
        let visible = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes).replace('\r', "");
            let lines = text.lines().map(|line| line.escape_debug().to_string());
            lines.collect::<Vec<_>>().join("\n")
        };
        if bytes.len() <= 2 * SHOWN {
            return visible(&bytes);
        }
        let (start, end) = (&bytes[..SHOWN], &bytes[bytes.len() - SHOWN..]);
        let left_out = bytes.len() - 2 * SHOWN;
        format!("{}\n[{left_out} bytes left out]\n{}", visible(start), visible(end))
    }
}
