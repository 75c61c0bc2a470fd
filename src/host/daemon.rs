//! Programs that serve devices (virtiofsd, passt): finding and starting them, logging their messages, stopping them with the device.
//!
//! Each inherits one socket descriptor and nothing else of rvmm's. It exits when its connection is closed; if it does not, it
//! is killed. A thread of its own starts it and waits for it, so that it is never a zombie, and so that the kernel kills it if
//! rvmm dies (PR_SET_PDEATHSIG is bound to the thread that starts a program). When one fails, its `--help` is checked for the
//! options that rvmm used (`daemon/version.rs`), since versions differ.
#![expect(unsafe_code, reason = "code between fork and exec")]

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::info;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::rand::{GetRandomFlags, getrandom};
use rvmm_devices::HostError;
use rvmm_devices::virtio::vhost_user::{Daemon, Sandbox, Service};

use crate::config::MAX_SOCKET_PATH;
use crate::sockets::{Listening, connect_to};

/// Paths of virtiofsd: in Debian, in Arch, and QEMU's in Debian 12.
const VIRTIOFSD: &[&str] =
    &["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// Time-out for a program to exit after its connection is closed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time-out for the last messages of a program that failed.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Limits of the lines of a program that are logged, and of the bytes of a line that are kept.
const MOST_LINES: usize = 32;
const LONGEST_LINE: usize = 512;
/// Stack of a thread that only waits.
const STACK: usize = 128 << 10;

mod version;

/// A program that runs, or has run.
struct Started {
    name: &'static str,
    /// Its file and its options, to be checked if it fails.
    program: PathBuf,
    options: Vec<String>,
    process: Pid,
    /// Readable once it has exited.
    pidfd: OwnedFd,
    errors: Option<ChildStderr>,
    line: Vec<u8>,
    last: String,
    lines: usize,
    waiting: Option<JoinHandle<()>>,
}

/// Starts the program for `service` and connects to it.
pub(super) fn start(service: &Service) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
    match service {
        Service::Folder { path, read_only, sandbox } => share(path, *read_only, *sandbox),
        Service::Network { forwards } => network(forwards),
    }
}

fn share(
    path: &Path,
    read_only: bool,
    sandbox: Sandbox,
) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
    let what = |error: &dyn std::fmt::Display| format!("Cannot share {}: {error}", path.display());
    let folder = fs::canonicalize(path).map_err(|error| HostError::invalid(what(&error)))?;
    if !folder.is_dir() {
        return Err(HostError::invalid(what(&"it is not a folder (share the folder it is in)")));
    }
    let program = find("virtiofsd", VIRTIOFSD)?;
    let refused = |error| HostError::os("Cannot create a socket for virtiofsd", error);
    // virtiofsd takes a listening socket. Only this user may connect, and it serves only its first client: rvmm.
    let socket = socket_path().map_err(refused)?;
    let listening = Listening::open_unknown(&socket, 1).map_err(super::refusal)?;
    let stream = connect_to(&socket).map_err(refused)?;
    fcntl_setfl(&listening, OFlags::empty()).map_err(|error| refused(error.into()))?;
    let sandbox = match sandbox {
        Sandbox::Namespace => "namespace",
        Sandbox::Chroot => "chroot",
        Sandbox::None => "none",
    };
    let mut arguments: Vec<OsString> = vec!["--shared-dir".into(), folder.into()];
    let descriptor = listening.as_raw_fd().to_string();
    for part in ["--fd", &descriptor, "--sandbox", sandbox, "--log-level", "warn"] {
        arguments.push(part.into());
    }
    if read_only {
        arguments.push("--readonly".into());
    }
    let daemon = spawn("virtiofsd", &program, arguments, listening.as_raw_fd())?;
    Ok((stream, Box::new(daemon)))
}

