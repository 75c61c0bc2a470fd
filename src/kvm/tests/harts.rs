//! Running, kicking, settling and abandoning harts.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::thread::sched_getaffinity;
use rvmm_devices::IoEvent;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::asm::*;
use super::*;
use crate::riscv::sbi::eid;
use crate::vcpu::exit::{Fault, SystemEvent};
use crate::vcpu::hart::{Csr, Kick};

/// Time-out of the waits of a test; generous, since the host may be emulated.
const TIME_OUT: Duration = Duration::from_secs(60);

/// A call of the vendor range: `a7` and `ecall`.
fn call() -> Vec<u32> {
    [&li(A7, 0x0900_0000)[..], &[ECALL]].concat()
}

#[test]
fn a_call_carries_its_arguments_out_and_its_answer_in() {
    let code = [&[addi(A0, ZERO, 7), addi(A6, ZERO, 5)][..], &call(), &[ECALL]].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    let Exit::Sbi(first) = hart.enter().unwrap() else { panic!("not a call") };
    assert_eq!((first.extension, first.function, first.args[0]), (VENDOR, 5, 7));
    *first.ret = [11, 12];
    let (_, args) = called(hart.as_mut(), [0; 2]);
    assert_eq!(args[..2], [11, 12]);
}

#[test]
fn a_load_from_an_unmapped_address_takes_the_data_of_the_exit() {
    for (funct3, len, value) in
        [(4, 1, 0x81_u64), (5, 2, 0x8001), (6, 4, 0x8000_0001), (3, 8, 1 << 63 | 1)]
    {
        let code = [&li(T0, 0x1000_0000)[..], &[load(funct3, A0, T0, 8)], &call()].concat();
        let guest = Guest::new(&code);
        let mut hart = guest.hart(0);
        let Exit::MmioRead { addr, data } = hart.enter().unwrap() else { panic!("not a load") };
        assert_eq!((addr, data.len()), (HOLE + 8, len));
        data.copy_from_slice(&value.to_le_bytes()[..len]);
        assert_eq!(called(hart.as_mut(), [0; 2]).1[0], value, "{len} bytes");
    }
}

#[test]
fn a_signed_load_arrives_signed_or_as_linux_6_12_has_it() {
    let code = [&li(T0, 0x1000_0000)[..], &[load(2, A0, T0, 0)], &call()].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    let Exit::MmioRead { data, .. } = hart.enter().unwrap() else { panic!("not a load") };
    data.copy_from_slice(&0x8000_0001_u32.to_le_bytes());
    // Linux before 7.0 does not sign-extend loads that it emulates.
    let seen = called(hart.as_mut(), [0; 2]).1[0];
    assert!([0xffff_ffff_8000_0001, 0x8000_0001].contains(&seen), "{seen:#x}");
}

#[test]
fn a_store_to_an_unmapped_address_carries_the_bytes_of_its_width() {
    for (funct3, len) in [(0, 1), (1, 2), (2, 4), (3, 8)] {
        let code = [&li(T0, 0x1000_0000)[..], &li(A0, 0x7654_3210), &[store(funct3, A0, T0, 0x10)]];
        let guest = Guest::new(&code.concat());
        let mut hart = guest.hart(0);
        let Exit::MmioWrite { addr, data } = hart.enter().unwrap() else { panic!("not a store") };
        assert_eq!(addr, HOLE + 0x10);
        assert_eq!(data, &0x7654_3210_u64.to_le_bytes()[..len]);
    }
}

#[test]
fn an_atomic_on_a_device_is_a_fault_and_the_program_counter_stays() {
    let guest = Guest::new(&[&li(T0, 0x1000_0000)[..], &[amoadd_w(A0, A1, T0)], &call()].concat());
    let mut hart = guest.hart(0);
    let exit = hart.enter().unwrap();
    assert!(matches!(exit, Exit::Fault(Fault::Unemulated)), "{exit:?}");
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 8);
    hart.set(Reg::Pc, BASE + 12).unwrap();
    assert_eq!(called(hart.as_mut(), [0; 2]).0, VENDOR);
}

