//! Resets, and the dirty log.

use rvmm_devices::IoEvent;
use rvmm_devices::irq::IrqLine;
use rvmm_devices::testing::skip;
use vm_memory::{GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::aia::{LEVEL_HIGH, host_has_aia, plan, trap_to, wired};
use super::asm::*;
use super::*;
use crate::config::IrqchipChoice;
use crate::hypervisor::Irqchip;
use crate::riscv::sbi::eid;
use crate::vcpu::exit::SystemEvent;

/// `a7`, `a0`, `a1` and `ecall` of a shutdown by SBI SRST.
fn shutdown() -> Vec<u32> {
    let srst = u32::try_from(eid::SRST).unwrap();
    [&li(A7, srst)[..], &[addi(A0, ZERO, 0), addi(A1, ZERO, 1), addi(A6, ZERO, 0), ECALL]].concat()
}

fn shuts_down(hart: &mut dyn Hart) {
    let exit = hart.enter().unwrap();
    assert!(matches!(exit, Exit::System(SystemEvent::Shutdown(1))), "{exit:?}");
}

#[test]
fn a_machine_that_is_reset_is_as_a_new_one_and_runs_again_from_the_same_memory() {
    let guest = Guest::new(&shutdown());
    let fresh = Guest::new(&[SPIN]);
    let _fresh_hart = fresh.hart(0);
    fresh.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
    let expected = fresh.vm.save().unwrap();
    for _ in 0..3 {
        let mut hart = guest.hart(0);
        guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
        let mut found = guest.vm.save().unwrap();
        hart.set(Reg::Pc, 0).unwrap();
        found.harts = guest.vm.save().unwrap().harts;
        let mut expected = expected.clone();
        for hart in &mut expected.harts {
            let pc = hart.registers.iter_mut().find(|register| register.id == crate::kvm::regs::PC);
            pc.unwrap().value = crate::hypervisor::RegisterValue::Word(0);
        }
        assert_eq!((found.harts, found.irqchip), (expected.harts, expected.irqchip));
        assert!(found.time < 1 << 40, "{:#x}", found.time);
        hart.set(Reg::Pc, BASE).unwrap();
        hart.set(Reg::Time, 1 << 50).unwrap();
        hart.set(Reg::X(20), 20).unwrap();
        shuts_down(hart.as_mut());
        drop(hart);
        guest.vm.reset().unwrap();
        assert!(guest.vm.save().is_err(), "it has no hart");
    }
}

#[test]
fn a_machine_with_a_hart_is_not_reset() {
    let guest = Guest::new(&shutdown());
    let hart = guest.hart(0);
    let error = guest.vm.reset().unwrap_err().to_string();
    assert!(error.contains("Hart 0 is still in use"), "{error}");
    drop(hart);
    guest.vm.reset().unwrap();
    let mut hart = guest.hart(0);
    let kick = hart.bind().unwrap();
    kick.kick();
    assert!(matches!(hart.enter().unwrap(), Exit::Interrupted));
    shuts_down(hart.as_mut());
    drop(hart);
    guest.vm.reset().unwrap();
}

#[test]
fn an_ioevent_and_the_width_of_addresses_survive_resets() {
    let code = [
        &li(T0, u32::try_from(HOLE).unwrap())[..],
        &[addi(T1, ZERO, 1), store(2, T1, T0, 0x50)],
        &shutdown(),
    ]
    .concat();
    let vm = open().unwrap().create_vm().unwrap();
    vm.limit_addresses((1 << 41) - 0x1000);
    let bits = vm.address_bits();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(BASE), 0x1000)]).unwrap();
    let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(BASE)).unwrap();
    let host = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
    vm.map_rom(0, BASE, host, 0x1000).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.register_ioeventfd(HOLE, IoEvent { offset: 0x50, value: 1, event: &event }).unwrap();
    for _ in 0..3 {
        assert_eq!(vm.address_bits(), bits);
        let mut hart = vm.create_hart(0, &CpuSettings::default()).unwrap();
        hart.set(Reg::Pc, BASE).unwrap();
        shuts_down(hart.as_mut());
        assert_eq!(event.read().unwrap(), 1);
        drop(hart);
        vm.reset().unwrap();
    }
}

/// A hart whose guest has wired source 7 and waits.
fn wired_hart(guest: &Guest) -> Box<dyn Hart> {
    let mut hart = guest.hart(0);
    let irqchip = guest.vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).unwrap();
    assert_ne!(irqchip, Irqchip::None);
    called(hart.as_mut(), [0; 2]);
    hart
}

/// The identity that the guest claims, 0 for none, and true if it finds source 7 high.
fn claim(hart: &mut dyn Hart) -> (u64, bool) {
    let (_, args) = called(hart, [0; 2]);
    (args[0] >> 16, args[1] & 1 << 7 != 0)
}

#[test]
fn a_line_and_its_event_raise_interrupts_after_resets() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let guest = Guest::new(&wired(LEVEL_HIGH));
    let mut hart = wired_hart(&guest);
    let line = guest.vm.irq_line(7).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    assert!(line.attach_irqfd(&event));
    for round in 0..3 {
        line.set_level(true);
        assert_eq!(claim(hart.as_mut()), (5, true), "round {round}");
        line.set_level(false);
        assert_eq!(claim(hart.as_mut()), (0, false), "round {round}");
        event.write(1).unwrap();
        while claim(hart.as_mut()).0 != 5 {}
        drop(hart);
        guest.vm.reset().unwrap();
        hart = wired_hart(&guest);
    }
}

