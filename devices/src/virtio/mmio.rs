//! Virtio over MMIO, version 2 (virtio 1.3, section 4.2): the registers. Their semantics are in `state.rs`.
//!
//! An access of 8 bytes accesses two registers, the lower first, as on QEMU's `virt`: guests access 64-bit addresses that way.
//!
//! Not implemented: shared memory regions (all have the length -1, as for those that do not exist) and version 1, the legacy
//! interface (4.2.4): writes to its registers are logged.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::hold::Hold;
use super::queue::Queue;
use super::state::VirtioCore;
use super::{DmaMemory, VirtioDevice};
use crate::catalog::BuildError;
use crate::device::{
    Access, AccessError, FdtDesc, FdtProperty, FdtValue, Interest, IoEvent, MmioDevice,
    RegisterName, Source, Unlocked, read_words, write_words,
};
use crate::irq::{Interrupt, PendingInterrupt, StatusPin};
use crate::lifecycle::{Lifecycle, PauseError, RestoreError, SaveError, SavedState};

/// Tokens from this one on are the queues' kicks; those below are the device's own.
pub const KICK: u32 = 1 << 31;

/// The token of the timer for interrupt coalescing.
const HOLD: u32 = u32::MAX;

/// Size in bytes: the registers and the configuration space.
const SIZE: u64 = 0x1000;

/// Offset of the configuration space.
const CONFIG: u64 = 0x100;

mod reg;

use reg::register_name;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// "QEMU", little-endian: the subsystem vendor. The specification gives it no meaning, but drivers written for QEMU's `virt`
/// (xv6, RT-Thread and others) accept no other.
const VENDOR: u32 = 0x554d_4551;

/// A virtio device with the MMIO transport.
pub struct VirtioMmio {
    core: VirtioCore,
}

/// The registers that a driver accesses in every interrupt.
struct InterruptRegisters(Arc<StatusPin>);

impl Unlocked for InterruptRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let is_ours = offset == reg::INTERRUPT_STATUS && data.len() == 4;
        if is_ours {
            data.copy_from_slice(&self.0.status().to_le_bytes());
        }
        is_ours
    }

    fn write(&self, offset: u64, data: &[u8]) -> bool {
        let (reg::INTERRUPT_ACK, Ok(bits)) = (offset, data.try_into()) else { return false };
        if self.0.clear(u32::from_le_bytes(bits)) {
            self.0.drive();
        }
        true
    }
}

impl VirtioMmio {
    /// Creates the transport of `device`, which accesses `memory` and interrupts its driver by `interrupt`: a line, since this
    /// transport has no messages.
    ///
    /// # Errors
    /// The host has no event descriptors left.
    pub fn create(
        device: Box<dyn VirtioDevice>,
        memory: Arc<dyn DmaMemory>,
        interrupt: Interrupt,
    ) -> Result<Self, BuildError> {
        let model = device.device_type().name;
        let core = VirtioCore::new(device, memory, interrupt)
            .map_err(|source| BuildError::Host { model, what: "event descriptors", source })?;
        Ok(Self { core })
    }

    /// Number of requests that were refused as invalid since the device was created.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.core.refused()
    }

    fn read_register(&self, register: u64) -> Result<u32, AccessError> {
        let core = &self.core;
        let state = &core.state;
        Ok(match register {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => core.kind.id,
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => half(core.offered(), state.device_features_sel),
            reg::QUEUE_SIZE_MAX => core.selected().map_or(0, |queue| queue.max_size().into()),
            reg::QUEUE_READY => core.selected().is_some_and(Queue::is_ready).into(),
            reg::INTERRUPT_STATUS => core.interrupt.status(),
            reg::STATUS => state.status,
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => {
                u32::MAX
            }
            // A reset is nearly always complete before the driver can read this.
            reg::QUEUE_RESET => core.is_queue_resetting().into(),
            reg::CONFIG_GENERATION => state.generation,
            other if is_write_only(other) => return Err(AccessError::WriteOnly),
            _ => return Err(AccessError::NoRegister),
        })
    }

    fn write_register(&mut self, register: u64, value: u32) -> Access {
        let core = &mut self.core;
        match register {
            reg::DEVICE_FEATURES_SEL => core.state.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => core.state.driver_features_sel = value,
            reg::DRIVER_FEATURES => return core.take_features(value),
            reg::QUEUE_SEL => core.state.queue_sel = value,
            reg::QUEUE_NOTIFY => core.kick(value),
            reg::INTERRUPT_ACK => core.interrupt.clear(value),
            reg::STATUS => return core.write_status(value),
            reg::SHM_SEL => {}
            reg::QUEUE_RESET => return core.reset_queue(value),
            reg::QUEUE_READY => return core.make_ready(value),
            reg::QUEUE_SIZE => return core.set_up_queue(|queue| queue.size = value),
            reg::QUEUE_DESC_LOW => {
                return core.set_up_queue(|q| set_low(&mut q.descriptors, value));
            }
            reg::QUEUE_DESC_HIGH => {
                return core.set_up_queue(|q| set_high(&mut q.descriptors, value));
            }
            reg::QUEUE_DRIVER_LOW => return core.set_up_queue(|q| set_low(&mut q.driver, value)),
            reg::QUEUE_DRIVER_HIGH => return core.set_up_queue(|q| set_high(&mut q.driver, value)),
            reg::QUEUE_DEVICE_LOW => return core.set_up_queue(|q| set_low(&mut q.device, value)),
            reg::QUEUE_DEVICE_HIGH => return core.set_up_queue(|q| set_high(&mut q.device, value)),
            reg::GUEST_PAGE_SIZE | reg::QUEUE_ALIGN | reg::QUEUE_PFN => {
                let name = register_name(register, true).unwrap_or_default();
                core.wants_version_1(format_args!("writes {name}"));
                return Err(AccessError::NoRegister);
            }
            _ if self.read_register(register).is_ok() => return Err(AccessError::ReadOnly),
            _ => return Err(AccessError::NoRegister),
        }
        Ok(())
    }
}

