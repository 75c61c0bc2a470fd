//! One writer or many readers of a disk, enforced among programs by open file description locks (fcntl(2)).
//!
//! There are two protocols. Between machines of rvmm, and with programs that lock whole files: all bytes but QEMU's are locked
//! exclusively if the disk is writable, shared if it is read-only. With QEMU (its block/file-posix.c): one byte for each
//! permission that a program uses, and one for each permission that it does not share. These bytes are only ever locked
//! shared: a program locks its own and then checks the opposite ones; if another program has one locked, opening fails. rvmm
//! takes the permissions that QEMU takes for a machine's disk: others may read, but not write or resize. Left out: permissions
//! that only QEMU's block jobs use.
#![expect(unsafe_code, reason = "locks of a range are not in any safe crate here")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use log::warn;
use rvmm_devices::{FilePath, HostError};

/// Ranges of rvmm's bytes: the first byte, and their number; zero for all that follow. In between are QEMU's.
const OURS: [(i64, i64); 2] = [(0, 100), (300, 0)];

/// First of QEMU's bytes for permissions that are used, and for those that are not shared.
const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// QEMU's permissions: BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE, BLK_PERM_RESIZE.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// The lock of a disk's file, which is released when this is dropped. It may be lent to another program meanwhile.
#[derive(Debug)]
pub(crate) struct DiskLock {
    path: FilePath,
    /// Of the same open file description as that of the disk.
    file: File,
    is_read_only: bool,
}

impl DiskLock {
    /// Locks a file.
    ///
    /// # Errors
    /// Another program has a conflicting lock, or the host has no descriptors left.
    pub(super) fn take(
        path: &FilePath,
        file: &File,
        is_read_only: bool,
    ) -> Result<Self, HostError> {
        let shared = file.try_clone();
        let file =
            shared.map_err(|source| HostError::os(format!("Cannot lock disk {path}"), source))?;
        take(path, &file, is_read_only)?;
        Ok(Self { path: path.clone(), file, is_read_only })
    }

    /// Releases the lock. The disk is not used until [`DiskLock::retake`].
    pub(crate) fn release(&self) {
        give_back(&self.file);
    }

    /// Takes the lock again.
    ///
    /// # Errors
    /// Another program has taken it meanwhile.
    pub(crate) fn retake(&self) -> Result<(), HostError> {
        take(&self.path, &self.file, self.is_read_only)
    }
}

impl Drop for DiskLock {
    fn drop(&mut self) {
        // A call that has just ended may hold a reference to the file, and with it the lock, for a moment longer.
        self.release();
    }
}

/// Locks the file as long as it is open.
///
/// # Errors
/// Another program has a conflicting lock.
fn take(path: &FilePath, file: &File, is_read_only: bool) -> Result<(), HostError> {
    match try_all(file, is_read_only) {
        Ok(true) => return Ok(()),
        Ok(false) => {}
        Err(error) => {
            warn!("Cannot lock disk {path}: {error} (make sure that no other program uses it)");
            return Ok(());
        }
    }
    let (open_for, hint) = if is_read_only || is_written(file) {
        ("writing", "stop that program")
    } else {
        ("reading", "stop that program, or add ro=on")
    };
    give_back(file);
    let what =
        format!("Cannot use disk {path}: another program has it open for {open_for} ({hint})");
    Err(HostError::os(what, io::ErrorKind::ResourceBusy.into()))
}

/// Releases all locks.
fn give_back(file: &File) {
    // A failure is harmless: closing the file releases the locks, too.
    let _ = set(file, libc::F_UNLCK, (0, 0));
}

