//! Page faults of guest RAM that another program serves (userfaultfd(2)): both the side of the machine and that of the program.
//!
//! The machine registers its RAM, all of which is absent then, and gives the descriptor away. A thread that accesses an absent page
//! waits in the kernel until the page is filled. One that accesses guest memory within KVM_RUN does not notice signals meanwhile.
//!
//! If the other program is gone, absent pages must not become zeroes, which the guest and its devices would take for its memory. They
//! become lost pages (`lost.rs`): poisoned ones (UFFDIO_POISON, Linux 6.6), on older kernels those of an empty file over all of RAM.
#![expect(unsafe_code, reason = "ioctls of userfaultfd")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, memfd_create};
use rustix::io::Errno;

use super::pagemap::PageMap;
use super::{GuestRam, PAGE};
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

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRange {
    start: u64,
    len: u64,
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

/// RAM whose contents another program has.
#[derive(Debug)]
pub(super) struct Paging {
    faults: Arc<Userfault>,
    /// Nobody fills an absent page any more, and there is none: they were made lost ones.
    is_given_up: bool,
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfault {
    /// A new one. Faults of the kernel are served, too: KVM's are such.
    fn create() -> Result<Self, Error> {
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

    fn register(&self, range: PageRange) -> Result<(), Errno> {
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
                    let _ = self.call(UFFDIO_WAKE, &mut PageRange { start: address, len: PAGE });
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
    fn poison(&self, range: PageRange) -> Result<(), Errno> {
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

impl GuestRam {
    /// Leaves the contents of RAM to another program, which gets the result: all pages are absent until it fills them. Nothing accesses
    /// RAM meanwhile, and no file is mapped over it.
    ///
    /// # Errors
    /// [`Error::Config`] for RAM in huge pages or RAM that other programs map; [`Error::Host`] if the kernel or the user's rights do not
    /// allow it.
    pub(crate) fn leave_to_pager(&self) -> Result<Arc<Userfault>, Error> {
        self.leave_ranges(std::slice::from_ref(&(0..self.span.size)))
    }

    /// The same with ranges of offsets only, whose contents are dropped. Who accesses another absent page waits, too.
    ///
    /// # Errors
    /// As for [`GuestRam::leave_to_pager`].
    pub(crate) fn leave_ranges(&self, ranges: &[Range<u64>]) -> Result<Arc<Userfault>, Error> {
        let refused = |what: &str| {
            Err(Error::Config(format!(
                "Cannot let another program serve the guest's memory: {what}"
            )))
        };
        if self.reservation.is_huge() {
            return refused("it is in huge pages (the machine was started with --hugepages)");
        }
        if self.reservation.is_shared() {
            return refused("the program of a device maps it, too");
        }
        let faults = Arc::new(Userfault::create()?);
        for range in ranges {
            self.reservation.discard(range.start, range.end.saturating_sub(range.start));
        }
        let registered = faults.register(self.pages());
        registered.map_err(|error| Error::Host {
            what: "Cannot register guest RAM with userfaultfd(2)".into(),
            source: error.into(),
        })?;
        *self.paging() = Some(Paging { faults: Arc::clone(&faults), is_given_up: false });
        Ok(faults)
    }

    /// True if another program has contents of RAM.
    pub(super) fn is_paged(&self) -> bool {
        self.paging().is_some()
    }

    /// Gives up the pages of RAM that the other program has not filled: an access to one is as one to a page of a file that has shrunk.
    /// Who waits for one goes on. Pages that are there stay, if the kernel has UFFDIO_POISON.
    pub(crate) fn lose_absent(&self) {
        let mut paging = self.paging();
        let Some(Paging { faults, is_given_up }) = paging.as_mut() else { return };
        *is_given_up = true;
        let lost = self.absent().into_iter().try_for_each(|range| faults.poison(range));
        if let Err(error) = lost {
            log::debug!("UFFDIO_POISON fails: {error}");
            self.lose_all(faults);
        }
    }

    /// True once absent pages would never be filled: none may be returned to the host. So it stays until the result is dropped.
    pub(super) fn keeps_pages(&self) -> (bool, MutexGuard<'_, Option<Paging>>) {
        let paging = self.paging();
        (paging.as_ref().is_some_and(|paging| paging.is_given_up), paging)
    }

    /// The ranges without pages; all of RAM if the kernel does not tell.
    fn absent(&self) -> Vec<PageRange> {
        let (start, size) = (self.reservation.address(), self.reservation.size());
        let mut ranges = Vec::new();
        let each = |address, len| {
            ranges.push(PageRange { start: address as u64, len: len as u64 });
        };
        let found = PageMap::open()
            .and_then(|map| map.for_runs(start, size, |entry| !entry.exists(), each));
        if found.is_ok() { ranges } else { vec![self.pages()] }
    }

    fn lose_all(&self, faults: &Userfault) {
        let empty = memfd_create("lost-ram", MemfdFlags::CLOEXEC).map(File::from);
        let lost = empty.map_err(io::Error::from).and_then(|file| {
            self.reservation.overlay(0, &file, 0, self.span.size).map_err(io::Error::other)
        });
        match lost {
            // Otherwise who waits would find zeroes: it waits until the process ends.
            Err(error) => log::error!("Cannot give up the guest's memory: {error}"),
            Ok(()) => _ = faults.call(UFFDIO_WAKE, &mut self.pages()),
        }
    }

    /// Ends the service of a RAM that is complete: it keeps its pages, and absent ones are zeroes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn keep_all(&self) -> io::Result<()> {
        match self.paging().take() {
            Some(faults) => Ok(faults.call(UFFDIO_UNREGISTER, &mut self.pages())?),
            None => Ok(()),
        }
    }

    /// From now on absent pages are zeroes, and the other program cannot fill them any more.
    pub(super) fn end_paging(&self) -> Result<(), Error> {
        // A new mapping in the place of RAM is not registered.
        if self.paging().take().is_some() {
            self.reservation.uncover(0, self.span.size)
        } else {
            Ok(())
        }
    }

    fn pages(&self) -> PageRange {
        PageRange { start: self.host_address(), len: self.span.size }
    }

    fn paging(&self) -> MutexGuard<'_, Option<Paging>> {
        self.paging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use rvmm_devices::testing::skip;
    use rvmm_devices::virtio::DmaMemory;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::RamError;
    use super::*;
    use crate::layout::Span;

    const SPAN: Span = Span { base: 0x8000_0000, size: 2 << 20 };

    /// RAM that nobody serves yet. Reports a skip where the user may not.
    fn paged() -> Option<(GuestRam, Arc<Userfault>)> {
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.write(SPAN.base, b"gone once it is left to a pager").unwrap();
        match ram.leave_to_pager() {
            Ok(faults) => Some((ram, faults)),
            Err(error) => {
                skip(&error.to_string());
                None
            }
        }
    }

    /// Waits for a fault, and returns the address from the start of RAM.
    fn next_fault(ram: &GuestRam, faults: &Userfault) -> u64 {
        loop {
            if let [address] = faults.faults().unwrap()[..] {
                return address - ram.host_address();
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn who_reads_a_page_waits_until_it_is_filled() {
        let Some((ram, faults)) = paged() else { return };
        assert!(ram.occupied().unwrap().iter().eq([&(0..SPAN.size)]));
        let mut bytes = [1; 8];
        thread::scope(|scope| {
            scope.spawn(|| ram.read(SPAN.base + 4096, &mut bytes).unwrap());
            assert_eq!(next_fault(&ram, &faults), 4096);
            let page = ram.host_address() + 4096;
            assert_eq!(faults.copy(page, &[7; 4096]).unwrap(), Placed::New);
            assert_eq!(faults.copy(page, &[8; 4096]).unwrap(), Placed::Before);
            assert_eq!(faults.zero(page).unwrap(), Placed::Before);
        });
        assert_eq!(bytes, [7; 8]);
        // What the balloon returns is absent again.
        ram.release(SPAN.base + 4096, 4096);
        assert_eq!(faults.zero(ram.host_address() + 4096).unwrap(), Placed::New);
        ram.read(SPAN.base + 4096, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        // Outside of RAM.
        assert_eq!(faults.zero(ram.host_address() + SPAN.size).unwrap(), Placed::Gone);
    }

    #[test]
    fn absent_pages_that_are_given_up_are_lost_and_no_zeroes() {
        for replaces_all in [false, true] {
            let Some((ram, faults)) = paged() else { return };
            faults.copy(ram.host_address(), &[7; 4096]).unwrap();
            faults.copy(ram.host_address() + 3 * 4096, &[7; 8192]).unwrap();
            thread::scope(|scope| {
                let waits = scope.spawn(|| ram.read(SPAN.base + 8192, &mut [0; 4096]));
                assert_eq!(next_fault(&ram, &faults), 8192);
                if replaces_all {
                    ram.lose_all(&faults)
                } else {
                    ram.lose_absent()
                }
                assert_eq!(waits.join().unwrap(), Err(RamError::Lost));
            });
            assert!(ram.is_lost());
            // A system call fails, too.
            let file = File::from(memfd_create("to", MemfdFlags::CLOEXEC).unwrap());
            let place = GuestAddress(SPAN.base + 5 * 4096);
            let view = ram.view();
            assert!(view.write_all_volatile_to(place, &mut &file, 4096).is_err());
            // A pager that comes too late may still fill poisoned pages: it has the right contents.
            let late = faults.copy(ram.host_address() + 9 * 4096, &[8; 4096]).unwrap();
            assert_eq!(late, if replaces_all { Placed::Gone } else { Placed::New });
            if !replaces_all {
                // The balloon returns it, which would have somebody wait for it for ever.
                ram.release(SPAN.base + 3 * 4096, 4096);
                let mut bytes = [0; 4096];
                let _ = ram.read(SPAN.base + 3 * 4096, &mut bytes);
                assert_eq!(bytes, [7; 4096]);
            }
        }
    }

    #[test]
    fn cleared_memory_is_zero_and_the_pager_cannot_fill_it() {
        for is_lost in [false, true] {
            let Some((ram, faults)) = paged() else { return };
            faults.copy(ram.host_address(), &[7; 4096]).unwrap();
            if is_lost {
                ram.lose_absent();
            }
            ram.clear().unwrap();
            let mut all = vec![1; 2 << 20];
            ram.read(SPAN.base, &mut all).unwrap();
            assert!(all.iter().all(|byte| *byte == 0));
            ram.release(SPAN.base, SPAN.size);
            assert_eq!(faults.copy(ram.host_address(), &[7; 4096]).unwrap(), Placed::Gone);
        }
    }

    #[test]
    fn memory_that_other_programs_map_or_in_huge_pages_is_not_left_to_a_pager() {
        let shared = GuestRam::shared(SPAN, false).unwrap();
        assert!(shared.leave_to_pager().unwrap_err().to_string().contains("maps it, too"));
        let huge = GuestRam::over(
            SPAN,
            super::super::Reservation::of_absent_pages(SPAN.size, false).unwrap(),
        );
        let refusal = huge.unwrap().leave_to_pager().unwrap_err();
        assert!(refusal.to_string().contains("--hugepages"), "{refusal}");
    }

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