#[test]
fn a_misaligned_access_to_a_device_is_a_fault_or_is_split_by_the_hardware() {
    let guest = Guest::new(&[&li(T0, 0x1000_0001)[..], &[load(2, A0, T0, 0)], &call()].concat());
    let mut hart = guest.hart(0);
    let exit = hart.enter().unwrap();
    assert!(matches!(exit, Exit::Fault(Fault::Misaligned) | Exit::MmioRead { .. }), "{exit:?}");
}

#[test]
fn a_jump_to_an_unmapped_address_is_a_fault_or_the_guests_own_trap() {
    let trap = 4 * 5;
    let code = [&[here(T1), addi(T1, T1, trap), csrw(STVEC, T1)][..], &li(T0, 0x1000_0000)];
    // `jr t0`, then the trap's target.
    let code = [&code.concat()[..], &[0x0002_8067], &call()].concat();
    let mut code = code;
    code[1] = addi(T1, T1, 4 * 6);
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    match hart.enter().unwrap() {
        Exit::Fault(Fault::Unemulated) => assert_eq!(hart.get(Reg::Pc).unwrap(), HOLE),
        Exit::Sbi(call) => assert_eq!(call.extension, VENDOR),
        other => panic!("neither: {other:?}"),
    }
}

#[test]
fn an_ebreak_exits_only_where_that_is_switched_on() {
    let trap = 4 * 4;
    let code = [here(T1), addi(T1, T1, trap), csrw(STVEC, T1), EBREAK];
    let code = [&code[..], &[csrr(A0, SCAUSE)], &call()].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    hart.trap_ebreaks(true).unwrap();
    for _ in 0..2 {
        let exit = hart.enter().unwrap();
        assert!(matches!(exit, Exit::Debug), "{exit:?}");
        assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 12);
    }
    hart.trap_ebreaks(false).unwrap();
    assert_eq!(called(hart.as_mut(), [0; 2]).1[0], 3);
}

/// Runs the guest until its next call; true if it sees its timer interrupt pending.
fn sees_timer(hart: &mut dyn Hart) -> bool {
    const STIP: u64 = 1 << 5;
    called(hart, [0; 2]).1[0] & STIP != 0
}

#[test]
fn a_timer_interrupt_is_made_pending_and_taken_back_where_the_host_can() {
    let code = [&[csrr(A0, SIP)][..], &call(), &[jump_back(4)]].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    assert!(!sees_timer(hart.as_mut()));
    for _ in 0..3 {
        hart.settle().unwrap();
        assert!(hart.set_timer_pending(true).unwrap());
        // Without Sstc it is a timer of the kernel's, which expires asynchronously.
        while !sees_timer(hart.as_mut()) {
            thread::yield_now();
        }
        hart.settle().unwrap();
        if hart.set_timer_pending(false).unwrap() {
            assert!(!sees_timer(hart.as_mut()));
            assert_eq!(hart.get(Reg::TimeCompare).unwrap(), u64::MAX);
        }
    }
}

#[test]
fn a_timer_interrupt_that_is_made_pending_ends_a_wait_with_interrupts_off() {
    let code = [&li(T0, 1 << 5)[..], &[csrs(SIE, T0), WFI], &call()].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    assert!(hart.set_timer_pending(true).unwrap());
    assert_eq!(called(hart.as_mut(), [0; 2]).0, VENDOR);
}

#[test]
fn settling_completes_a_load_without_running_on() {
    let code = [&li(T0, 0x1000_0000)[..], &[load(3, A0, T0, 0), addi(A0, A0, 1)], &call()].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    let Exit::MmioRead { data, .. } = hart.enter().unwrap() else { panic!("not a load") };
    data.copy_from_slice(&41_u64.to_le_bytes());
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 8);
    for _ in 0..2 {
        hart.settle().unwrap();
        assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 12);
        assert_eq!(hart.get(Reg::X(10)).unwrap(), 41);
    }
    assert_eq!(called(hart.as_mut(), [0; 2]).1[0], 42);
}

