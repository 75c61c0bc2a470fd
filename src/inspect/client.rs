//! The client: finds this user's running machines and connects to one of them.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::attached;
use super::query::{Order, Query, Reply};
use crate::sockets::{peer_process, remove_stale_socket};

/// Maximum size of a reply in bytes; 512 harts with all their registers need less.
const MAX_LINE: u64 = 8 << 20;

/// Time-out of a reply.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The folder of sockets: `rvmm` in the user's runtime folder (XDG Base Directory Specification), else `/run/rvmm`.
fn folder() -> Option<PathBuf> {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(own) => Some(Path::new(&own).join("rvmm")),
        None => Some(PathBuf::from("/run/rvmm")).filter(|folder| folder.is_dir()),
    }
}

/// Path of the inspection socket of this process's machine `name`; `None` where there is no folder for it.
#[must_use]
pub fn socket_for(name: &str) -> Option<PathBuf> {
    Some(runtime_folder()?.join(socket_name(name, std::process::id())))
}

/// The name of the inspection socket of machine `name` of the process `pid`, in the [runtime folder](runtime_folder).
#[must_use]
pub fn socket_name(name: &str, pid: u32) -> String {
    format!("{name}-{pid}.sock")
}

/// The folder of this user's running machines, created if necessary; `None` where there is no place for it.
#[must_use]
pub fn runtime_folder() -> Option<PathBuf> {
    let folder = folder()?;
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            log::debug!("Inspection socket unavailable: {}: {error}", folder.display());
            return None;
        }
        _ => {}
    }
    Some(folder)
}

/// A machine that has a socket.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// The number of its process.
    pub pid: String,
    path: PathBuf,
}

impl Found {
    /// All that are in the [runtime folder](runtime_folder), in the order of their names. Sockets of dead ones are removed.
    ///
    /// # Errors
    /// A message: there is no such folder.
    pub fn all() -> Result<Vec<(Self, Connection)>, String> {
        let folder = searched_folder()?;
        let running = Self::running(&folder, None).into_iter();
        Ok(running
            .filter_map(|(found, stream)| Some((found, Connection::over(stream).ok()?)))
            .collect())
    }

    /// Those of this name or process, in the order of their names.
    fn running(folder: &Path, target: Option<&str>) -> Vec<(Self, UnixStream)> {
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        let found = files.filter_map(|file| Self::read(file.file_name(), folder));
        let wanted = found.filter(|f| target.is_none_or(|t| f.name == t || f.pid == t));
        let mut running: Vec<_> =
            wanted.filter_map(|found| connect(&found.path).map(|c| (found, c))).collect();
        running.sort_by(|(a, _), (b, _)| (&a.name, &a.pid).cmp(&(&b.name, &b.pid)));
        running
    }

    fn read(file: OsString, folder: &Path) -> Option<Self> {
        let path = folder.join(&file);
        let file = file.into_string().ok()?;
        let (name, pid) = file.strip_suffix(".sock")?.rsplit_once('-')?;
        let is_number = pid.parse::<u32>().is_ok();
        is_number.then(|| Self { name: name.into(), pid: pid.into(), path })
    }
}

fn searched_folder() -> Result<PathBuf, String> {
    folder().ok_or_else(|| {
        "Cannot find machines: there is no runtime folder (set XDG_RUNTIME_DIR for rvmm and for this command)"
            .into()
    })
}

/// A connection to a running machine.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
}