#[test]
fn a_line_keeps_its_level_over_a_reset() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let guest = Guest::new(&wired(LEVEL_HIGH));
    let hart = wired_hart(&guest);
    let line = guest.vm.irq_line(7).unwrap();
    drop(hart);
    guest.vm.reset().unwrap();
    // It leads nowhere now.
    line.set_level(true);
    let mut hart = wired_hart(&guest);
    let read = |hart: &mut dyn Hart| {
        hart.settle().unwrap();
        guest.vm.save().unwrap().irqchip.unwrap().aplic.sources[0].high
    };
    assert!(read(hart.as_mut()));
    line.set_level(false);
    assert!(!read(hart.as_mut()));
}

#[test]
fn an_external_line_leads_to_the_hart_that_exists_after_a_reset() {
    let code = [
        &trap_to(10)[..],
        &li(T0, 0x200),
        &[csrw(SIE, T0), addi(T0, ZERO, 2), csrs(SSTATUS, T0), WFI, SPIN],
        &li(A7, 0x0900_0000),
        &[csrr(A0, SCAUSE), ECALL],
        &shutdown(),
    ];
    let guest = Guest::new(&code.concat());
    let start = || {
        let hart = guest.hart(0);
        guest.vm.create_irqchip(IrqchipChoice::Plic, &plan(1)).unwrap();
        hart
    };
    let mut hart = start();
    let line: Arc<dyn IrqLine> = guest.vm.external_line(0).unwrap();
    for high_before in [false, true, false] {
        line.set_level(true);
        assert_eq!(called(hart.as_mut(), [0; 2]).1[0], 1 << 63 | 9);
        shuts_down(hart.as_mut());
        drop(hart);
        guest.vm.reset().unwrap();
        line.set_level(high_before);
        hart = start();
    }
}

/// A guest that stores to pages 3 and 5, calls, stores to pages 5 and 7, and calls twice.
fn writer() -> Vec<u32> {
    let add_t0_t1 = 0x0062_82b3;
    let write = |page: u32| [lui(T0, page), add_t0_t1, store(3, A0, T0, 8)];
    let call = [&li(A7, 0x0900_0000)[..], &[ECALL]].concat();
    [
        &[here(T1)][..],
        &write(3),
        &write(5),
        &call,
        &write(7),
        &write(5),
        &call,
        &call,
        // An endless loop of the whole.
        &[jump_back(22)],
    ]
    .concat()
}

/// Switches the log on in the middle of a run and compares it with the writes.
fn log_of(vm: &dyn Vm, hart: &mut dyn Hart) {
    let pages = |hart: &mut dyn Hart| {
        hart.settle().unwrap();
        let words = vm.dirty_pages(0).unwrap();
        assert!(words[1..].iter().all(|word| *word == 0), "{words:x?}");
        words[0]
    };
    for _ in 0..3 {
        called(hart, [0; 2]);
    }
    hart.settle().unwrap();
    assert!(vm.dirty_pages(0).is_err());
    vm.log_dirty(0, true).unwrap();
    vm.log_dirty(0, true).unwrap();
    assert_eq!(pages(hart), 0);
    for _ in 0..2 {
        called(hart, [0; 2]);
        assert_eq!(pages(hart), 1 << 3 | 1 << 5);
        called(hart, [0; 2]);
        assert_eq!(pages(hart), 1 << 5 | 1 << 7);
        called(hart, [0; 2]);
        assert_eq!(pages(hart), 0);
    }
    vm.log_dirty(0, false).unwrap();
    assert!(vm.dirty_pages(0).is_err());
    called(hart, [0; 2]);
    hart.settle().unwrap();
    vm.log_dirty(0, true).unwrap();
    assert_eq!(pages(hart), 0, "the log starts anew");
}

#[test]
fn the_log_has_the_pages_that_the_guest_has_written_and_no_other() {
    let guest = Guest::new(&writer());
    let mut hart = guest.hart(0);
    log_of(guest.vm.as_ref(), hart.as_mut());
    assert!(guest.vm.log_dirty(1, true).is_err() && guest.vm.dirty_pages(1).is_err());
}

/// Linux 6.12 fails a store to a huge page that was mapped before the log was switched on.
#[test]
fn the_log_has_the_small_pages_that_the_guest_has_written_in_a_huge_one() {
    const SIZE: usize = 2 << 20;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let region = MmapRegion::<()>::build(None, SIZE, libc::PROT_READ | libc::PROT_WRITE, flags);
    let Ok(region) = region else { return skip("this host has no free huge page") };
    let region = GuestRegionMmap::new(region, GuestAddress(BASE)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let bytes: Vec<u8> = writer().iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(BASE)).unwrap();
    let vm = open().unwrap().create_vm().unwrap();
    let host = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
    vm.map_memory(0, BASE, host, SIZE as u64).unwrap();
    let mut hart = vm.create_hart(0, &CpuSettings::default()).unwrap();
    hart.set(Reg::Pc, BASE).unwrap();
    log_of(vm.as_ref(), hart.as_mut());
}

#[test]
fn pages_that_were_written_before_a_reset_are_reported_after_it() {
    let guest = Guest::new(&writer());
    let mut hart = guest.hart(0);
    guest.vm.log_dirty(0, true).unwrap();
    called(hart.as_mut(), [0; 2]);
    drop(hart);
    guest.vm.reset().unwrap();
    guest.vm.reset().unwrap();
    assert_eq!(guest.vm.dirty_pages(0).unwrap(), [1 << 3 | 1 << 5]);
    let mut hart = guest.hart(0);
    called(hart.as_mut(), [0; 2]);
    hart.settle().unwrap();
    assert_eq!(guest.vm.dirty_pages(0).unwrap(), [1 << 3 | 1 << 5], "the log is still on");
    assert_eq!(guest.vm.dirty_pages(0).unwrap(), [0]);
}
