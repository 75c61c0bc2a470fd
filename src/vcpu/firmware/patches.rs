//! Breakpoints in place of a guest's SBI calls. Each is a guess from the bytes of a file ([`super::sites`]); the mode of the hart
//! that hits one decides what it is.
//!
//! In supervisor mode it is an SBI call. In user mode it is a system call: the guess was wrong, and the `ecall` is restored. A kernel
//! may contain its first program and copy it, breakpoints included, to where it runs: so a breakpoint elsewhere that is surrounded
//! by the same instructions as a patch is a copy of it, and handled the same way. If the number is not known before the call, a
//! patch from which a supervisor makes only calls that the host's kernel handles is removed after a while, unless the user chose
//! otherwise.
//!
//! `ecall` and `ebreak` differ in one byte only, so a hart that fetches during a change finds one of the two.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::{Level, log};

use super::sites::{Number, Site};
use crate::memory::{GuestRam, RamError};
use crate::riscv::trap::SUPERVISOR;
use crate::riscv::{insn, sbi};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::trap::{self, Fetched};
use crate::vcpu::walk::translate;

/// The bytes of an `ebreak`.
const EBREAK: [u8; 4] = insn::EBREAK.to_le_bytes();

/// Makes changed code visible to the harts.
pub type SyncCode = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Maximum number of patches per machine. A kernel makes its calls in tens of places.
pub const MOST: usize = 4096;

/// Number of calls with other numbers after which a patch is removed.
const MAX_OTHERS: u32 = 256;

/// Bytes after an `ecall` that are compared to find copies.
const BYTES_AFTER: usize = 4;

/// Index of the byte in which `ecall` and `ebreak` differ.
const DIFFERING_BYTE: usize = 2;

/// The calls that are patched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Those of SBI 0.1.
    pub v01: bool,
    /// Those that set the timer.
    pub timer: bool,
}

impl Wanted {
    /// True if a call with this number is patched.
    #[must_use]
    pub fn has(self, number: u64) -> bool {
        self.v01 && sbi::is_v01(number) || self.timer && sbi::is_set_timer(number)
    }
}

/// All patches of a machine.
pub struct Patches {
    wanted: Wanted,
    /// True if patches of unknown number are removed when they make no wanted calls.
    removes_unused: bool,
    sync: SyncCode,
    patterns: Vec<Pattern>,
    state: Mutex<PatchState>,
}

#[derive(Default)]
struct PatchState {
    /// By guest-physical address.
    patches: BTreeMap<u64, Patch>,
    has_logged: bool,
}

#[derive(Clone, Copy, Default)]
struct Patch {
    /// The number is not known before the call.
    is_unknown: bool,
    /// A supervisor has made a wanted call here.
    is_call: bool,
    /// Number of other calls that a supervisor has made here.
    others: u32,
}

/// The bytes before a patch, from the instruction that sets a7, and some bytes after it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    before: Vec<u8>,
    after: Vec<u8>,
}

/// Classification of a breakpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PatchHit {
    /// A supervisor's call.
    Call,
    /// User code's system call, at a place where supervisors make calls as well.
    UserCall,
    /// The guest's own instruction, which has been restored.
    Restored,
    /// None of the patches.
    NotAPatch,
}

impl Patches {
    /// Creates an empty set of patches, for the calls `wanted`. With `removes_unused`, patches that turn out useless are removed;
    /// `sync` makes changed code visible to harts.
    #[must_use]
    pub fn new(wanted: Wanted, removes_unused: bool, sync: SyncCode) -> Self {
        Self { wanted, removes_unused, sync, patterns: Vec::new(), state: Mutex::default() }
    }

    /// Creates a set that stays empty.
    #[must_use]
    pub fn none() -> Self {
        Self::new(Wanted { v01: false, timer: false }, true, Box::new(|| Ok(())))
    }

    /// Inserts a breakpoint in place of the `ecall` at `site` of `code`, which is at guest-physical address `base`, if its number is
    /// or may be a wanted one; false if there are too many already. It becomes visible to harts by [`SyncCode`].
    ///
    /// # Errors
    /// The code is not in RAM.
    pub fn insert(
        &mut self,
        ram: &GuestRam,
        base: u64,
        code: &[u8],
        site: Site,
    ) -> Result<bool, RamError> {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !site.number.may_be(|number| self.wanted.has(number)) {
            return Ok(true);
        }
        if state.patches.len() >= MOST {
            return Ok(false);
        }
        let addr = base.saturating_add(site.at as u64);
        ram.write(addr, &EBREAK)?;
        let is_unknown = site.number == Number::Moved;
        state.patches.insert(addr, Patch { is_unknown, ..Patch::default() });
        let end = site.at.saturating_add(EBREAK.len());
        let pattern = Pattern {
            before: code.get(site.start..site.at).unwrap_or_default().to_vec(),
            after: code.get(end..).unwrap_or_default().iter().copied().take(BYTES_AFTER).collect(),
        };
        if !self.patterns.contains(&pattern) {
            self.patterns.push(pattern);
        }
        Ok(true)
    }

