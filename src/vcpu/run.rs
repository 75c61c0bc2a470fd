//! A hart's thread: bind, wait for the start, then the run loop.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::debug;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::context::MachineContext;
use super::control::{Control, Order, Registration, WakeReason};
use super::dispatch::{Flow, dispatch};
use super::hart::{Csr, Hart, Reg};
use super::record::Recorder;
use super::sbi;
use super::stop::StopReason;
use super::trap;
use crate::riscv::trap::interrupt;

/// Stack of a hart's thread; its deepest call is a log line.
const STACK: usize = 256 << 10;

/// Spawns a hart's thread, `vcpuN`, pinned to host CPU `affinity` if one is given. When this returns the hart is bound and
/// registered with `control`; it waits for [`Control::start`], and runs until `control` has a reason to stop. The thread drops
/// the hart before [`Control::wait`] returns. `recorder` receives its exits and is dropped with it.
///
/// # Errors
/// The host has no thread left, has no such CPU, or cannot bind the hart; the message names the cause.
pub fn spawn_hart(
    hart: Box<dyn Hart>,
    context: Arc<MachineContext>,
    control: Arc<Control>,
    affinity: Option<u32>,
    recorder: impl Recorder,
) -> io::Result<JoinHandle<()>> {
    let id = hart.id();
    let (report, bound) = sync_channel(1);
    let body = move || {
        // The spawning thread waits for the report, so sending cannot fail.
        let mut hart = hart;
        match begin(hart.as_mut(), &control, affinity) {
            Ok(registration) => {
                let _ = report.send(Ok(()));
                serve(hart, registration, &context, &control, recorder);
            }
            Err(error) => {
                let _ = report.send(Err(error));
            }
        }
    };
    let thread = thread::Builder::new().name(format!("vcpu{id}")).stack_size(STACK).spawn(body)?;
    match bound.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other(format!("The thread of hart {id} died before it started"))),
    }
}

fn serve(
    mut hart: Box<dyn Hart>,
    registration: Registration,
    context: &MachineContext,
    control: &Arc<Control>,
    mut recorder: impl Recorder,
) {
    let reason = run_loop(hart.as_mut(), context, control, &mut recorder).unwrap_or_else(|error| {
        let id = hart.id();
        Some(StopReason::HostFailure(format!("Hart {id} cannot continue: {error}")))
    });
    if let Some(reason) = reason {
        control.stop(reason);
    }
    debug!("Hart {} ends", hart.id());
    drop(recorder);
    drop(hart);
    drop(registration);
}

fn begin(
    hart: &mut dyn Hart,
    control: &Arc<Control>,
    affinity: Option<u32>,
) -> io::Result<Registration> {
    if let Some(cpu) = affinity {
        pin(hart.id(), cpu)?;
    }
    let kick = hart.bind()?;
    Ok(control.register(hart.id(), kick))
}

