//! Clears the deadlines that a guest's timer leaves in the host's CPUs.
//!
//! If the CPU has Sstc, the deadline of a hart is in `vstimecmp` of the CPU that ran it last (Sstc 1.0, chapter 3). Kernels before
//! [`CLEARS_DEADLINES`] leave it there when the hart ends or migrates, with the interrupt enabled: once the deadline has passed, the
//! `wfi` of that CPU's idle loop returns at once, for ever. The CPU counts as idle and uses the power of a busy one; if it is
//! emulated, it keeps a CPU of the outer host busy. So the last hart of a machine to end enters KVM once more on each CPU where one
//! may have run, with no deadline and a signal pending: the kernel loads the hart's registers, sees the signal, and returns before
//! the guest runs.
#![expect(unsafe_code, reason = "signal masks have no safe interface")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::system::uname;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::kick;
use super::regs;
use super::release::{Version, is_at_least};
use super::vcpu::Vcpu;

/// The first kernel that is known to clear the deadline in the CPU itself (`kvm_riscv_vcpu_timer_save` in
/// `arch/riscv/kvm/vcpu_timer.c`).
const CLEARS_DEADLINES: Version = (7, 2);

/// Value of `compare` in a timer that is not set.
const NEVER: u64 = u64::MAX;

/// The CPUs that may have run the harts of one machine, and the number of harts that are left.
#[derive(Default)]
pub(super) struct Deadlines {
    state: Mutex<DeadlineState>,
}

#[derive(Default)]
struct DeadlineState {
    harts: usize,
    cpus: Vec<CpuSet>,
}

impl Deadlines {
    /// Adds a hart that starts to run on the calling thread, and the CPUs of the thread's affinity mask.
    pub(super) fn enter(&self) {
        let mut state = self.lock();
        state.harts += 1;
        state.note_affinity();
    }

    /// Removes a hart that ends on the calling thread. Its `vcpu` is not run or kicked any more. The last hart clears the deadlines.
    pub(super) fn leave(&self, vcpu: &Vcpu) {
        let cpus = {
            let mut state = self.lock();
            state.harts = state.harts.saturating_sub(1);
            // The affinity may have changed since.
            state.note_affinity();
            if state.harts > 0 {
                return;
            }
            std::mem::take(&mut state.cpus)
        };
        if is_at_least(&uname().release().to_string_lossy(), CLEARS_DEADLINES) {
            return;
        }
        if let Err(error) = clear(vcpu, &cpus) {
            log::debug!("A deadline of the guest may keep a host CPU awake: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, DeadlineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeadlineState {
    fn note_affinity(&mut self) {
        match sched_getaffinity(None) {
            Ok(cpus) if !self.cpus.contains(&cpus) => self.cpus.push(cpus),
            Ok(_) => {}
            Err(error) => log::debug!("Cannot read the affinity of a hart's thread: {error}"),
        }
    }
}

/// Enters KVM with `vcpu` on every one of these CPUs, without running the guest. The thread keeps its affinity.
fn clear(vcpu: &Vcpu, cpus: &[CpuSet]) -> io::Result<()> {
    vcpu.set_reg(regs::TIMER_COMPARE, NEVER)?;
    let before = sched_getaffinity(None)?;
    let signal = Pending::new()?;
    vcpu.interrupt_only_by(signal.number)?;
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| cpus.iter().any(|set| set.is_set(*cpu))) {
        let mut one = CpuSet::new();
        one.set(cpu);
        // Fails where the CPU is offline by now, or not allowed for this process: then no deadline of the guest's wakes it.
        if sched_setaffinity(None, &one).is_err() {
            continue;
        }
        match vcpu.run() {
            Err(libc::EINTR) => {}
            other => log::debug!("CPU {cpu} may keep a deadline of the guest: {other:?}"),
        }
    }
    drop(signal);
    Ok(sched_setaffinity(None, &before)?)
}

/// The signal that kicks harts, blocked and pending in the calling thread.
struct Pending {
    number: libc::c_int,
    /// The set of this signal alone.
    these: libc::sigset_t,
    /// The thread's signal mask before.
    mask: libc::sigset_t,
}

impl Pending {
    fn new() -> io::Result<Self> {
        let number = kick::signal()?;
        let mut these = MaybeUninit::uninit();
        let mut mask = MaybeUninit::uninit();
        // SAFETY: the first call initialises the set, the second one gets a valid number; the third reads one set and writes the other.
        // The signal is sent to this thread, which blocks it, and is consumed by `drop`.
        let (blocked, mask) = unsafe {
            libc::sigemptyset(these.as_mut_ptr());
            libc::sigaddset(these.as_mut_ptr(), number);
            let blocked = libc::pthread_sigmask(libc::SIG_BLOCK, these.as_ptr(), mask.as_mut_ptr());
            if blocked == 0 {
                libc::pthread_kill(libc::pthread_self(), number);
            }
            (blocked, mask)
        };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: the calls that succeeded have written them.
        let (these, mask) = unsafe { (these.assume_init(), mask.assume_init()) };
        Ok(Self { number, these, mask })
    }
}

impl Drop for Pending {
    /// Consumes the signal: its handler would kick the hart that is bound to the thread by then.
    fn drop(&mut self) {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: both calls only read: a set and a time-out, then the mask that an earlier call wrote.
        unsafe {
            libc::sigtimedwait(&raw const self.these, ptr::null_mut(), &raw const at_once);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, ptr::null_mut());
        }
    }
}
