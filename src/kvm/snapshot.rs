//! Rules for the registers of a saved hart: which are saved, which are only compared, and in which order the others are written.
//!
//! The registers are those that the kernel lists, so that a newer one's are saved, too. Pure data: compiled and tested on every host.

use super::isa::{ISA_EXTENSIONS, SBI_EXTENSIONS};
use super::regs::{
    self, CONFIG, FP_D, FP_F, ISA, SBI, STEAL_HIGH, STEAL_LOW, TIMEBASE, TIMER, TIMER_COMPARE,
    TIMER_STATE, VLENB, index_of, type_of,
};
use crate::hypervisor::{Register, RegisterValue};
use crate::riscv::trap::interrupt;

/// Names of the configuration registers, by index.
const CONFIG_NAMES: [&str; 8] = [
    "misa",
    "zicbom block size",
    "mvendorid",
    "marchid",
    "mimpid",
    "zicboz block size",
    "satp mode",
    "zicbop block size",
];

/// The registers of a hart that are saved, of those that the kernel lists. `time` is the VM's. Where there are registers of D, those
/// of F are halves of them, and writing them back would destroy others.
pub(super) fn saved(listed: &[u64]) -> Vec<u64> {
    let has_d = listed.iter().any(|id| type_of(*id) == FP_D);
    let is_saved = |id: &u64| *id != regs::TIME && !(has_d && type_of(*id) == FP_F);
    listed.iter().copied().filter(is_saved).collect()
}

/// True for a register that describes the hart and does not change while it runs.
fn is_fixed(id: u64) -> bool {
    matches!(type_of(id), CONFIG | ISA | SBI) || id == TIMEBASE || id == VLENB
}

/// The differences between a saved hart and an existing one that keep the first from being restored into the second; empty without any.
///
/// An extension that is off is as one that the kernel does not have. One that only the existing hart has is no obstacle: a guest that
/// was started without it does not use it. But for Sstc: a guest without it sets its timer through SBI, and every kernel up to 7.3 that
/// has Sstc loses that if the hart's thread is preempted right after the call. Linux hangs within seconds then.
pub(super) fn differences(saved: &[Register], existing: &[Register]) -> Vec<String> {
    let mut found = Vec::new();
    let has_sstc = |hart: &[Register]| {
        hart.contains(&Register { id: regs::SSTC, value: RegisterValue::Word(1) })
    };
    if has_sstc(existing) && !has_sstc(saved) {
        found
            .push("without Sstc, which is here (KVM would lose timers that the guest sets)".into());
    }
    for Register { id, value } in saved {
        let here = existing.iter().find(|register| register.id == *id).map(|found| &found.value);
        let is_off = matches!(value, RegisterValue::Word(0)) && is_fixed(*id);
        match here {
            None if is_off => {}
            None => found.push(format!("{} ({}, here missing)", name(*id), shown(value))),
            Some(here) if is_fixed(*id) && here != value => {
                found.push(format!("{} ({}, here {})", name(*id), shown(value), shown(here)));
            }
            Some(_) => {}
        }
    }
    found
}

/// The registers to write into a new hart, in this order. `sip` comes before anything that raises an interrupt, since writing it drops
/// interrupts that the kernel has queued.
pub(super) fn writes(saved: &[Register], has_sstc: bool) -> Vec<&Register> {
    let is_timer = |id: u64| type_of(id) == TIMER;
    let mut writes: Vec<&Register> =
        saved.iter().filter(|register| !is_fixed(register.id) && !is_timer(register.id)).collect();
    // The kernel lists the types in the right order. But Linux 7.2 and 7.3 switch steal time off where the upper half of its address is
    // written as 0 after the lower one.
    writes.sort_by_key(|register| match register.id {
        STEAL_HIGH => (type_of(STEAL_LOW), 0),
        id => (type_of(id), 1),
    });
    let timer = |id| saved.iter().find(|register| register.id == id);
    let compare = timer(TIMER_COMPARE);
    writes.extend(compare);
    // With Sstc the comparator is the whole timer, and the state refuses the value 0 everywhere.
    let armed = |state: &&Register| !has_sstc && state.value == RegisterValue::Word(1);
    if let Some(state) = timer(TIMER_STATE).filter(armed) {
        // Linux 6.12 replaces `compare` with 1: the guest gets one interrupt too early.
        writes.push(state);
        writes.extend(compare);
    }
    writes
}

/// True if a software interrupt is pending.
pub(super) fn has_software_interrupt(saved: &[Register]) -> bool {
    let sip = saved.iter().find(|register| register.id == regs::SIP).map(|found| &found.value);
    matches!(sip, Some(RegisterValue::Word(sip)) if sip & interrupt::SSI != 0)
}