impl Lifecycle for VirtioMmio {
    fn pause(&mut self) -> Result<(), PauseError> {
        self.core.pause()
    }

    fn resume(&mut self) {
        self.core.resume();
    }

    fn reset(&mut self) {
        self.core.reset_device();
        self.core.device.reopen();
        self.core.interrupt.reset();
        self.core.interrupt.sync();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        self.core.save()
    }

    fn restore(&mut self, state: SavedState) -> Result<(), RestoreError> {
        self.core.restore(state)
    }
}

impl MmioDevice for VirtioMmio {
    fn name(&self) -> &'static str {
        self.core.kind.name
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn register_names(&self) -> RegisterName {
        register_name
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        check_end(offset, data.len())?;
        if let Some(offset) = offset.checked_sub(CONFIG) {
            read_config(self.core.device.config(), offset, data);
            return Ok(());
        }
        read_words(offset, data, |register| self.read_register(register))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        check_end(offset, data.len())?;
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let offset = usize::try_from(offset).map_err(|_| AccessError::NoRegister)?;
            let end = offset.checked_add(data.len()).ok_or(AccessError::PastEnd)?;
            if end > self.core.device.config().len() {
                return Err(AccessError::NoRegister);
            }
            self.core.device.write_config(offset, data);
            return Ok(());
        }
        let result =
            write_words(offset, data, |register, value| self.write_register(register, value));
        self.core.interrupt.sync();
        result
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "virtio_mmio",
            compatible: vec!["virtio,mmio"],
            properties: vec![FdtProperty { name: "dma-coherent", value: FdtValue::Empty }],
            companions: Vec::new(),
        })
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let kick = |(index, kick): (u32, &EventFd)| Source {
            fd: kick.as_raw_fd(),
            token: KICK | index,
            interest: Interest::Signal,
        };
        // Kicks of remote queues are read by their backend.
        let core = &self.core;
        let is_own = |(index, _): &(u32, &EventFd)| {
            !u16::try_from(*index)
                .is_ok_and(|queue| core.kind.remote.include(queue, core.state.driver_features))
        };
        let kicks = (0..).zip(self.core.kicks.iter()).filter(is_own);
        list.extend(kicks.map(kick));
        let hold = |hold: &Hold| Source { fd: hold.fd(), token: HOLD, interest: Interest::Read };
        list.extend(self.core.interrupt.hold.as_ref().map(hold));
        self.core.device.list_sources(list);
    }

    fn ready(&mut self, token: u32) {
        if token == HOLD {
            self.core.hold_expired();
        } else if token & KICK == 0 {
            self.core.work(|device, work| device.ready(token, work), None);
        } else if let Ok(queue) = u16::try_from(token & !KICK)
            && self.core.is_active(queue)
        {
            self.core.work(|device, work| device.kicked(queue, work), Some(queue));
        }
    }

    fn take_pending_irq(&mut self) -> Option<PendingInterrupt> {
        self.core.interrupt.take_pending()
    }

    fn unlocked(&self) -> Option<Arc<dyn Unlocked>> {
        let pin = self.core.interrupt.pin()?;
        Some(Arc::new(InterruptRegisters(Arc::clone(pin))))
    }

    fn ioeventfds(&self) -> Vec<IoEvent<'_>> {
        let notify = |(value, event)| IoEvent { offset: reg::QUEUE_NOTIFY, value, event };
        (0..).zip(self.core.kicks.iter()).map(notify).collect()
    }
}

fn check_end(offset: u64, width: usize) -> Access {
    let end = offset.checked_add(width as u64);
    if end.is_some_and(|end| end <= SIZE) { Ok(()) } else { Err(AccessError::PastEnd) }
}

fn is_write_only(register: u64) -> bool {
    matches!(
        register,
        reg::DEVICE_FEATURES_SEL
            | reg::DRIVER_FEATURES
            | reg::DRIVER_FEATURES_SEL
            | reg::QUEUE_SEL
            | reg::QUEUE_SIZE
            | reg::QUEUE_NOTIFY
            | reg::INTERRUPT_ACK
            | reg::QUEUE_DESC_LOW
            | reg::QUEUE_DESC_HIGH
            | reg::QUEUE_DRIVER_LOW
            | reg::QUEUE_DRIVER_HIGH
            | reg::QUEUE_DEVICE_LOW
            | reg::QUEUE_DEVICE_HIGH
            | reg::SHM_SEL
    )
}

/// Word `selector` of 64 bits of features; zero beyond them.
fn half(features: u64, selector: u32) -> u32 {
    let word = match selector {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

/// Copies the configuration space from `offset` on; zeroes past its end.
fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
    let from = from.unwrap_or_default();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = from.get(index).copied().unwrap_or(0);
    }
}
