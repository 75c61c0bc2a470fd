//! A hart's thread from start to end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use super::super::exit::{Fault, SystemEvent};
use super::super::hart::{Csr, Hart, Reg};
use super::super::record::Unrecorded;
use super::super::restarts::{COUNTERS, Exits, Restarts};
use super::super::stop::StopReason;
use super::super::testing::{Event, NOWHERE, RAM, ScriptHart, Step, UART, context};
use super::super::{Control, MachineContext, spawn_hart};
use crate::config::Unassigned;
use crate::riscv::sbi::eid;
use crate::riscv::trap::interrupt;

/// Runs one hart until it stops.
fn run(context: MachineContext, hart: ScriptHart) -> (StopReason, Vec<Event>) {
    let control = Arc::new(Control::new());
    let log = hart.log();
    control.start();
    let thread =
        spawn_hart(Box::new(hart), Arc::new(context), Arc::clone(&control), None, Unrecorded)
            .unwrap();
    let reason = control.wait();
    let _ = thread.join();
    (reason, log.events())
}

fn zero() -> MachineContext {
    context(Unassigned::Zero).0
}

const OFF: Step = Step::System(SystemEvent::Shutdown(0));

#[test]
fn a_script_of_exits_is_answered_in_order() {
    let script = [
        Step::Load { addr: UART + 7, len: 2 },
        Step::Store { addr: NOWHERE, bytes: vec![1] },
        Step::Sbi { extension: 0x0900_0000, function: 1, args: [0; 6] },
        Step::Csr { csr: 0x151 },
        OFF,
    ];
    let (reason, events) = run(zero(), ScriptHart::new(0, script));
    assert_eq!(reason, StopReason::PowerOff);
    let expected = [
        Event::Bound,
        Event::Entered,
        Event::Loaded(vec![0x77, 0]),
        Event::Entered,
        Event::Entered,
        Event::Sbi([u64::MAX - 1, 0]),
        Event::Entered,
        Event::Csr(0),
        Event::Entered,
    ];
    assert_eq!(events, expected);
}

#[test]
fn a_reset_ends_the_run_with_that_reason() {
    let hart = ScriptHart::new(0, [Step::System(SystemEvent::Reset(1))]);
    assert_eq!(run(zero(), hart).0, StopReason::Reset);
}

#[test]
fn a_call_that_cannot_be_answered_yet_is_made_again() {
    let (context, uart) = context(Unassigned::Zero);
    let put = Step::Sbi { extension: eid::DBCN, function: 2, args: [0x41; 6] };
    let (reason, events) = run(context, ScriptHart::new(0, [put, OFF]));
    assert_eq!(reason, StopReason::PowerOff);
    assert_eq!(events.iter().filter(|e| **e == Event::Abandoned).count(), 1);
    assert!(!events.iter().any(|e| matches!(e, Event::Sbi(_))), "the first call has no answer");
    assert!(uart.line().sent.is_empty());
}

#[test]
fn a_trap_is_raised_and_the_hart_goes_on() {
    let hart = ScriptHart::new(0, [Step::Fault(Fault::Unemulated), Step::Debug, OFF]).with([
        (Reg::Pc, NOWHERE),
        (Reg::Mode, 1),
        (Reg::Csr(Csr::Stvec), RAM.base),
    ]);
    assert_eq!(run(zero(), hart).0, StopReason::PowerOff);
}