#[test]
fn settling_leaves_a_hart_alone_that_has_nothing_to_complete() {
    let guest = Guest::new(&[SPIN]);
    let mut hart = guest.hart(0);
    hart.settle().unwrap();
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE);
    // KVM_RUN was not called: what must be set before the first one still can be.
    assert!(guest.hart_with(1, &CpuSettings::default()).get(Reg::Mode).is_ok());
}

#[test]
fn an_abandoned_load_is_tried_again() {
    let guest = Guest::new(&[&li(T0, 0x1000_0000)[..], &[load(3, A0, T0, 0)], &call()].concat());
    let mut hart = guest.hart(0);
    assert!(matches!(hart.enter().unwrap(), Exit::MmioRead { .. }));
    hart.abandon();
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 8);
    assert!(matches!(hart.enter().unwrap(), Exit::MmioRead { .. }));
}

#[test]
fn an_abandoned_load_can_be_turned_into_a_trap() {
    let guest = Guest::new(&[&li(T0, 0x1000_0000)[..], &[load(3, A0, T0, 0)], &call()].concat());
    let mut hart = guest.hart(0);
    assert!(matches!(hart.enter().unwrap(), Exit::MmioRead { .. }));
    hart.abandon();
    hart.set(Reg::Csr(Csr::Scause), 5).unwrap();
    hart.set(Reg::Pc, BASE + 12).unwrap();
    called(hart.as_mut(), [0; 2]);
    assert_eq!(hart.get(Reg::Csr(Csr::Scause)).unwrap(), 5);
}

#[test]
fn a_shutdown_is_a_system_event() {
    let code = [
        &li(A7, u32::try_from(eid::SRST).unwrap())[..],
        &[addi(A0, ZERO, 0), addi(A1, ZERO, 1), ECALL],
    ]
    .concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    let exit = hart.enter().unwrap();
    assert!(matches!(exit, Exit::System(SystemEvent::Shutdown(1))), "{exit:?}");
}

#[test]
fn registers_keep_what_is_written() {
    let guest = Guest::new(&[SPIN]);
    let mut hart = guest.hart(0);
    for number in 1..32 {
        hart.set(Reg::X(number), 0x1000 + u64::from(number)).unwrap();
    }
    for number in 1..32 {
        assert_eq!(hart.get(Reg::X(number)).unwrap(), 0x1000 + u64::from(number));
    }
    hart.set(Reg::X(0), 5).unwrap();
    assert_eq!(hart.get(Reg::X(0)).unwrap(), 0);
    assert!(hart.get(Reg::X(32)).is_err());
    assert_eq!(hart.get(Reg::Mode).unwrap(), 1);
    hart.set(Reg::Mode, 0).unwrap();
    assert_eq!(hart.get(Reg::Mode).unwrap(), 0);
}

/// Runs `hart` on its own thread until it is kicked out, `times` times; returns the kick and a channel with a message per exit.
fn on_thread(mut hart: Box<dyn Hart>, times: u32) -> (Arc<dyn Kick>, mpsc::Receiver<()>) {
    let (send_kick, kick) = mpsc::channel();
    let (send_out, out) = mpsc::channel();
    thread::spawn(move || {
        send_kick.send(hart.bind().unwrap()).unwrap();
        for _ in 0..times {
            assert!(matches!(hart.enter().unwrap(), Exit::Interrupted));
            send_out.send(()).unwrap();
        }
    });
    (kick.recv_timeout(TIME_OUT).unwrap(), out)
}

#[test]
fn a_kick_wakes_a_hart_that_waits_for_an_interrupt() {
    let guest = Guest::new(&[WFI, SPIN]);
    // `wfi` with no interrupt enabled still returns for pending ones, of which there are none.
    let (kick, out) = on_thread(guest.hart(0), 3);
    for _ in 0..3 {
        kick.kick();
        out.recv_timeout(TIME_OUT).unwrap();
    }
}

