//! The session on the console: takes it as the controlling terminal, and runs the shell or the prompt.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process;

use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::{Watch, program, prompt};

/// Path of the host's busybox in the initramfs, if the host has one.
pub(super) const BUSYBOX: &str = "/bin/busybox";

/// The prompt of both the shell and the small prompt.
pub(super) const PROMPT: &str = "rvmm# ";

/// Runs the session's process; its first argument is `prompt` if the shell has failed.
pub(super) fn main(watch: Watch) -> ! {
    if let Err(error) = take_console() {
        eprintln!("rvmm: no controlling terminal, Ctrl-C does nothing: {error}");
    }
    let wants_shell = std::env::args_os().nth(1).is_none_or(|which| which != "prompt");
    if wants_shell && Path::new(BUSYBOX).exists() {
        let error = become_busybox();
        eprintln!("rvmm: cannot start busybox: {error}");
    }
    prompt::run(watch);
    process::exit(0)
}

/// Makes this process the leader of a session whose terminal is the console.
fn take_console() -> io::Result<()> {
    setsid()?;
    let console = open_console()?;
    ioctl_tiocsctty(&console)?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// The terminal behind /dev/console under its own name, which `ps` and `tty` show; else /dev/console.
fn open_console() -> io::Result<File> {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    // The last one named is /dev/console.
    let name = active.split_ascii_whitespace().last().unwrap_or("console");
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    options.open(Path::new("/dev").join(name)).or_else(|_| options.open("/dev/console"))
}

/// Replaces this process by busybox's shell; returns only if that fails.
fn become_busybox() -> io::Error {
    // Links for all of its commands, so that they are found. They exist already in later sessions.
    let links = program(BUSYBOX).args(["--install", "-s"]).status();
    if !links.is_ok_and(|status| status.success()) {
        eprintln!("rvmm: busybox cannot create its links: run its commands as 'busybox COMMAND'");
    }
    println!("busybox is the shell; poweroff ends the machine.");
    // Without it the shell starts in the root folder.
    let home = if Path::new("/root").is_dir() { "/root" } else { "/" };
    program(BUSYBOX).arg0("sh").env("PS1", PROMPT).current_dir(home).exec()
}
