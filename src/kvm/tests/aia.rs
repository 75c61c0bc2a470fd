//! Interrupt controllers and lines, on hosts with AIA and without.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::asm::*;
use super::*;
use crate::config::{IrqchipChoice, KnobChange};
use crate::kvm::isa::sbi_number;
use crate::kvm::regs::sbi_extension;
use crate::layout::Span;
use crate::machine::vm::{AiaFacts, AiaPlan, Irqchip};

const APLIC: u32 = 0x0d00_0000;
const IMSICS: u64 = 0x2800_0000;

fn plan(harts: u32) -> AiaPlan {
    AiaPlan {
        harts,
        sources: 95,
        aplic: Span { base: APLIC.into(), size: 0x4000 },
        imsics: Span { base: IMSICS, size: 0x100_0000 },
    }
}

fn host_has_aia() -> bool {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap() != Irqchip::None
}

#[test]
fn the_aia_is_made_as_planned_or_refused_with_the_way_out() {
    let guest = Guest::new(&[SPIN]);
    let _harts = [guest.hart(0), guest.hart(1), guest.hart(2)];
    match guest.vm.create_irqchip(IrqchipChoice::Aia, &plan(3)) {
        Ok(Irqchip::Aia(facts)) => {
            assert!(host_has_aia());
            let AiaFacts { sources, ids, hart_index_bits, guest_index_bits } = facts;
            assert_eq!((sources, hart_index_bits, guest_index_bits), (95, 2, 0));
            assert!(ids >= sources && ids % 64 == 63, "{ids}");
            assert!(guest.vm.irq_line(95).is_ok());
            for none in [0, 96, u32::MAX] {
                assert!(guest.vm.irq_line(none).is_err(), "{none}");
            }
            assert!(guest.vm.external_line(0).is_err());
        }
        Err(error) => {
            assert!(!host_has_aia());
            assert!(error.to_string().contains("--irqchip plic"), "{error}");
        }
        Ok(Irqchip::None) => panic!("a choice that was forced is not met"),
    }
}

#[test]
fn a_plic_machine_gets_lines_to_its_harts_on_every_host() {
    let guest = Guest::new(&[SPIN]);
    let _harts = [guest.hart(0), guest.hart(1)];
    let irqchip = guest.vm.create_irqchip(IrqchipChoice::Plic, &plan(2)).unwrap();
    assert_eq!(irqchip, Irqchip::None);
    assert!(guest.vm.external_line(1).is_ok());
    assert!(guest.vm.external_line(2).is_err());
    assert!(guest.vm.irq_line(1).is_err());
    // A guest without the controller is not shown its CSRs either.
    assert!(!guest.vm.cpu_facts().unwrap().extensions.contains(&"ssaia".into()));
}

#[test]
fn a_guest_with_aia_is_shown_ssaia() {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    let irqchip = guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
    let shown = guest.vm.cpu_facts().unwrap().extensions.contains(&"ssaia".into());
    assert_eq!(shown, irqchip != Irqchip::None);
}

#[test]
fn a_guest_whose_ssaia_is_switched_off_gets_a_plic() {
    let isa = vec![KnobChange { name: "ssaia".into(), on: false }];
    let knobs = CpuKnobs { isa, ..CpuKnobs::default() };
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart_with(0, &knobs);
    let auto = guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
    assert_eq!(auto, Irqchip::None);
    assert!(guest.vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).is_err());
}

#[test]
fn harts_and_irqchip_are_made_in_their_order() {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(4);
    assert!(guest.vm.create_hart(4, &CpuKnobs::default()).is_err());
    assert!(guest.vm.create_hart(3, &CpuKnobs::default()).is_err());
    if host_has_aia() {
        assert!(guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(2)).is_err());
        assert!(guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).is_ok());
        assert!(guest.vm.create_hart(5, &CpuKnobs::default()).is_err());
    }
}

/// Sets the trap's target to `at` words behind the first of its three instructions.
fn trap_to(at: u32) -> [u32; 3] {
    [here(T1), addi(T1, T1, 4 * at), csrw(STVEC, T1)]
}

#[test]
fn an_external_interrupt_reaches_a_hart_that_waits_and_goes_when_the_line_does() {
    // Enables SEIE and SIE and waits; the trap calls with scause, then with sip after the call.
    let seie = 0x200;
    let code = [
        &trap_to(10)[..],
        &li(T0, seie),
        &[csrw(SIE, T0), addi(T0, ZERO, 2), csrs(SSTATUS, T0), WFI, SPIN],
        &li(A7, 0x0900_0000),
        &[csrr(A0, 0x142), ECALL, csrr(A0, 0x144), ECALL],
    ];
    let guest = Guest::new(&code.concat());
    let mut hart = guest.hart(0);
    guest.vm.create_irqchip(IrqchipChoice::Plic, &plan(1)).unwrap();
    let line = guest.vm.external_line(0).unwrap();
    let raise = std::thread::spawn({
        let line = Arc::clone(&line);
        move || line.set_level(true)
    });
    let (_, args) = called(hart.as_mut(), [0; 2]);
    raise.join().unwrap();
    assert_eq!(args[0], 1 << 63 | 9);
    line.set_level(false);
    let (_, args) = called(hart.as_mut(), [0; 2]);
    assert_eq!(args[0] & seie as u64, 0, "sip {:#x}", args[0]);
}