/// The name of a register in messages.
pub(super) fn name(id: u64) -> String {
    let of = |table: &[&str]| {
        usize::try_from(index_of(id))
            .ok()
            .and_then(|index| table.get(index))
            .map(|name| (*name).to_owned())
    };
    let known = match type_of(id) {
        CONFIG => of(&CONFIG_NAMES),
        ISA => of(ISA_EXTENSIONS).map(|name| format!("ISA extension {name}")),
        SBI => of(SBI_EXTENSIONS).map(|name| format!("SBI extension {name}")),
        _ if id == TIMEBASE => Some("timebase frequency".into()),
        _ if id == VLENB => Some("vlenb".into()),
        _ => None,
    };
    known.unwrap_or_else(|| format!("register {id:#x}"))
}

fn shown(value: &RegisterValue) -> String {
    match value {
        RegisterValue::Word(word) => format!("{word:#x}"),
        RegisterValue::Bytes(bytes) => format!("{} bytes", bytes.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::regs::{PC, SIP, SSTC, isa_extension, sbi_extension};

    fn register(id: u64, value: u64) -> Register {
        Register { id, value: RegisterValue::Word(value) }
    }

    #[test]
    fn halves_of_other_registers_and_the_common_time_are_not_saved() {
        let (f0, d0) = (0x8020_0000_0500_0000, 0x8030_0000_0600_0000);
        assert_eq!(saved(&[PC, regs::TIME, f0, d0]), [PC, d0]);
        assert_eq!(saved(&[PC, f0]), [PC, f0]);
    }

    #[test]
    fn a_hart_that_differs_is_refused_by_name() {
        let saved = [
            register(0x8030_0000_0100_0002, 0x489),
            register(PC, 1),
            register(TIMEBASE, 10_000_000),
            register(isa_extension(13), 1),
            register(isa_extension(15), 0),
            register(sbi_extension(11), 1),
            register(VLENB, 16),
        ];
        assert_eq!(differences(&saved, &saved), Vec::<String>::new());
        let mut here = saved.to_vec();
        here[1].value = RegisterValue::Word(2);
        assert_eq!(
            differences(&saved, &here),
            Vec::<String>::new(),
            "a program counter may differ"
        );
        here.retain(|register| register.id != isa_extension(15));
        here.push(register(isa_extension(66), 1));
        assert_eq!(differences(&saved, &here), Vec::<String>::new(), "off is as absent");
        for register in &mut here {
            register.value = RegisterValue::Word(7);
        }
        let named = differences(&saved, &here).join("; ");
        for name in [
            "mvendorid (0x489, here 0x7)",
            "timebase frequency (0x989680, here 0x7)",
            "ISA extension zbb (0x1, here 0x7)",
            "SBI extension susp",
            "vlenb",
        ] {
            assert!(named.contains(name), "{named}");
        }
        let named = differences(&saved, &[]).join("; ");
        assert!(named.contains("register 0x8030000002000000 (0x1, here missing)"), "{named}");
    }

    #[test]
    fn an_extension_that_is_off_is_restored_only_into_a_hart_where_it_is_off() {
        let saved = [register(isa_extension(15), 0)];
        assert_eq!(differences(&saved, &[register(isa_extension(15), 1)]).len(), 1);
    }

    #[test]
    fn a_guest_without_sstc_is_refused_where_the_kernel_would_lose_its_timers() {
        let (with, without) = ([register(SSTC, 1)], [register(PC, 0)]);
        let here = |hart: &[Register]| [hart, &[register(PC, 0)]].concat();
        assert_eq!(differences(&with, &here(&with)), [""; 0]);
        assert_eq!(differences(&without, &here(&[])), [""; 0]);
        let missing = differences(&with, &here(&[]));
        assert!(missing.len() == 1 && missing[0].contains("sstc"), "{missing:?}");
        let [only] = &differences(&without, &here(&with))[..] else { panic!("no refusal") };
        assert!(only.starts_with("without Sstc") && only.contains("lose timers"), "{only}");
    }

    #[test]
    fn registers_are_written_in_the_order_that_the_kernel_needs() {
        let saved = [
            register(TIMEBASE, 1),
            register(PC, 1),
            register(SIP, 2),
            register(TIMER_COMPARE, 9),
            register(TIMER_STATE, 1),
            register(isa_extension(13), 1),
            register(STEAL_LOW, 64),
            register(STEAL_HIGH, 0),
        ];
        let ids = |has_sstc| writes(&saved, has_sstc).iter().map(|r| r.id).collect::<Vec<_>>();
        assert_eq!(ids(true), [PC, SIP, STEAL_HIGH, STEAL_LOW, TIMER_COMPARE]);
        let [.., compare, state, again] = ids(false)[..] else { panic!("too few") };
        assert_eq!([compare, state, again], [TIMER_COMPARE, TIMER_STATE, TIMER_COMPARE]);
        let idle = [register(TIMER_COMPARE, u64::MAX), register(TIMER_STATE, 0)];
        assert_eq!(writes(&idle, false).len(), 1);
    }
}
