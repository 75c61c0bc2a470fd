//! Job control by a real shell: a console in the background leaves the terminal alone, and comes back with `fg`.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, WaitOptions, getpgrp, kill_process, waitpid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr, tcsetpgrp};
use vmm_sys_util::signal::block_signal;

use super::{ECHO, LONG, OnTerminal, Output, READY, THIS_TEST, pid, start};

/// The file whose opening for writing puts an orphaned group into the foreground.
const TURN: &str = "RVMM_TEST_TURN";

/// Ctrl-A and a key.
const SUSPEND: &[u8] = b"\x01z";
const STOP: &[u8] = b"\x01x";

/// In the process that echoes: makes its group the foreground one when the test says so, as no shell does with a group that
/// is none of its jobs.
pub(crate) fn take_a_turn_when_told() {
    let Some(path) = std::env::var_os(TURN) else { return };
    thread::spawn(move || {
        File::open(path).unwrap();
        // Blocked, it is no reason to be stopped (tcsetpgrp(3)).
        block_signal(libc::SIGTTOU).unwrap();
        tcsetpgrp(std::io::stdin(), getpgrp()).unwrap();
    });
}

/// An interactive bash on a terminal of its own; where there is none, the host's `sh`.
struct Shell {
    keyboard: File,
    screen: Output<File>,
    slave: OwnedFd,
    child: Child,
}

