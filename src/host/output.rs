//! Output that a user asked for: files that are written whole or left unchanged, and blocking writes to descriptors.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// Writes all of `bytes` to a descriptor, and blocks until that is done, also if the descriptor is non-blocking.
///
/// # Errors
/// The error of the system call; a part may have been written.
pub(crate) fn deliver(out: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&out, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(&out, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Replaces the contents of the file `path`, or creates it. A device or a pipe gets the bytes written to it.
///
/// # Errors
/// The error of the system call. An existing file is unchanged if its file system can reserve space, else empty; a new one is removed.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_padded(path, bytes, bytes.len() as u64)
}

/// As [`write_file`], with a hole of zeroes after the bytes, up to `len`.
///
/// # Errors
/// As [`write_file`]; only a regular file can be padded.
pub(crate) fn write_padded(path: &Path, bytes: &[u8], len: u64) -> io::Result<()> {
    let made = OpenOptions::new().write(true).create_new(true).open(path);
    let (file, is_new) = match made {
        // Not truncated: the old contents may have to stay. It may also be a dangling symbolic link.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            (OpenOptions::new().write(true).create(true).truncate(false).open(path)?, false)
        }
        made => (made?, true),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        if len != bytes.len() as u64 {
            return Err(io::Error::other("it is not a regular file"));
        }
        return deliver(&file, bytes);
    }
    let filled = fill(&file, metadata.len(), bytes, len);
    if filled.is_err() && is_new {
        // The file is empty.
        let _ = std::fs::remove_file(path);
    }
    filled
}

/// Replaces the contents of a file of `old` bytes.
fn fill(mut file: &File, old: u64, bytes: &[u8], len: u64) -> io::Result<()> {
    // A write beyond the limit raises SIGXFSZ, which ends the process.
    if getrlimit(Resource::Fsize).current.is_some_and(|most| len > most) {
        return Err(Errno::FBIG.into());
    }
    let has_space = match reserve(file, bytes.len() as u64) {
        Ok(has_space) => has_space,
        Err(error) => {
            file.set_len(old)?;
            return Err(error);
        }
    };
    let written = file.write_all(bytes).and_then(|()| {
        file.set_len(bytes.len() as u64)?;
        file.set_len(len)?;
        // Without reserved space, ENOSPC may only be reported at writeback.
        if has_space { Ok(()) } else { file.sync_data() }
    });
    if written.is_err() {
        // An empty file rather than a partial one.
        let _ = file.set_len(0);
    }
    written
}

/// Reserves space for `len` bytes; false if the file system cannot.
fn reserve(file: &File, len: u64) -> io::Result<bool> {
    if len == 0 {
        return Ok(true);
    }
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, len) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::io::Read;
    use std::thread;

    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    use rustix::pipe::pipe;
    use rvmm_devices::testing::skip;

    use super::*;

    /// Runs `test` in a folder on a file system of 64 KiB; reports a skip if mounting is not permitted.
    pub(crate) fn on_a_small_file_system(test: impl FnOnce(&Path)) {
        let folder = tempfile::tempdir().unwrap();
        let mounted =
            mount("tmpfs", folder.path(), "tmpfs", MountFlags::empty(), Some(c"size=64k"));
        if mounted.is_err() {
            return skip("mounting is not permitted");
        }
        test(folder.path());
        unmount(folder.path(), UnmountFlags::DETACH).unwrap();
    }

    #[test]
    fn a_file_is_replaced_whatever_its_length_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for bytes in [&b"12345"[..], b"123", b"", b"1234567"] {
            write_file(&path, bytes).unwrap();
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        write_padded(&path, b"ab", 6).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"ab\0\0\0\0");
    }

    #[test]
    fn a_symbolic_link_stays_one_and_may_be_dangling() {
        let folder = tempfile::tempdir().unwrap();
        let (link, file) = (folder.path().join("link"), folder.path().join("file"));
        std::os::unix::fs::symlink("file", &link).unwrap();
        for bytes in [b"one", b"two"] {
            write_file(&link, bytes).unwrap();
            assert_eq!(fs::read(&file).unwrap(), bytes);
        }
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_full_file_system_leaves_nothing_new_and_what_was_there_as_it_was() {
        on_a_small_file_system(|folder| {
            let (new, old) = (folder.join("new"), folder.join("old"));
            fs::write(&old, b"precious").unwrap();
            for path in [&new, &old] {
                let error = write_file(path, &vec![7; 100 << 10]).unwrap_err();
                assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC));
            }
            assert!(!new.exists());
            assert_eq!(fs::read(&old).unwrap(), b"precious");
            write_file(&new, &vec![7; 20 << 10]).unwrap();
        });
    }

    #[test]
    fn a_device_that_is_full_is_an_error_and_has_no_length() {
        let error = write_file(Path::new("/dev/full"), b"x").unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC));
        assert!(write_padded(Path::new("/dev/null"), b"x", 2).is_err());
        write_file(Path::new("/dev/null"), b"x").unwrap();
    }

    #[test]
    fn a_write_to_a_non_blocking_descriptor_waits_and_a_broken_pipe_is_an_error() {
        let (reader, writer) = pipe().unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let bytes: Vec<u8> = (0..1_u32 << 20).map(|i| i.to_le_bytes()[0]).collect();
        let sent = bytes.clone();
        let thread = thread::spawn(move || deliver(&writer, &sent));
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).unwrap();
        thread.join().unwrap().unwrap();
        assert!(read == bytes);
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let error = deliver(&writer, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
