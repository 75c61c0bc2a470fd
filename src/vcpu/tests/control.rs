//! Start, stop, pause and resume, from several threads at once. The harts idle in the guest until they are kicked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::super::hart::{Hart, Reg};
use super::super::record::Unrecorded;
use super::super::stop::StopReason;
use super::super::testing::{Event, EventLog, ScriptHart, Step, context};
use super::super::{Control, spawn_hart};
use crate::config::Unassigned;
use crate::riscv::sbi::eid;

const SUSPEND: Step = Step::Sbi { extension: eid::SUSP, function: 0, args: [0; 6] };
/// The event of a hart whose suspend call is settled, before it sleeps.
const ASLEEP: Event = Event::Sbi([0, 0]);

struct Run {
    control: Arc<Control>,
    logs: Vec<EventLog>,
    threads: Vec<JoinHandle<()>>,
}

/// Harts with these scripts, not started.
fn machine(scripts: &[&[Step]]) -> Run {
    let context = Arc::new(context(Unassigned::Zero).0);
    let control = Arc::new(Control::new());
    let (mut logs, mut threads) = (Vec::new(), Vec::new());
    for (id, script) in (0..).zip(scripts) {
        let hart = ScriptHart::new(id, script.iter().cloned());
        logs.push(hart.log());
        let thread = spawn_hart(
            Box::new(hart),
            Arc::clone(&context),
            Arc::clone(&control),
            None,
            Unrecorded,
        );
        threads.push(thread.unwrap());
    }
    Run { control, logs, threads }
}

impl Run {
    /// Waits for the end, with a time-out for hangs.
    fn end(self) -> StopReason {
        let (done, over) = channel();
        let control = self.control;
        thread::spawn(move || done.send(control.wait()));
        let reason = over.recv_timeout(Duration::from_secs(60)).expect("the run ends");
        for thread in self.threads {
            thread.join().unwrap();
        }
        reason
    }

    fn count(&self, hart: usize, event: &Event) -> usize {
        self.logs[hart].events().iter().filter(|e| *e == event).count()
    }

    fn await_inside(&self, times: usize) {
        for log in &self.logs {
            log.await_event(&Event::Entered, times);
        }
    }
}

