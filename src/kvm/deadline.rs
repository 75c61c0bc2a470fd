//! What a guest's timer leaves behind in the host's CPUs, and how it is taken back.
//!
//! Where the CPU has Sstc, the deadline of a hart lies in `vstimecmp` of the CPU that ran it last (Sstc 1.0, chapter 3). Kernels before
//! [`TAKES_DEADLINES_BACK`] leave it there when the hart ends or moves on, with the interrupt enabled: from the deadline on the `wfi` of
//! that CPU's idle loop returns at once, for ever. The CPU counts as idle and burns a whole CPU's power; where it is emulated, a
//! CPU of the machine below. So the last hart of a machine to end enters KVM once more on each CPU where one may have been, with no
//! deadline and a signal pending: the kernel loads the hart's registers, sees the signal, and comes back before the guest runs.
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

/// The first kernel of which it is known that it takes the deadline out of the CPU itself (`kvm_riscv_vcpu_timer_save` in
/// `arch/riscv/kvm/vcpu_timer.c`).
const TAKES_DEADLINES_BACK: Version = (7, 2);

/// `compare` of a timer that is not set.
const NEVER: u64 = u64::MAX;

/// The CPUs that the harts of one machine may have been on, and how many of these harts are left.
#[derive(Default)]
pub(super) struct Deadlines {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    harts: usize,
    cpus: Vec<CpuSet>,
}

impl Deadlines {
    /// A hart begins to run on the calling thread, which tells by its affinity where that may be.
    pub(super) fn enter(&self) {
        let mut state = self.lock();
        state.harts += 1;
        state.note_affinity();
    }

    /// A hart that entered ends on the calling thread: `vcpu`, which nobody runs or kicks any more. The last one leaves no deadline.
    pub(super) fn leave(&self, vcpu: &Vcpu) {
        let cpus = {
            let mut state = self.lock();
            state.harts = state.harts.saturating_sub(1);
            // It may have been given other CPUs meanwhile.
            state.note_affinity();
            if state.harts > 0 {
                return;
            }
            std::mem::take(&mut state.cpus)
        };
        if is_at_least(&uname().release().to_string_lossy(), TAKES_DEADLINES_BACK) {
            return;
        }
        if let Err(error) = take_back(vcpu, &cpus) {
            log::debug!("A deadline of the guest may keep a CPU of the host awake: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn note_affinity(&mut self) {
        match sched_getaffinity(None) {
            Ok(cpus) if !self.cpus.contains(&cpus) => self.cpus.push(cpus),
            Ok(_) => {}
            Err(error) => log::debug!("The kernel does not tell this thread's CPUs: {error}"),
        }
    }
}

/// Enters KVM with `vcpu` on every one of these CPUs, without running the guest. The thread keeps its affinity.
fn take_back(vcpu: &Vcpu, cpus: &[CpuSet]) -> io::Result<()> {
    vcpu.set_reg(regs::TIMER_COMPARE, NEVER)?;
    let before = sched_getaffinity(None)?;
    let signal = Pending::new()?;
    vcpu.let_in(signal.number)?;
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| cpus.iter().any(|set| set.is_set(*cpu))) {
        let mut one = CpuSet::new();
        one.set(cpu);
        // Refused where the CPU was taken offline, or away from this process: then nothing of ours wakes it.
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
    /// This signal alone.
    these: libc::sigset_t,
    /// What the thread blocked before.
    mask: libc::sigset_t,
}

impl Pending {
    fn new() -> io::Result<Self> {
        let number = kick::signal()?;
        let mut these = MaybeUninit::uninit();
        let mut mask = MaybeUninit::uninit();
        // SAFETY: the first call makes the set, the second one takes a valid number; the third reads one set and writes the other.
        // The signal goes to this very thread, which blocks it, and is taken out again by `drop`.
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
    /// Takes the signal itself: its action would kick whatever hart is bound to the thread by now.
    fn drop(&mut self) {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: reads a set and a time, and then the set of an earlier call; nothing is asked to be written.
        unsafe {
            libc::sigtimedwait(&raw const self.these, ptr::null_mut(), &raw const at_once);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, ptr::null_mut());
        }
    }
}