/// False if another program has a conflicting lock; an error if the file system has no locks.
fn try_all(file: &File, is_read_only: bool) -> io::Result<bool> {
    let kind = if is_read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let used: &[i64] = if is_read_only { &[READ] } else { &[READ, WRITE, RESIZE] };
    let unshared = [WRITE, RESIZE];
    for range in OURS {
        if !set(file, kind, range)? {
            return Ok(false);
        }
    }
    let bytes = used.iter().map(|right| USED + right);
    for byte in bytes.chain(unshared.map(|right| UNSHARED + right)) {
        if !set(file, libc::F_RDLCK, (byte, 1))? {
            return Ok(false);
        }
    }
    let opposite = used.iter().map(|right| UNSHARED + right);
    for byte in opposite.chain(unshared.map(|right| USED + right)) {
        if qemu_has(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// True if the conflicting lock is that of a writer.
fn is_written(file: &File) -> bool {
    let [first, _] = OURS;
    match held(file, first) {
        Ok(Some(lock)) => lock.l_type == lock_of(libc::F_WRLCK, first).l_type,
        _ => [WRITE, RESIZE].iter().any(|right| matches!(qemu_has(file, USED + right), Ok(true))),
    }
}

fn lock_of(kind: libc::c_int, (l_start, l_len): (i64, i64)) -> libc::flock {
    // The constants fit: they are small, and the field's type differs between systems.
    let l_type = libc::c_short::try_from(kind).unwrap_or_default();
    let l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    libc::flock { l_type, l_whence, l_start, l_len, l_pid: 0 }
}

/// Sets a lock; false if another program has a conflicting one.
fn set(file: &File, kind: libc::c_int, range: (i64, i64)) -> io::Result<bool> {
    let lock = lock_of(kind, range);
    // SAFETY: fcntl reads a `flock` that outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied => Ok(false),
        _ => Err(error),
    }
}

/// True if another program has locked a byte of QEMU's. A lock of the whole file covers it too, but is no permission.
fn qemu_has(file: &File, byte: i64) -> io::Result<bool> {
    let [(_, first), (end, _)] = OURS;
    let lock = held(file, (byte, 1))?;
    Ok(lock.is_some_and(|lock| {
        let is_bounded = lock.l_len > 0 && lock.l_start.saturating_add(lock.l_len) <= end;
        lock.l_start >= first && is_bounded
    }))
}

/// Another program's lock in a range.
fn held(file: &File, range: (i64, i64)) -> io::Result<Option<libc::flock>> {
    let mut lock = lock_of(libc::F_WRLCK, range);
    let none = lock_of(libc::F_UNLCK, range).l_type;
    // SAFETY: fcntl reads and writes a `flock` that outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((lock.l_type != none).then_some(lock))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    use tempfile::NamedTempFile;

    use super::*;

    fn disk() -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file
    }

    fn reopen(file: &NamedTempFile) -> File {
        File::options().read(true).write(true).open(file.path()).unwrap()
    }

    /// Opens for writing, then for reading only: `opened`, or the reason why not.
    fn both(file: &NamedTempFile) -> [String; 2] {
        [false, true].map(|is_read_only| {
            let what = take(&"disk".into(), &reopen(file), is_read_only)
                .err()
                .map(|error| error.to_string());
            what.map_or("opened".into(), |what| what.rsplit(" for ").next().unwrap().to_owned())
        })
    }

    const OPENED: &str = "opened";
    const WRITING: &str = "writing (stop that program)";
    const READING: &str = "reading (stop that program, or add ro=on)";

    #[test]
    fn the_bytes_of_qemu_are_heeded() {
        for (bytes, expected) in [
            // qemu-io on raw bytes: for writing, for reading.
            (&[100, 101][..], [WRITING, WRITING]),
            (&[100], [OPENED, OPENED]),
            // qemu-io on an image: no other program may write.
            (&[100, 101, 103, 201, 203], [WRITING, WRITING]),
            (&[100, 201, 203], [READING, OPENED]),
            // A block job that does not share reading, and one without permissions of interest.
            (&[200], [READING, WRITING]),
            (&[102, 204], [OPENED, OPENED]),
        ] {
            let file = disk();
            let other = reopen(&file);
            for byte in bytes {
                assert!(set(&other, libc::F_RDLCK, (*byte, 1)).unwrap());
            }
            assert_eq!(both(&file), expected, "{bytes:?}");
            drop(other);
            assert_eq!(both(&file), [OPENED, OPENED], "{bytes:?}");
        }
    }

    #[test]
    fn a_program_that_locks_the_whole_file_is_heeded() {
        for (kind, expected) in
            [(libc::F_WRLCK, [WRITING, WRITING]), (libc::F_RDLCK, [READING, OPENED])]
        {
            let file = disk();
            let other = reopen(&file);
            assert!(set(&other, kind, (0, 0)).unwrap());
            assert_eq!(both(&file), expected);
        }
    }

    #[test]
    fn a_lock_that_is_lent_can_be_taken_by_one_other_and_taken_back_afterwards() {
        let file = disk();
        let ours = reopen(&file);
        let lock = DiskLock::take(&"disk".into(), &ours, false).unwrap();
        assert_eq!(both(&file), [WRITING, WRITING]);
        lock.release();
        assert_eq!(both(&file), [OPENED, OPENED]);
        let other = reopen(&file);
        let theirs = DiskLock::take(&"disk".into(), &other, false).unwrap();
        assert!(lock.retake().unwrap_err().to_string().contains("another program has it open"));
        drop(theirs);
        lock.retake().unwrap();
        assert_eq!(both(&file), [WRITING, WRITING]);
        drop(lock);
        assert_eq!(both(&file), [OPENED, OPENED]);
    }

    #[test]
    fn a_failed_lock_leaves_nothing_locked() {
        let file = disk();
        let (other, refused) = (reopen(&file), reopen(&file));
        assert!(set(&other, libc::F_RDLCK, (101, 1)).unwrap());
        assert!(take(&"disk".into(), &refused, false).is_err());
        drop(other);
        assert_eq!(both(&file), [OPENED, OPENED]);
    }

    /// Runs a program of QEMU's, with the disk for `DISK`, and returns true if it succeeded. Reports a skip if it is not installed.
    fn qemu(program: &str, arguments: &str, file: &NamedTempFile) -> Option<bool> {
        let path = file.path().to_str().unwrap();
        let arguments = arguments.split('|').map(|word| if word == "DISK" { path } else { word });
        match Command::new(program).args(arguments).output() {
            Ok(output) => Some(output.status.success()),
            Err(error) => {
                rvmm_devices::testing::skip(&format!("there is no {program}: {error}"));
                None
            }
        }
    }

    /// Starts qemu-io, and waits until it has the disk open.
    fn qemu_io(options: &[&str], file: &NamedTempFile) -> Option<Child> {
        qemu("qemu-io", "-V", &disk())?;
        let mut command = Command::new("qemu-io");
        command.args(options).args(["-f", "raw"]).arg(file.path());
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while held(file.as_file(), (USED, 1)).unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(120), "qemu-io never opens the disk");
            thread::sleep(Duration::from_millis(10));
        }
        Some(child)
    }

    /// Stops it by the end of its input.
    fn end(mut child: Child) {
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn a_disk_that_qemu_writes_is_neither_read_nor_written() {
        let file = disk();
        let Some(writer) = qemu_io(&[], &file) else { return };
        assert_eq!(both(&file), [WRITING, WRITING]);
        end(writer);
        assert_eq!(both(&file), [OPENED, OPENED]);
        let reader = qemu_io(&["-r"], &file).unwrap();
        assert_eq!(both(&file)[1], OPENED);
        end(reader);
    }

    #[test]
    fn qemu_does_not_write_an_open_disk_and_reads_one_without_a_writer() {
        let file = disk();
        let write = "-f|raw|-c|write 0 512|DISK";
        let other = disk();
        let copy = format!("convert|-f|raw|-O|raw|DISK|{}", other.path().to_str().unwrap());
        for (is_read_only, may_read) in [(true, true), (false, false)] {
            let ours = reopen(&file);
            take(&"disk".into(), &ours, is_read_only).unwrap();
            let Some(is_ok) = qemu("qemu-io", write, &file) else { return };
            assert!(!is_ok, "written by two");
            assert_eq!(qemu("qemu-img", &copy, &file), Some(may_read));
            // With -U (force share) it is read nevertheless, as the disk of a machine of QEMU.
            assert_eq!(qemu("qemu-img", "info|-U|DISK", &file), Some(true));
            give_back(&ours);
            assert_eq!(qemu("qemu-io", write, &file), Some(true));
        }
    }
}
