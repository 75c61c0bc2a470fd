//! A page table walk as text, a line for each step.

use std::fmt::Write;

use crate::inspect::{Walk, WalkTarget};

/// The walk as text.
pub(super) fn text(walk: &Walk) -> String {
    let mut out = String::new();
    let root = (walk.satp & ((1 << 44) - 1)) << 12;
    // Writing into a String cannot fail: results are dropped.
    let _ = writeln!(out, "hart {}: {:#018x}\n", walk.hart, walk.address);
    let _ = writeln!(out, "First stage (VS), the guest's page tables");
    let _ = write!(out, "  satp {:#018x}: {}", walk.satp, walk.mode);
    let _ = match walk.mode.as_str() {
        "bare" => writeln!(out, ", addresses are guest-physical as they are"),
        _ => writeln!(out, ", address space {}, root at {root:#x}", walk.satp >> 44 & 0xffff),
    };
    for step in &walk.steps {
        let next = (step.entry >> 10 & ((1 << 44) - 1)) << 12;
        let what = match (step.entry & 1, step.is_leaf) {
            (0, _) => "not valid".into(),
            (_, true) => format!("page at {next:#x}"),
            (_, false) => format!("table at {next:#x}"),
        };
        let _ = writeln!(
            out,
            "  level {}: entry at {:#012x} is {:#018x}  {:<16} {what}",
            step.level, step.addr, step.entry, step.flags
        );
    }
    match walk.physical {
        Some(physical) => {
            let _ = writeln!(out, "  guest-physical address {physical:#x}\n");
        }
        None => {
            let _ = writeln!(out, "  {}\n", walk.fault);
        }
    }
    let _ = writeln!(
        out,
        "Second stage (G), KVM's page tables: no interface shows them; this is what they map to"
    );
    if let Some(landing) = &walk.landing {
        let _ = writeln!(out, "  {}", place(landing));
    }
    if let (Some(levels), Some(accesses)) = (walk.second_levels, walk.accesses) {
        let first = walk.steps.len();
        let sum = match walk.physical {
            Some(_) => format!("({first} + 1) * ({levels} + 1) - 1"),
            None => format!("{first} * ({levels} + 1)"),
        };
        let _ = writeln!(
            out,
            "  {levels} levels: {sum} = {accesses} accesses to memory, if the hart has nothing cached and KVM maps pages of 4 KiB"
        );
    }
    out
}

fn place(landing: &WalkTarget) -> String {
    match landing {
        WalkTarget::Memory { slot, base, offset } => {
            format!("memory: slot {slot}, {offset:#x} bytes from {base:#x}")
        }
        WalkTarget::Device { name, offset, register } => {
            let register =
                register.as_ref().map_or(String::new(), |name| format!(", register {name}"));
            // The guest reads the parts of a flash that are memory slots.
            let exit = match name.starts_with("flash") {
                true => "its parts that are memory are read without an exit, every other access is an exit",
                false => "no slot, so every access is an exit to rvmm",
            };
            format!("device {name}, offset {offset:#x}{register}: {exit}")
        }
        WalkTarget::Range(name) => format!(
            "the range \"{name}\" of the memory map: the kernel's interrupt controller if the machine has it, else nothing"
        ),
        WalkTarget::Nothing => {
            "neither a slot nor a device: an access is an exit, with the effect that --unassigned sets".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::WalkStep;

    fn walk() -> Walk {
        let step = |level, addr, entry, is_leaf| WalkStep {
            level,
            addr,
            entry,
            flags: "V R W A D".into(),
            is_leaf,
        };
        Walk {
            hart: 1,
            satp: 8 << 60 | 0x80200,
            mode: "Sv39".into(),
            address: 0x1234,
            steps: vec![
                step(2, 0x8020_0000, 0x2008_0401, false),
                step(1, 0x8020_1000, 0x2000_00c7, true),
            ],
            physical: Some(0x8000_1234),
            fault: String::new(),
            landing: Some(WalkTarget::Memory { slot: 0, base: 0x8000_0000, offset: 0x1234 }),
            second_levels: Some(5),
            accesses: Some(17),
        }
    }

    #[test]
    fn every_step_is_a_line_and_the_accesses_are_counted() {
        let text = text(&walk());
        for part in [
            "hart 1: 0x0000000000001234",
            "Sv39, address space 0, root at 0x80200000",
            "level 2: entry at 0x0080200000",
            "page at 0x80000000",
            "guest-physical address 0x80001234",
            "slot 0, 0x1234 bytes from 0x80000000",
            "(2 + 1) * (5 + 1) - 1 = 17 accesses",
        ] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }

    #[test]
    fn a_walk_that_ends_early_shows_the_fault() {
        let fault =
            Walk { physical: None, fault: "page fault: so".into(), landing: None, ..walk() };
        assert!(text(&fault).contains("  page fault: so\n"));
        let bare = Walk { mode: "bare".into(), steps: Vec::new(), ..walk() };
        assert!(text(&bare).contains("guest-physical as they are"));
        for (landing, part) in [
            (
                WalkTarget::Device {
                    name: "serial".into(),
                    offset: 5,
                    register: Some("LSR".into()),
                },
                "register LSR",
            ),
            (WalkTarget::Range("imsics".into()), "imsics"),
            (WalkTarget::Nothing, "--unassigned"),
        ] {
            assert!(place(&landing).contains(part));
        }
    }
}