fn network(forwards: &[(u16, u16)]) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
    let program = find("passt", &["/usr/bin/passt"])?;
    let refused = |error| HostError::os("Cannot create a socket for passt", error);
    let (stream, far) = UnixStream::pair().map_err(refused)?;
    let descriptor = far.as_raw_fd().to_string();
    let mut arguments: Vec<OsString> = Vec::new();
    for part in ["--foreground", "--quiet", "--vhost-user", "--fd", &descriptor] {
        arguments.push(part.into());
    }
    for (host, guest) in forwards {
        arguments.extend(["--tcp-ports".into(), format!("127.0.0.1/{host}:{guest}").into()]);
    }
    let daemon = spawn("passt", &program, arguments, far.as_raw_fd())?;
    Ok((stream, Box::new(daemon)))
}

/// Path of the program: one of the usual ones, else from PATH.
fn find(name: &str, usual: &[&str]) -> Result<PathBuf, HostError> {
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|folder| folder.join(name));
    let mut all = usual.iter().map(PathBuf::from).chain(in_path);
    all.find(|file| file.is_file()).ok_or_else(|| {
        HostError::invalid(format!(
            "Cannot find {name}, which serves this device (on Debian: sudo apt install {name})"
        ))
    })
}

/// Returns a unique path for a socket.
fn socket_path() -> io::Result<PathBuf> {
    let mut random = [0; 8];
    getrandom(&mut random, GetRandomFlags::empty())?;
    let name = format!("rvmm-{:016x}.sock", u64::from_ne_bytes(random));
    let path = env::temp_dir().join(&name);
    let is_short = path.as_os_str().len() <= MAX_SOCKET_PATH;
    Ok(if is_short { path } else { Path::new("/tmp").join(name) })
}

/// Starts `program` with `descriptor` open, and a thread that waits for it to exit.
fn spawn(
    name: &'static str,
    program: &Path,
    arguments: Vec<OsString>,
    descriptor: RawFd,
) -> Result<Started, HostError> {
    let refused = |error| HostError::os(format!("Cannot start {name}"), error);
    let (sender, receiver) = mpsc::sync_channel(1);
    let options = version::options(&arguments);
    let file: OsString = program.into();
    let wait = move || match launch(&file, &arguments, descriptor) {
        Ok(mut child) => {
            let errors = child.stderr.take();
            let process = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let process = process.ok_or_else(|| io::Error::other("the process has no PID"));
            // The PID is not reused before the process is waited for.
            let opened = process.and_then(|process| {
                Ok((process, pidfd_open(process, PidfdFlags::empty())?, errors))
            });
            if sender.send(opened).is_err() {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
        Err(error) => drop(sender.send(Err(error))),
    };
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK).spawn(wait);
    let waiting = Some(thread.map_err(refused)?);
    let died = |_| io::Error::other("the thread that starts it has exited");
    let opened = receiver.recv().map_err(died).and_then(|opened| opened);
    let (process, pidfd, errors) = opened.map_err(refused)?;
    if let Some(errors) = &errors {
        fcntl_setfl(errors, OFlags::NONBLOCK).map_err(|error| refused(error.into()))?;
    }
    let (line, last) = (Vec::new(), String::new());
    let program = program.to_owned();
    Ok(Started { name, program, options, process, pidfd, errors, line, last, lines: 0, waiting })
}

fn launch(program: &OsStr, arguments: &[OsString], descriptor: RawFd) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: an all-zero set is a valid one, and both calls only read their arguments.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        }
        // SAFETY: neither call touches memory.
        let result = unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)
                | libc::fcntl(descriptor, libc::F_SETFD, 0)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // PR_SET_PDEATHSIG does not report a parent that died before.
        if std::os::unix::process::parent_id() != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made; nothing is allocated.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

impl Started {
    fn has_ended_within(&self, limit: Duration) -> bool {
        is_readable(&self.pidfd, limit)
    }

