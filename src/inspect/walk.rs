//! The translation of an address in both stages (Privileged specification, Hypervisor extension: Two-Stage Address Translation):
//! the guest's page tables entry by entry, and the target of the result.
//!
//! The first stage is the guest's and is in its memory, so it is read as the hart reads it. The second stage's tables are
//! KVM's and no interface shows them: of it only the memory slots are known, and the devices at other addresses.

use serde::{Deserialize, Serialize};

use crate::layout::{self, Span};
use crate::memory::{GuestRam, PAGE};
use crate::trace::DeviceMap;
use crate::vcpu::walk::{Step, WalkError, walk};

/// The memory map behind the second stage.
#[derive(Debug, Clone, Copy)]
pub struct Stages<'a> {
    /// The guest's memory: slot 0.
    pub ram: &'a GuestRam,
    /// The trap shim's page, where the guest has one: its slot and its first address.
    pub shim: Option<(u32, u64)>,
    /// The devices.
    pub places: &'a DeviceMap,
    /// Bits of a guest-physical address, where KVM reports it.
    pub address_bits: Option<u32>,
}

/// A whole walk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    /// The hart.
    pub hart: u32,
    /// Its `satp`.
    pub satp: u64,
    /// The name of its mode: `bare`, `Sv39`, `Sv48`, `Sv57`, or `reserved`.
    pub mode: String,
    /// The virtual address.
    pub address: u64,
    /// The entries that were read, from the root on.
    pub steps: Vec<WalkStep>,
    /// The guest-physical address; none where the walk ends in a fault.
    pub physical: Option<u64>,
    /// The reason of the fault; empty without one.
    pub fault: String,
    /// The target of the guest-physical address.
    pub landing: Option<WalkTarget>,
    /// Levels of the second stage, where KVM reports it.
    pub second_levels: Option<u32>,
    /// Maximum number of memory accesses of a hart that translates the address with empty caches.
    pub accesses: Option<u32>,
}

/// An entry of a page table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkStep {
    /// Its level; 0 is the last.
    pub level: u32,
    /// Its guest-physical address.
    pub addr: u64,
    /// Its value.
    pub entry: u64,
    /// Its flags: `V R W X U G A D`, and `N` and the memory type where they are set.
    pub flags: String,
    /// True if it points to a page and not to a table.
    pub is_leaf: bool,
}

/// The target of a guest-physical address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WalkTarget {
    /// Memory: an offset in a slot.
    Memory {
        /// The number of the slot.
        slot: u32,
        /// Its first address.
        base: u64,
        /// Bytes from there.
        offset: u64,
    },
    /// A device of rvmm's: an access is an exit, except for parts that the device maps as memory (flash).
    Device {
        /// The device, with its address where there are several of the kind.
        name: String,
        /// Bytes from its base.
        offset: u64,
        /// The register at this offset, for reads.
        register: Option<String>,
    },
    /// A range of the memory map where rvmm has no device: the kernel's interrupt controller, or nothing.
    Range(String),
    /// No memory, device or range.
    Nothing,
}

impl Walk {
    /// Walks `address` under the `satp` of hart `hart`.
    #[must_use]
    pub fn of(stages: Stages<'_>, hart: u32, satp: u64, address: u64) -> Self {
        let mut steps = Vec::new();
        let result = walk(stages.ram, satp, address, |step| steps.push(WalkStep::of(step)));
        let second_levels = stages.address_bits.and_then(levels);
        let first_levels = u32::try_from(steps.len()).unwrap_or(u32::MAX);
        // Each table of the first stage is at a guest-physical address, which the second stage translates, as it does the result,
        // where there is one.
        let accesses = second_levels.map(|levels| match result {
            Ok(_) => (first_levels + 1) * (levels + 1) - 1,
            Err(_) => first_levels * (levels + 1),
        });
        Self {
            hart,
            satp,
            mode: mode(satp).into(),
            address,
            physical: result.ok(),
            fault: result.err().map_or("", |error| why(error, steps.last())).into(),
            landing: result.ok().map(|physical| WalkTarget::of(stages, physical)),
            steps,
            second_levels,
            accesses,
        }
    }
}

/// Levels of the second stage: Sv39x4, Sv48x4 and Sv57x4 have two address bits more than Sv39, Sv48 and Sv57.
fn levels(address_bits: u32) -> Option<u32> {
    match address_bits {
        41 => Some(3),
        50 => Some(4),
        59 => Some(5),
        _ => None,
    }
}

fn mode(satp: u64) -> &'static str {
    match satp >> 60 {
        0 => "bare",
        8 => "Sv39",
        9 => "Sv48",
        10 => "Sv57",
        _ => "reserved",
    }
}

fn why(error: WalkError, last: Option<&WalkStep>) -> &'static str {
    match (error, last) {
        (WalkError::Access, _) => "access fault: a page table is outside memory",
        (WalkError::Lost, _) => "the memory of a page table is lost",
        (WalkError::Page, None) => {
            "page fault: the address is not canonical, or the mode is reserved"
        }
        (WalkError::Page, Some(step)) if step.entry & 1 == 0 => {
            "page fault: the entry is not valid"
        }
        (WalkError::Page, Some(step)) if step.is_leaf => {
            "page fault: the entry of a large page is not aligned, or its NAPOT pattern is reserved"
        }
        (WalkError::Page, Some(_)) => {
            "page fault: the entry has W without R, or an entry of the last table is no leaf"
        }
    }
}

impl WalkStep {
    fn of(step: Step) -> Self {
        let Step { level, addr, entry } = step;
        let set = |bit: u32| entry >> bit & 1 == 1;
        let mut flags: Vec<&str> = Vec::new();
        for (bit, name) in (0..).zip(["V", "R", "W", "X", "U", "G", "A", "D"]) {
            if set(bit) {
                flags.push(name);
            }
        }
        // Svpbmt and Svnapot.
        match entry >> 61 & 3 {
            0 => {}
            1 => flags.push("NC"),
            2 => flags.push("IO"),
            _ => flags.push("PBMT=3"),
        }
        if set(63) {
            flags.push("N");
        }
        let is_leaf = set(1) || set(3);
        Self { level, addr, entry, flags: flags.join(" "), is_leaf }
    }
}

impl WalkTarget {
    fn of(stages: Stages<'_>, physical: u64) -> Self {
        let Span { base, .. } = stages.ram.span();
        if stages.ram.contains(physical, 1) {
            return Self::Memory { slot: 0, base, offset: physical.wrapping_sub(base) };
        }
        let offset = |(slot, base): (u32, u64)| Some((slot, base, physical.checked_sub(base)?));
        let shim = stages.shim.and_then(offset).filter(|(.., offset)| *offset < PAGE);
        if let Some((slot, base, offset)) = shim {
            return Self::Memory { slot, base, offset };
        }
        if let Some((name, offset, register)) = stages.places.at(physical) {
            let register = register.map(Into::into);
            return Self::Device { name: name.into(), offset, register };
        }
        let within = |span: Span| (span.base..span.end()).contains(&physical);
        match layout::MAP.iter().find(|row| within(row.span)) {
            Some(row) => Self::Range(row.name.into()),
            None => Self::Nothing,
        }
    }
}
