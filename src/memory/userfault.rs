//! Page faults that another program serves (userfaultfd(2)): both the side of the machine and that of the program. A thread that accesses an
//! absent page waits in the kernel until the page is filled.
#![expect(unsafe_code, reason = "ioctls of userfaultfd")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use super::PAGE;
use crate::error::Error;

/// Another way to a userfaultfd than the system call, with the permissions of a file.
const DEVICE: &str = "/dev/userfaultfd";

/// The version of the interface.
const API: u64 = 0xaa;

/// The number of an ioctl with an argument that the kernel reads and writes.
const fn both<T>(number: u32) -> u32 {
    3 << 30 | argument::<T>(number)
}

/// The same with an argument that the kernel only reads. (The header of userfaultfd names the other direction.)
const fn only<T>(number: u32) -> u32 {
    2 << 30 | argument::<T>(number)
}

#[expect(clippy::cast_possible_truncation, reason = "the structures have at most 40 bytes")]
const fn argument<T>(number: u32) -> u32 {
    (size_of::<T>() as u32) << 16 | 0xaa << 8 | number
}

const UFFDIO_API: u32 = both::<Api>(0x3f);
const UFFDIO_REGISTER: u32 = both::<Register>(0);
const UFFDIO_UNREGISTER: u32 = only::<PageRange>(1);
const UFFDIO_WAKE: u32 = only::<PageRange>(2);
const UFFDIO_COPY: u32 = both::<Filled>(3);
const UFFDIO_ZEROPAGE: u32 = both::<Fill>(4);
const UFFDIO_POISON: u32 = both::<Fill>(8);
const USERFAULTFD_IOC_NEW: u32 = 0xaa << 8;

/// Faults of absent pages, the only kind that is registered.
const MISSING: u64 = 1;

/// Kind of a message: an access to an absent page.
const PAGEFAULT: u8 = 0x12;

/// Size of a message, and the place of the address in one of that kind.
const MESSAGE: usize = 32;

/// Messages that are read at once.
const BATCH: usize = 16;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Whole pages of a process.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PageRange {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    range: PageRange,
    mode: u64,
    ioctls: u64,
}

/// Bytes from this process.
#[repr(C)]
#[derive(Default)]
struct Filled {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// Zeroes or poison.
#[repr(C)]
#[derive(Default)]
struct Fill {
    range: PageRange,
    mode: u64,
    done: i64,
}

/// What became of a page that was to be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placed {
    /// It is there now, and who has waited for it goes on.
    New,
    /// It was there before.
    Before,
    /// The memory is not registered any more, or its process has ended.
    Gone,
}

