//! A running program.

use std::fs::File;
use std::io::ErrorKind::{ConnectionRefused, NotFound};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::termios::Termios;

use super::LIMIT;
use super::screen::{Missing, Screen};

/// A running program. It is killed when this is dropped, and if the test is failing then, its output is printed.
pub(crate) struct Session {
    shown: String,
    child: Child,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
    terminal: Option<Terminal>,
    output: Screen,
    errors: Screen,
}

/// A pseudo terminal: the user's end (`master`) and the program's end.
pub(crate) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    at_start: Termios,
}

impl Terminal {
    pub(crate) fn new(master: OwnedFd, slave: OwnedFd) -> Self {
        let at_start = rustix::termios::tcgetattr(&slave).expect("tcgetattr");
        Self { master, slave, at_start }
    }

    pub(crate) fn reader(&self) -> File {
        File::from(self.master.try_clone().expect("a copy of a descriptor"))
    }
}

impl Session {
    pub(crate) fn new(
        shown: String,
        child: Child,
        terminal: Option<Terminal>,
        output: Screen,
        errors: Screen,
    ) -> Self {
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("pidfd_open");
        Self { shown, child, pidfd, status: None, terminal, output, errors }
    }

    /// Waits until the program prints `text` on its output, and returns the output between the last such text and this one.
    pub(crate) fn expect(&self, text: &str) -> String {
        self.found(text, self.output.find(text, LIMIT))
    }

    /// As [`Session::expect`], but returns `None` after the time-out or at the end of the program.
    pub(crate) fn says_within(&self, text: &str, limit: Duration) -> Option<String> {
        self.output.find(text, limit).ok()
    }

    /// Waits until the program prints `text` on its standard error, and returns the text before that.
    pub(crate) fn expect_error(&self, text: &str) -> String {
        self.found(text, self.errors.find(text, LIMIT))
    }

    fn found(&self, text: &str, result: Result<String, Missing>) -> String {
        match result {
            Ok(before) => before,
            Err(Missing::Ended) => panic!("it ended without printing {text:?}"),
            Err(Missing::Late) => panic!("it has not printed {text:?} for {LIMIT:?}"),
        }
    }

    /// Types.
    pub(crate) fn send(&mut self, text: &str) {
        self.send_bytes(text.as_bytes());
    }

    /// Types bytes; blocks while the program does not read.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        let sent = self.try_send(bytes);
        sent.unwrap_or_else(|error| panic!("Cannot type {} bytes: {error}", bytes.len()));
    }

    /// Types bytes into a program that may have ended.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match (&self.terminal, &mut self.child.stdin) {
            (Some(terminal), _) => terminal.reader().write_all(bytes),
            (None, Some(pipe)) => pipe.write_all(bytes).and_then(|()| pipe.flush()),
            (None, None) => panic!("this program has no input"),
        }
    }

    /// Types a command into a guest's shell and returns its output. The next prompt is not consumed.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        // The terminal echoes the typed text, with arbitrary line breaks. Marks that are typed in two halves appear complete
        // only in the output of the shell.
        self.send(&format!("echo st''art; {command}; echo do''ne\n"));
        self.expect("start\r\n");
        self.expect("done\r\n").replace('\r', "")
    }

    /// Types bytes in a separate thread, then closes the input.
    pub(crate) fn feed(&mut self, bytes: Vec<u8>) -> thread::JoinHandle<()> {
        let mut pipe = self.child.stdin.take().expect("a program with a pipe for its input");
        thread::spawn(move || pipe.write_all(&bytes).expect("the program reads all of its input"))
    }

    /// Closes the program's input.
    pub(crate) fn close_input(&mut self) {
        self.child.stdin = None;
    }

    /// The output of a program that was started with `unread`.
    pub(crate) fn take_output(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("a program whose output nobody reads")
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a running program");
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The settings of its terminal.
    pub(crate) fn settings(&self) -> Termios {
        let terminal = self.terminal.as_ref().expect("a program on a terminal");
        rustix::termios::tcgetattr(&terminal.slave).expect("tcgetattr")
    }

    /// The settings of its terminal before it started.
    pub(crate) fn settings_at_start(&self) -> &Termios {
        &self.terminal.as_ref().expect("a program on a terminal").at_start
    }

    /// True while it runs.
    pub(crate) fn is_running(&mut self) -> bool {
        self.wait(Duration::ZERO).is_none()
    }

    /// Connects to the socket of the running program as soon as it listens; its file exists a moment earlier.
    pub(crate) fn connect(&mut self, path: &Path) -> UnixStream {
        let deadline = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(LIMIT)).expect("a time-out");
                    return stream;
                }
                Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => {
                    assert!(self.is_running(), "it ended before it listened");
                    assert!(Instant::now() < deadline, "{}: {error}", path.display());
                }
                Err(error) => panic!("{}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end of the program and returns its exit code.
    pub(crate) fn exit_code(&mut self) -> i32 {
        self.exit_code_within(LIMIT)
    }

    /// As [`Session::exit_code`], with a time-out.
    pub(crate) fn exit_code_within(&mut self, limit: Duration) -> i32 {
        let status = self.wait(limit).unwrap_or_else(|| panic!("it has not ended after {limit:?}"));
        status.code().unwrap_or_else(|| panic!("it was killed: {status}"))
    }

    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        while self.status.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("a short time");
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => return None,
                other => {
                    other.expect("poll");
                    self.status = Some(self.child.wait().expect("wait"));
                    // The slave, kept open for its settings, also keeps the reader from the end of file.
                }
            }
        }
        self.status
    }

    /// The complete output, once the program has closed it.
    pub(crate) fn output(&self) -> Vec<u8> {
        self.output.to_end(LIMIT).expect("the end of the output")
    }

    /// The standard error so far.
    pub(crate) fn errors(&self) -> String {
        String::from_utf8_lossy(&self.errors.bytes()).into_owned()
    }

    /// The complete standard error, once the program has closed it.
    pub(crate) fn all_errors(&self) -> String {
        let bytes = self.errors.to_end(LIMIT).expect("the end of standard error");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.status.is_none() {
            // It may have ended just now.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() {
            eprintln!("--- {}", self.shown);
            eprintln!("--- ended: {:?}", self.status);
            eprintln!("--- standard error:\n{}", self.errors.transcript());
            eprintln!("--- output:\n{}\n---", self.output.transcript());
        }
    }
}
