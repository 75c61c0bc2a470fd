//! The breakpoints that stand in place of a guest's calls. Each is a guess, made by the bytes of a file ([`super::sites`]); who runs
//! into one decides what it is.
//!
//! A supervisor makes a call there. User code makes a system call: the guess was wrong, and the `ecall` is put back. A kernel may carry
//! its first program within itself and copy it, breakpoints and all, to where it runs: so a breakpoint elsewhere that stands among the
//! same instructions as a patch is a copy of it, and treated alike. Where the number is not known before the call, a
//! supervisor that makes only calls that the host's kernel answers itself is left alone after a while, unless the user asked otherwise.
//!
//! Only one byte tells `ecall` from `ebreak`, so that a hart on its way there finds either of the two.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::{Level, log};

use super::sites::{self, EBREAK, Number, Site};
use crate::memory::{GuestRam, RamError};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::trap::{self, Fetched};
use crate::vcpu::walk::translate;

/// Has the harts see changed code.
pub type SyncCode = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Patches that a machine has at most. A kernel makes its calls in tens of places.
pub const MOST: usize = 4096;

/// Calls of other numbers at a patch before it is taken away.
const ENOUGH: u32 = 256;

/// Bytes behind an `ecall` that a copy of it shares.
const BEHIND: usize = 4;

/// Where in an `ecall` and an `ebreak` the byte is that differs.
const DIFFERENT: usize = 2;

/// The calls that patches are there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Those of SBI 0.1.
    pub v01: bool,
    /// Those that set the timer.
    pub timer: bool,
}

impl Wanted {
    /// Whether a call of this number is one.
    #[must_use]
    pub fn has(self, number: u64) -> bool {
        self.v01 && sites::is_v01(number) || self.timer && sites::is_set_timer(number)
    }
}

/// All patches of a machine.
pub struct Patches {
    wanted: Wanted,
    /// Whether a patch of unknown number is taken away that no wanted call comes from.
    gives_up: bool,
    sync: SyncCode,
    shapes: Vec<Shape>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By guest-physical address.
    patches: BTreeMap<u64, Patch>,
    has_told: bool,
}

#[derive(Clone, Copy, Default)]
struct Patch {
    /// The number is not known before the call.
    is_open: bool,
    /// A supervisor has made a wanted call here.
    is_call: bool,
    /// Other calls that a supervisor has made here so far.
    others: u32,
}

/// The bytes in front of a patch, from where its number is put into a7, and some behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    before: Vec<u8>,
    behind: Vec<u8>,
}

/// What a breakpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PatchHit {
    /// A supervisor's call.
    Call,
    /// User code's system call, at a place where supervisors make calls, too.
    UserCall,
    /// Nothing any more: the guest's own instruction is there again.
    Restored,
    /// None of the patches.
    Strange,
}

impl Patches {
    /// No patches yet, for the calls `wanted`. With `gives_up` those that turn out useless are taken away; `sync` has harts see
    /// changed code.
    #[must_use]
    pub fn new(wanted: Wanted, gives_up: bool, sync: SyncCode) -> Self {
        Self { wanted, gives_up, sync, shapes: Vec::new(), state: Mutex::default() }
    }

    /// No patches, and none to come.
    #[must_use]
    pub fn none() -> Self {
        Self::new(Wanted { v01: false, timer: false }, true, Box::new(|| Ok(())))
    }

    /// Puts a breakpoint in place of the `ecall` at `site` of `code`, which lies at guest-physical address `base`, if its number is or may
    /// be a wanted one; false where there are too many already. The harts do not see it before [`SyncCode`].
    ///
    /// # Errors
    /// The code is not in RAM.
    pub fn plant(
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
        let is_open = site.number == Number::Moved;
        state.patches.insert(addr, Patch { is_open, ..Patch::default() });
        let end = site.at.saturating_add(EBREAK.len());
        let shape = Shape {
            before: code.get(site.start..site.at).unwrap_or_default().to_vec(),
            behind: code.get(end..).unwrap_or_default().iter().copied().take(BEHIND).collect(),
        };
        if !self.shapes.contains(&shape) {
            self.shapes.push(shape);
        }
        Ok(true)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().patches.len()
    }

