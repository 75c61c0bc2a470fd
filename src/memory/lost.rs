//! SIGBUS on guest RAM: the page is replaced by zeroes and the loss is recorded, instead of ending the process. A huge page is
//! replaced as a whole, since the kernel does not split it.
//!
//! The signal's disposition is per process, so the watched ranges are, too: a fixed table of atomics, which a
//! signal handler may read. A fault elsewhere is passed to the previous handler.
#![expect(unsafe_code, reason = "a signal handler, and a mapping made inside it")]

use std::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{mem, ptr};

use crate::error::Error;

/// Limit of machines in one process.
const SLOTS: usize = 64;

struct Slot {
    taken: AtomicBool,
    base: AtomicUsize,
    /// Zero while the slot is not in use: the handler then matches no address.
    size: AtomicUsize,
    /// Size of a page of the mapping, a power of two.
    page: AtomicUsize,
    fired: AtomicBool,
}

static RANGES: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        base: AtomicUsize::new(0),
        size: AtomicUsize::new(0),
        page: AtomicUsize::new(4096),
        fired: AtomicBool::new(false),
    }
}; SLOTS];

static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A watched range of this process; released on drop, before the range is unmapped.
pub(super) struct Watch(&'static Slot);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("fired", &self.fired()).finish_non_exhaustive()
    }
}

impl Watch {
    /// Watches `size` bytes at `base`, both multiples of `page`.
    pub(super) fn new(base: usize, size: usize, page: usize) -> Result<Self, Error> {
        install()?;
        let free = |slot: &&Slot| !slot.taken.swap(true, Ordering::AcqRel);
        let slot = RANGES.iter().find(free).ok_or_else(|| Error::Memory {
            what: format!("Cannot watch guest RAM: one process can run at most {SLOTS} machines"),
            source: None,
        })?;
        slot.fired.store(false, Ordering::Relaxed);
        slot.base.store(base, Ordering::Relaxed);
        slot.page.store(page, Ordering::Relaxed);
        slot.size.store(size, Ordering::Release);
        Ok(Self(slot))
    }

    /// True once a page of the range was lost.
    pub(super) fn fired(&self) -> bool {
        self.0.fired.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.size.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

fn install() -> Result<(), Error> {
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: an all-zero sigaction is valid (default action, empty mask).
    let (mut new, mut old): (libc::sigaction, libc::sigaction) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    new.sa_sigaction = on_sigbus as *const () as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: reads the present action into a valid structure; changes nothing.
    let read = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut old) };
    // If several threads are here at once, only the first may install, or the second would save this handler as the
    // previous one.
    if read != 0 || PREVIOUS.set(old).is_err() {
        return if read == 0 { Ok(()) } else { Err(refused()) };
    }
    // SAFETY: the handler only uses async-signal-safe operations (atomics, mmap, sigaction, and the previous handler).
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const new, ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(refused())
    }
}

fn refused() -> Error {
    Error::Memory {
        what: "Cannot watch guest RAM for lost pages".into(),
        source: Some(std::io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(signal: i32, siginfo: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, and for SIGBUS it has an address.
    let address = unsafe { (*siginfo).si_addr() }.addr();
    for slot in &RANGES {
        let size = slot.size.load(Ordering::Acquire);
        let offset = address.wrapping_sub(slot.base.load(Ordering::Relaxed));
        if offset < size && replace_page(address, slot.page.load(Ordering::Relaxed)) {
            slot.fired.store(true, Ordering::Release);
            return;
        }
    }
    pass_on(signal, siginfo, context);
}

fn replace_page(address: usize, size: usize) -> bool {
    let page = address & !(size - 1);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the page is in a watched range, which is guest RAM without references into it.
    let mapped = unsafe { libc::mmap(ptr::without_provenance_mut(page), size, prot, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

fn pass_on(signal: i32, siginfo: *mut libc::siginfo_t, context: *mut c_void) {
    let Some(previous) = PREVIOUS.get() else { return };
    let action = previous.sa_sigaction;
    if action == libc::SIG_DFL || action == libc::SIG_IGN {
        // SAFETY: restores an action that was in force; the faulting instruction then runs again and takes it.
        unsafe { libc::sigaction(libc::SIGBUS, previous, ptr::null_mut()) };
    } else if previous.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: an action with SA_SIGINFO is a function of this type (sigaction(2)).
        let next: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) =
            unsafe { mem::transmute(action) };
        next(signal, siginfo, context);
    } else {
        // SAFETY: an action without SA_SIGINFO that is neither default nor ignore is a function of this type.
        let next: extern "C" fn(i32) = unsafe { mem::transmute(action) };
        next(signal);
    }
}
