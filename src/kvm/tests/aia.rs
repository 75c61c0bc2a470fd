//! Interrupt controllers and lines, on hosts with AIA and without.

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use rvmm_devices::testing::skip;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::asm::*;
use super::*;
use crate::config::{ExtensionChange, IrqchipChoice};
use crate::hypervisor::{AiaFacts, AiaPlan, Irqchip};
use crate::kvm::identities;
use crate::kvm::isa::sbi_number;
use crate::kvm::regs::sbi_extension;
use crate::kvm::report::{AiaSupport, GuestFiles};
use crate::kvm::vm::KvmVm;
use crate::layout::Span;
use crate::vcpu::hart::Csr;

pub(super) const APLIC: u32 = 0x0d00_0000;
const IMSICS: u64 = 0x2800_0000;

pub(super) fn plan(harts: u32) -> AiaPlan {
    AiaPlan {
        harts,
        sources: 95,
        identities: 31,
        aplic: Span { base: APLIC.into(), size: 0x4000 },
        imsics: Span { base: IMSICS, size: 0x100_0000 },
    }
}

pub(super) fn host_has_aia() -> bool {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap() != Irqchip::None
}

#[test]
fn the_aia_is_created_as_planned_or_refused_with_a_remedy() {
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
        Ok(Irqchip::None) => panic!("a forced choice is not met"),
    }
}

#[test]
fn a_machine_with_more_interrupts_than_an_emulated_imsic_has_gets_a_plic_unless_aia_is_forced() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let all_work = identities::all_work(&open().unwrap()).unwrap();
    for (wanted, choice, has_aia) in [
        (31, IrqchipChoice::Auto, true),
        (32, IrqchipChoice::Auto, all_work),
        (32, IrqchipChoice::Aia, true),
    ] {
        let guest = Guest::new(&[SPIN]);
        let _hart = guest.hart(0);
        let plan = AiaPlan { identities: wanted, ..plan(1) };
        let irqchip = guest.vm.create_irqchip(choice, &plan).unwrap();
        assert_eq!(irqchip != Irqchip::None, has_aia, "{wanted} {choice:?}");
    }
}

/// In a machine that runs on guest files the guest would see the files' own enable bits, all of which work.
#[test]
fn identities_are_reported_to_work_where_a_guest_can_enable_them() {
    const EIE0: u32 = 0xc0;
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let code = [&li(T0, EIE0)[..], &[csrw(SISELECT, T0)], &li(T1, 1), &[slli(T1, T1, 40)]];
    let code = [&code.concat()[..], &[csrs(SIREG, T1), csrr(A0, SIREG)], &li(A7, 0x0900_0000)];
    let code = [&code.concat()[..], &[ECALL]].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    guest.vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).unwrap();
    let enabled = called(hart.as_mut(), [0; 2]).1[0];
    let all_work = identities::all_work(&open().unwrap()).unwrap();
    let runs_on_guest_files = matches!(
        super::super::probe().unwrap().aia,
        Some(AiaSupport { guest_files: GuestFiles::Used, .. })
    );
    assert_eq!(enabled == 1 << 40, all_work || runs_on_guest_files, "{enabled:#x}");
}

#[test]
fn a_guest_that_touches_no_register_of_the_aplic_has_set_up_nothing() {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    assert_eq!(guest.vm.has_set_up_irqchip(), None);
    if guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap() != Irqchip::None {
        assert_eq!(guest.vm.has_set_up_irqchip(), Some(false));
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
    // The extension of its CSRs is hidden from a guest without the controller.
    assert!(!guest.vm.cpu_facts().unwrap().extensions.contains(&"ssaia".into()));
}

#[test]
fn ssaia_is_visible_to_a_guest_with_aia() {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(0);
    let irqchip = guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
    let shown = guest.vm.cpu_facts().unwrap().extensions.contains(&"ssaia".into());
    assert_eq!(shown, irqchip != Irqchip::None);
}

#[test]
fn csrs_of_the_aia_keep_their_values_where_there_is_one() {
    let guest = Guest::new(&[SPIN]);
    let mut hart = guest.hart(0);
    for (csr, value) in [(Csr::Siselect, 0x70), (Csr::Hviprio1, 0x0500), (Csr::Hviprio2, 0x0900)] {
        let set = hart.set(Reg::Csr(csr), value);
        assert_eq!(set.is_ok(), host_has_aia(), "{csr:?}: {set:?}");
        assert_eq!(hart.get(Reg::Csr(csr)).ok(), host_has_aia().then_some(value), "{csr:?}");
    }
}

#[test]
fn a_guest_whose_ssaia_is_switched_off_gets_a_plic() {
    let isa = vec![ExtensionChange { name: "ssaia".into(), on: false }];
    let knobs = CpuSettings { isa, ..CpuSettings::default() };
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart_with(0, &knobs);
    let auto = guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap();
    assert_eq!(auto, Irqchip::None);
    assert!(guest.vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).is_err());
}

