//! The memory slots of a VM, and the log of the pages that the guest writes (kernel, `Documentation/virt/kvm/api.rst` 4.8 and 4.35).
#![expect(unsafe_code, reason = "guest memory is passed to the kernel by address")]

use std::collections::BTreeMap;
use std::io;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::system::uname;

use super::release::{Version, is_at_least};

/// The first kernel that splits a huge page when the guest writes to it under logging (`arch/riscv/kvm/gstage.c`): in older ones such a
/// store fails KVM_RUN with EEXIST if the page was mapped before logging was switched on.
const SPLITS_HUGE_PAGES: Version = (7, 1);

/// The memory slots that a VM has, by number.
#[derive(Default)]
pub(super) struct Slots(BTreeMap<u32, Slot>);

#[derive(Clone)]
struct Slot {
    region: kvm_userspace_memory_region,
    /// Pages that were written before a reset and not reported yet; empty without any.
    earlier: Vec<u64>,
}

impl Slot {
    fn is_logged(&self) -> bool {
        self.region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0
    }

    fn log(&self, vm: &VmFd) -> io::Result<Vec<u64>> {
        let size = usize::try_from(self.region.memory_size)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut pages = vm.get_dirty_log(self.region.slot, size).map_err(io::Error::from)?;
        for (word, earlier) in pages.iter_mut().zip(&self.earlier) {
            *word |= earlier;
        }
        Ok(pages)
    }
}

impl Slots {
    /// Maps memory of this process into the guest. It stays mapped as long as the VM exists.
    pub(super) fn map(&mut self, vm: &VmFd, region: kvm_userspace_memory_region) -> io::Result<()> {
        set(vm, region)?;
        self.0.insert(region.slot, Slot { region, earlier: Vec::new() });
        Ok(())
    }

    /// Switches the log of a slot on or off, while no hart runs.
    pub(super) fn log_dirty(&mut self, vm: &VmFd, number: u32, on: bool) -> io::Result<()> {
        let slot = self.0.get_mut(&number).ok_or(io::ErrorKind::NotFound)?;
        if slot.is_logged() == on {
            return Ok(());
        }
        let mut region = slot.region;
        region.flags ^= KVM_MEM_LOG_DIRTY_PAGES;
        // Without the flag the second stage would keep its small pages.
        if !on || !is_at_least(&uname().release().to_string_lossy(), SPLITS_HUGE_PAGES) {
            set(vm, kvm_userspace_memory_region { memory_size: 0, flags: 0, ..region })?;
        }
        set(vm, region)?;
        *slot = Slot { region, earlier: Vec::new() };
        Ok(())
    }

    /// The pages of a slot that were written since the last call.
    pub(super) fn dirty_pages(&mut self, vm: &VmFd, number: u32) -> io::Result<Vec<u64>> {
        let slot = self.0.get_mut(&number).filter(|slot| slot.is_logged());
        let slot = slot.ok_or(io::ErrorKind::NotFound)?;
        let pages = slot.log(vm)?;
        slot.earlier.clear();
        Ok(pages)
    }

    /// Keeps the logs of `vm`, which is about to end.
    pub(super) fn keep_logs(&mut self, vm: &VmFd) -> io::Result<()> {
        for slot in self.0.values_mut().filter(|slot| slot.is_logged()) {
            slot.earlier = slot.log(vm)?;
        }
        Ok(())
    }

    /// Maps all slots into a new VM.
    pub(super) fn map_again(&self, vm: &VmFd) -> io::Result<()> {
        self.0.values().try_for_each(|slot| set(vm, slot.region))
    }
}

fn set(vm: &VmFd, region: kvm_userspace_memory_region) -> io::Result<()> {
    // SAFETY: the caller of `map` keeps the memory mapped as long as the VM exists; the kernel checks that the range lies in this
    // process's address space and overlaps no other slot.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}