    /// Reads a page at most; false at the end of the output.
    fn read(&mut self) -> bool {
        let Some(errors) = &mut self.errors else { return false };
        let mut page = [0; 4096];
        match errors.read(&mut page) {
            Ok(0) => false,
            Ok(count) => {
                page.get(..count).unwrap_or_default().iter().for_each(|byte| self.take(*byte));
                true
            }
            Err(error) => {
                matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            }
        }
    }

    fn take(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < LONGEST_LINE {
                self.line.push(byte);
            }
            return;
        }
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        if line.trim().is_empty() {
            return;
        }
        self.lines += 1;
        if self.lines <= MOST_LINES {
            info!("{}: {line}", self.name);
        } else if self.lines == MOST_LINES + 1 {
            info!("Further messages of {} are not logged", self.name);
        }
        self.last = line;
    }
}

impl Daemon for Started {
    fn name(&self) -> &str {
        self.name
    }

    fn messages(&self) -> Option<RawFd> {
        self.errors.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn forward_output(&mut self) {
        if !self.read() {
            self.errors = None;
        }
    }

    fn kill(&mut self) {
        // Its PID is not reused as long as it has not exited.
        if !self.has_ended_within(Duration::ZERO) {
            let _ = kill_process_group(self.process, Signal::KILL);
        }
    }

    fn last_output(&mut self) -> String {
        let now = Instant::now();
        let deadline = now.checked_add(MESSAGE_TIMEOUT).unwrap_or(now);
        while let Some(errors) = &self.errors {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !is_readable(errors, left) {
                break;
            }
            self.forward_output();
        }
        self.take(b'\n');
        // A program of another version often reports an unknown option with a page of usage.
        version::complaint(self.name, &self.program, &self.options)
            .unwrap_or_else(|| self.last.clone())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !self.has_ended_within(EXIT_TIMEOUT) {
            self.kill();
        }
        let _ = self.waiting.take().map(JoinHandle::join);
    }
}

fn is_readable(fd: &impl std::os::fd::AsFd, limit: Duration) -> bool {
    let timeout = Timespec::try_from(limit).ok();
    poll(&mut [PollFd::new(fd, PollFlags::IN)], timeout.as_ref()).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// The last words of a program that is this script, started as passt.
    fn last_output(script: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        // Written under another name: exec fails (ETXTBSY) while a fork of another test has the file open for writing.
        fs::write(folder.path().join("text"), format!("#!/bin/sh\n{script}\n")).unwrap();
        let copied = Command::new("cp").arg(folder.path().join("text")).arg(&program).status();
        assert!(copied.unwrap().success());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let (_near, far) = UnixStream::pair().unwrap();
        let arguments = ["--foreground", "--vhost-user", "--fd", "3"].map(OsString::from);
        spawn("passt", &program, arguments.into(), far.as_raw_fd()).unwrap().last_output()
    }

    #[test]
    fn a_program_of_another_version_is_reported_in_one_line_with_the_missing_options() {
        let old = "case $1 in
            --help) echo '  -f, --foreground'; echo '  --fdx'; echo ' --fd FD  use it' >&2;;
            --version) echo 'passt 0.0~old'; echo 'Copyright';;
            *) echo \"unrecognized option '--vhost-user'\" >&2; echo usage: and much more >&2; exit 1;;
            esac";
        let words = last_output(old);
        assert!(words.contains("does not support --vhost-user ("), "{words}");
        assert!(words.contains("passt 0.0~old") && words.contains("2024_11_27"), "{words}");
        assert!(!words.contains("Copyright") && !words.contains("--fd "), "{words}");
    }

    #[test]
    fn a_program_that_supports_all_its_options_is_reported_with_its_last_message() {
        let script = "case $1 in
            --help) echo '--foreground --vhost-user --fd';;
            *) echo 'no namespaces here' >&2; exit 1;;
            esac";
        assert_eq!(last_output(script), "no namespaces here");
        // No --help, no check of the options.
        assert_eq!(last_output("echo 'only words' >&2; exit 1"), "only words");
    }
}