fn pin(hart: u32, cpu: u32) -> io::Result<()> {
    let refused = |why: &str| {
        let what = format!("Cannot pin hart {hart} to host CPU {cpu}: {why}");
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    let index = usize::try_from(cpu).unwrap_or(usize::MAX);
    if index >= CpuSet::MAX_CPU {
        return Err(refused("there is no such CPU"));
    }
    let mut cpus = CpuSet::new();
    cpus.set(index);
    sched_setaffinity(None, &cpus).map_err(|errno| match errno {
        rustix::io::Errno::INVAL => {
            refused("the host has no such CPU, or does not let rvmm use it")
        }
        other => refused(&io::Error::from(other).to_string()),
    })
}

/// The run loop. `None` if the control ended it.
fn run_loop(
    hart: &mut dyn Hart,
    context: &MachineContext,
    control: &Control,
    recorder: &mut impl Recorder,
) -> io::Result<Option<StopReason>> {
    if !follow_order(hart, control)? {
        return Ok(None);
    }
    let mut bus = context.bus.view();
    loop {
        recorder.entering();
        // The exit is not moved: that would cost as much as the rest of this loop.
        let flow = match hart.enter() {
            Ok(ref mut exit) => {
                recorder.left();
                let flow = dispatch(exit, context, &mut bus);
                recorder.answered(exit, &flow);
                match flow {
                    Flow::Resume if !recorder.wants_pc(&Flow::Resume) => continue,
                    other => other,
                }
            }
            Err(error) => return Err(error),
        };
        if recorder.wants_pc(&flow)
            && let Ok(pc) = hart.get(Reg::Pc)
        {
            recorder.at(pc);
        }
        match flow {
            Flow::Resume => {}
            Flow::Retry => {
                hart.abandon();
                thread::yield_now();
            }
            Flow::Yield => {
                if !follow_order(hart, control)? {
                    return Ok(None);
                }
                if let Some(firmware) = &context.firmware {
                    firmware.handle_kick(hart)?;
                }
                if let Some(restarts) = &context.restarts {
                    restarts.handle_kick(hart)?;
                }
                if let Some(wakeups) = &context.wakeups {
                    wakeups.handle_kick(hart)?;
                }
            }
            Flow::Suspend => {
                if !sleep(hart, context, control)? {
                    return Ok(None);
                }
            }
            Flow::Resolve(trouble) => {
                if let Some(reason) = trap::resolve(hart, context, trouble)? {
                    return Ok(Some(reason));
                }
            }
            Flow::Stop(reason) => return Ok(Some(*reason)),
        }
    }
}

/// Follows the control's order; false if the run ends.
#[cold]
fn follow_order(hart: &mut dyn Hart, control: &Control) -> io::Result<bool> {
    match control.order(hart.id()) {
        Order::Run => Ok(true),
        Order::End => Ok(false),
        Order::Park => {
            hart.settle()?;
            Ok(park(hart, |id| control.park(id)))
        }
    }
}

/// Waits, and runs the hart's tasks meanwhile; false if the run ends.
fn park(hart: &mut dyn Hart, wait: impl Fn(u32) -> WakeReason) -> bool {
    loop {
        match wait(hart.id()) {
            WakeReason::Run => return true,
            WakeReason::End => return false,
            WakeReason::Task(task) => task(hart),
        }
    }
}

/// Sleeps until the system is woken: by its timer, if the timer interrupt is enabled; by an interrupt that its controller
/// forwards; by console input. Returns at once if one of them is pending. The count of host events is read before that check,
/// so that none is missed after it. False if the run ends.
///
/// The wake-up condition uses the hart's registers as the guest left them; the kernel resets them when the hart enters the guest
/// again (SBI 13.1).
#[cold]
fn sleep(hart: &mut dyn Hart, context: &MachineContext, control: &Control) -> io::Result<bool> {
    hart.settle()?;
    let events = control.events();
    let is_running = loop {
        let Some(limit) = time_to_sleep(hart, context)? else { break follow_order(hart, control)? };
        match control.sleep(hart.id(), events, limit) {
            WakeReason::Run => break true,
            WakeReason::End => break false,
            WakeReason::Task(task) => task(hart),
        }
    };
    if let Some(restarts) = context.restarts.as_ref().filter(|_| is_running) {
        restarts.expect(hart.id());
    }
    Ok(is_running)
}

/// Maximum time that a suspended system sleeps, until its timer is due; `None` if it must not sleep.
fn time_to_sleep(hart: &dyn Hart, context: &MachineContext) -> io::Result<Option<Duration>> {
    let (sip, sie) = (hart.get(Reg::Csr(Csr::Sip))?, hart.get(Reg::Csr(Csr::Sie))?);
    // The interrupt controller has its own masks for external interrupts.
    if sip & (interrupt::SEI | sie & interrupt::STI) != 0 || sbi::has_input(context) {
        return Ok(None);
    }
    let due = hart.get(Reg::TimeCompare)?;
    if sie & interrupt::STI == 0 || due == u64::MAX {
        return Ok(Some(Duration::MAX));
    }
    // Round up: waking half a tick early is too early.
    let ticks = due.saturating_sub(hart.get(Reg::Time)?).saturating_add(1);
    let hz = context.timebase_hz.max(1);
    let nanos = (ticks % hz).saturating_mul(1_000_000_000) / hz;
    Ok(Some(Duration::from_secs(ticks / hz).saturating_add(Duration::from_nanos(nanos))))
}
