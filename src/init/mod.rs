//! What this same executable does when it wakes up as process 1 of a guest: the default initramfs.
//!
//! Process 1 mounts, greets, starts a session on the console, buries the dead, and ends the machine when it is told to. The
//! session is a process of its own, so that it has the console as its controlling terminal (Ctrl-C reaches what runs
//! there) and so that nothing that happens in it ends process 1: the host's busybox as the shell where it came along, else
//! rvmm's own small prompt.
//!
//! | file | what is in it |
//! |---|---|
//! | `archive.rs` | on the host: what goes into the initramfs |
//! | `greeting.rs` | the one line about the guest |
//! | `power.rs` | the orderly end |
//! | `session.rs` | the console, and who reads it |
//! | `prompt.rs`, `commands.rs` | the small prompt and its commands |
//! | `words.rs`, `tables.rs` | taking lines and the kernel's tables apart: pure |

use std::ffi::{OsStr, c_int};
use std::fmt;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::panic;
use std::process::{self, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::sethostname;

use crate::signals::{self, Signals};
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

/// Where the initramfs has this executable.
const PATH: &str = "/init";

/// The name under which process 1 starts its session.
const SESSION: &str = "rvmm-session";

/// A session that ends sooner has failed, and the next one waits as long.
const SHORT: Duration = Duration::from_secs(1);

/// Short sessions in a row after which busybox is not tried any more.
const MAX_SHORT: u32 = 3;

/// Whether this process is a guest's init, or the session that init has started, and [`main`] has to be called instead of
/// everything else. A process 1 of another name (in a container, say) is not.
#[must_use]
pub fn is_wanted() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    name == SESSION || (process::id() == 1 && name == PATH)
}

/// Process 1 of a guest, or its session; see [`is_wanted`]. Process 1 ends with the machine.
pub fn main() -> ! {
    if process::id() == 1 {
        process_one()
    }
    session::main()
}

fn process_one() -> ! {
    panic::set_hook(Box::new(|panic| {
        tell(format_args!("rvmm: init failed and powers off: {panic}"));
        power::now(Ending::PowerOff);
    }));
    mount_all();
    let signals = signals::watch(&[
        libc::SIGCHLD,
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGPWR,
    ]);
    // A name is a nicety; the shell's prompt does not depend on it.
    let _ = sethostname(b"rvmm");
    tell(format_args!("{}", greeting::line()));
    match signals {
        Ok(signals) => Init { signals, session: None, short: 0 }.run(),
        Err(error) => {
            tell(format_args!("rvmm: init cannot take signals and powers off: {error}"));
            power::now(Ending::PowerOff)
        }
    }
}

/// Prints a line of process 1. Where the console is gone that fails, and `println!` would end process 1 over it.
fn tell(line: fmt::Arguments<'_>) {
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
            tell(format_args!("rvmm: cannot mount {place}: {error}"));
        }
    }
}

/// Process 1 at work.
struct Init {
    signals: Signals,
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
                power::end(ending, &mut self.signals)
            }
            self.bury();
        }
    }

    /// Waits for signals, and gives what the machine has to do because of them.
    fn wait(&mut self, limit: Option<Duration>) -> Option<Ending> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
        // An error is a signal that has come just now.
        let _ = poll(&mut fds, limit.as_ref());
        self.signals.take().find_map(asks_for)
    }

    fn start_session(&mut self) {
        let shell = if self.short < MAX_SHORT { "shell" } else { "prompt" };
        let started = Command::new(PATH).arg0(SESSION).arg(shell).env_clear().spawn();
        let pid = started.map(|child| c_int::try_from(child.id()).ok().and_then(Pid::from_raw));
        match pid {
            Ok(pid) => self.session = pid.map(|pid| (pid, Instant::now())),
            Err(error) => {
                tell(format_args!("rvmm: cannot start a session: {error}"));
                self.pause();
            }
        }
    }

    /// Waits for all children that have died, its own and the orphans.
    fn bury(&mut self) {
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

    /// Nothing may start sessions as fast as it can.
    fn pause(&mut self) {
        if let Some(ending) = self.wait(Some(SHORT)) {
            power::end(ending, &mut self.signals)
        }
    }
}

/// The signals by which busybox, sysvinit and the kernel ask process 1 to end the machine.
fn asks_for(signal: c_int) -> Option<Ending> {
    match signal {
        // A halted virtual machine would only be one that nobody can use.
        libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGPWR => Some(Ending::PowerOff),
        libc::SIGTERM | libc::SIGINT => Some(Ending::Reboot),
        _ => None,
    }
}

/// The folders in which programs are looked up.
const SEARCH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// A program that is started from the session, with the little environment that it gets.
fn program(path: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(path);
    // A serial line says nothing about the terminal behind it; this is what most can at least.
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
        assert!(!is_wanted());
    }

    #[test]
    fn busyboxs_poweroff_reboot_and_halt_are_understood() {
        assert_eq!(asks_for(libc::SIGUSR2), Some(Ending::PowerOff));
        assert_eq!(asks_for(libc::SIGUSR1), Some(Ending::PowerOff));
        assert_eq!(asks_for(libc::SIGTERM), Some(Ending::Reboot));
        assert_eq!(asks_for(libc::SIGCHLD), None);
    }
}