#[test]
fn a_kick_wakes_a_hart_that_was_never_started() {
    let guest = Guest::new(&[SPIN]);
    let _boot = guest.hart(0);
    let (kick, out) = on_thread(guest.hart(1), 2);
    for _ in 0..2 {
        kick.kick();
        out.recv_timeout(TIME_OUT).unwrap();
    }
}

#[test]
fn a_kick_ends_a_busy_loop() {
    let guest = Guest::new(&[SPIN]);
    let (kick, out) = on_thread(guest.hart(0), 1);
    kick.kick();
    out.recv_timeout(TIME_OUT).unwrap();
}

#[test]
fn a_kick_before_the_run_is_not_lost_and_counts_once() {
    let guest = Guest::new(&call());
    let mut hart = guest.hart(0);
    let kick = hart.bind().unwrap();
    kick.kick();
    kick.kick();
    assert!(matches!(hart.enter().unwrap(), Exit::Interrupted));
    assert!(matches!(hart.enter().unwrap(), Exit::Sbi(_)));
}

#[test]
fn a_kick_survives_the_settling_of_an_exit() {
    let guest = Guest::new(&[&call()[..], &[SPIN]].concat());
    let mut hart = guest.hart(0);
    let kick = hart.bind().unwrap();
    assert!(matches!(hart.enter().unwrap(), Exit::Sbi(_)));
    kick.kick();
    hart.settle().unwrap();
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 12);
    assert!(matches!(hart.enter().unwrap(), Exit::Interrupted));
}

#[test]
fn a_kick_before_a_completed_exit_does_not_complete_it_twice() {
    let guest = Guest::new(&[&call()[..], &[ECALL]].concat());
    let mut hart = guest.hart(0);
    let kick = hart.bind().unwrap();
    assert!(matches!(hart.enter().unwrap(), Exit::Sbi(_)));
    kick.kick();
    assert!(matches!(hart.enter().unwrap(), Exit::Interrupted));
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 12);
    assert!(matches!(hart.enter().unwrap(), Exit::Sbi(_)));
    assert_eq!(hart.get(Reg::Pc).unwrap(), BASE + 12);
}

#[test]
fn a_kick_after_the_end_of_the_thread_does_nothing() {
    let guest = Guest::new(&[SPIN]);
    let mut hart = guest.hart(0);
    let kick = thread::spawn(move || hart.bind().unwrap()).join().unwrap();
    kick.kick();
    kick.kick();
    assert_eq!(Arc::strong_count(&kick), 1);
}

#[test]
fn a_hart_dropped_elsewhere_leaves_its_thread_unharmed() {
    let guest = Guest::new(&[SPIN]);
    let mut hart = guest.hart(0);
    let (dispatch_event, handed) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let first = thread::spawn(move || {
        let kick = hart.bind().unwrap();
        dispatch_event.send((hart, kick)).unwrap();
        may_go_on.recv_timeout(TIME_OUT).unwrap();
    });
    let (hart, kick) = handed.recv_timeout(TIME_OUT).unwrap();
    drop(hart);
    drop(guest);
    kick.kick();
    go_on.send(()).unwrap();
    first.join().unwrap();
}

#[test]
fn a_thread_takes_one_hart_after_another() {
    let first = Guest::new(&call());
    let second = Guest::new(&call());
    let mut one = first.hart(0);
    let mut other = second.hart(0);
    let old = one.bind().unwrap();
    let new = other.bind().unwrap();
    drop(one);
    old.kick();
    assert!(matches!(other.enter().unwrap(), Exit::Sbi(_)));
    new.kick();
    assert!(matches!(other.enter().unwrap(), Exit::Interrupted));
}