impl Connection {
    /// Connects to the machine with this name or process, or to the only one that there is.
    ///
    /// # Errors
    /// A message: there is none, or there are several, with their names.
    pub fn open(target: Option<&str>) -> Result<Self, String> {
        let folder = searched_folder()?;
        let mut running = Found::running(&folder, target);
        if running.len() > 1 {
            let all: Vec<_> =
                running.iter().map(|(f, _)| format!("{} {}", f.name, f.pid)).collect();
            return Err(format!(
                "Several machines are running (give the name or process of one): {}",
                all.join(", ")
            ));
        }
        match (running.pop(), target) {
            (Some((_, stream)), _) => Self::over(stream)
                .map_err(|error| format!("Cannot connect to the machine: {error}")),
            (None, Some(target)) => Err(format!(
                "No machine {} of this user is running (looked in {})",
                crate::config::quoted(target),
                folder.display()
            )),
            (None, None) => {
                Err(format!("No machine of this user is running (looked in {})", folder.display()))
            }
        }
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// No machine listens there.
    pub fn to(path: &Path) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?)
    }

    fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Sets the time-out of a reply.
    ///
    /// # Errors
    /// The time is zero.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.reader.get_ref().set_read_timeout(Some(timeout))
    }

    /// True while the machine has not closed its end, whether it answers or not.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let mut end = [PollFd::new(self.reader.get_ref(), PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut end, Some(&now)), Ok(0))
    }

    /// The process that listens, as it is numbered here; `None` if it is in another namespace. The number is still that process's while
    /// the connection [is open](Self::is_open).
    #[must_use]
    pub fn process(&self) -> Option<Pid> {
        peer_process(self.reader.get_ref())
    }

    /// Sends a query and waits for the reply.
    ///
    /// # Errors
    /// The machine is gone (`UnexpectedEof`, `BrokenPipe`, `ConnectionReset`), or its reply is malformed.
    pub fn ask(&mut self, query: Query) -> io::Result<Reply> {
        self.exchange(query.line())
    }

    /// Sends an order and waits for the reply, however long it takes.
    ///
    /// # Errors
    /// As for [`Connection::ask`].
    pub fn give(&mut self, order: &Order) -> io::Result<Reply> {
        let line = serde_json::to_string(order)?;
        self.reader.get_ref().set_read_timeout(None)?;
        let reply = self.exchange(line);
        self.reader.get_ref().set_read_timeout(Some(TIMEOUT))?;
        reply
    }

    /// Sends an order with a descriptor, which is closed here, calls `each` with every reply but the last one, and returns that, however
    /// long it takes.
    ///
    /// # Errors
    /// As for [`Connection::ask`].
    pub fn give_with(
        &mut self,
        order: &Order,
        descriptor: OwnedFd,
        mut each: impl FnMut(&Reply),
    ) -> io::Result<Reply> {
        let line = serde_json::to_string(order)? + "\n";
        self.reader.get_ref().set_read_timeout(None)?;
        let sent = attached::send(self.reader.get_ref(), line.as_bytes(), descriptor.as_fd())?;
        // The machine has its own: the other side notices when that one is closed.
        drop(descriptor);
        self.reader.get_mut().write_all(line.as_bytes().get(sent..).unwrap_or_default())?;
        loop {
            match self.read_reply()? {
                reply @ Reply::Progress(_) => each(&reply),
                reply => return Ok(reply),
            }
        }
    }

    fn exchange(&mut self, line: String) -> io::Result<Reply> {
        self.reader.get_mut().write_all(format!("{line}\n").as_bytes())?;
        self.read_reply()
    }

    fn read_reply(&mut self) -> io::Result<Reply> {
        let mut line = Vec::new();
        self.reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_slice(&line).map_err(io::Error::other)
    }
}

/// Connects to a socket. A file without a listener is removed; a machine that is just starting is waited for.
fn connect(path: &Path) -> Option<UnixStream> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            match remove_stale_socket(path) {
                Ok(false) => UnixStream::connect(path).ok(),
                _ => None,
            }
        }
        result => result.ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_connection_is_open_until_the_machine_ends_also_if_it_never_answers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web-1.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let waiting = Connection::to(&path).unwrap();
        assert!(waiting.is_open());
        assert_eq!(
            waiting.process().map(Pid::as_raw_nonzero).map(|pid| pid.get().unsigned_abs()),
            Some(std::process::id())
        );
        drop(listener);
        assert!(!waiting.is_open());
    }

    #[test]
    fn the_file_of_a_dead_machine_is_removed_and_that_of_a_starting_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web-1.sock");
        // A bound socket without a listener looks dead; a machine that creates one holds a lock on the folder.
        drop(UnixListener::bind(&path).unwrap());
        let lock = fs::File::open(folder.path()).unwrap();
        lock.lock().unwrap();
        std::thread::scope(|scope| {
            let client = scope.spawn(|| connect(&path));
            // Replaced by one that listens.
            fs::remove_file(&path).unwrap();
            let listener = UnixListener::bind(&path).unwrap();
            lock.unlock().unwrap();
            // The client finds the listener at once or after a wait; or it came when there was no file at all.
            let found = client.join().unwrap().is_some();
            assert!(path.exists(), "found: {found}");
            drop(listener);
        });
        assert!(connect(&path).is_none());
        assert!(!path.exists());
    }
}