#[test]
fn harts_and_irqchip_are_created_in_order_only() {
    let guest = Guest::new(&[SPIN]);
    let _hart = guest.hart(4);
    assert!(guest.vm.create_hart(4, &CpuSettings::default()).is_err());
    assert!(guest.vm.create_hart(3, &CpuSettings::default()).is_err());
    if host_has_aia() {
        assert!(guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(2)).is_err());
        assert!(guest.vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).is_ok());
        assert!(guest.vm.create_hart(5, &CpuSettings::default()).is_err());
    }
}

/// Sets the trap's target to `at` words behind the first of its three instructions.
pub(super) fn trap_to(at: u32) -> [u32; 3] {
    [here(T1), addi(T1, T1, 4 * at), csrw(STVEC, T1)]
}

#[test]
fn an_external_interrupt_reaches_a_waiting_hart_and_is_cleared_with_the_line() {
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
    assert!(
        !line.attach_irqfd(&EventFd::new(EFD_NONBLOCK).unwrap()),
        "the controller is not in the kernel"
    );
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

/// A guest that wires source 7 of this mode (AIA 4.5.2) to identity 5 of its hart, calls, and waits. From the interrupt on it calls
/// again and again, with what it claims by stopei, and with in_clrip, the levels of sources 0 to 31.
pub(super) fn wired(mode: u32) -> Vec<u32> {
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
        &li(T0, APLIC + 0x1d00),
        &[csrrw(A0, stopei, ZERO), load(2, A1, T0, 0), ECALL, jump_back(3)],
    ];
    code.concat()
}

const EDGE_RISING: u32 = 4;
pub(super) const LEVEL_HIGH: u32 = 6;

/// A machine with an AIA whose guest has wired source 7 and is about to wait.
struct Wired {
    hart: Box<dyn Hart>,
    vm: KvmVm,
    /// Owns the machine's memory.
    _guest: Guest,
}

impl Wired {
    fn new(mode: u32) -> Self {
        let guest = Guest::new(&wired(mode));
        let host = guest.memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
        let vm = open().unwrap().new_vm().unwrap();
        vm.map_memory(0, BASE, host, 0x1_0000).unwrap();
        let mut hart = vm.create_hart(0, &CpuSettings::default()).unwrap();
        hart.set(Reg::Pc, BASE).unwrap();
        vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).unwrap();
        called(hart.as_mut(), [0; 2]);
        Self { hart, vm, _guest: guest }
    }

    /// The identity that the guest claims, 0 for none, and true if it finds source 7 high.
    fn claim(&mut self) -> (u64, bool) {
        let (_, args) = called(self.hart.as_mut(), [0; 2]);
        (args[0] >> 16, args[1] & 1 << 7 != 0)
    }

    /// Signals an event descriptor that is bound to interrupt `gsi` for that time. Unbinding waits until the kernel has processed the
    /// event.
    fn event(&self, gsi: u32) {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        self.vm.fd().register_irqfd(&event, gsi).unwrap();
        event.write(1).unwrap();
        self.vm.fd().unregister_irqfd(&event, gsi).unwrap();
    }

    /// Routes interrupt 200, and no other one, as a message to identity 5 of the hart.
    fn route_a_message(&self) {
        let msi = kvm_irq_routing_msi {
            address_lo: u32::try_from(IMSICS).unwrap(),
            data: 5,
            ..kvm_irq_routing_msi::default()
        };
        let entry = kvm_irq_routing_entry {
            gsi: 200,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
            ..kvm_irq_routing_entry::default()
        };
        let table = KvmIrqRouting::from_entries(&[entry]).unwrap();
        self.vm.fd().set_gsi_routing(&table).unwrap();
    }
}

#[test]
fn a_wired_source_reaches_its_hart_through_aplic_and_imsic() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    // KVM forgets a level that rises before the source is configured.
    let mut machine = Wired::new(LEVEL_HIGH);
    let line = machine.vm.irq_line(7).unwrap();
    let raise = std::thread::spawn({
        let line = Arc::clone(&line);
        move || line.set_level(true)
    });
    assert_eq!(machine.claim(), (5, true), "the line is high until its device lowers it");
    raise.join().unwrap();
    assert_eq!(machine.claim(), (0, true), "and interrupts once");
    line.set_level(false);
    assert_eq!(machine.claim(), (0, false));
}

