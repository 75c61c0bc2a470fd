//! The output of guests and narrator, in order: printed at once, and kept for the check. Only a line of the narrator that arrives in
//! the middle of a guest's line waits for the end of that line.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rvmm_devices::{ConsoleBackend, Port, Ports};

/// Maximum number of bytes that are kept; the labs' guests print less.
const MAX_TEXT: usize = 1 << 20;

/// Maximum number of the narrator's lines that wait for the end of a guest's line.
const MAX_WAITING: usize = 64;

/// Maximum length in bytes of a line of one of several machines.
const MAX_LINE: usize = 400;

/// The text, shared by all of its writers.
#[derive(Clone)]
pub(super) struct Transcript(Arc<SharedTranscript>);

struct SharedTranscript {
    state: Mutex<TranscriptState>,
    grown: Condvar,
}

struct TranscriptState {
    text: Vec<u8>,
    out: Box<dyn Write + Send>,
    is_at_line_start: bool,
    /// The narrator's lines that wait for the end of the guest's line.
    waiting: Vec<NarratorLine>,
    /// True once nothing more is printed.
    has_ended: bool,
}

/// A line of the narrator.
struct NarratorLine {
    line: String,
    is_kept: bool,
}

impl Transcript {
    /// An empty transcript, printed to `out`.
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        let state = TranscriptState {
            text: Vec::new(),
            out,
            is_at_line_start: true,
            waiting: Vec::new(),
            has_ended: false,
        };
        Self(Arc::new(SharedTranscript { state: Mutex::new(state), grown: Condvar::new() }))
    }

    /// Adds a whole line.
    pub(super) fn line(&self, line: &str) {
        self.push(NarratorLine { line: line.into(), is_kept: true });
    }

    /// Prints a whole line that is not part of the text.
    pub(super) fn aside(&self, line: &str) {
        self.push(NarratorLine { line: line.into(), is_kept: false });
    }

    fn push(&self, told: NarratorLine) {
        let mut state = self.lock();
        state.waiting.push(told);
        if state.waiting.len() > MAX_WAITING {
            state.end_line();
        } else if state.is_at_line_start {
            state.catch_up();
        }
        drop(state);
        self.0.grown.notify_all();
    }

    /// Ends the transcript: waiting lines are printed, and threads that wait for a text return.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.end_line();
        state.has_ended = true;
        drop(state);
        self.0.grown.notify_all();
    }

    /// Adds a part of the text, as a guest prints it.
    fn bytes(&self, bytes: &[u8]) {
        let mut state = self.lock();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            state.keep(part);
            state.show(part);
            state.is_at_line_start = part.ends_with(b"\n");
            if state.is_at_line_start {
                state.catch_up();
            }
        }
        drop(state);
        self.0.grown.notify_all();
    }

    /// The text so far, with its lines ended by line feeds alone.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().text).replace('\r', "")
    }

    /// Waits for `what` in the text or for the end of the text, for `limit` at most; true if the text has it.
    pub(super) fn wait_for(&self, what: &str, limit: Duration) -> bool {
        let has = |state: &TranscriptState| {
            state.text.windows(what.len().max(1)).any(|part| part == what.as_bytes())
        };
        let waited = self
            .0
            .grown
            .wait_timeout_while(self.lock(), limit, |state| !state.has_ended && !has(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        has(&state)
    }

    fn lock(&self) -> MutexGuard<'_, TranscriptState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TranscriptState {
    /// Ends the guest's line, if there is an unfinished one.
    fn end_line(&mut self) {
        if !self.is_at_line_start {
            self.keep(b"\n");
            self.show(b"\n");
            self.is_at_line_start = true;
        }
        self.catch_up();
    }

    fn catch_up(&mut self) {
        for NarratorLine { line, is_kept } in std::mem::take(&mut self.waiting) {
            let line = line + "\n";
            if is_kept {
                self.keep(line.as_bytes());
            }
            self.show(line.as_bytes());
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_TEXT - self.text.len();
        self.text.extend(bytes.iter().take(room));
    }

    fn show(&mut self, bytes: &[u8]) {
        // A closed output is no reason to stop the guest: the check uses the kept text.
        let _ = self.out.write_all(bytes).and_then(|()| self.out.flush());
    }
}

/// A console backend that writes to a transcript, with input from a pipe if there is one.
pub(super) struct Screen {
    transcript: Transcript,
    input: Option<OwnedFd>,
    /// For one of several machines: its name, and its current line.
    line: Option<(String, Vec<u8>)>,
}

impl Screen {
    /// The console of the machine `name`; with several machines whole lines are printed, each after its machine's name.
    pub(super) fn new(
        transcript: &Transcript,
        input: Option<OwnedFd>,
        name: Option<String>,
    ) -> Self {
        let line = name.map(|name| (name, Vec::new()));
        Self { transcript: transcript.clone(), input, line }
    }
}

/// Prints the rest of an unfinished line, too.
impl Drop for Screen {
    fn drop(&mut self) {
        if let Some((name, line)) = self.line.take().filter(|(_, line)| !line.is_empty()) {
            self.transcript.line(&format!("[{name}] {}", String::from_utf8_lossy(&line)));
        }
    }
}

impl ConsoleBackend for Screen {
    fn ports(&self) -> Ports {
        let input = self.input.as_ref().map_or(Port::Closed, |fd| Port::Poll(fd.as_raw_fd()));
        Ports { input, output: Port::Always, event_fd: None }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.input {
            Some(fd) => Ok(rustix::io::read(fd.as_fd(), buffer)?),
            None => Ok(0),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some((name, line)) = &mut self.line else {
            self.transcript.bytes(bytes);
            return Ok(bytes.len());
        };
        for byte in bytes {
            match byte {
                b'\r' => {}
                b'\n' => {
                    let text = String::from_utf8_lossy(line).into_owned();
                    self.transcript.line(&format!("[{name}] {text}"));
                    line.clear();
                }
                _ if line.len() < MAX_LINE => line.push(*byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }
}

/// The first of `expected` that is not a whole line of `text` after the one before it; `None` if all are.
pub(super) fn missing<'a>(text: &str, expected: &[&'a str]) -> Option<&'a str> {
    let mut lines = text.lines();
    expected.iter().find(|wanted| !lines.any(|line| line == **wanted)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript() -> Transcript {
        Transcript::new(Box::new(io::sink()))
    }

    #[test]
    fn a_line_of_the_narrator_does_not_interrupt_one_of_the_guest() {
        let all = transcript();
        let mut screen = Screen::new(&all, None, None);
        all.line("first");
        screen.write(b"half").unwrap();
        all.line("told");
        all.line("told again");
        screen.write(b" and half\r\nlate").unwrap();
        assert_eq!(all.text(), "first\nhalf and half\ntold\ntold again\nlate");
        all.line("last");
        all.end();
        assert_eq!(all.text(), "first\nhalf and half\ntold\ntold again\nlate\nlast\n");
    }

    #[test]
    fn a_line_of_a_guest_that_does_not_end_is_ended() {
        let all = transcript();
        let mut screen = Screen::new(&all, None, None);
        screen.write(b"endless").unwrap();
        for _ in 0..=MAX_WAITING {
            all.line("told");
        }
        assert!(all.text().starts_with("endless\ntold\ntold\n"));
    }

    #[test]
    fn an_aside_is_no_part_of_the_text() {
        let all = transcript();
        let mut screen = Screen::new(&all, None, None);
        screen.write(b"half").unwrap();
        all.aside("by the way");
        screen.write(b" and half\n").unwrap();
        all.line("told");
        assert_eq!(all.text(), "half and half\ntold\n");
    }

    #[test]
    fn lines_must_come_whole_and_in_order() {
        let text = "one\ntwo and more\nthree\none\n";
        assert_eq!(missing(text, &["one", "three"]), None);
        assert_eq!(missing(text, &["three", "one"]), None);
        assert_eq!(missing(text, &["one", "two"]), Some("two"));
        assert_eq!(missing(text, &["three", "three"]), Some("three"));
    }

    #[test]
    fn lines_of_several_machines_stay_whole_and_carry_their_names() {
        let all = transcript();
        let mut left = Screen::new(&all, None, Some("left".into()));
        let mut right = Screen::new(&all, None, Some("right".into()));
        left.write(b"one").unwrap();
        right.write(b"two\r\n").unwrap();
        left.write(b" more\n").unwrap();
        assert_eq!(all.text(), "[right] two\n[left] one more\n");
        left.write(b"and no end").unwrap();
        drop((left, right));
        assert_eq!(all.text(), "[right] two\n[left] one more\n[left] and no end\n");
    }

    #[test]
    fn the_kept_text_is_bounded() {
        let all = transcript();
        let mut screen = Screen::new(&all, None, None);
        for _ in 0..3 {
            screen.write(&vec![b'x'; MAX_TEXT / 2]).unwrap();
        }
        assert_eq!(all.text().len(), MAX_TEXT);
        let for_ever = Duration::MAX;
        assert!(!all.wait_for("y", Duration::ZERO) && all.wait_for("xx", for_ever));
        all.end();
        assert!(!all.wait_for("y", for_ever), "the text has ended");
    }
}
