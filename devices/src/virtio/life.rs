//! The life of a virtio device, whatever its transport (virtio 1.3, chapters 2 and 3): status, features, queues, work.
//!
//! The status register is a table of steps: what is no step changes nothing. The features are refused unless the driver takes
//! VERSION_1 and nothing that was not offered. A queue is set up while the device does not run and frozen while it does;
//! RING_RESET opens one alone. A device that the driver has broken says NEEDS_RESET and is silent until it is reset.

use std::sync::Arc;

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupt::{Interrupt, isr};
use super::queue::{Queue, SetUp};
use super::{DmaMemory, VirtioDevice, feature};
use crate::device::{Access, AccessError};
use crate::irq::IrqLine;

/// Bits of the status register (virtio 1.3, section 2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 64;
    pub(crate) const FAILED: u32 = 128;
}

/// The steps of a start, in order (virtio 1.3, section 3.1.1).
const STEPS: [u32; 4] =
    [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];

/// A device, its queues, and what the driver has made of them.
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) memory: Arc<dyn DmaMemory>,
    /// One per queue; the kernel rings them where it can, else a write to QueueNotify does.
    pub(super) kicks: Box<[EventFd]>,
    pub(super) said: Said,
    /// The driver has reset the device, which is not through with what it had taken before. Until it is, the status says
    /// NEEDS_RESET, so that nothing starts.
    is_resetting: bool,
    /// The same for queues that were reset alone, a bit each.
    resetting_queues: u64,

    pub(super) queues: Box<[Queue]>,
    pub(super) interrupt: Interrupt,
    pub(super) state: State,
}

/// What was said about the driver, each once.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Said {
    broken: bool,
    version: bool,
    features: bool,
    pub(super) refused: bool,
}

/// What the driver sees besides the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct State {
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) generation: u32,
    /// Chains that went back unserved because they made no sense.
    pub(super) refused: u64,
}