#[test]
fn an_event_descriptor_may_leave_its_source_high_for_ever() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    for mode in [EDGE_RISING, LEVEL_HIGH] {
        let mut machine = Wired::new(mode);
        machine.event(7);
        let (first, stays_high) = machine.claim();
        assert_eq!(first, 5, "mode {mode}");
        machine.event(7);
        let (second, is_high) = machine.claim();
        assert_eq!(is_high, stays_high, "mode {mode}");
        // Linux 6.12 raises the source and never lowers it: in edge mode every later event is lost. A kernel that sends pulses
        // interrupts each time; then a level does not stay high.
        let repeats = mode == LEVEL_HIGH || !stays_high;
        assert_eq!(second, if repeats { 5 } else { 0 }, "mode {mode}, high: {stays_high}");
        // Only the owner of the line can lower it.
        machine.vm.fd().set_irq_line(7, false).unwrap();
        assert_eq!(machine.claim(), (0, false), "mode {mode}");
        machine.event(7);
        assert_eq!(machine.claim(), (5, stays_high), "mode {mode}");
    }
}

#[test]
fn a_line_that_events_raise_is_low_when_its_device_says_so() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    for mode in [EDGE_RISING, LEVEL_HIGH] {
        let mut machine = Wired::new(mode);
        let line = machine.vm.irq_line(7).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        assert!(line.attach_irqfd(&event));
        for round in 0..3 {
            event.write(1).unwrap();
            while machine.claim().0 != 5 {}
            // A kernel that sends pulses may lower the source only now.
            while {
                line.set_level(false);
                machine.claim() != (0, false)
            } {}
            line.set_level(true);
            assert_eq!(machine.claim(), (5, true), "mode {mode}, round {round}");
            line.set_level(false);
            assert_eq!(machine.claim(), (0, false), "mode {mode}, round {round}");
        }
        assert!(!line.attach_irqfd(&event), "the event raises a line already");
    }
}

#[test]
fn no_event_raises_a_line_that_has_to_wake_a_guest_that_is_suspended() {
    let asked = [ExtensionChange { name: "susp".into(), on: true }];
    if !host_has_aia() || suspend_is_on(IrqchipChoice::Aia, &asked).is_none() {
        return skip("this host has no AIA, or its kernel has no SUSP (Linux 6.14 has)");
    }
    let vm = open().unwrap().new_vm().unwrap();
    let knobs = CpuSettings { sbi: asked.to_vec(), ..CpuSettings::default() };
    let _hart = vm.create_hart(0, &knobs).unwrap();
    vm.create_irqchip(IrqchipChoice::Aia, &plan(1)).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    assert!(!vm.irq_line(7).unwrap().attach_irqfd(&event));
    event.write(1).unwrap();
    assert!(event.read().is_ok(), "the kernel has not taken it");
}

#[test]
fn an_event_descriptor_that_is_routed_to_a_message_interrupts_each_time() {
    if !host_has_aia() {
        return skip("this host has no AIA");
    }
    let mut machine = Wired::new(LEVEL_HIGH);
    machine.route_a_message();
    for _ in 0..3 {
        machine.event(200);
        assert_eq!(machine.claim(), (5, false), "a message, and the source stays as it is");
        assert_eq!(machine.claim(), (0, false), "once");
    }
}

#[test]
fn without_an_aia_an_event_descriptor_takes_interrupts_and_loses_them() {
    if host_has_aia() {
        return skip("this host has an AIA");
    }
    let vm = open().unwrap().new_vm().unwrap();
    let _hart = vm.create_hart(0, &CpuSettings::default()).unwrap();
    assert_eq!(vm.create_irqchip(IrqchipChoice::Auto, &plan(1)).unwrap(), Irqchip::None);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.fd().register_irqfd(&event, 7).unwrap();
    event.write(1).unwrap();
    assert!(event.read().is_err(), "the kernel has taken it, and there is nothing to interrupt");
}

/// True if `susp` is on in the only hart of a machine with knobs `sbi` and the irqchip `choice`; `None` without SUSP.
fn suspend_is_on(choice: IrqchipChoice, sbi: &[ExtensionChange]) -> Option<bool> {
    let vm = open().unwrap().new_vm().unwrap();
    let knobs = CpuSettings { sbi: sbi.to_vec(), ..CpuSettings::default() };
    let _hart = vm.create_hart(0, &knobs).ok()?;
    vm.create_irqchip(choice, &plan(1)).unwrap();
    let number = sbi_number("susp").unwrap();
    let value = vm.first_vcpu().unwrap().reg(sbi_extension(number));
    value.ok().map(|value| value != 0)
}

#[test]
fn system_suspend_is_offered_where_a_guest_wakes_from_it() {
    let Some(on) = suspend_is_on(IrqchipChoice::Plic, &[]) else {
        return skip("this host's kernel has no SUSP (Linux 6.14 has)");
    };
    assert!(on);
    let asked = [ExtensionChange { name: "susp".into(), on: true }];
    if host_has_aia() {
        assert_eq!(suspend_is_on(IrqchipChoice::Aia, &[]), Some(false));
        assert_eq!(suspend_is_on(IrqchipChoice::Aia, &asked), Some(true));
    }
}