/// A userfaultfd: a process's own, or another one's.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfault {
    /// A new one. Faults of the kernel are served, too: KVM's are such.
    pub(super) fn create() -> Result<Self, Error> {
        let fd = open().map_err(|(error, what)| Error::Host {
            what: format!("Cannot let another program serve the guest's memory: {what}"),
            source: error,
        })?;
        let this = Self(fd);
        let mut api = Api { api: API, ..Api::default() };
        this.call(UFFDIO_API, &mut api).map_err(|error| Error::Host {
            what: "Cannot use userfaultfd(2)".into(),
            source: error.into(),
        })?;
        Ok(this)
    }

    /// One that another process has passed, with memory of that process.
    ///
    /// # Errors
    /// The descriptor is another kind of file, or one that cannot be polled.
    pub(crate) fn received(fd: OwnedFd, start: u64, len: u64) -> io::Result<Self> {
        if !fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK) {
            return Err(io::Error::other("the descriptor is in blocking mode"));
        }
        let this = Self(fd);
        match this.call(UFFDIO_WAKE, &mut PageRange { start, len }) {
            Ok(()) => Ok(this),
            Err(Errno::NOTTY) => Err(io::Error::other("the descriptor is no userfaultfd")),
            Err(error) => Err(error.into()),
        }
    }

    /// Has faults of absent pages reported from now on.
    ///
    /// # Errors
    /// The range is not all of this process's anonymous memory.
    pub(super) fn register(&self, range: PageRange) -> Result<(), Errno> {
        let mut register = Register { range, mode: MISSING, ..Register::default() };
        self.call(UFFDIO_REGISTER, &mut register)
    }

    /// Fills an absent page, or several, from bytes: a multiple of 4096 of them.
    ///
    /// # Errors
    /// The host has no memory left, or the range is none of the other process's memory.
    pub(crate) fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Placed> {
        let mut copy = Filled {
            to: address,
            from: bytes.as_ptr().addr() as u64,
            len: bytes.len() as u64,
            ..Filled::default()
        };
        self.place(address, UFFDIO_COPY, &mut copy, |copy| &mut copy.done)
    }

    /// Fills an absent page with zeroes.
    ///
    /// # Errors
    /// As for [`Userfault::copy`].
    pub(crate) fn zero(&self, address: u64) -> io::Result<Placed> {
        let mut fill = Fill { range: PageRange { start: address, len: PAGE }, ..Fill::default() };
        self.place(address, UFFDIO_ZEROPAGE, &mut fill, |fill| &mut fill.done)
    }

    fn place<T>(
        &self,
        address: u64,
        request: u32,
        argument: &mut T,
        done: impl Fn(&mut T) -> &mut i64,
    ) -> io::Result<Placed> {
        loop {
            match self.call(request, argument) {
                Ok(()) => return Ok(Placed::New),
                // The process is changing its mappings at this moment.
                Err(Errno::AGAIN | Errno::INTR) => *done(argument) = 0,
                Err(Errno::EXIST) => {
                    // Who waits for it may have come after the page.
                    self.wake(PageRange { start: address, len: PAGE });
                    return Ok(Placed::Before);
                }
                Err(Errno::NOENT | Errno::SRCH) => return Ok(Placed::Gone),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The addresses that are waited for, since the last call. Does not wait.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub(crate) fn faults(&self) -> io::Result<Vec<u64>> {
        let mut messages = [0; BATCH * MESSAGE];
        let len = match rustix::io::read(&self.0, &mut messages) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let (messages, _) = messages.get(..len).unwrap_or_default().as_chunks::<MESSAGE>();
        let address = |message: &[u8; MESSAGE]| {
            let (words, _) = message.as_chunks::<8>();
            let [kind, _, address, _] = words else { return None };
            // Others are notes of a machine that asks for them; to read them is what it waits for.
            (kind.first() == Some(&PAGEFAULT)).then(|| u64::from_ne_bytes(*address))
        };
        Ok(messages.iter().filter_map(address).collect())
    }

    /// Makes the absent pages of a range lost ones, and wakes who waits for them.
    pub(super) fn poison(&self, range: PageRange) -> Result<(), Errno> {
        let end = range.start.saturating_add(range.len);
        let mut at = range.start;
        while at < end {
            let range = PageRange { start: at, len: end - at };
            let mut fill = Fill { range, ..Fill::default() };
            let result = self.call(UFFDIO_POISON, &mut fill);
            // Pages up to the first one that is there.
            let done = u64::try_from(fill.done).unwrap_or(0) / PAGE * PAGE;
            match result {
                Err(Errno::EXIST) => at += done + PAGE,
                // It has stopped in front of a page that is there, or for a moment.
                Err(Errno::AGAIN | Errno::INTR) => at += done,
                Err(error) => return Err(error),
                Ok(()) => at = end,
            }
        }
        Ok(())
    }

    /// Ends the registration of a range; who waits for a page of it goes on.
    pub(super) fn unregister(&self, mut range: PageRange) -> Result<(), Errno> {
        self.call(UFFDIO_UNREGISTER, &mut range)
    }

    /// Wakes who waits for a page of a range: it looks again what is there.
    pub(super) fn wake(&self, mut range: PageRange) {
        let _ = self.call(UFFDIO_WAKE, &mut range);
    }

    fn call<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the argument is the structure of this request, and lives as long as the call. Only absent pages of a range that a
        // process has registered change, which is guest RAM without references into it.
        let result = unsafe {
            libc::ioctl(self.0.as_raw_fd(), request as libc::Ioctl, std::ptr::from_mut(argument))
        };
        if result >= 0 { Ok(()) } else { Err(last_error()) }
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A new userfaultfd; the error with what can be done.
fn open() -> Result<OwnedFd, (io::Error, &'static str)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call only has a number as its argument.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if let Some(fd) = descriptor(fd) {
        return Ok(fd);
    }
    let error = last_error();
    if error == Errno::NOSYS {
        return Err((error.into(), "the host's kernel lacks CONFIG_USERFAULTFD"));
    }
    if error != Errno::PERM {
        return Err((error.into(), "userfaultfd(2) fails"));
    }
    let device = File::options().read(true).write(true).open(DEVICE);
    let device = device.map_err(|error| {
        let what = "rvmm has neither CAP_SYS_PTRACE nor access to /dev/userfaultfd, and vm.unprivileged_userfaultfd is 0 (do one of: setfacl -m u:$USER:rw /dev/userfaultfd; sysctl vm.unprivileged_userfaultfd=1; run it as root)";
        (error, what)
    })?;
    // SAFETY: the call only has a number as its argument.
    let fd = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            USERFAULTFD_IOC_NEW as libc::Ioctl,
            libc::c_long::from(flags),
        )
    };
    descriptor(fd.into()).ok_or_else(|| (last_error().into(), "/dev/userfaultfd fails"))
}

fn descriptor(result: libc::c_long) -> Option<OwnedFd> {
    let fd = i32::try_from(result).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just created the descriptor, and nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn another_kind_of_file_is_no_userfaultfd() {
        let file = File::from(memfd_create("other", MemfdFlags::CLOEXEC).unwrap());
        let blocking = Userfault::received(file.try_clone().unwrap().into(), 0, 4096).unwrap_err();
        assert!(blocking.to_string().contains("blocking"), "{blocking}");
        rustix::fs::fcntl_setfl(&file, OFlags::NONBLOCK).unwrap();
        let other = Userfault::received(file.into(), 0, 4096).unwrap_err();
        assert!(other.to_string().contains("no userfaultfd"), "{other}");
    }
}
