//! The default initramfs: this executable is its init, process 1 of the guest.
//!
//! Process 1 mounts file systems, prints a line about the guest, starts a session on the console, reaps processes, and ends the
//! machine on request. The session is a process of its own, so that it has the console as its controlling terminal (Ctrl-C
//! reaches its programs) and no failure in it ends process 1. It is the host's busybox as the shell if the initramfs has it,
//! else rvmm's own small prompt.
//!
//! | file | contents |
//! |---|---|
//! | `archive.rs` | on the host: creates the initramfs |
//! | `greeting.rs` | the one line about the guest |
//! | `power.rs` | power-off and reboot |
//! | `session.rs` | the session on the console |
//! | `prompt.rs`, `commands.rs` | the small prompt and its commands |
//! | `words.rs`, `tables.rs` | parsers for lines and the kernel's tables: pure |
#![forbid(unsafe_code)]

use std::ffi::{OsStr, c_int};
use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::panic;
use std::process::{self, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::sethostname;

use power::Ending;

mod archive;
mod commands;
mod greeting;
mod power;
mod prompt;
mod session;
mod tables;
mod words;

pub use archive::{host_busybox, initramfs};

/// Path of this executable in the initramfs.
const PATH: &str = "/init";

/// The name (`argv[0]`) of the session that process 1 starts.
const SESSION: &str = "rvmm-session";

/// A session that ends sooner has failed; it is also the time before the next one starts.
const SHORT: Duration = Duration::from_secs(1);

/// Number of short sessions in a row after which busybox is not started again.
const MAX_SHORT: u32 = 3;

/// Signals of this process that it has taken over, as a descriptor that is readable while one is pending.
pub trait Signals: AsFd {
    /// Takes the signals received since the last call, each once.
    fn take(&self) -> Vec<c_int>;
}

/// Takes over the signals of these numbers for the whole process. Programs started from it have their default actions.
pub type Watch = fn(&[c_int]) -> io::Result<Box<dyn Signals>>;

/// True if this process is a guest's init, or the session that init has started: then [`main`] has to be called instead of
/// everything else. A process 1 of another name (in a container, for example) is neither.
#[must_use]
pub fn is_guest_init() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    name == SESSION || (process::id() == 1 && name == PATH)
}

/// Runs process 1 of a guest, or its session; see [`is_guest_init`]. Process 1 ends with the machine.
pub fn main(watch: Watch) -> ! {
    if process::id() == 1 {
        process_one(watch)
    }
    session::main(watch)
}

fn process_one(watch: Watch) -> ! {
    panic::set_hook(Box::new(|panic| {
        print_line(format_args!("rvmm: init failed and powers off: {panic}"));
        power::now(Ending::PowerOff);
    }));
    mount_all();
    let signals = watch(&[
        libc::SIGCHLD,
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGPWR,
    ]);
    // The host name is optional: the shell's prompt does not depend on it.
    let _ = sethostname(b"rvmm");
    print_line(format_args!("{}", greeting::line()));
    match signals {
        Ok(signals) => Init { signals, session: None, short: 0 }.run(),
        Err(error) => {
            print_line(format_args!("rvmm: init cannot take over signals and powers off: {error}"));
            power::now(Ending::PowerOff)
        }
    }
}

/// Prints a line of process 1. Without a console that fails, and `println!` would end process 1.
fn print_line(line: fmt::Arguments<'_>) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn mount_all() {
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let wanted = [
        ("proc", "/proc", plain),
        ("sysfs", "/sys", plain),
        ("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC),
    ];
    for (kind, place, flags) in wanted {
        // The kernel may have mounted /dev by itself.
        if let Err(error) = mount(kind, place, kind, flags, None)
            && error != Errno::BUSY
        {
            print_line(format_args!("rvmm: cannot mount {place}: {error}"));
        }
    }
}

/// The state of process 1.
struct Init {
    signals: Box<dyn Signals>,
    session: Option<(Pid, Instant)>,
    /// Short sessions in a row.
    short: u32,
}

impl Init {
    fn run(mut self) -> ! {
        loop {
            if self.session.is_none() {
                self.start_session();
            }
            if let Some(ending) = self.wait(None) {
                power::end(ending, self.signals.as_ref())
            }
            self.reap();
        }
    }

    /// Waits for signals, and returns how they request the machine to end, if at all.
    fn wait(&mut self, limit: Option<Duration>) -> Option<Ending> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
        // An error means that a signal has just arrived.
        let _ = poll(&mut fds, limit.as_ref());
        self.signals.take().into_iter().find_map(requested_ending)
    }

    fn start_session(&mut self) {
        let shell = if self.short < MAX_SHORT { "shell" } else { "prompt" };
        let started = Command::new(PATH).arg0(SESSION).arg(shell).env_clear().spawn();
        let pid = started.map(|child| c_int::try_from(child.id()).ok().and_then(Pid::from_raw));
        match pid {
            Ok(pid) => self.session = pid.map(|pid| (pid, Instant::now())),
            Err(error) => {
                print_line(format_args!("rvmm: cannot start a session: {error}"));
                self.pause();
            }
        }
    }

    /// Reaps all processes that have ended, its own children and orphans.
    fn reap(&mut self) {
        while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
            let Some((_, start)) = self.session.filter(|(session, _)| *session == pid) else {
                continue;
            };
            self.session = None;
            self.short = if start.elapsed() < SHORT { self.short.saturating_add(1) } else { 0 };
            if self.short > 0 {
                self.pause();
            }
        }
    }

    /// Waits before the next session, so that one that fails at once is not restarted in a busy loop.
    fn pause(&mut self) {
        if let Some(ending) = self.wait(Some(SHORT)) {
            power::end(ending, self.signals.as_ref())
        }
    }
}

/// The ending that busybox, sysvinit and the kernel request from process 1 by a signal.
fn requested_ending(signal: c_int) -> Option<Ending> {
    match signal {
        // A halted virtual machine would be of no use.
        libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGPWR => Some(Ending::PowerOff),
        libc::SIGTERM | libc::SIGINT => Some(Ending::Reboot),
        _ => None,
    }
}

/// The folders in which programs are looked up.
const SEARCH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// A program of the session, with a minimal environment.
fn program(path: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(path);
    // The terminal at the other end of a serial line is unknown; most terminals support at least this one.
    command
        .env_clear()
        .env("PATH", SEARCH)
        .env("HOME", "/root")
        .env("TERM", "vt102")
        .env("USER", "root");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_process_is_not_a_guests_init() {
        assert!(!is_guest_init());
    }

    #[test]
    fn busyboxs_poweroff_reboot_and_halt_are_understood() {
        assert_eq!(requested_ending(libc::SIGUSR2), Some(Ending::PowerOff));
        assert_eq!(requested_ending(libc::SIGUSR1), Some(Ending::PowerOff));
        assert_eq!(requested_ending(libc::SIGTERM), Some(Ending::Reboot));
        assert_eq!(requested_ending(libc::SIGCHLD), None);
    }
}
