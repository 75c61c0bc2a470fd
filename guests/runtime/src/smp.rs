//! Start and suspend of harts.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::board::Board;
use crate::entry::{_start_hart, MAX_HARTS};
use crate::{sbi, trap};

static JOBS: [AtomicUsize; MAX_HARTS] = [const { AtomicUsize::new(0) }; MAX_HARTS];

/// The stack slot of a hart: the boot hart has 0, the others count up in the order of the tree.
fn slot(hart: usize) -> Option<usize> {
    let board = Board::get();
    if hart == board.boot_hart {
        return Some(0);
    }
    let mut others = board.cpus().iter().filter(|cpu| cpu.hart != board.boot_hart);
    others.position(|cpu| cpu.hart == hart).map(|index| index + 1)
}

/// Starts `hart`, which must be another one and stopped, at `job`. When `job` returns, the hart stops itself.
pub fn start(hart: usize, job: fn()) -> sbi::Ret {
    let slot = slot(hart).expect("no such hart in the tree");
    JOBS[slot].store(job as usize, Ordering::SeqCst);
    sbi::hart_start(hart, (&raw const _start_hart) as usize, slot)
}

/// Suspends the whole machine to RAM (SBI 13.1); this hart must be the only started one. After the wake-up the
/// hart runs `job` on a new stack, and then stops; returns only with an error.
pub fn suspend_system(job: fn()) -> sbi::Ret {
    let slot = slot(trap::hart().id).expect("a hart outside the tree");
    JOBS[slot].store(job as usize, Ordering::SeqCst);
    sbi::call(sbi::SUSP, 0, [0, (&raw const _start_hart) as usize, slot, 0, 0, 0])
}

/// Suspends the calling hart non-retentively (SBI 9.4). After the wake-up it runs `job` on a new stack, and
/// then stops; returns only with an error.
pub fn suspend(job: fn()) -> sbi::Ret {
    const NON_RETENTIVE: usize = 0x8000_0000;
    let slot = slot(trap::hart().id).expect("a hart outside the tree");
    JOBS[slot].store(job as usize, Ordering::SeqCst);
    sbi::call(sbi::HSM, 3, [NON_RETENTIVE, (&raw const _start_hart) as usize, slot, 0, 0, 0])
}

pub(crate) extern "C" fn started(slot: usize) -> ! {
    let job = JOBS[slot].load(Ordering::SeqCst);
    // SAFETY: `start` stored a `fn()` here before it started this hart.
    let job: fn() = unsafe { core::mem::transmute(job) };
    job();
    let ret = sbi::hart_stop();
    panic!("hart_stop came back: {ret:?}");
}
