//! Memory accesses through a hart's page tables, and breakpoints by virtual address.

use super::debuggee::Debuggee;
use crate::memory::PAGE;
use crate::vcpu::hart::{Csr, Reg};
use crate::vcpu::walk::translate;

impl Debuggee {
    /// Translates an address; `None` if the result is not RAM.
    pub(super) fn lookup(&self, satp: u64, va: u64, len: u64) -> Option<u64> {
        let context = self.context.as_ref()?;
        translate(&context.ram, satp, va).ok().filter(|addr| context.ram.contains(*addr, len))
    }

    fn satp(&self, hart: u32) -> Option<u64> {
        self.on(hart, |hart| hart.get(Reg::Csr(Csr::Satp)).ok()).ok().flatten()
    }

    /// Reads memory through the page tables of `hart`, ignoring permissions. Returns the number of bytes read before the first page
    /// that is not RAM.
    pub(super) fn read(&self, hart: u32, va: u64, bytes: &mut [u8]) -> Option<usize> {
        let (context, satp) = (self.context.as_ref()?, self.satp(hart)?);
        va.checked_add(bytes.len() as u64)?;
        let mut done = 0;
        for (va, range) in pages(va, bytes.len()) {
            let Some(part) = bytes.get_mut(range) else { break };
            let addr = self.lookup(satp, va, part.len() as u64);
            if addr.is_none_or(|addr| context.read(addr, part).is_err()) {
                break;
            }
            done += part.len();
        }
        (done > 0 || bytes.is_empty()).then_some(done)
    }

    /// Writes memory through the page tables of `hart`, ignoring permissions: all of it, or nothing (`None`).
    pub(super) fn write(&self, hart: u32, va: u64, bytes: &[u8]) -> Option<()> {
        let (context, satp) = (self.context.as_ref()?, self.satp(hart)?);
        va.checked_add(bytes.len() as u64)?;
        let mut parts = Vec::new();
        for (va, range) in pages(va, bytes.len()) {
            let part = bytes.get(range)?;
            parts.push((self.lookup(satp, va, part.len() as u64)?, part));
        }
        parts.into_iter().try_for_each(|(addr, part)| context.write(addr, part)).ok()
    }

    /// Sets a breakpoint at `va`, translated by the first hart whose page tables lead to RAM, beginning with that of the last stop.
    pub(super) fn set_breakpoint(&self, va: u64) -> Option<()> {
        let harts = std::iter::once(self.current).chain(self.harts());
        let mut satps = harts.filter_map(|hart| self.satp(hart));
        let addr = satps.find_map(|satp| self.lookup(satp, va, 2)).filter(|addr| addr % 2 == 0)?;
        self.context.as_ref()?.set(va, addr).ok()?.then_some(())
    }

    /// Removes a breakpoint, if it is set.
    pub(super) fn unset_breakpoint(&self, va: u64) {
        if let Some(context) = &self.context {
            context.unset(va);
        }
    }
}

/// Splits `len` bytes from `va` on, which do not wrap, at page boundaries: the address and byte range of each part.
fn pages(va: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut at = 0_usize;
    std::iter::from_fn(move || {
        let start = at;
        let va = va.checked_add(start as u64)?;
        let room = usize::try_from(PAGE - va % PAGE).ok()?;
        at = len.min(start.checked_add(room)?);
        (start < len).then_some((va, start..at))
    })
}
