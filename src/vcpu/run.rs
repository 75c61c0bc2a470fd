//! A hart's thread: bind, wait for the start, and then the loop.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::debug;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::control::{Control, Order, Service, Wakeup};
use super::dispatch::{Flow, dispatch};
use super::hart::{Csr, Hart, Reg};
use super::record::Recorder;
use super::sbi;
use super::stop::StopReason;
use super::trap;
use super::world::World;

/// Stack of a hart's thread; its deepest call is a log line.
const STACK: usize = 256 << 10;

/// `sip.SEIP`: an external interrupt is pending.
const SEIP: u64 = 1 << 9;

/// `sip.STIP`: the timer's interrupt is pending; the same bit of `sie` enables it.
const STIP: u64 = 1 << 5;

/// Gives a hart its thread, `vcpuN`, on host CPU `affinity` if one is named. When this returns the hart is bound and known
/// to `control`; it waits for [`Control::start`], and runs until `control` has a reason to stop. The thread drops the hart
/// before [`Control::wait`] returns. `recorder` sees its exits and is dropped with it.
///
/// # Errors
/// The host gives no thread, has no such CPU, or cannot bind the hart; the message says which.
pub fn spawn_hart(
    hart: Box<dyn Hart>,
    world: Arc<World>,
    control: Arc<Control>,
    affinity: Option<u32>,
    recorder: impl Recorder,
) -> io::Result<JoinHandle<()>> {
    let id = hart.id();
    let (report, bound) = sync_channel(1);
    let body = move || {
        // The spawner waits for the report, so that it can always be sent.
        let mut hart = hart;
        match begin(hart.as_mut(), &control, affinity) {
            Ok(service) => {
                let _ = report.send(Ok(()));
                serve(hart, service, &world, &control, recorder);
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
    service: Service,
    world: &World,
    control: &Arc<Control>,
    mut recorder: impl Recorder,
) {
    let reason = live(hart.as_mut(), world, control, &mut recorder).unwrap_or_else(|error| {
        let id = hart.id();
        Some(StopReason::HostFailure(format!("Hart {id} cannot go on: {error}")))
    });
    if let Some(reason) = reason {
        control.stop(reason);
    }
    debug!("Hart {} ends", hart.id());
    drop(recorder);
    drop(hart);
    drop(service);
}

fn begin(
    hart: &mut dyn Hart,
    control: &Arc<Control>,
    affinity: Option<u32>,
) -> io::Result<Service> {
    if let Some(cpu) = affinity {
        pin(hart.id(), cpu)?;
    }
    let kick = hart.bind()?;
    Ok(control.enlist(hart.id(), kick))
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

/// The loop. `None` where the control ended it.
fn live(
    hart: &mut dyn Hart,
    world: &World,
    control: &Control,
    recorder: &mut impl Recorder,
) -> io::Result<Option<StopReason>> {
    if !obey(hart, control)? {
        return Ok(None);
    }
    loop {
        recorder.entering();
        // The exit stays where it is: to move it would cost as much as the rest of this loop.
        let flow = match hart.enter() {
            Ok(ref mut exit) => {
                recorder.left();
                let flow = dispatch(exit, world);
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
                if !obey(hart, control)? {
                    return Ok(None);
                }
                if let Some(firmware) = &world.firmware {
                    firmware.attend(hart)?;
                }
                if let Some(restarts) = &world.restarts {
                    restarts.attend(hart)?;
                }
            }
            Flow::Suspend => {
                if !sleep(hart, world, control)? {
                    return Ok(None);
                }
            }
            Flow::Resolve(trouble) => {
                if let Some(reason) = trap::resolve(hart, world, trouble)? {
                    return Ok(Some(reason));
                }
            }
            Flow::Stop(reason) => return Ok(Some(*reason)),
        }
    }
}

/// Does what the control says; false where the run ends.
#[cold]
fn obey(hart: &mut dyn Hart, control: &Control) -> io::Result<bool> {
    match control.order(hart.id()) {
        Order::Run => Ok(true),
        Order::End => Ok(false),
        Order::Park => {
            hart.settle()?;
            Ok(rest(hart, |id| control.park(id)))
        }
    }
}

/// Waits, and does what the hart is visited for meanwhile; false where the run ends.
fn rest(hart: &mut dyn Hart, wait: impl Fn(u32) -> Wakeup) -> bool {
    loop {
        match wait(hart.id()) {
            Wakeup::Run => return true,
            Wakeup::End => return false,
            Wakeup::Task(task) => task(hart),
        }
    }
}

/// Sleeps until something wakes the system: its timer, if it has the timer's interrupt enabled; an interrupt that its controller lets
/// through to it; console input. Not at all where one of them is there already. The events of the host are counted from before that
/// look, so that none is missed after it. False where the run ends.
///
/// What wakes it is the hart as the guest has left it; the kernel starts it anew when it enters the guest (SBI 13.1).
#[cold]
fn sleep(hart: &mut dyn Hart, world: &World, control: &Control) -> io::Result<bool> {
    hart.settle()?;
    let events = control.events();
    let goes_on = loop {
        let Some(limit) = time_to_sleep(hart, world)? else { break obey(hart, control)? };
        match control.sleep(hart.id(), events, limit) {
            Wakeup::Run => break true,
            Wakeup::End => break false,
            Wakeup::Task(task) => task(hart),
        }
    };
    if let Some(restarts) = world.restarts.as_ref().filter(|_| goes_on) {
        restarts.expect(hart.id());
    }
    Ok(goes_on)
}

/// How long a suspended system sleeps at most, until its timer is due; `None` where it is awake.
fn time_to_sleep(hart: &dyn Hart, world: &World) -> io::Result<Option<Duration>> {
    let (sip, sie) = (hart.get(Reg::Csr(Csr::Sip))?, hart.get(Reg::Csr(Csr::Sie))?);
    // The controller has masks of its own for an external interrupt.
    if sip & (SEIP | sie & STIP) != 0 || sbi::has_input(world) {
        return Ok(None);
    }
    let due = hart.get(Reg::TimeCompare)?;
    if sie & STIP == 0 || due == u64::MAX {
        return Ok(Some(Duration::MAX));
    }
    // Half a tick early is too early.
    let ticks = due.saturating_sub(hart.get(Reg::Time)?).saturating_add(1);
    let hz = world.timebase_hz.max(1);
    let rest = (ticks % hz).saturating_mul(1_000_000_000) / hz;
    Ok(Some(Duration::from_secs(ticks / hz).saturating_add(Duration::from_nanos(rest))))
}
