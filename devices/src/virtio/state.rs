//! The state of a virtio device, independent of its transport (virtio 1.3, chapters 2 and 3): status, features, queues.
//!
//! The status register only accepts the steps of a start, in order. FEATURES_OK is refused unless the driver has accepted
//! VERSION_1 and only offered features. A queue can be set up while the device does not run, and is fixed while it does;
//! RING_RESET allows it for a single queue. After an error of the driver the device sets NEEDS_RESET and does nothing until it is reset.

use std::sync::Arc;

use log::warn;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupt::DriverInterrupt;
use super::queue::{Queue, SetUp};
use super::{DeviceType, DmaMemory, Rings, VirtioDevice, feature};
use crate::device::{Access, AccessError};
use crate::irq::Interrupt;

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

/// A device, its queues, and their state.
pub(super) struct VirtioCore {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) kind: DeviceType,
    pub(super) memory: Arc<dyn DmaMemory>,
    /// One per queue; signalled by the kernel (ioeventfd) if possible, else by a write to QueueNotify.
    pub(super) kicks: Box<[EventFd]>,
    pub(super) logged: Logged,
    /// The driver has reset the device, which has not yet settled the requests from before. Until then the status is
    /// NEEDS_RESET, so that the driver does not start it.
    pub(super) is_resetting: bool,
    /// The same for queues that were reset alone, a bit each.
    pub(super) resetting_queues: u64,

    pub(super) queues: Box<[Queue]>,
    pub(super) interrupt: DriverInterrupt,
    /// Remote queues interrupt the driver directly.
    pub(super) uses_irqfd: bool,
    pub(super) state: DriverState,
}

/// Log lines about the driver that were written, each once.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Logged {
    failure: bool,
    version: bool,
    features: bool,
    pub(super) refused: bool,
}

/// The driver-visible state other than the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DriverState {
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) generation: u32,
    /// Number of chains that were refused as invalid.
    pub(super) refused: u64,
}

impl VirtioCore {
    pub(super) fn new(
        mut device: Box<dyn VirtioDevice>,
        memory: Arc<dyn DmaMemory>,
        interrupt: Interrupt,
    ) -> std::io::Result<Self> {
        let kind = device.device_type();
        let uses_irqfd = device.attach_interrupt(&interrupt);
        let queues: Box<[Queue]> =
            (0..).zip(&kind.queue_sizes).map(|(index, size)| Queue::new(index, *size)).collect();
        let kick = |_: &Queue| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kicks = queues.iter().map(kick).collect::<Result<_, _>>()?;
        let interrupt = DriverInterrupt::new(interrupt, kind.coalesces_interrupts)?;
        Ok(Self {
            device,
            kind,
            memory,
            kicks,
            logged: Logged::default(),
            is_resetting: false,
            resetting_queues: 0,
            queues,
            interrupt,
            uses_irqfd,
            state: DriverState::default(),
        })
    }

    pub(super) fn offered(&self) -> u64 {
        self.kind.features | self.kind.transport_features & feature::TRANSPORT
    }