    /// What the breakpoint at `pc` is, to which the hart has come.
    pub(super) fn meet(
        &self,
        hart: &mut dyn Hart,
        ram: &GuestRam,
        pc: u64,
    ) -> io::Result<PatchHit> {
        let satp = hart.get(Reg::Csr(Csr::Satp))?;
        let Ok(addr) = translate(ram, satp, pc) else { return Ok(PatchHit::Strange) };
        let is_user = hart.get(Reg::Mode)? != trap::SUPERVISOR;
        let number = hart.get(Reg::X(17))?;
        let mut state = self.lock();
        let copy = Patch { is_open: true, ..Patch::default() };
        let patch = match state.patches.get(&addr) {
            Some(patch) => *patch,
            None if matches!(trap::fetch(ram, satp, pc), Fetched::Word(sites::ECALL)) => {
                return Ok(PatchHit::Restored);
            }
            None if !self.is_copy(ram, satp, pc) => return Ok(PatchHit::Strange),
            // A supervisor that has copied itself makes all its calls there; what is no call's number may be a breakpoint of its own.
            None if !is_user && !self.wanted.has(number) && !sites::is_sbi(number) => {
                return Ok(PatchHit::Strange);
            }
            None => copy,
        };
        let (met, patch) = self.judge(patch, is_user, number);
        match patch {
            Some(patch) if state.patches.len() < MOST || state.patches.contains_key(&addr) => {
                state.patches.insert(addr, patch);
            }
            Some(_) => {}
            None => {
                state.patches.remove(&addr);
                Self::tell(&mut state, pc, is_user);
                drop(state);
                self.restore(ram, satp, pc)?;
            }
        }
        Ok(met)
    }

    /// What it is that the hart has come to, and what is known of it from now on: nothing where the `ecall` is put back.
    fn judge(&self, mut patch: Patch, is_user: bool, number: u64) -> (PatchHit, Option<Patch>) {
        match (is_user, patch.is_call) {
            (true, true) => return (PatchHit::UserCall, Some(patch)),
            (true, false) => return (PatchHit::Restored, None),
            (false, _) => {}
        }
        if self.wanted.has(number) {
            patch.is_call = true;
        } else if self.gives_up && patch.is_open && !patch.is_call {
            patch.others += 1;
            if patch.others >= ENOUGH {
                return (PatchHit::Restored, None);
            }
        }
        (PatchHit::Call, Some(patch))
    }

    fn tell(state: &mut State, pc: u64, is_user: bool) {
        let whose = if is_user { "a program's system call" } else { "for the host's kernel" };
        // One line for the first; a guest may make any number of copies.
        let level = if state.has_told { Level::Debug } else { Level::Info };
        state.has_told = true;
        log!(
            level,
            "The call at {pc:#x}, a breakpoint until now (--sbi-v01), is {whose}: put back"
        );
    }

    /// Puts the `ecall` back at `pc`, if nobody has yet.
    fn restore(&self, ram: &GuestRam, satp: u64, pc: u64) -> io::Result<()> {
        let [.., before, _] = EBREAK;
        // The instruction may lie on two pages.
        let Ok(addr) = translate(ram, satp, pc.wrapping_add(DIFFERENT as u64)) else {
            return Ok(());
        };
        let mut byte = [0];
        if ram.read(addr, &mut byte).is_ok() && byte == [before] && ram.write(addr, &[0]).is_ok() {
            (self.sync)()?;
        }
        Ok(())
    }

    /// Whether the breakpoint at `pc` stands where a copy of a patch would.
    fn is_copy(&self, ram: &GuestRam, satp: u64, pc: u64) -> bool {
        let behind = pc.wrapping_add(EBREAK.len() as u64);
        matches!(trap::fetch(ram, satp, pc), Fetched::Word(word) if word == u32::from_le_bytes(EBREAK))
            && self.shapes.iter().any(|shape| {
                let start = pc.wrapping_sub(shape.before.len() as u64);
                holds(ram, satp, start, &shape.before) && holds(ram, satp, behind, &shape.behind)
            })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether these bytes are at a virtual address. Reads two of them at a time, as they may lie on different pages.
fn holds(ram: &GuestRam, satp: u64, start: u64, bytes: &[u8]) -> bool {
    (0..).step_by(2).zip(bytes.chunks(2)).all(|(offset, expected)| {
        let mut found = [0; 2];
        let Some(found) = found.get_mut(..expected.len()) else { return false };
        translate(ram, satp, start.wrapping_add(offset))
            .is_ok_and(|addr| ram.read(addr, found).is_ok())
            && found == expected
    })
}
