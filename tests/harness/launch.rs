//! A builder for a program's command, input and output.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, LocalModes, OptionalActions};

use super::screen::Screen;
use super::session::{Session, Terminal};

/// A program to be started, by default with pipes that are read continuously.
pub(crate) struct Launch {
    command: Command,
    input: Input,
    reads: bool,
}

enum Input {
    Pipe,
    Nothing,
    Terminal,
}

impl Launch {
    /// The program at this path.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        // Tests must not depend on the environment.
        command.env_remove("RVMM_LOG").env("LC_ALL", "C").env("TERM", "dumb");
        Self { command, input: Input::Pipe, reads: true }
    }

    /// Appends arguments.
    pub(crate) fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// Appends one argument with a path in it: `--serial=file:` and the path.
    pub(crate) fn path(mut self, before: &str, path: &Path, after: &str) -> Self {
        let mut argument = std::ffi::OsString::from(before);
        argument.push(path);
        argument.push(after);
        self.command.arg(argument);
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: &Path) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets the working directory.
    pub(crate) fn folder(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Appends `--kernel` and a path.
    pub(crate) fn kernel(self, kernel: &Path) -> Self {
        self.args(&["--kernel"]).path("", kernel, "")
    }

    /// Uses `/dev/null` as standard input.
    pub(crate) fn no_input(mut self) -> Self {
        self.input = Input::Nothing;
        self
    }

    /// Uses a new pseudo terminal, as a user's shell would.
    pub(crate) fn on_terminal(mut self) -> Self {
        self.input = Input::Terminal;
        self
    }

    /// Uses an output pipe that the test reads itself, or not at all.
    pub(crate) fn unread(mut self) -> Self {
        self.reads = false;
        self
    }

    /// Starts the program.
    pub(crate) fn start(mut self) -> Session {
        self.command.stderr(Stdio::piped());
        let terminal = match self.input {
            Input::Terminal => Some(self.give_terminal()),
            Input::Pipe => {
                self.command.stdin(Stdio::piped()).stdout(Stdio::piped());
                None
            }
            Input::Nothing => {
                self.command.stdin(Stdio::null()).stdout(Stdio::piped());
                None
            }
        };
        let shown = format!("{:?}", self.command);
        let mut child =
            self.command.spawn().unwrap_or_else(|error| panic!("Cannot start {shown}: {error}"));
        // The command holds the slave's descriptors; the terminal has to close with the child.
        drop(self.command);
        let output = match (&terminal, self.reads) {
            (Some(terminal), true) => Screen::read(terminal.reader()),
            (None, true) => Screen::read(child.stdout.take().expect("a pipe")),
            (_, false) => Screen::default(),
        };
        let errors = Screen::read(child.stderr.take().expect("a pipe"));
        Session::new(shown, child, terminal, output, errors)
    }

    fn give_terminal(&mut self) -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).expect("a pseudo terminal");
        rustix::pty::grantpt(&master).expect("grantpt");
        rustix::pty::unlockpt(&master).expect("unlockpt");
        let path = rustix::pty::ptsname(&master, Vec::new()).expect("ptsname");
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("the slave");
        // Settings that no program sets by accident.
        let mut settings = rustix::termios::tcgetattr(&slave).expect("tcgetattr");
        settings.input_modes |= InputModes::IXANY;
        settings.local_modes |= LocalModes::ICANON | LocalModes::ECHO;
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &settings).expect("tcsetattr");
        let copy = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("a copy of a descriptor"));
        self.command.stdin(copy(&slave)).stdout(copy(&slave));
        Terminal::new(master, slave)
    }
}