    /// Number of patches.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().patches.len()
    }

    /// Classifies the breakpoint at `pc`, which the hart has hit, and removes the patch if it is a wrong guess.
    pub(super) fn classify(
        &self,
        hart: &mut dyn Hart,
        ram: &GuestRam,
        pc: u64,
    ) -> io::Result<PatchHit> {
        let satp = hart.get(Reg::Csr(Csr::Satp))?;
        let Ok(addr) = translate(ram, satp, pc) else { return Ok(PatchHit::NotAPatch) };
        let is_user = hart.get(Reg::Mode)? != SUPERVISOR;
        let number = hart.get(Reg::X(17))?;
        let mut state = self.lock();
        let copy = Patch { is_unknown: true, ..Patch::default() };
        let patch = match state.patches.get(&addr) {
            Some(patch) => *patch,
            None if matches!(trap::fetch(ram, satp, pc), Fetched::Word(insn::ECALL)) => {
                return Ok(PatchHit::Restored);
            }
            None if !self.is_copy(ram, satp, pc) => return Ok(PatchHit::NotAPatch),
            // A supervisor that has copied itself makes all its calls there; with a number that no SBI call has, it may be its own breakpoint.
            None if !is_user && !self.wanted.has(number) && !sbi::is_sbi(number) => {
                return Ok(PatchHit::NotAPatch);
            }
            None => copy,
        };
        let (hit, patch) = self.update(patch, is_user, number);
        match patch {
            Some(patch) if state.patches.len() < MOST || state.patches.contains_key(&addr) => {
                state.patches.insert(addr, patch);
            }
            Some(_) => {}
            None => {
                state.patches.remove(&addr);
                Self::log_removal(&mut state, pc, is_user);
                drop(state);
                self.restore(ram, satp, pc)?;
            }
        }
        Ok(hit)
    }

    /// Classifies a hit, and returns the new state of the patch: `None` if the `ecall` is to be restored.
    fn update(&self, mut patch: Patch, is_user: bool, number: u64) -> (PatchHit, Option<Patch>) {
        match (is_user, patch.is_call) {
            (true, true) => return (PatchHit::UserCall, Some(patch)),
            (true, false) => return (PatchHit::Restored, None),
            (false, _) => {}
        }
        if self.wanted.has(number) {
            patch.is_call = true;
        } else if self.removes_unused && patch.is_unknown && !patch.is_call {
            patch.others += 1;
            if patch.others >= MAX_OTHERS {
                return (PatchHit::Restored, None);
            }
        }
        (PatchHit::Call, Some(patch))
    }

    fn log_removal(state: &mut PatchState, pc: u64, is_user: bool) {
        let whose =
            if is_user { "a program's system call" } else { "handled by the host's kernel" };
        // Only the first at level info: a guest may make any number of copies.
        let level = if state.has_logged { Level::Debug } else { Level::Info };
        state.has_logged = true;
        log!(level, "Removed the breakpoint of --sbi-v01 at {pc:#x}: the call is {whose}");
    }

    /// Restores the `ecall` at `pc`, unless that is already done.
    fn restore(&self, ram: &GuestRam, satp: u64, pc: u64) -> io::Result<()> {
        let [.., before, _] = EBREAK;
        // The instruction may cross a page boundary.
        let Ok(addr) = translate(ram, satp, pc.wrapping_add(DIFFERING_BYTE as u64)) else {
            return Ok(());
        };
        let mut byte = [0];
        if ram.read(addr, &mut byte).is_ok() && byte == [before] && ram.write(addr, &[0]).is_ok() {
            (self.sync)()?;
        }
        Ok(())
    }

    /// True if the breakpoint at `pc` is surrounded by the same bytes as a patch.
    fn is_copy(&self, ram: &GuestRam, satp: u64, pc: u64) -> bool {
        let after = pc.wrapping_add(EBREAK.len() as u64);
        matches!(trap::fetch(ram, satp, pc), Fetched::Word(word) if word == insn::EBREAK)
            && self.patterns.iter().any(|pattern| {
                let start = pc.wrapping_sub(pattern.before.len() as u64);
                matches_at(ram, satp, start, &pattern.before)
                    && matches_at(ram, satp, after, &pattern.after)
            })
    }

    fn lock(&self) -> MutexGuard<'_, PatchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// True if these bytes are at a virtual address. Reads two at a time, as they may be on different pages.
fn matches_at(ram: &GuestRam, satp: u64, start: u64, bytes: &[u8]) -> bool {
    (0..).step_by(2).zip(bytes.chunks(2)).all(|(offset, expected)| {
        let mut found = [0; 2];
        let Some(found) = found.get_mut(..expected.len()) else { return false };
        translate(ram, satp, start.wrapping_add(offset))
            .is_ok_and(|addr| ram.read(addr, found).is_ok())
            && found == expected
    })
}