impl Shell {
    fn start() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let bash = Command::new("bash").arg("--version").stdout(Stdio::null()).status();
        let shell: &[&str] =
            if bash.is_ok() { &["bash", "--norc", "--noprofile"] } else { &["sh"] };
        let child = Command::new("setsid")
            .arg("-c")
            .args(shell)
            .arg("-i")
            .env("PS1", "prompt> ")
            .env("TERM", "dumb")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let screen = Output::new(keyboard.try_clone().unwrap());
        let mut new = Self { keyboard, screen, slave, child };
        new.screen.until(b"prompt> ");
        new
    }

    fn enter(&mut self, line: &str) {
        self.keyboard.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Has the shell answer to keys, and the process in the background see them, a few times.
    fn is_typed_to(&mut self) {
        for n in 40..45 {
            self.enter(&format!("echo answer-$(({n}+2))"));
            self.screen.until(format!("answer-{}", n + 2).as_bytes());
        }
    }

    /// The only job is said to be `Running` or `Stopped`.
    fn has_a_job_that_is(&mut self, state: &str) {
        self.enter("echo jobs''-are; jobs; echo jobs''-were");
        self.screen.until(b"jobs-are");
        let line = self.screen.line_until(b"jobs-were");
        assert!(line.contains("[1]+") && line.contains(state), "{line:?}, not {state}");
    }

    /// Waits until the terminal is raw, or is not.
    fn is_raw(&self, wanted: bool) {
        let deadline = Instant::now() + LONG;
        loop {
            let modes = tcgetattr(&self.slave).unwrap().local_modes;
            // What a shell that edits lines changes itself says nothing.
            if modes.contains(LocalModes::IEXTEN) != wanted {
                return;
            }
            assert!(Instant::now() < deadline, "raw: {}", !wanted);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn types(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn exits(mut self) {
        self.enter("exit");
        self.child.wait().unwrap();
    }
}

/// The command that echoes, with a shell's words before and after it.
fn echo(before: &str, after: &str) -> String {
    let exe = std::env::current_exe().unwrap();
    let exe = exe.to_str().unwrap();
    format!(
        "{ECHO}=job {before} {exe} --exact {THIS_TEST} --nocapture --quiet --test-threads=1 2>/dev/null {after}"
    )
}

fn fifo(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path
}

#[test]
fn a_job_in_the_background_leaves_the_keys_to_the_shell_until_fg() {
    let mut shell = Shell::start();
    shell.enter(&echo("", "&"));
    shell.screen.until(READY.trim_ascii_end());
    shell.is_typed_to();
    shell.has_a_job_that_is("Running");
    shell.is_raw(false);

    shell.enter("fg");
    shell.screen.until(b"Ctrl-A h shows the keys");
    shell.is_raw(true);
    shell.types(b"one\x03\x1a");
    shell.screen.until(b"one\x03\x1a");

    shell.types(SUSPEND);
    shell.screen.until(b"Stopped");
    shell.is_raw(false);
    shell.enter("bg");
    shell.is_typed_to();
    shell.has_a_job_that_is("Running");
    shell.is_raw(false);

    shell.enter("fg");
    shell.is_raw(true);
    shell.types(b"two");
    shell.screen.until(b"two");
    shell.types(STOP);
    shell.screen.until(b"prompt> ");
    shell.is_raw(false);
    shell.enter("echo code-$?");
    shell.screen.until(b"code-0");
    shell.exits();
}

#[test]
fn a_job_that_is_stopped_by_a_signal_gives_the_terminal_back_and_has_it_again_by_fg() {
    let mut shell = Shell::start();
    for stop in [Signal::TSTP, Signal::STOP] {
        shell.enter(&echo("", "& child=$!"));
        shell.screen.until(READY.trim_ascii_end());
        shell.enter("echo it is $child.");
        // Once as typed, once as said.
        shell.screen.until(b"it is ");
        shell.screen.until(b"it is ");
        let child = shell.screen.line_until(b".").parse().unwrap();
        shell.enter("fg %1");
        shell.is_raw(true);
        kill_process(Pid::from_raw(child).unwrap(), stop).unwrap();
        shell.screen.until(b"Stopped");
        // Of SIGSTOP nobody hears anything: what becomes of the mode is the shell's affair.
        if stop == Signal::TSTP {
            shell.is_raw(false);
        }
        shell.enter("fg %1");
        shell.is_raw(true);
        shell.types(b"again");
        shell.screen.until(b"again");
        shell.types(STOP);
        shell.screen.until(b"prompt> ");
        shell.is_raw(false);
    }
    shell.exits();
}

#[test]
fn a_job_that_ends_in_the_background_leaves_the_terminal_as_it_is() {
    let mut shell = Shell::start();
    shell.enter(&echo("", "& child=$!"));
    shell.screen.until(READY.trim_ascii_end());
    shell.enter("kill $child; wait $child; echo code-$?");
    shell.screen.until(b"code-0");
    shell.is_raw(false);
    shell.is_typed_to();
    shell.exits();
}

#[test]
fn keys_that_an_orphaned_group_cannot_have_are_not_the_end_of_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let (turn, rest) = (fifo(folder.path(), "turn"), fifo(folder.path(), "rest"));
    let mut shell = Shell::start();
    // Its parent ends, and with that nobody in the session looks after the group.
    let before = format!("{TURN}={}", turn.display());
    shell.enter(&format!("({}); echo re''turned", echo(&before, "</dev/tty &")));
    // Until it has returned, the group of the two is in the foreground.
    shell.screen.until_all(&[READY.trim_ascii_end(), b"returned"]);
    shell.is_typed_to();
    // The shell keeps away from the keyboard meanwhile.
    shell.enter(&format!("cat {}; echo over-$((40+2))", rest.display()));
    let rest = File::options().write(true).open(rest).unwrap();
    drop(File::options().write(true).open(turn).unwrap());
    shell.is_raw(true);
    shell.types(b"mine");
    shell.screen.until(b"mine");
    shell.types(STOP);
    shell.is_raw(false);
    drop(rest);
    shell.screen.until(b"over-42");
    shell.exits();
}

#[test]
fn sigtstp_stops_no_group_that_nobody_would_continue() {
    // The process is the first of its session.
    let mut terminal = OnTerminal::start("echo");
    let process = pid(&terminal.child);
    kill_process(process, Signal::TSTP).unwrap();
    for word in [&b"still"[..], b"here"] {
        terminal.keyboard.write_all(word).unwrap();
        terminal.screen.until(word);
    }
    let stopped = waitpid(Some(process), WaitOptions::UNTRACED | WaitOptions::NOHANG).unwrap();
    assert!(stopped.is_none(), "{stopped:?}");
    let deadline = Instant::now() + LONG;
    while !terminal.is_raw() {
        assert!(Instant::now() < deadline, "the terminal is not raw again");
        thread::sleep(Duration::from_millis(1));
    }
    terminal.keyboard.write_all(STOP).unwrap();
    terminal.ends(true);
}

#[test]
fn signals_that_were_ignored_at_the_start_stay_so() {
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TSTP] {
        let name = signal.as_raw().to_string();
        let trap = format!("trap '' {name}; exec \"$@\"");
        let (input, typed) = std::io::pipe().unwrap();
        let mut child = start(&["sh", "-c", trap.as_str(), "sh"], "echo", input, Stdio::piped());
        let mut output = Output::new(child.stdout.take().unwrap());
        output.until(READY);
        kill_process(pid(&child), signal).unwrap();
        // Were it not ignored, the loop would see it before what comes later.
        let mut typed = File::from(OwnedFd::from(typed));
        typed.write_all(b"alive").unwrap();
        output.until(b"alive");
        thread::sleep(Duration::from_millis(50));
        typed.write_all(b"still").unwrap();
        output.until(b"still");
        kill_process(pid(&child), Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success());
    }
}
