//! The hash chain of a hart: each step reads and rewrites a word of a buffer in RAM, while sums and a wave are in
//! floating-point registers. A word, a register or a rounding mode that is lost changes all later hashes.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use runtime::entry::MAX_HARTS;
use runtime::{Failure, csr_read, csr_write, ensure_eq};

/// Words in a hart's buffer of 64 KiB.
const WORDS: usize = 8192;
/// Steps of a round: one per sum, this many times.
const BLOCKS: usize = 512;
const SUMS: usize = 8;
/// The rounding modes of `frm`.
const ROUNDINGS: usize = 5;

static BUFFERS: [[AtomicU64; WORDS]; MAX_HARTS] =
    [const { [const { AtomicU64::new(0) }; WORDS] }; MAX_HARTS];
static SAVED: [Saved; MAX_HARTS] = [const { Saved::new() }; MAX_HARTS];

/// A chain of a hart that is stopped.
struct Saved {
    rounds: AtomicUsize,
    hash: AtomicU64,
    wave: AtomicU64,
    sums: [AtomicU64; SUMS],
}

impl Saved {
    const fn new() -> Self {
        Self {
            rounds: AtomicUsize::new(0),
            hash: AtomicU64::new(0),
            wave: AtomicU64::new(0),
            sums: [const { AtomicU64::new(0) }; SUMS],
        }
    }
}

/// A chain that its hart computes.
pub(crate) struct Chain {
    hart: usize,
    /// Number of completed rounds.
    pub(crate) rounds: usize,
    hash: u64,
    /// The logistic map, in which any difference grows.
    wave: f64,
    /// The number of blocks, times 1, 2, 3, ...
    sums: [f64; SUMS],
}

impl Chain {
    /// The chain of the calling hart, from where [`Chain::save`] left it.
    pub(crate) fn continued(hart: usize) -> Self {
        let saved = &SAVED[hart];
        let float = |bits: &AtomicU64| f64::from_bits(bits.load(Relaxed));
        let mut chain = Self {
            hart,
            rounds: saved.rounds.load(Relaxed),
            hash: saved.hash.load(Relaxed),
            wave: float(&saved.wave),
            sums: saved.sums.each_ref().map(float),
        };
        if chain.rounds == 0 {
            chain.hash = mix(hart as u64);
            chain.wave = 0.25;
            for (index, word) in BUFFERS[hart].iter().enumerate() {
                word.store(mix((hart * WORDS + index) as u64), Relaxed);
            }
        }
        set_rounding(hart % ROUNDINGS);
        chain
    }

    /// Keeps the chain in memory while the hart is stopped.
    pub(crate) fn save(&self) {
        let saved = &SAVED[self.hart];
        saved.rounds.store(self.rounds, Relaxed);
        saved.hash.store(self.hash, Relaxed);
        saved.wave.store(self.wave.to_bits(), Relaxed);
        for (slot, sum) in saved.sums.iter().zip(self.sums) {
            slot.store(sum.to_bits(), Relaxed);
        }
    }

    /// Computes a round, and checks the sums.
    pub(crate) fn next_round(&mut self) -> Result<(), Failure> {
        let words = &BUFFERS[self.hart];
        // In registers, not in `self`.
        let (mut hash, mut wave, mut sums) = (self.hash, self.wave, self.sums);
        for _ in 0..BLOCKS {
            for (weight, sum) in (1u32..).zip(&mut sums) {
                let word = &words[hash as usize % WORDS];
                hash = mix(hash ^ word.load(Relaxed));
                word.store(hash.rotate_left(17), Relaxed);
                *sum += f64::from(weight);
            }
            wave = 3.9 * wave * (1.0 - wave);
            hash ^= wave.to_bits();
        }
        (self.hash, self.wave, self.sums) = (hash, wave, sums);
        self.rounds += 1;
        let rounds = self.rounds;
        for (weight, sum) in (1..).zip(sums) {
            let expected = (rounds * BLOCKS * weight) as u64;
            ensure_eq!(sum.to_bits(), (expected as f64).to_bits(), "sum {weight}, round {rounds}");
        }
        ensure_eq!(csr_read!("frm"), self.hart % ROUNDINGS, "the rounding mode, round {rounds}");
        Ok(())
    }

    /// The hash of everything: the chain, the numbers and the buffer.
    pub(crate) fn hash(&self) -> u64 {
        let numbers = self.sums.iter().chain([&self.wave]).map(|number| number.to_bits());
        let words = BUFFERS[self.hart].iter().map(|word| word.load(Relaxed));
        numbers.chain(words).fold(self.hash, |hash, word| mix(hash ^ word))
    }
}

/// Sets the rounding mode. The compiler knows only the usual one, but it computes none of the chain's numbers itself.
fn set_rounding(mode: usize) {
    while csr_read!("frm") != mode {
        csr_write!("frm", mode);
        // QEMU's write to `frm` leaves the host's `sstatus.FS` clean, so that KVM does not save the mode when it switches to
        // another thread now. An instruction with a floating-point register makes it dirty; if that was too late, again.
        // SAFETY: it changes only the register.
        unsafe { asm!("fmv.d.x {}, zero", out(freg) _, options(nomem, nostack)) }
    }
}

/// A step of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