impl Core {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<dyn DmaMemory>,
        irq: Arc<dyn IrqLine>,
    ) -> std::io::Result<Self> {
        let queues: Box<[Queue]> =
            (0..).zip(device.queue_sizes()).map(|(index, size)| Queue::new(index, *size)).collect();
        let kick = |_: &Queue| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kicks = queues.iter().map(kick).collect::<Result<_, _>>()?;
        let interrupt = Interrupt::new(irq, device.may_hold())?;
        Ok(Self {
            device,
            memory,
            kicks,
            said: Said::default(),
            is_resetting: false,
            resetting_queues: 0,
            queues,
            interrupt,
            state: State::default(),
        })
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | self.device.transport_features() & feature::TRANSPORT
    }

    pub(super) fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.state.queue_sel).ok()?)
    }

    pub(super) fn is_active(&self, queue: u16) -> bool {
        self.queues.get(usize::from(queue)).is_some_and(Queue::is_active)
    }

    /// Chains that went back unserved because they made no sense.
    pub(super) fn refused(&self) -> u64 {
        self.state.refused
    }

    /// Wakes the I/O thread for a queue, where the kernel does not do it.
    pub(super) fn ring(&self, queue: u32) {
        let kick = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue));
        // Refused means that the counter is full: it is awake.
        let _ = kick.map(|kick| kick.write(1));
    }

    pub(super) fn take_features(&mut self, value: u32) -> Access {
        if self.state.status & status::FEATURES_OK != 0 {
            return Err(AccessError::ReadOnly);
        }
        let shift = match self.state.driver_features_sel {
            0 => 0,
            1 => 32,
            // Nothing is offered there.
            _ if value == 0 => return Ok(()),
            _ => return Err(AccessError::NoRegister),
        };
        let features = self.state.driver_features & !(u64::from(u32::MAX) << shift);
        self.state.driver_features = features | u64::from(value) << shift;
        Ok(())
    }

    /// Changes the set-up of the selected queue, where it is not in use.
    pub(super) fn set_up_queue(&mut self, change: impl FnOnce(&mut SetUp)) -> Access {
        let is_running = self.state.is_running();
        let Some(queue) = self.queues.get_mut(self.state.queue_sel as usize) else {
            return Err(AccessError::NoRegister);
        };
        // Frozen as soon as it is ready: nothing moves a ring that is in use.
        if self.resetting_queues != 0 || queue.is_ready() || is_running && !queue.was_reset() {
            return Err(AccessError::ReadOnly);
        }
        change(&mut queue.set_up);
        Ok(())
    }

    pub(super) fn make_ready(&mut self, value: u32) -> Access {
        let (is_running, memory) = (self.state.is_running(), Arc::clone(&self.memory));
        let (indirect, event_idx) = self.state.ring_features();
        let Some(queue) = self.queues.get_mut(self.state.queue_sel as usize) else {
            return Err(AccessError::NoRegister);
        };
        match value {
            _ if self.resetting_queues != 0 => return Err(AccessError::ReadOnly),
            0 if !is_running => queue.set_ready(false),
            1 if queue.is_ready() => {}
            1 if !is_running => queue.set_ready(true),
            1 if queue.was_reset() => {
                queue.set_ready(true);
                if !queue.start(memory.view(), indirect, event_idx) {
                    self.break_down("a queue is not all in RAM");
                }
                self.hand_over(self.state.queue_sel as usize);
            }
            _ => return Err(AccessError::ReadOnly),
        }
        Ok(())
    }

    /// RING_RESET (virtio 1.3, section 2.6.1).
    pub(super) fn reset_queue(&mut self, value: u32) -> Access {
        let negotiated = self.state.driver_features & feature::RING_RESET != 0;
        if value != 1 || !negotiated || !self.state.is_running() {
            return Err(AccessError::ReadOnly);
        }
        let index = self.state.queue_sel;
        let Some(queue) = self.queues.get_mut(index as usize) else {
            return Err(AccessError::NoRegister);
        };
        if let Ok(index) = u16::try_from(index) {
            self.device.reset_queue(index);
        }
        queue.reset(true);
        if !self.device.is_settled() {
            self.resetting_queues |= 1 << (index % 64);
        }
        Ok(())
    }

    /// Whether the reset of the selected queue is not over.
    pub(super) fn is_queue_resetting(&self) -> bool {
        self.state.queue_sel < 64 && self.resetting_queues >> self.state.queue_sel & 1 == 1
    }

    /// Ends resets that waited for the host's end.
    pub(super) fn settle(&mut self) {
        if (self.is_resetting || self.resetting_queues != 0) && self.device.is_settled() {
            self.resetting_queues = 0;
            if std::mem::take(&mut self.is_resetting) {
                self.state.status = 0;
            }
        }
    }

    pub(super) fn write_status(&mut self, value: u32) -> Access {
        let now = self.state.status;
        if value == 0 {
            self.reset_device();
            return Ok(());
        }
        // NEEDS_RESET is the device's; what is set stays set.
        let new = value & !now & !status::NEEDS_RESET;
        if now & !status::NEEDS_RESET & !value != 0 || new & !KNOWN != 0 {
            return Err(AccessError::ReadOnly);
        }
        if new & status::FAILED != 0 {
            self.state.status |= status::FAILED;
            self.silence();
            return Ok(());
        }
        if now & (status::FAILED | status::NEEDS_RESET) != 0 {
            return Err(AccessError::ReadOnly);
        }
        for step in STEPS {
            if new & step != 0 && !self.step(step) {
                return Err(AccessError::ReadOnly);
            }
        }
        Ok(())
    }

    /// One step of the start (virtio 1.3, section 3.1.1); false where it is not the next one.
    fn step(&mut self, step: u32) -> bool {
        let before = step_mask(step);
        if self.state.status & before != before {
            return false;
        }
        match step {
            status::FEATURES_OK => {
                // The driver finds out by reading the status back.
                if self.agrees() {
                    self.state.status |= step;
                }
            }
            status::DRIVER_OK => {
                self.state.status |= step;
                self.start();
            }
            _ => self.state.status |= step,
        }
        true
    }

    /// Whether the device can work with the features that the driver has taken; the log says why not.
    fn agrees(&mut self) -> bool {
        let taken = self.state.driver_features;
        let unknown = taken & !self.offered();
        if unknown != 0 {
            if !std::mem::replace(&mut self.said.features, true) {
                let name = self.device.name();
                warn!(
                    "{name}: the guest's driver takes features that were not offered ({unknown:#x}), and is refused"
                );
            }
            return false;
        }
        let is_known = taken & feature::VERSION_1 != 0 || self.device.may_lack_version_1();
        if !is_known {
            self.wants_version_1(format_args!("does not take VIRTIO_F_VERSION_1"));
        }
        is_known
    }

    /// The driver has done what only drivers of virtio-mmio version 1 do: its device never comes up.
    pub(super) fn wants_version_1(&mut self, what: std::fmt::Arguments<'_>) {
        if !std::mem::replace(&mut self.said.version, true) {
            warn!(
                "{}: the guest's driver {what}, as for legacy virtio-mmio (version 1), which rvmm does not have: the device stays unused \
                 (it has version 2; build the guest with a driver for that, one that runs with QEMU's -global virtio-mmio.force-legacy=false)",
                self.device.name()
            );
        }
    }

    fn start(&mut self) {
        let (indirect, event_idx) = self.state.ring_features();
        let memory = Arc::clone(&self.memory);
        let start = |queue: &mut Queue| {
            !queue.is_ready() || queue.start(memory.view(), indirect, event_idx)
        };
        if !self.queues.iter_mut().all(start) {
            self.break_down("a queue is not all in RAM");
            return;
        }
        if self.device.raises_line() {
            self.interrupt.share(true);
        }
        (0..self.queues.len()).for_each(|queue| self.hand_over(queue));
        self.device.activate(self.state.driver_features);
        // What was made available before is not announced again.
        (0..).zip(&self.queues).filter(|(_, queue)| queue.is_active()).for_each(|(index, _)| {
            self.ring(index);
        });
    }

    /// Tells the device that a queue has started, where somebody else works on it.
    fn hand_over(&mut self, queue: usize) {
        let rings = self.queues.get(queue).and_then(Queue::rings);
        if let (Some(rings), Some(kick)) = (rings, self.kicks.get(queue))
            && self.device.is_remote(rings.queue, self.state.driver_features)
        {
            self.device.start_remote(rings, kick);
        }
    }

    /// Stops all work and forgets everything the driver has set up.
    pub(super) fn reset_device(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(|queue| queue.reset(false));
        let State { generation, refused, .. } = self.state;
        self.state = State { generation, refused, ..State::default() };
        self.interrupt.clear(u32::MAX);
        self.share_nothing();
        self.interrupt.forget();
        self.resetting_queues = 0;
        self.is_resetting = !self.device.is_settled();
        if self.is_resetting {
            self.state.status = status::NEEDS_RESET;
        }
    }

    /// Nobody works on the queues any more who raises the line.
    fn share_nothing(&mut self) {
        if self.device.raises_line() {
            self.interrupt.share(false);
        }
    }

    /// Stops all work; the driver's registers stay.
    fn silence(&mut self) {
        self.device.reset();
        self.share_nothing();
        self.interrupt.forget();
        self.queues.iter_mut().for_each(Queue::stop);
    }

    /// The driver has done what cannot be gone on from.
    pub(super) fn break_down(&mut self, why: &str) {
        if !std::mem::replace(&mut self.said.broken, true) {
            warn!("{}: {why}: the device waits for its reset", self.device.name());
        }
        self.silence();
        self.state.status |= status::NEEDS_RESET;
        self.interrupt.raise(isr::CONFIG_CHANGE);
    }
}

impl State {
    pub(super) fn is_running(&self) -> bool {
        self.status & (status::DRIVER_OK | status::FAILED | status::NEEDS_RESET)
            == status::DRIVER_OK
    }

    /// Indirect descriptors and event indices, where the driver has taken them.
    fn ring_features(&self) -> (bool, bool) {
        let has = |bit| self.driver_features & bit != 0;
        (has(feature::INDIRECT_DESC), has(feature::EVENT_IDX))
    }
}

/// Bits that a driver may write.
const KNOWN: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

/// What has to be set before `step`. ACKNOWLEDGE tells the device nothing, and drivers leave it out: U-Boot sets it once, resets the
/// device, and goes on with DRIVER.
fn step_mask(step: u32) -> u32 {
    let before = STEPS.into_iter().take_while(|s| *s != step);
    before.filter(|s| *s != status::ACKNOWLEDGE).fold(0, |mask, step| mask | step)
}
