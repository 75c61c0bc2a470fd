//! Job control by a real shell: a console in the background does not use the terminal, until `fg`.

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

/// The variable with the path of a FIFO: opening it for writing puts an orphaned group into the foreground.
const TURN: &str = "RVMM_TEST_TURN";

/// Ctrl-A and a key.
const SUSPEND: &[u8] = b"\x01z";
const STOP: &[u8] = b"\x01x";

/// In the process that echoes: makes its group the foreground group on request of the test, because no shell does that for a
/// group that is not one of its jobs.
pub(crate) fn come_to_foreground_on_request() {
    let Some(path) = std::env::var_os(TURN) else { return };
    thread::spawn(move || {
        File::open(path).unwrap();
        // If blocked, SIGTTOU does not stop the process (tcsetpgrp(3)).
        block_signal(libc::SIGTTOU).unwrap();
        tcsetpgrp(std::io::stdin(), getpgrp()).unwrap();
    });
}

/// An interactive bash on a new terminal; without bash, the host's `sh`.
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

    /// Checks a few times that the shell gets typed keys, and the process in the background does not.
    fn gets_keys(&mut self) {
        for n in 40..45 {
            self.enter(&format!("echo answer-$(({n}+2))"));
            self.screen.until(format!("answer-{}", n + 2).as_bytes());
        }
    }

    /// Waits until the shell reports its only job as `Running` or `Stopped`.
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
            // The modes that a shell with line editing changes itself are ignored.
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

/// The command that echoes, with text of the shell's before and after it.
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
    shell.gets_keys();
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
    shell.gets_keys();
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
fn a_stopped_job_gives_the_terminal_back_and_gets_it_again_by_fg() {
    let mut shell = Shell::start();
    for stop in [Signal::TSTP, Signal::STOP] {
        shell.enter(&echo("", "& child=$!"));
        shell.screen.until(READY.trim_ascii_end());
        shell.enter("echo it is $child.");
        // Once as the echo of the input, once as output.
        shell.screen.until(b"it is ");
        shell.screen.until(b"it is ");
        let child = shell.screen.line_until(b".").parse().unwrap();
        shell.enter("fg %1");
        shell.is_raw(true);
        kill_process(Pid::from_raw(child).unwrap(), stop).unwrap();
        shell.screen.until(b"Stopped");
        // SIGSTOP cannot be caught: restoring the mode is up to the shell.
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
    shell.gets_keys();
    shell.exits();
}

#[test]
fn an_orphaned_group_without_the_keyboard_is_not_at_the_end_of_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let (turn, rest) = (fifo(folder.path(), "turn"), fifo(folder.path(), "rest"));
    let mut shell = Shell::start();
    // Its parent ends, which makes the group orphaned.
    let before = format!("{TURN}={}", turn.display());
    shell.enter(&format!("({}); echo re''turned", echo(&before, "</dev/tty &")));
    // Until that returns, their group is in the foreground.
    shell.screen.until_all(&[READY.trim_ascii_end(), b"returned"]);
    shell.gets_keys();
    // Meanwhile the shell does not read the keyboard.
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
fn sigtstp_does_not_stop_an_orphaned_group() {
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
fn signals_that_were_ignored_at_the_start_stay_ignored() {
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TSTP] {
        let name = signal.as_raw().to_string();
        let trap = format!("trap '' {name}; exec \"$@\"");
        let (input, typed) = std::io::pipe().unwrap();
        let mut child = start(&["sh", "-c", trap.as_str(), "sh"], "echo", input, Stdio::piped());
        let mut output = Output::new(child.stdout.take().unwrap());
        output.until(READY);
        kill_process(pid(&child), signal).unwrap();
        // If it were not ignored, the loop would process it before later events.
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
