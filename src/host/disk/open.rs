//! The file of a disk: checked, opened and locked.
#![expect(unsafe_code, reason = "a system call that no safe crate here has")]

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, Weak};

use log::warn;
use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, fcntl_setfl, fstatfs, seek};
use rustix::io::Errno;
use rvmm_devices::virtio::blk::{DiskCache, DiskPlan};
use rvmm_devices::{FilePath, HostError};

use super::lock::DiskLock;

/// Size of a sector in bytes.
const SECTOR: u64 = 512;

/// File systems in memory: tmpfs and ramfs (<linux/magic.h>).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Alignment for O_DIRECT if the kernel does not report one: more than any disk needs.
const STRICT: Align = Align { memory: 4096, offset: 4096 };

/// The open files of a disk. Dropping them releases the lock.
#[derive(Debug)]
pub(super) struct Files {
    main: File,
    /// Its canonical path.
    name: Vec<u8>,
    is_block: bool,
    is_in_memory: bool,
    /// With O_DIRECT: its alignment, and the same file without O_DIRECT.
    direct: Option<(Align, File)>,
    lock: Arc<DiskLock>,
}

/// Alignment that O_DIRECT requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Align {
    /// For addresses and lengths of buffers.
    pub(super) memory: usize,
    /// For offsets and lengths on the disk.
    pub(super) offset: u64,
}

impl Align {
    /// True if a buffer of `len` bytes at `address` is aligned.
    pub(super) fn fits(self, address: usize, len: usize) -> bool {
        address.is_multiple_of(self.memory) && len.is_multiple_of(self.memory)
    }
}

impl Files {
    /// Opens the file that the plan names and locks it: exclusively if it is writable, against writers if it is read-only.
    pub(super) fn open(plan: &DiskPlan) -> Result<Self, HostError> {
        let path = &plan.path;
        let kind = std::fs::metadata(path).map_err(|error| not_open(path, error))?.file_type();
        check_kind(path, kind)?;
        // O_EXCL on a block device fails if it is mounted. NONBLOCK: should the file have been replaced meanwhile, opening it does
        // not block.
        let mut flags = OFlags::NONBLOCK;
        flags.set(OFlags::EXCL, kind.is_block_device() && !plan.is_read_only);
        flags.set(OFlags::DIRECT, plan.cache == DiskCache::None);
        let mut options = OpenOptions::new();
        options.read(true).write(!plan.is_read_only);
        let main = options.custom_flags(flags.bits().cast_signed()).open(path);
        let main = main.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::INVAL) if plan.cache == DiskCache::None => no_direct(path),
            _ => not_open(path, error),
        })?;
        let kind = main.metadata().map_err(|error| not_open(path, error))?.file_type();
        check_kind(path, kind)?;
        // With O_NONBLOCK, io_uring fails with EAGAIN instead of waiting.
        fcntl_getfl(&main)
            .and_then(|flags| fcntl_setfl(&main, flags - OFlags::NONBLOCK))
            .map_err(|error| not_open(path, error.into()))?;
        let lock = Arc::new(DiskLock::take(path, &main, plan.is_read_only)?);
        let is_block = kind.is_block_device();
        // The node of a block device may be in a file system in memory, the device is not.
        let is_in_memory =
            !is_block && fstatfs(&main).is_ok_and(|stat| IN_MEMORY.contains(&stat.f_type));
        // A file that was deleted meanwhile keeps the path that was given.
        let name = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let name = name.into_os_string().into_vec();
        let mut files = Self { main, name, is_block, is_in_memory, direct: None, lock };
        if plan.cache == DiskCache::None {
            let align = alignment(&files.main).ok_or_else(|| no_direct(path))?;
            // The same file, even if the path is now another one's.
            let same = format!("/proc/self/fd/{}", files.main());
            let mut options = OpenOptions::new();
            let buffered = options.read(true).write(!plan.is_read_only).open(same);
            files.direct = Some((align, buffered.map_err(|error| not_open(path, error))?));
        }
        Ok(files)
    }

    /// The size of the disk in bytes: whole sectors.
    pub(super) fn first_size(&self, path: &FilePath) -> Result<u64, HostError> {
        let bytes = self.bytes().map_err(|source| {
            HostError::os(format!("Cannot read the size of disk {path}"), source)
        })?;
        let size = whole_sectors(bytes);
        if size == 0 {
            return Err(HostError::invalid(format!(
                "Cannot use disk {path}: it has {bytes} bytes, a sector has 512 (make it larger: truncate -s 1G {path})"
            )));
        }
        if size != bytes {
            let rest = bytes - size;
            warn!(
                "Disk {path} has {bytes} bytes, not a multiple of 512: the guest does not see the last {rest}"
            );
        }
        Ok(size)
    }

    /// The lock, as long as the files are open.
    pub(super) fn lock(&self) -> Weak<DiskLock> {
        Arc::downgrade(&self.lock)
    }

    /// Current size of the file or device.
    pub(super) fn bytes(&self) -> io::Result<u64> {
        if self.is_block {
            Ok(seek(&self.main, SeekFrom::End(0))?)
        } else {
            Ok(self.main.metadata()?.len())
        }
    }

    /// True if reads and writes are copies in memory, which are not worth another thread.
    pub(super) fn is_in_memory(&self) -> bool {
        self.is_in_memory
    }

    /// The canonical path of the file.
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// The descriptor for all calls that are aligned.
    pub(super) fn main(&self) -> RawFd {
        self.main.as_raw_fd()
    }

    /// True if it is a block device.
    pub(super) fn is_block(&self) -> bool {
        self.is_block
    }

    /// A duplicate of the descriptor: both share the lock and the file status flags.
    pub(super) fn share(&self) -> io::Result<File> {
        self.main.try_clone()
    }

    /// The file, for reads of any alignment.
    pub(super) fn readable(&self) -> &File {
        self.direct.as_ref().map_or(&self.main, |(_, buffered)| buffered)
    }

    /// Leaves the alignment for O_DIRECT to the caller from now on.
    pub(super) fn forget_direct(&mut self) {
        self.direct = None;
    }

    /// The descriptor that goes through the page cache.
    pub(super) fn buffered(&self) -> RawFd {
        self.readable().as_raw_fd()
    }

    /// Alignment of the main descriptor, if it has O_DIRECT.
    pub(super) fn direct(&self) -> Option<Align> {
        self.direct.as_ref().map(|(align, _)| *align)
    }
}

