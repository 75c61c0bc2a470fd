//! Kicks a hart out of the guest from another thread, with a real-time signal whose handler sets `immediate_exit`.
//!
//! The signal interrupts a running KVM_RUN. One that arrives just before KVM_RUN would be lost without the handler, which makes
//! the next KVM_RUN return at once. So a thread that sets a flag and then kicks can rely on the hart checking the flag.
#![expect(unsafe_code, reason = "signal actions and pthread_kill have no safe interface")]

use std::cell::{Cell, RefCell};
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libc::{c_int, c_void, pthread_t, siginfo_t};
use vmm_sys_util::signal::{SIGRTMAX, SIGRTMIN, register_signal_handler, unblock_signal};

use super::vcpu::Vcpu;
use crate::vcpu::hart::Kick;

/// The value that the signal handler writes into `immediate_exit`; different from the one that [`super::hart`] writes itself.
pub(super) const KICKED: u8 = 2;

thread_local! {
    /// The `immediate_exit` of the hart bound to this thread, or null. Has neither initialiser nor destructor, so a
    /// signal handler may read it at any time.
    static FLAG: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    /// Owns what `FLAG` points to; both are cleared when the thread ends.
    static BOUND: RefCell<Option<Bound>> = const { RefCell::new(None) };
}

/// The binding of a hart to its thread.
struct Bound {
    vcpu: Arc<Vcpu>,
    target: Arc<Target>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        FLAG.set(ptr::null());
        *self.target.thread.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A thread that can be kicked until it ends.
struct Target {
    signal: c_int,
    thread: Mutex<Option<pthread_t>>,
}

impl Kick for Target {
    fn kick(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = *thread {
            // SAFETY: the thread removes its handle under the lock before it ends, so the handle is valid; the signal has
            // a handler. The call only fails for an invalid signal number, and this one is registered.
            unsafe { libc::pthread_kill(thread, self.signal) };
        }
    }
}

/// Binds `vcpu` to the calling thread, in place of the vCPU that was bound to it before.
pub(super) fn bind(vcpu: &Arc<Vcpu>) -> io::Result<Arc<dyn Kick>> {
    let signal = signal()?;
    // SAFETY: has no preconditions.
    let thread = unsafe { libc::pthread_self() };
    let target = Arc::new(Target { signal, thread: Mutex::new(Some(thread)) });
    let bound = Bound { vcpu: Arc::clone(vcpu), target: Arc::clone(&target) };
    // The old binding is dropped before the new flag is set: its `drop` clears the flag.
    drop(BOUND.replace(None));
    FLAG.set(bound.vcpu.immediate_exit());
    BOUND.replace(Some(bound));
    unblock_signal(signal).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(target)
}

/// Unbinds `vcpu` from the calling thread, if it is bound to it.
pub(super) fn unbind(vcpu: &Arc<Vcpu>) {
    // At the end of a thread its locals, and the binding with them, may be destroyed already.
    let _ = BOUND.try_with(|bound| {
        let mut bound = bound.borrow_mut();
        if bound.as_ref().is_some_and(|bound| Arc::ptr_eq(&bound.vcpu, vcpu)) {
            *bound = None;
        }
    });
}

/// The signal of kicks: the first real-time signal without a handler in this process, chosen and registered once.
///
/// Signal handlers belong to the process, so this is one of the few things that all machines of a process share.
pub(super) fn signal() -> io::Result<c_int> {
    static SIGNAL: OnceLock<Result<c_int, i32>> = OnceLock::new();
    let found = SIGNAL.get_or_init(|| {
        let free = (SIGRTMIN()..=SIGRTMAX()).find(|number| is_free(*number)).ok_or(libc::EBUSY)?;
        register_signal_handler(free, kicked).map_err(|e| e.errno())?;
        Ok(free)
    });
    found.map_err(io::Error::from_raw_os_error)
}

fn is_free(number: c_int) -> bool {
    // SAFETY: `sigaction` is plain data for which zero bits are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: changes no handler; the kernel writes one structure that outlives the call.
    let asked = unsafe { libc::sigaction(number, ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_DFL
}

/// The signal handler: runs on the hart's own thread, between any two of its instructions.
extern "C" fn kicked(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = FLAG.get();
    if !flag.is_null() {
        // SAFETY: `BOUND` of this thread keeps the byte mapped for as long as the pointer is not null.
        unsafe { (*flag).store(KICKED, Ordering::Relaxed) };
    }
}
