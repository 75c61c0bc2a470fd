//! A process that can be recognized on the same host, so that a side that loses the connection learns whether the other one has ended.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

/// The identity of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Process {
    /// Of the host's kernel, since its boot.
    boot: String,
    /// The inode of its namespace of process IDs.
    namespace: u64,
    /// Its ID there.
    pid: u32,
    /// Its start, in ticks of the kernel's clock since the boot: an ID is used again.
    started: u64,
}

impl Process {
    /// This process.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub(super) fn this() -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned();
        let namespace = fs::metadata("/proc/self/ns/pid")?.ino();
        let pid = std::process::id();
        Ok(Self { boot, namespace, pid, started: start_of(pid)? })
    }

    /// True if this is its ID, on this host.
    pub(super) fn has_id(&self, pid: Pid) -> bool {
        self.is_here() && u32::try_from(pid.as_raw_nonzero().get()) == Ok(self.pid)
    }

    fn is_here(&self) -> bool {
        Self::this().is_ok_and(|this| (&this.boot, this.namespace) == (&self.boot, self.namespace))
    }

    /// Watches for its end; `None` if it is not on this host, or has ended already.
    pub(super) fn watch(&self) -> Option<Watch> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let fd = pid.filter(|_| self.is_here()).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let fd = fd?.ok()?;
        // Asked after it was opened: now it cannot be another process's any more.
        (start_of(self.pid).ok()? == self.started).then_some(Watch(fd))
    }
}

/// A process that is watched.
#[derive(Debug)]
pub(super) struct Watch(OwnedFd);

impl Watch {
    /// Waits for the end of the process. False if it lives for `limit` on.
    pub(super) fn ends_within(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        matches!(poll(&mut fds, limit.as_ref()), Ok(1..))
    }
}

/// The start of a process (proc(5), field 22 of `stat`).
fn start_of(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, the program's name, may have any characters.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    let start = fields.and_then(|fields| fields.split_ascii_whitespace().nth(19)?.parse().ok());
    start.ok_or_else(|| io::Error::other("/proc/PID/stat has another form"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_recognized_and_its_end_is_noticed() {
        let this = Process::this().unwrap();
        assert_eq!(Process::this().unwrap(), this);
        assert!(this.has_id(rustix::process::getpid()));
        assert!(!this.watch().unwrap().ends_within(Duration::ZERO));
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let its = Process { pid: child.id(), started: start_of(child.id()).unwrap(), ..this };
        let watch = its.watch().unwrap();
        assert!(!watch.ends_within(Duration::from_millis(1)));
        let other = Process { started: its.started - 1, ..its.clone() };
        assert!(other.watch().is_none());
        drop(child.stdin.take());
        assert!(watch.ends_within(Duration::from_mins(1)));
        child.wait().unwrap();
        assert!(its.watch().is_none());
    }

    #[test]
    fn a_process_of_another_boot_or_namespace_is_not_watched() {
        let this = Process::this().unwrap();
        for other in [
            Process { boot: "another".into(), ..this.clone() },
            Process { namespace: this.namespace + 1, ..this.clone() },
            Process { pid: 0, ..this.clone() },
            Process { pid: u32::MAX, ..this },
        ] {
            assert!(other.watch().is_none() && !other.has_id(rustix::process::getpid()));
        }
    }
}