/// A guest that wires source 7 of this mode (AIA 4.5.2) to identity 5 of its hart, calls, and waits. The interrupt calls with stopei, then
/// with in_clrip, the levels of sources 0 to 31.
fn wired(mode: u32) -> Vec<u32> {
    let (siselect, sireg, stopei) = (0x150, 0x151, 0x15c);
    let select = |reg: u32, value: u32| {
        [&li(T0, reg)[..], &[csrw(siselect, T0)], &li(T0, value), &[csrw(sireg, T0)]].concat()
    };
    let write = |offset: u32, value: u32| {
        [&li(T0, APLIC + offset)[..], &li(T1, value), &[store(2, T1, T0, 0)]].concat()
    };
    // The IMSIC: delivery on, no threshold, identity 5 enabled. The APLIC: source 7 to hart 0 as identity 5.
    let setup = [
        select(0x70, 1),
        select(0x72, 0),
        select(0xc0, 1 << 5),
        write(0x0004 + 4 * 6, mode),
        write(0x3004 + 4 * 6, 5),
        write(0x1edc, 7),
        write(0, 0x100),
    ];
    let code = [
        &setup.concat()[..],
        &li(A7, 0x0900_0000),
        &[ECALL],
        &trap_to(10),
        &li(T0, 0x200),
        &[csrw(SIE, T0), addi(T0, ZERO, 2), csrs(SSTATUS, T0), WFI, SPIN],
        &li(A7, 0x0900_0000),
        &[csrr(A0, stopei), ECALL],
        &li(T0, APLIC + 0x1d00),
        &[load(2, A0, T0, 0), ECALL],
    ];
    code.concat()
}

const LEVEL_HIGH: u32 = 6;

#[test]
fn a_wired_source_reaches_its_hart_through_aplic_and_imsic() {
    if !host_has_aia() {
        eprintln!("skipped: this host has no AIA");
        return;
    }
    let guest = Guest::new(&wired(LEVEL_HIGH));
    let mut hart = guest.hart(0);
    guest.vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).unwrap();
    let line = guest.vm.irq_line(7).unwrap();
    // KVM forgets a level that rises before the source is configured.
    called(hart.as_mut(), [0; 2]);
    let raise = std::thread::spawn(move || line.set_level(true));
    let (_, args) = called(hart.as_mut(), [0; 2]);
    raise.join().unwrap();
    assert_eq!(args[0] >> 16, 5);
    let levels = in_clrip(hart.as_mut());
    assert_eq!(levels, 1 << 7, "the line is high until its device lowers it");
}

/// What the APLIC says of its lines, which the guest asks by a load.
fn in_clrip(hart: &mut dyn Hart) -> u64 {
    called(hart, [0; 2]).1[0] & 0xffff_ffff
}

#[test]
fn without_an_aia_an_event_descriptor_takes_interrupts_and_loses_them() {
    if host_has_aia() {
        eprintln!("skipped: this host has an AIA");
        return;
    }
    let vm = open().unwrap().new_vm().unwrap();
    let _hart = vm.create_hart(0, &CpuKnobs::default()).unwrap();
    assert_eq!(vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap(), Irqchip::None);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.fd().register_irqfd(&event, 7).unwrap();
    event.write(1).unwrap();
    assert!(event.read().is_err(), "the kernel has taken it, and there is nobody to interrupt");
}

/// Whether `susp` is on in the only hart of a machine with `sbi` as knobs, once `choice` is met; `None` without SUSP.
fn suspend_is_on(choice: IrqchipChoice, sbi: &[KnobChange]) -> Option<bool> {
    let vm = open().unwrap().new_vm().unwrap();
    let knobs = CpuKnobs { sbi: sbi.to_vec(), ..CpuKnobs::default() };
    let _hart = vm.create_hart(0, &knobs).ok()?;
    vm.create_irqchip(choice, &plan(1)).unwrap();
    let number = sbi_number("susp").unwrap();
    let value = vm.first_vcpu().unwrap().reg(sbi_extension(number));
    value.ok().map(|value| value != 0)
}

#[test]
fn system_suspend_is_offered_where_a_guest_wakes_from_it() {
    let Some(on) = suspend_is_on(IrqchipChoice::Plic, &[]) else {
        eprintln!("skipped: this host's kernel has no SUSP (Linux 6.14 has)");
        return;
    };
    assert!(on);
    let asked = [KnobChange { name: "susp".into(), on: true }];
    if host_has_aia() {
        assert_eq!(suspend_is_on(IrqchipChoice::Aia, &[]), Some(false));
        assert_eq!(suspend_is_on(IrqchipChoice::Aia, &asked), Some(true));
    }
}