#[test]
fn an_unknown_exit_stops_with_the_harts_number_and_registers() {
    let hart = ScriptHart::new(5, [Step::Unknown(42)]).with([(Reg::X(10), 0xabcdef)]);
    match run(zero(), hart).0 {
        StopReason::HartFault { hart: 5, what, dump } => {
            assert!(what.contains("42"), "{what}");
            assert!(dump.contains("a0 0000000000abcdef"), "{dump}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_hart_that_cannot_be_entered_is_the_hosts_failure() {
    match run(zero(), ScriptHart::new(2, [Step::Broken])).0 {
        StopReason::HostFailure(what) => assert_eq!(what, "Hart 2 cannot continue: broken"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_thread_that_panics_ends_the_machine_and_the_other_harts() {
    let control = Arc::new(Control::new());
    let context = Arc::new(zero());
    let spawn = |id, script: Vec<Step>| {
        let hart = Box::new(ScriptHart::new(id, script));
        spawn_hart(hart, Arc::clone(&context), Arc::clone(&control), None, Unrecorded).unwrap()
    };
    let threads = [spawn(0, vec![]), spawn(1, vec![Step::Panic]), spawn(2, vec![])];
    control.start();
    assert_eq!(control.wait(), StopReason::HostFailure("The thread of hart 1 died".into()));
    let [first, second, third] = threads.map(thread::JoinHandle::join);
    assert!(first.is_ok() && second.is_err() && third.is_ok());
}

#[test]
fn the_thread_is_named_after_its_hart_and_pinned() {
    let (control, context) = (Arc::new(Control::new()), Arc::new(zero()));
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let cpu = (0..1024).find(|cpu| allowed.is_set(*cpu)).unwrap();
    let hart = Box::new(ScriptHart::new(7, []));
    let cpu = Some(u32::try_from(cpu).unwrap());
    let thread = spawn_hart(hart, context, Arc::clone(&control), cpu, Unrecorded).unwrap();
    assert_eq!(thread.thread().name(), Some("vcpu7"));
    control.stop(StopReason::Requested);
    assert_eq!(control.wait(), StopReason::Requested);
    thread.join().unwrap();
}

#[test]
fn a_cpu_that_the_host_lacks_is_refused_by_name() {
    let (control, context) = (Arc::new(Control::new()), Arc::new(zero()));
    for cpu in [1023, 1024, u32::MAX] {
        let hart = Box::new(ScriptHart::new(1, []));
        let refused =
            spawn_hart(hart, Arc::clone(&context), Arc::clone(&control), Some(cpu), Unrecorded);
        let error = refused.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let start = format!("Cannot pin hart 1 to host CPU {cpu}: ");
        assert!(error.to_string().starts_with(&start), "{error}");
    }
    control.stop(StopReason::Requested);
    assert_eq!(control.wait(), StopReason::Requested);
}

#[test]
fn a_pending_interrupt_keeps_a_suspended_system_awake() {
    let suspend = Step::Sbi { extension: eid::SUSP, function: 0, args: [0; 6] };
    let hart = ScriptHart::new(0, [suspend, OFF]).with([(Reg::Csr(Csr::Sip), interrupt::SEI)]);
    let (reason, events) = run(zero(), hart);
    assert_eq!(reason, StopReason::PowerOff);
    assert!(events.contains(&Event::Settled));
}

#[test]
fn unread_input_keeps_a_suspended_system_awake() {
    let (context, uart) = context(Unassigned::Zero);
    uart.line().typed.push_back(b'x');
    let suspend = Step::Sbi { extension: eid::SUSP, function: 0, args: [0; 6] };
    let (reason, _) = run(context, ScriptHart::new(0, [suspend, OFF]));
    assert_eq!(reason, StopReason::PowerOff);
    assert_eq!(uart.line().typed, [b'x'], "it is still there to be read");
}

const SUSPEND: Step = Step::Sbi { extension: eid::SUSP, function: 0, args: [0; 6] };
const STIP: u64 = interrupt::STI;

/// A hart that suspends the system at tick 100 with its timer set to `due`, and then powers off.
fn suspending(sie: u64, due: u64) -> ScriptHart {
    let sie = (Reg::Csr(Csr::Sie), sie);
    ScriptHart::new(0, [SUSPEND, OFF]).with([sie, (Reg::Time, 100), (Reg::TimeCompare, due)])
}

#[test]
fn the_timer_of_a_suspended_system_wakes_it() {
    // Past, now, and in a millisecond at the context's 10 MHz.
    for due in [0, 100, 10_100] {
        let (reason, events) = run(zero(), suspending(STIP, due));
        assert_eq!(reason, StopReason::PowerOff);
        assert_eq!(events.iter().filter(|event| **event == Event::Entered).count(), 2);
    }
}

#[test]
fn a_timer_that_is_off_or_a_century_away_does_not_wake() {
    for (sie, due) in [(0, 0), (0, 10_100), (STIP, u64::MAX), (STIP, u64::MAX - 1)] {
        let control = Arc::new(Control::new());
        let hart = suspending(sie, due);
        let log = hart.log();
        control.start();
        let thread =
            spawn_hart(Box::new(hart), Arc::new(zero()), Arc::clone(&control), None, Unrecorded);
        let entries = || log.events().iter().filter(|event| **event == Event::Entered).count();
        log.await_event(&Event::Settled, 1);
        drop(control.pause().expect("it sleeps"));
        thread::sleep(Duration::from_millis(20));
        assert_eq!(entries(), 1);
        while entries() == 1 {
            control.wake();
            thread::yield_now();
        }
        assert_eq!(control.wait(), StopReason::PowerOff);
        thread.unwrap().join().unwrap();
    }
}

/// A count that increases with each read.
struct Increasing(AtomicU64);

impl Exits for Increasing {
    fn count(&self) -> io::Result<u64> {
        Ok(self.0.fetch_add(1, SeqCst))
    }
}

#[test]
fn a_hart_that_wakes_gets_the_state_back_that_the_kernel_lost_at_its_start() {
    let control = Arc::new(Control::new());
    for opens in [false, true] {
        let mut context = zero();
        let exits: Vec<Box<dyn Exits>> = vec![Box::new(Increasing(AtomicU64::new(0)))];
        context.restarts = Some(Restarts::watch(exits, opens, &control).unwrap());
        let restarts = context.restarts.as_ref().unwrap();
        let mut hart = ScriptHart::new(0, []);
        restarts.handle_kick(&mut hart).unwrap();
        assert!(hart.log().events().is_empty(), "no start is expected");
        restarts.expect(0);
        while !hart.log().events().contains(&Event::ExternalDriven) {
            restarts.handle_kick(&mut hart).unwrap();
            thread::yield_now();
        }
        let expected = if opens { COUNTERS } else { 0 };
        assert_eq!(hart.get(Reg::Csr(Csr::Scounteren)).unwrap(), expected);
    }
}