#[test]
fn harts_wait_for_the_start() {
    let run = machine(&[&[], &[]]);
    assert_eq!(run.control.reason(), None);
    let pause = run.control.pause().expect("all are out of the guest");
    assert_eq!(run.count(0, &Event::Entered) + run.count(1, &Event::Entered), 0);
    drop(pause);
    run.control.start();
    run.await_inside(1);
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_stop_before_the_start_ends_the_run() {
    let run = machine(&[&[], &[]]);
    assert!(run.control.stop(StopReason::Reset));
    run.control.start();
    let log = run.logs[0].clone();
    assert_eq!(run.end(), StopReason::Reset);
    assert!(!log.events().contains(&Event::Entered));
}

#[test]
fn a_stop_reaches_harts_that_idle_in_the_guest() {
    let run = machine(&[&[], &[], &[]]);
    run.control.start();
    run.await_inside(1);
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_stop_ends_a_pause() {
    let run = machine(&[&[], &[]]);
    run.control.start();
    let _pause = run.control.pause().unwrap();
    run.control.stop(StopReason::PowerOff);
    assert!(run.control.pause().is_none());
    assert_eq!(run.end(), StopReason::PowerOff);
}

#[test]
fn the_first_reason_counts() {
    let run = machine(&[&[]]);
    run.control.start();
    assert!(run.control.stop(StopReason::Reset));
    assert!(!run.control.stop(StopReason::PowerOff));
    assert_eq!(run.control.reason(), Some(StopReason::Reset));
    assert_eq!(run.end(), StopReason::Reset);
}

#[test]
fn of_threads_that_stop_at_once_one_is_first() {
    for _ in 0..50 {
        let run = machine(&[&[], &[]]);
        run.control.start();
        let wins = AtomicUsize::new(0);
        thread::scope(|scope| {
            for code in 0..4 {
                let (control, wins) = (&run.control, &wins);
                scope.spawn(move || {
                    if control.stop(StopReason::GuestFailure(code)) {
                        wins.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(wins.load(Ordering::Relaxed), 1);
        assert!(matches!(run.end(), StopReason::GuestFailure(0..4)));
    }
}

#[test]
fn a_pause_settles_every_hart_and_lets_none_run() {
    let run = machine(&[&[], &[]]);
    run.control.start();
    run.await_inside(1);
    for round in 1..=3 {
        let first = run.control.pause().unwrap();
        assert!(run.control.is_paused());
        let counts = |event| [run.count(0, event), run.count(1, event)];
        assert_eq!(counts(&Event::Settled).map(|n| n >= round), [true; 2]);
        let entered = counts(&Event::Entered);
        let second = run.control.pause().expect("a second pause finds them paused");
        assert_eq!(counts(&Event::Entered), entered);
        drop(first);
        assert!(run.control.is_paused());
        drop(second);
        run.logs[0].await_event(&Event::Entered, entered[0] + 1);
        run.logs[1].await_event(&Event::Entered, entered[1] + 1);
    }
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn an_answer_is_in_the_registers_when_a_hart_pauses() {
    let load = Step::Load { addr: 0x2000_0000, len: 4 };
    let run = machine(&[&[load]]);
    run.control.start();
    run.await_inside(2);
    let _pause = run.control.pause().unwrap();
    assert!(run.logs[0].events().contains(&Event::Loaded(vec![0; 4])));
    run.control.stop(StopReason::Requested);
    run.end();
}

#[test]
fn pause_and_resume_from_many_threads_lose_no_wake_up() {
    let run = machine(&[&[], &[], &[]]);
    run.control.start();
    thread::scope(|scope| {
        for _ in 0..3 {
            let control = &run.control;
            scope.spawn(move || {
                for _ in 0..200 {
                    drop(control.pause());
                }
            });
        }
    });
    assert!(!run.control.is_paused());
    drop(run.control.pause().unwrap());
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_suspended_system_sleeps_until_a_host_event() {
    let run = machine(&[&[SUSPEND]]);
    run.control.start();
    run.logs[0].await_event(&ASLEEP, 1);
    let pause = run.control.pause().expect("a sleeping hart is out of the guest");
    assert_eq!(run.count(0, &Event::Entered), 1);
    drop(pause);
    while run.count(0, &Event::Entered) == 1 {
        run.control.wake();
        thread::yield_now();
    }
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_suspended_system_can_be_stopped() {
    let run = machine(&[&[SUSPEND], &[]]);
    run.control.start();
    run.logs[0].await_event(&ASLEEP, 1);
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_wake_up_during_a_pause_counts_after_it() {
    let run = machine(&[&[SUSPEND]]);
    run.control.start();
    run.logs[0].await_event(&ASLEEP, 1);
    let pause = run.control.pause().unwrap();
    run.control.wake();
    drop(run.control.pause().unwrap());
    assert_eq!(run.count(0, &Event::Entered), 1);
    drop(pause);
    run.logs[0].await_event(&Event::Entered, 2);
    run.control.stop(StopReason::Requested);
    run.end();
}

#[test]
fn without_harts_a_stop_is_the_end() {
    let control = Arc::new(Control::new());
    control.start();
    assert!(control.pause().is_some());
    control.stop(StopReason::Requested);
    assert_eq!(control.wait(), StopReason::Requested);
}

#[test]
fn a_wait_with_a_limit_returns_whether_the_run_has_ended() {
    let control = Arc::new(Control::new());
    assert!(!control.ends_within(Duration::from_millis(1)));
    let stopper = Arc::clone(&control);
    let thread = thread::spawn(move || stopper.stop(StopReason::Requested));
    assert!(control.ends_within(Duration::from_secs(3600)), "the end ends the wait");
    thread.join().unwrap();
}

#[test]
fn a_held_hart_runs_tasks_on_its_own_thread_and_none_enters_the_guest() {
    let run = machine(&[&[], &[]]);
    run.control.hold();
    run.control.start();
    assert!(run.control.await_held());
    assert_eq!(run.control.harts(), [0, 1]);
    for id in [1, 0, 1] {
        let task = |hart: &mut dyn Hart| {
            hart.set(Reg::X(5), 7 + u64::from(hart.id())).unwrap();
            thread::current().name().map(str::to_owned)
        };
        assert_eq!(run.control.run_on(id, task).flatten().unwrap(), format!("vcpu{id}"));
        let value = run.control.run_on(id, |hart| hart.get(Reg::X(5)).unwrap());
        assert_eq!(value, Some(7 + u64::from(id)));
    }
    assert_eq!(run.control.run_on(2, |_| ()), None, "there is no hart 2");
    assert_eq!(run.count(0, &Event::Entered) + run.count(1, &Event::Entered), 0);
    // One of them, then both.
    run.control.release(Some(&[1]));
    run.logs[1].await_event(&Event::Entered, 1);
    assert_eq!(run.count(0, &Event::Entered), 0);
    run.control.release(None);
    run.logs[0].await_event(&Event::Entered, 1);
    run.control.hold_one(0);
    run.logs[0].await_event(&Event::Settled, 2);
    assert_eq!(run.control.run_on(0, |hart| hart.id()), Some(0));
    run.control.stop(StopReason::Requested);
    assert_eq!(run.control.run_on(0, |_| ()), None, "no task runs after the end");
    assert!(!run.control.await_held());
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_hold_and_a_pause_do_not_end_each_other() {
    let run = machine(&[&[]]);
    run.control.start();
    run.await_inside(1);
    let pause = run.control.pause().unwrap();
    run.control.hold();
    drop(pause);
    assert!(run.control.await_held());
    assert_eq!(run.count(0, &Event::Entered), 1);
    let pause = run.control.pause().unwrap();
    run.control.release(None);
    assert!(run.control.is_paused());
    assert_eq!(run.control.run_on(0, |hart| hart.id()), Some(0), "a paused one runs tasks as well");
    assert_eq!(run.count(0, &Event::Entered), 1);
    drop(pause);
    run.logs[0].await_event(&Event::Entered, 2);
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_pause_that_begins_during_another_outlives_it() {
    let run = machine(&[&[]]);
    run.control.start();
    run.await_inside(1);
    let first = run.control.pause().unwrap();
    let second = run.control.pause().unwrap();
    drop(first);
    assert!(run.control.is_paused());
    assert_eq!(run.control.run_on(0, |hart| hart.id()), Some(0));
    assert_eq!(run.count(0, &Event::Entered), 1);
    drop(second);
    run.logs[0].await_event(&Event::Entered, 2);
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}

#[test]
fn a_task_is_not_waited_for_once_the_machine_ends() {
    for _ in 0..50 {
        let run = machine(&[&[]]);
        run.control.hold();
        let control = Arc::clone(&run.control);
        let requester = thread::spawn(move || while control.run_on(0, |_| ()).is_some() {});
        run.control.stop(StopReason::Requested);
        requester.join().unwrap();
        assert_eq!(run.end(), StopReason::Requested);
    }
}

#[test]
fn a_hart_that_sleeps_runs_tasks_and_sleeps_on() {
    let run = machine(&[&[SUSPEND]]);
    run.control.start();
    run.logs[0].await_event(&ASLEEP, 1);
    run.control.hold();
    assert!(run.control.await_held());
    assert_eq!(run.control.run_on(0, |hart| hart.id()), Some(0));
    run.control.release(None);
    assert_eq!(run.count(0, &Event::Entered), 1, "it sleeps on");
    run.control.wake();
    run.logs[0].await_event(&Event::Entered, 2);
    run.control.stop(StopReason::Requested);
    assert_eq!(run.end(), StopReason::Requested);
}
