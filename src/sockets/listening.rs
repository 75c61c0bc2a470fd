//! A Unix socket that rvmm listens on, and its file: created with mode 0600, in place of one whose process is dead but never of one
//! that still listens, and removed at the end.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use rvmm_devices::Listener;

use crate::config::MAX_SOCKET_PATH;
use crate::error::Error;

/// Attempts to lock the folder, 10 ms apart.
const LOCK_TRIES: u32 = 1000;

/// A non-blocking listening socket.
#[derive(Debug)]
pub(crate) struct Listening {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file, so that no other file is removed at the end.
    identity: (u64, u64),
}

impl Listening {
    /// Creates the socket and its file; up to `backlog` connections may wait to be accepted.
    ///
    /// # Errors
    /// [`Error::Config`] for a path that is too long; [`Error::File`] if the file cannot be created or the path is that of another
    /// kind of file; [`Error::Host`] if another program listens on it, or a system call fails.
    pub(crate) fn open(path: &Path, backlog: i32) -> Result<Self, Error> {
        Self::create(path, backlog, true)
    }

    /// As [`Listening::open`], with a path that no other program knows yet: does not wait for the lock of its folder.
    ///
    /// # Errors
    /// As [`Listening::open`].
    pub(crate) fn open_unknown(path: &Path, backlog: i32) -> Result<Self, Error> {
        Self::create(path, backlog, false)
    }

    fn create(path: &Path, backlog: i32, is_known: bool) -> Result<Self, Error> {
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(Error::Config(format!(
                "Cannot listen on {}: the path has {length} bytes, a socket's at most {MAX_SOCKET_PATH} (use a shorter one)",
                path.display()
            )));
        }
        let failed = |source: io::Error| {
            use io::ErrorKind::{
                AddrInUse, AlreadyExists, NotADirectory, NotFound, PermissionDenied,
            };
            let hint = match source.kind() {
                AlreadyExists | NotADirectory | NotFound | PermissionDenied => {
                    return Error::File { verb: "listen on", path: path.into(), source };
                }
                AddrInUse => " (another program listens on it: stop it, or choose another path)",
                _ => "",
            };
            Error::Host { what: format!("Cannot listen on {}{hint}", path.display()), source }
        };
        // Held until the socket listens: between bind and listen, connections are refused as if its process were dead.
        let _lock = is_known.then(|| lock_folder(path)).transpose().map_err(failed)?;
        let socket = bound(path).map_err(failed)?;
        listen(&socket, backlog).map_err(|error| failed(error.into()))?;
        let file = fs::symlink_metadata(path).map_err(failed)?;
        let identity = (file.dev(), file.ino());
        Ok(Self { socket, path: path.into(), identity })
    }

    /// Path of the socket.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// `WouldBlock` if there is none, or it was aborted; else the error of the system call.
    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        accept_with(&self.socket, SocketFlags::CLOEXEC).map_err(|error| match error {
            Errno::CONNABORTED => io::ErrorKind::WouldBlock.into(),
            other => other.into(),
        })
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Listener for Listening {
    fn accept(&self) -> io::Result<UnixStream> {
        Self::accept(self).map(Into::into)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let is_own = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if is_own {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects to the socket at `path`, without blocking and without following a symbolic link in the last component.
///
/// # Errors
/// No program listens on it, its backlog is full (`WouldBlock`), or it is not a socket.
pub(crate) fn connect_to(path: &Path) -> io::Result<UnixStream> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("it is not a socket"));
    }
    let socket = new_socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// As [`connect_to`], for a socket whose rvmm may be starting at this moment: its file exists before it listens, and until
/// then its creator keeps the folder locked ([`Listening::open`]).
///
/// # Errors
/// As [`connect_to`].
pub(crate) fn connect_to_starting(path: &Path) -> io::Result<UnixStream> {
    connect_to(path).or_else(|error| {
        if error.kind() != io::ErrorKind::ConnectionRefused {
            return Err(error);
        }
        let _lock = lock_folder(path)?;
        connect_to(path)
    })
}

/// Removes the file of a socket whose process is dead, and returns true if it was. A process that is just starting holds the
/// folder's lock until it listens ([`Listening::open`]), so its file stays.
///
/// # Errors
/// The error of the system call; `TimedOut` if another program keeps the folder locked.
pub(crate) fn remove_stale_socket(path: &Path) -> io::Result<bool> {
    let Some(_lock) = lock_folder(path)? else { return Ok(false) };
    match connect_to(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map(|()| true)
        }
        _ => Ok(false),
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Locks the folder of the socket's file against other instances of rvmm until the result is dropped. A folder that cannot be
/// opened is not locked.
fn lock_folder(path: &Path) -> io::Result<Option<File>> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Ok(folder) = File::open(parent.unwrap_or(Path::new("."))) else { return Ok(None) };
    for _ in 0..LOCK_TRIES {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) => sleep(Duration::from_millis(10)),
            // A file system without locks.
            _ => return Ok(Some(folder)),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "another program keeps the folder locked"))
}

/// A socket bound to `path`, to which only the owner may connect.
fn bound(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = new_socket()?;
    // Before bind, which creates the file with this mode: others can connect at no moment.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {}
        result => return Ok(result.map(|()| socket)?),
    }
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the file exists and is not a socket (remove it, or choose another path)",
        ));
    }
    match connect(&new_socket()?, &address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path)?,
        Ok(()) | Err(Errno::AGAIN) => return Err(io::ErrorKind::AddrInUse.into()),
        Err(error) => return Err(error.into()),
    }
    bind(&socket, &address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_socket_that_listens_is_connected_to_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listening = Listening::open(&path, 1).unwrap();
        assert_eq!(listening.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut near = connect_to(&path).unwrap();
        let mut far = UnixStream::from(listening.accept().unwrap());
        near.write_all(b"hello").unwrap();
        let mut received = [0; 5];
        far.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"hello");
        // None is accepted: connecting to a full backlog does not block.
        let waiting: Vec<_> = (0..16).map(|_| connect_to(&path)).collect();
        let refused = waiting.iter().find_map(|result| result.as_ref().err()).unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_socket_that_is_about_to_listen_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = lock_folder(&path).unwrap();
        let socket = bound(&path).unwrap();
        assert_eq!(connect_to(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        std::thread::scope(|scope| {
            let stream = scope.spawn(|| connect_to_starting(&path));
            listen(&socket, 1).unwrap();
            drop(lock);
            stream.join().unwrap().unwrap();
        });
        // A socket whose process has died is not waited for.
        drop(socket);
        let refused = connect_to_starting(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn the_file_of_a_socket_that_is_about_to_listen_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = lock_folder(&path).unwrap();
        let socket = bound(&path).unwrap();
        std::thread::scope(|scope| {
            let cleaner = scope.spawn(|| remove_stale_socket(&path));
            listen(&socket, 1).unwrap();
            drop(lock);
            assert!(!cleaner.join().unwrap().unwrap());
        });
        assert!(path.exists());
        drop(socket);
        assert!(remove_stale_socket(&path).unwrap(), "now it is dead");
        assert!(!path.exists());
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(!remove_stale_socket(&file).unwrap(), "a file that is not a socket stays");
    }

    #[test]
    fn an_unknown_name_needs_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _lock = lock_folder(&path).unwrap();
        let listening = Listening::open_unknown(&path, 1).unwrap();
        connect_to(&path).unwrap();
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_not_connected_to() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("socket"), folder.path().join("link"));
        let _listening = Listening::open(&path, 1).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [&link, &file, folder.path(), &folder.path().join("nothing")] {
            assert!(connect_to(path).is_err(), "{}", path.display());
        }
    }
}