#[test]
fn a_doorbell_rings_without_an_exit_and_only_with_its_own_value() {
    let code = [
        &li(T0, u32::try_from(HOLE).unwrap())[..],
        &[addi(T1, ZERO, 1), store(2, T1, T0, 0x50)][..],
        &[addi(T1, ZERO, 2), store(2, T1, T0, 0x50)][..],
    ]
    .concat();
    let guest = Guest::new(&code);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let ioevent = IoEvent { offset: 0x50, value: 1, event: &event };
    guest.vm.register_ioeventfd(HOLE, ioevent).unwrap();
    let mut hart = guest.hart(0);
    match hart.enter().unwrap() {
        Exit::MmioWrite { addr, data } => {
            assert_eq!((addr, data), (HOLE + 0x50, &2_u32.to_le_bytes()[..]));
        }
        other => panic!("not the store of another value: {other:?}"),
    }
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn floating_point_registers_are_read_from_and_written_to_the_guest() {
    // Floating point on; fmv.x.d a0,fa0; frcsr a1; fmv.d.x fa1,a0
    let code = [&[csrs(SSTATUS, T0), 0xe205_0553, 0x0030_25f3, 0xf205_05d3][..], &call()].concat();
    let code = [&li(T0, 0x2000)[..], &code].concat();
    let guest = Guest::new(&code);
    let mut hart = guest.hart(0);
    hart.set(Reg::F(10), 0x3ff8_0000_0000_0000).unwrap();
    hart.set(Reg::Fcsr, 0x61).unwrap();
    let args = called(hart.as_mut(), [0; 2]).1;
    assert_eq!(args[..2], [0x3ff8_0000_0000_0000, 0x61]);
    assert_eq!(hart.get(Reg::F(11)).unwrap(), 0x3ff8_0000_0000_0000);
    assert_eq!(hart.get(Reg::Fcsr).unwrap(), 0x61);
}

#[test]
fn code_that_is_written_between_two_entries_is_executed() {
    let guest = Guest::new(&[&[addi(A0, ZERO, 1)][..], &call()].concat());
    let mut hart = guest.hart(0);
    for number in 1..50 {
        guest.memory.write_obj(addi(A0, ZERO, number), GuestAddress(BASE)).unwrap();
        guest.vm.code_changed().unwrap();
        hart.set(Reg::Pc, BASE).unwrap();
        assert_eq!(called(hart.as_mut(), [0; 2]).1[0], u64::from(number));
        hart.settle().unwrap();
    }
}

#[test]
fn the_thread_of_a_hart_that_ends_keeps_its_cpus_and_its_signals() {
    let guest = Guest::new(&call());
    let cpus = sched_getaffinity(None).unwrap();
    let mut hart = guest.hart(0);
    let kick = hart.bind().unwrap();
    assert!(matches!(hart.enter().unwrap(), Exit::Sbi(_)));
    kick.kick();
    drop(hart);
    assert_eq!(sched_getaffinity(None).unwrap(), cpus);
    // The next hart of the thread can be kicked as the first one could, and nothing is left for it.
    let guest = Guest::new(&call());
    let mut hart = guest.hart(0);
    let kick = hart.bind().unwrap();
    kick.kick();
    assert!(matches!(hart.enter().unwrap(), Exit::Interrupted));
    assert_eq!(called(hart.as_mut(), [0; 2]).0, VENDOR);
}

#[test]
fn addresses_are_as_narrow_as_the_machine_allows_where_the_kernel_can() {
    let vm = open().unwrap().create_vm().unwrap();
    let widest = vm.address_bits().unwrap();
    vm.limit_addresses(u64::MAX);
    assert_eq!(vm.address_bits(), Some(widest));
    // The last page of the width itself is refused up to Linux 7.2.
    vm.limit_addresses((1 << 41) - 0x1000);
    let bits = vm.address_bits().unwrap();
    // Before Linux 7.1 there is one width.
    assert!([41, widest].contains(&bits), "{bits}");
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(BASE), 0x1000)]).unwrap();
    let host = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
    vm.map_memory(0, (1 << 41) - 0x2000, host, 0x1000).unwrap();
}
