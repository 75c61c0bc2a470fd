//! Software breakpoints in guest memory: a `c.ebreak` over the first two bytes of an instruction, and the bytes it replaced.
//!
//! Two bytes are enough for instructions of every length, never cross a page boundary, and leave the second half of a longer
//! instruction alone. Every hart has `c.ebreak`: rvmm itself is compiled for hosts with compressed instructions.
//!
//! All addresses are guest-physical: a page may be mapped at several virtual addresses, and the `ebreak` appears at all of them.
//! If the guest overwrites a breakpoint (it patches its own code, or reuses the page), its write wins: bytes that are no longer
//! the inserted `ebreak` are neither hidden nor restored.

use std::collections::BTreeMap;

use crate::memory::{GuestRam, RamError};
use crate::riscv::insn;

const C_EBREAK: [u8; 2] = insn::C_EBREAK.to_le_bytes();

/// The inserted breakpoints: address, and the two bytes they replaced.
#[derive(Debug, Default)]
pub(super) struct SoftwareBreakpoints(BTreeMap<u64, [u8; 2]>);

impl SoftwareBreakpoints {
    /// True if a breakpoint is inserted at `addr`.
    pub(super) fn has(&self, addr: u64) -> bool {
        self.0.contains_key(&addr)
    }

    /// Inserts a breakpoint, unless one is inserted there already.
    ///
    /// # Errors
    /// `addr` is not in RAM, or the memory is lost, and with it the original bytes.
    pub(super) fn insert(&mut self, ram: &GuestRam, addr: u64) -> Result<(), RamError> {
        if self.has(addr) {
            return Ok(());
        }
        let mut before = [0; 2];
        ram.read(addr, &mut before)?;
        ram.write(addr, &C_EBREAK)?;
        self.0.insert(addr, before);
        Ok(())
    }

    /// Removes a breakpoint and restores the original bytes, unless the guest has overwritten it.
    pub(super) fn remove(&mut self, ram: &GuestRam, addr: u64) {
        let Some(before) = self.0.remove(&addr) else { return };
        let mut now = [0; 2];
        if ram.read(addr, &mut now).is_ok() && now == C_EBREAK {
            // Lost memory needs no restoring.
            let _ = ram.write(addr, &before);
        }
    }

    /// Removes all breakpoints.
    pub(super) fn remove_all(&mut self, ram: &GuestRam) {
        for addr in self.0.keys().copied().collect::<Vec<_>>() {
            self.remove(ram, addr);
        }
    }

    /// Replaces breakpoints in `bytes`, which were read at `addr`, with the original bytes.
    pub(super) fn hide(&self, addr: u64, bytes: &mut [u8]) {
        let end = addr.saturating_add(bytes.len() as u64);
        for (at, before) in self.0.range(addr.saturating_sub(1)..end) {
            let halves = (*at..).zip(C_EBREAK.iter().zip(before));
            let mut seen = halves.filter_map(|(at, (inserted, before))| {
                let index = usize::try_from(at.checked_sub(addr)?).ok()?;
                Some((index, *inserted, *before))
            });
            let is_intact = seen
                .clone()
                .all(|(index, inserted, _)| bytes.get(index).is_none_or(|byte| *byte == inserted));
            if is_intact {
                for (index, _, before) in seen.by_ref() {
                    if let Some(byte) = bytes.get_mut(index) {
                        *byte = before;
                    }
                }
            }
        }
    }

    /// Writes `bytes` underneath the breakpoints, which stay inserted.
    ///
    /// # Errors
    /// As [`GuestRam::write`].
    pub(super) fn write(
        &mut self,
        ram: &GuestRam,
        addr: u64,
        bytes: &[u8],
    ) -> Result<(), RamError> {
        let end = addr.saturating_add(bytes.len() as u64);
        let covered: Vec<u64> =
            self.0.range(addr.saturating_sub(1)..end).map(|(at, _)| *at).collect();
        for at in &covered {
            self.remove(ram, *at);
        }
        let written = ram.write(addr, bytes);
        for at in covered {
            self.insert(ram, at)?;
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::testing::RAM;

    const AT: u64 = RAM.base + 0x100;

    fn ram() -> GuestRam {
        let ram = GuestRam::new(RAM, false).unwrap();
        ram.write(AT, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        ram
    }

    fn bytes(ram: &GuestRam) -> [u8; 8] {
        let mut bytes = [0; 8];
        ram.read(AT, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_inserted_breakpoint_is_in_memory_but_hidden_and_gone_once_removed() {
        let (ram, mut inserted) = (ram(), SoftwareBreakpoints::default());
        inserted.insert(&ram, AT + 2).unwrap();
        inserted.insert(&ram, AT + 2).unwrap();
        assert!(inserted.has(AT + 2) && !inserted.has(AT));
        assert_eq!(bytes(&ram), [1, 2, 0x02, 0x90, 5, 6, 7, 8]);
        for (from, to) in [(0, 8), (2, 4), (3, 4), (0, 3), (3, 8), (4, 8), (0, 2)] {
            let mut seen = bytes(&ram)[from..to].to_vec();
            inserted.hide(AT + from as u64, &mut seen);
            assert_eq!(seen, [1, 2, 3, 4, 5, 6, 7, 8][from..to], "{from}..{to}");
        }
        inserted.remove(&ram, AT + 2);
        inserted.remove(&ram, AT + 2);
        assert_eq!(bytes(&ram), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn bytes_written_over_a_breakpoint_are_those_that_are_restored() {
        let (ram, mut inserted) = (ram(), SoftwareBreakpoints::default());
        inserted.insert(&ram, AT).unwrap();
        inserted.insert(&ram, AT + 4).unwrap();
        inserted.write(&ram, AT + 1, &[9; 4]).unwrap();
        assert_eq!(bytes(&ram), [0x02, 0x90, 9, 9, 0x02, 0x90, 7, 8]);
        inserted.remove_all(&ram);
        assert_eq!(bytes(&ram), [1, 9, 9, 9, 9, 6, 7, 8]);
    }

    #[test]
    fn bytes_that_the_guest_writes_over_a_breakpoint_stay() {
        let (ram, mut inserted) = (ram(), SoftwareBreakpoints::default());
        inserted.insert(&ram, AT).unwrap();
        ram.write(AT, &[7, 7]).unwrap();
        let mut seen = bytes(&ram);
        inserted.hide(AT, &mut seen);
        assert_eq!(seen[..2], [7, 7]);
        inserted.remove_all(&ram);
        assert_eq!(bytes(&ram)[..2], [7, 7]);
    }

    #[test]
    fn outside_of_memory_no_breakpoint_is_inserted() {
        let (ram, mut inserted) = (ram(), SoftwareBreakpoints::default());
        assert_eq!(inserted.insert(&ram, RAM.end() - 1), Err(RamError::NotRam));
        assert_eq!(inserted.insert(&ram, u64::MAX), Err(RamError::NotRam));
        assert!(!inserted.has(RAM.end() - 1));
        let mut last = [1];
        inserted.hide(u64::MAX, &mut last);
        assert_eq!(last, [1]);
    }
}
