//! Every exit, and its result.

use super::super::exit::{CsrAccess, Exit, Fault, SystemEvent};
use super::super::stop::StopReason;
use super::super::testing::{NOWHERE, UART, context};
use super::super::{Flow, MachineContext, UnresolvedExit, dispatch};
use crate::config::Unassigned;

fn zero() -> MachineContext {
    context(Unassigned::Zero).0
}

fn handle(exit: &mut Exit<'_>, context: &MachineContext) -> Flow {
    dispatch(exit, context, &mut context.bus.view())
}

#[test]
fn a_load_from_a_device_is_answered_in_place() {
    for len in [1, 2, 4, 8] {
        let mut data = vec![0xff; len];
        let flow = handle(&mut Exit::MmioRead { addr: UART + 7, data: &mut data }, &zero());
        assert_eq!(flow, Flow::Resume);
        assert_eq!(data[0], 0x77);
        assert!(data[1..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_store_reaches_its_device() {
    let (context, uart) = context(Unassigned::Stop);
    uart.line().room = 1;
    assert_eq!(handle(&mut Exit::MmioWrite { addr: UART, data: b"x" }, &context), Flow::Resume);
    assert_eq!(uart.line().sent, b"x");
}

#[test]
fn loads_from_unassigned_addresses_give_zero_and_stores_have_no_effect() {
    for addr in [0, NOWHERE, 1 << 55, u64::MAX - 7, u64::MAX] {
        let mut data = [0xff; 8];
        assert_eq!(handle(&mut Exit::MmioRead { addr, data: &mut data }, &zero()), Flow::Resume);
        assert_eq!(data, [0; 8]);
        assert_eq!(handle(&mut Exit::MmioWrite { addr, data: &data }, &zero()), Flow::Resume);
    }
}

#[test]
fn under_the_other_policies_an_unassigned_access_needs_the_hart() {
    for policy in [Unassigned::Fault, Unassigned::Stop] {
        let (context, _) = context(policy);
        let load = handle(&mut Exit::MmioRead { addr: NOWHERE, data: &mut [0; 4] }, &context);
        assert_eq!(load, Flow::Resolve(UnresolvedExit::Unassigned { addr: NOWHERE, write: false }));
        let store = handle(&mut Exit::MmioWrite { addr: NOWHERE, data: &[0; 4] }, &context);
        assert_eq!(store, Flow::Resolve(UnresolvedExit::Unassigned { addr: NOWHERE, write: true }));
    }
}

#[test]
fn an_interruption_leads_to_the_control() {
    assert_eq!(handle(&mut Exit::Interrupted, &zero()), Flow::Yield);
}

#[test]
fn system_events_stop_the_machine_with_their_reason() {
    let flow = |event| handle(&mut Exit::System(event), &zero());
    for reason in [0, 2, 0xe000_0000, u64::MAX] {
        assert_eq!(flow(SystemEvent::Shutdown(reason)), StopReason::PowerOff.into());
    }
    for reason in [0, 1, u64::MAX] {
        assert_eq!(flow(SystemEvent::Reset(reason)), StopReason::Reset.into());
    }
    assert_eq!(flow(SystemEvent::Other(7)), Flow::Resolve(UnresolvedExit::UnknownEvent(7)));
}

#[test]
fn a_shutdown_because_of_a_system_failure_ends_with_the_guests_exit_code() {
    let flow = handle(&mut Exit::System(SystemEvent::Shutdown(1)), &zero());
    assert_eq!(flow, StopReason::SystemFailure.into());
    assert_eq!((StopReason::SystemFailure.exit_code(), StopReason::PowerOff.exit_code()), (3, 0));
}

#[test]
fn faults_breakpoints_and_unknown_exits_need_the_hart() {
    let fault = Fault::Unemulated;
    assert_eq!(
        handle(&mut Exit::Fault(fault), &zero()),
        Flow::Resolve(UnresolvedExit::Fault(fault))
    );
    assert_eq!(handle(&mut Exit::Debug, &zero()), Flow::Resolve(UnresolvedExit::Breakpoint));
    assert_eq!(
        handle(&mut Exit::Unknown(99), &zero()),
        Flow::Resolve(UnresolvedExit::UnknownExit(99))
    );
}

fn csr(number: u64) -> u64 {
    let mut ret = 0xdead;
    let access = CsrAccess { csr: number, new_value: 5, write_mask: u64::MAX, ret: &mut ret };
    assert_eq!(handle(&mut Exit::Csr(access), &zero()), Flow::Resume);
    ret
}

#[test]
fn seed_gives_sixteen_bits_of_entropy_that_differ() {
    let draws: Vec<u64> = (0..64).map(|_| csr(0x015)).collect();
    for draw in &draws {
        assert_eq!(draw & !0xffff, 0x8000_0000, "state ES16, nothing reserved: {draw:#x}");
    }
    assert!(draws.iter().any(|draw| *draw != draws[0]));
}

#[test]
fn a_csr_that_the_machine_lacks_reads_as_zero() {
    for number in [0x151, 0x15c, 0, u64::MAX] {
        assert_eq!(csr(number), 0);
    }
}