    pub(super) fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.state.queue_sel).ok()?)
    }

    pub(super) fn is_active(&self, queue: u16) -> bool {
        self.queues.get(usize::from(queue)).is_some_and(Queue::is_active)
    }

    /// Number of chains that were refused as invalid.
    pub(super) fn refused(&self) -> u64 {
        self.state.refused
    }

    /// Wakes the I/O thread for a queue, if the kernel does not do it.
    pub(super) fn kick(&self, queue: u32) {
        let kick = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue));
        // Fails only if the counter is full: the thread is already woken.
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

    /// Changes the set-up of the selected queue, unless it is in use.
    pub(super) fn set_up_queue(&mut self, change: impl FnOnce(&mut SetUp)) -> Access {
        let is_running = self.state.is_running();
        let Some(queue) = self.queues.get_mut(self.state.queue_sel as usize) else {
            return Err(AccessError::NoRegister);
        };
        // Fixed as soon as it is ready: a ring in use never changes.
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
                    self.fail("a queue is not entirely in RAM");
                }
                self.start_remote(self.state.queue_sel as usize, 0);
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
        if !self.device.is_quiescent() {
            self.resetting_queues |= 1 << (index % 64);
        }
        Ok(())
    }

    /// True if the reset of the selected queue is not complete.
    pub(super) fn is_queue_resetting(&self) -> bool {
        self.state.queue_sel < 64 && self.resetting_queues >> self.state.queue_sel & 1 == 1
    }

    /// Completes resets that waited for the host.
    pub(super) fn settle(&mut self) {
        if (self.is_resetting || self.resetting_queues != 0) && self.device.is_quiescent() {
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
        // Only the device sets NEEDS_RESET; bits that are set stay set.
        let new = value & !now & !status::NEEDS_RESET;
        if now & !status::NEEDS_RESET & !value != 0 || new & !KNOWN != 0 {
            return Err(AccessError::ReadOnly);
        }
        if new & status::FAILED != 0 {
            self.state.status |= status::FAILED;
            self.stop();
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

    /// Takes one step of the start (virtio 1.3, section 3.1.1); returns false if it is not the next one.
    fn step(&mut self, step: u32) -> bool {
        let before = step_mask(step);
        if self.state.status & before != before {
            return false;
        }
        match step {
            status::FEATURES_OK => {
                // The driver reads the status back.
                if self.accepts_features() {
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

    /// Returns true if the device supports the features that the driver has accepted; else logs the reason.
    fn accepts_features(&mut self) -> bool {
        let taken = self.state.driver_features;
        let unknown = taken & !self.offered();
        if unknown != 0 {
            if !std::mem::replace(&mut self.logged.features, true) {
                let name = self.kind.name;
                warn!(
                    "{name}: the guest's driver accepts features that were not offered ({unknown:#x}): FEATURES_OK is refused"
                );
            }
            return false;
        }
        let is_known = taken & feature::VERSION_1 != 0 || self.kind.version_1_is_optional;
        if !is_known {
            self.wants_version_1(format_args!("does not accept VIRTIO_F_VERSION_1"));
        }
        is_known
    }

    /// Logs that the driver is one for virtio-mmio version 1, which cannot start the device.
    pub(super) fn wants_version_1(&mut self, what: std::fmt::Arguments<'_>) {
        if !std::mem::replace(&mut self.logged.version, true) {
            warn!(
                "{}: the guest's driver {what}, as for legacy virtio-mmio (version 1), which rvmm does not support: the device stays unused \
                 (it is version 2; build the guest with a driver for that, one that runs with QEMU's -global virtio-mmio.force-legacy=false)",
                self.kind.name
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
            self.fail("a queue is not entirely in RAM");
            return;
        }
        self.share_line();
        (0..self.queues.len()).for_each(|queue| self.start_remote(queue, 0));
        self.device.activate(self.state.driver_features);
        // There is no notification for buffers made available before.
        self.kick_active();
    }

    /// Remote queues raise the line from now on, if they can.
    pub(super) fn share_line(&mut self) {
        if self.uses_irqfd {
            self.interrupt.share(true);
        }
    }

    /// Passes a started queue to the device, if it is a remote one; its backend begins with the entry `next`.
    pub(super) fn start_remote(&mut self, queue: usize, next: u16) {
        let rings = self.queues.get(queue).and_then(Queue::rings);
        let rings = rings.map(|rings| Rings { next, ..rings });
        if let (Some(rings), Some(kick)) = (rings, self.kicks.get(queue))
            && self.kind.remote.include(rings.queue, self.state.driver_features)
        {
            self.device.start_remote(rings, kick);
        }
    }

    /// Stops the device and clears everything that the driver has set up.
    pub(super) fn reset_device(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(|queue| queue.reset(false));
        let DriverState { generation, refused, .. } = self.state;
        self.state = DriverState { generation, refused, ..DriverState::default() };
        self.interrupt.clear(u32::MAX);
        self.unshare_line();
        self.interrupt.forget();
        self.resetting_queues = 0;
        self.is_resetting = !self.device.is_quiescent();
        if self.is_resetting {
            self.state.status = status::NEEDS_RESET;
        }
    }

    /// Remote queues no longer raise the line.
    fn unshare_line(&mut self) {
        if self.uses_irqfd {
            self.interrupt.share(false);
        }
    }

    /// Stops the device; the driver's registers stay.
    fn stop(&mut self) {
        self.device.reset();
        self.unshare_line();
        self.interrupt.forget();
        self.queues.iter_mut().for_each(Queue::stop);
    }

    /// Stops the device until it is reset, and tells the driver by NEEDS_RESET.
    pub(super) fn fail(&mut self, why: &str) {
        if !std::mem::replace(&mut self.logged.failure, true) {
            warn!("{}: {why}: the device stops until the guest resets it", self.kind.name);
        }
        self.stop();
        self.state.status |= status::NEEDS_RESET;
        self.interrupt.raise_configuration();
    }
}

impl DriverState {
    pub(super) fn is_running(&self) -> bool {
        self.status & (status::DRIVER_OK | status::FAILED | status::NEEDS_RESET)
            == status::DRIVER_OK
    }

    /// True for indirect descriptors and for event indices, if the driver has accepted them.
    pub(super) fn ring_features(&self) -> (bool, bool) {
        let has = |bit| self.driver_features & bit != 0;
        (has(feature::INDIRECT_DESC), has(feature::EVENT_IDX))
    }
}

/// Bits that a driver may write.
const KNOWN: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

/// The status bits required before `step`, without ACKNOWLEDGE: it has no meaning for the device, and some drivers leave it out (U-Boot
/// sets it once, resets the device, and continues with DRIVER).
fn step_mask(step: u32) -> u32 {
    let before = STEPS.into_iter().take_while(|s| *s != step);
    before.filter(|s| *s != status::ACKNOWLEDGE).fold(0, |mask, step| mask | step)
}