/// Rounds `bytes` down to whole sectors.
pub(super) fn whole_sectors(bytes: u64) -> u64 {
    bytes / SECTOR * SECTOR
}

fn check_kind(path: &FilePath, kind: FileType) -> Result<(), HostError> {
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    Err(HostError::invalid(format!(
        "Cannot use disk {path}: it is {what} (give a file or a block device)"
    )))
}

fn not_open(path: &FilePath, error: io::Error) -> HostError {
    let what = format!("Cannot open disk {path}");
    let hint = match error.kind() {
        io::ErrorKind::NotFound => format!("create it: truncate -s 1G {path}"),
        io::ErrorKind::PermissionDenied => {
            "change its permissions, or add ro=on if you may only read it".into()
        }
        io::ErrorKind::ReadOnlyFilesystem => "add ro=on".into(),
        io::ErrorKind::ResourceBusy => {
            "it is mounted or part of another device: unmount it, or add ro=on".into()
        }
        _ => return HostError::os(what, error),
    };
    HostError::invalid(format!("{what}: {error} ({hint})"))
}

fn no_direct(path: &FilePath) -> HostError {
    HostError::invalid(format!(
        "Cannot use disk {path} with cache=none: its file system does not have O_DIRECT (use cache=writeback)"
    ))
}

/// Alignment for O_DIRECT on this file; `None` if O_DIRECT is not possible.
fn alignment(file: &File) -> Option<Align> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let fd = file.as_fd().as_raw_fd();
    let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
    // SAFETY: the path is an empty C string, and statx writes at most a `statx`.
    let result = unsafe { libc::statx(fd, c"".as_ptr(), flags, mask, stat.as_mut_ptr()) };
    // SAFETY: all zeroes are a valid `statx`, and so is what the kernel writes.
    let stat = unsafe { stat.assume_init() };
    if result != 0 || stat.stx_mask & mask == 0 {
        return Some(STRICT);
    }
    let (memory, offset) = (stat.stx_dio_mem_align as usize, u64::from(stat.stx_dio_offset_align));
    (memory > 0 && offset > 0).then_some(Align { memory, offset })
}
