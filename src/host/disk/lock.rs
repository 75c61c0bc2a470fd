//! One writer or many readers of a disk, agreed on with other programs by open file description locks (fcntl(2)).
//!
//! Two agreements stand beside each other. Between machines of rvmm, and with programs that lock whole files: everything but
//! QEMU's bytes, for itself where it is written, shared where it is read. With QEMU (its block/file-posix.c): a byte for each
//! right that somebody uses, and one for each right that somebody grants to nobody else. Those bytes are only ever locked
//! shared: who has locked his own looks whether the opposite ones of somebody else are locked, and goes where they are. rvmm
//! says to QEMU what a machine of QEMU says: others may read on, nobody else may write or resize. Left out: rights that only
//! QEMU's block jobs use.
#![expect(unsafe_code, reason = "locks of a range are not in any safe crate here")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use log::warn;
use rvmm_devices::HostError;

/// Bytes that are rvmm's: the first, and how many; zero for all that follow. In between are QEMU's.
const OURS: [(i64, i64); 2] = [(0, 100), (300, 0)];

/// Where QEMU has a byte for each right that is used, and for each that is not granted to others.
const USED: i64 = 100;
const REFUSED: i64 = 200;

/// QEMU's rights: to read and find what was written, to write, and to change the size.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks the file as long as it is open.
///
/// # Errors
/// Another program's lock stands in the way.
pub(super) fn take(path: &str, file: &File, is_read_only: bool) -> Result<(), HostError> {
    match try_all(file, is_read_only) {
        Ok(true) => return Ok(()),
        Ok(false) => {}
        Err(error) => {
            warn!("Disk {path} cannot be locked, see that nobody else uses it: {error}");
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
    Err(HostError::refused(what, io::ErrorKind::ResourceBusy.into()))
}

/// Lets go of all that was locked.
pub(super) fn give_back(file: &File) {
    // Nothing is lost where it fails: the locks end with the file.
    let _ = set(file, libc::F_UNLCK, (0, 0));
}

/// False where somebody else's lock stands in the way; an error where the file system has no locks.
fn try_all(file: &File, is_read_only: bool) -> io::Result<bool> {
    let kind = if is_read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let used: &[i64] = if is_read_only { &[READ] } else { &[READ, WRITE, RESIZE] };
    let refused = [WRITE, RESIZE];
    for range in OURS {
        if !set(file, kind, range)? {
            return Ok(false);
        }
    }
    let bytes = used.iter().map(|right| USED + right);
    for byte in bytes.chain(refused.map(|right| REFUSED + right)) {
        if !set(file, libc::F_RDLCK, (byte, 1))? {
            return Ok(false);
        }
    }
    let opposite = used.iter().map(|right| REFUSED + right);
    for byte in opposite.chain(refused.map(|right| USED + right)) {
        if qemu_has(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether what stands in the way is somebody who writes.
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

/// False where somebody else's lock stands in the way.
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

/// Whether somebody else has locked a byte of QEMU's. A lock of the whole file lies over it too, and means no right.
fn qemu_has(file: &File, byte: i64) -> io::Result<bool> {
    let [(_, first), (end, _)] = OURS;
    let lock = held(file, (byte, 1))?;
    Ok(lock.is_some_and(|lock| {
        let is_bounded = lock.l_len > 0 && lock.l_start.saturating_add(lock.l_len) <= end;
        lock.l_start >= first && is_bounded
    }))
}

/// Somebody else's lock in a range.
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

    /// Opens for writing, then for reading only: `opened`, or why not.
    fn both(file: &NamedTempFile) -> [String; 2] {
        [false, true].map(|is_read_only| {
            let what =
                take("disk", &reopen(file), is_read_only).err().map(|error| error.to_string());
            what.map_or("opened".into(), |what| what.rsplit(" for ").next().unwrap().to_owned())
        })
    }

    const OPENED: &str = "opened";
    const WRITING: &str = "writing (stop that program)";
    const READING: &str = "reading (stop that program, or add ro=on)";

    /// What another program's bytes of QEMU's come to.
    #[test]
    fn the_bytes_of_qemu_are_heeded() {
        for (bytes, expected) in [
            // qemu-io on raw bytes: for writing, for reading.
            (&[100, 101][..], [WRITING, WRITING]),
            (&[100], [OPENED, OPENED]),
            // On an image: nobody else may write.
            (&[100, 101, 103, 201, 203], [WRITING, WRITING]),
            (&[100, 201, 203], [READING, OPENED]),
            // A block job that leaves nothing to be read meanwhile, and one that changes nothing.
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
    fn who_was_refused_keeps_nothing_locked() {
        let file = disk();
        let (other, refused) = (reopen(&file), reopen(&file));
        assert!(set(&other, libc::F_RDLCK, (101, 1)).unwrap());
        assert!(take("disk", &refused, false).is_err());
        drop(other);
        assert_eq!(both(&file), [OPENED, OPENED]);
    }

    /// Runs a program of QEMU's, with the disk for `DISK`; whether it agreed. None, aloud, where there is none.
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

    /// qemu-io, until it has the disk open.
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

    /// Ends it by the end of its input.
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
    fn qemu_does_not_write_a_disk_that_is_open_here_and_reads_what_nobody_writes() {
        let file = disk();
        let write = "-f|raw|-c|write 0 512|DISK";
        let other = disk();
        let copy = format!("convert|-f|raw|-O|raw|DISK|{}", other.path().to_str().unwrap());
        for (is_read_only, may_read) in [(true, true), (false, false)] {
            let ours = reopen(&file);
            take("disk", &ours, is_read_only).unwrap();
            let Some(is_ok) = qemu("qemu-io", write, &file) else { return };
            assert!(!is_ok, "written by two");
            assert_eq!(qemu("qemu-img", &copy, &file), Some(may_read));
            // Who says that it may change meanwhile looks on, as at a machine of QEMU.
            assert_eq!(qemu("qemu-img", "info|-U|DISK", &file), Some(true));
            give_back(&ours);
            assert_eq!(qemu("qemu-io", write, &file), Some(true));
        }
    }
}
