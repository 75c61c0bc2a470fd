//! Input device (virtio 1.3, section 5.8): a keyboard with one key, the power button.
//!
//! A write to the eventfd [`Wiring::power_button`] presses it: the guest gets KEY_POWER down and up, as from a hardware
//! button, and its init shuts down in order. Presses before the guest has a driver are merged into one, as are presses
//! while a previous one is not fully delivered.
//!
//! Not implemented: other keys, axes, and LEDs; buffers of the status queue, by which a driver sets LEDs, are returned unused.

use std::os::fd::AsRawFd;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceType, VirtioDevice, VirtioError, VirtioLifecycle, Work};
use crate::catalog::{Built, Device, Model, Placement, Wiring};
use crate::config::{ModelConfig, Slot};
use crate::device::{Interest, Source};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "input",
    summary: "virtio input with one key: the power button, pressed by SIGTERM",
    keys: &[],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// The configuration of a power button.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InputConfig {
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

const EVENTS: u16 = 0;
const STATUS: u16 = 1;

const TOKEN_BUTTON: u32 = 0;

/// Fields of the configuration space (section 5.8.4).
mod config {
    pub(super) const SELECT: usize = 0;
    pub(super) const SUBSEL: usize = 1;
    pub(super) const SIZE: usize = 2;
    pub(super) const DATA: usize = 8;
    pub(super) const LEN: usize = 136;

    pub(super) const ID_NAME: u8 = 0x01;
    pub(super) const ID_DEVIDS: u8 = 0x03;
    pub(super) const EV_BITS: u8 = 0x11;
}

/// Linux's input event codes.
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

const NAME: &[u8] = b"rvmm power button";

/// Bus BUS_VIRTUAL, vendor and product 1, version 1, 16 bits each.
const DEVIDS: [u8; 8] = [6, 0, 1, 0, 1, 0, 1, 0];

/// The events of a press: type, code, value. A SYN separates the key down from the key up.
const PRESS: [(u16, u16, u32); 4] =
    [(EV_KEY, KEY_POWER, 1), (EV_SYN, 0, 0), (EV_KEY, KEY_POWER, 0), (EV_SYN, 0, 0)];

struct Input {
    button: Option<EventFd>,
    /// Number of events of the current press that were sent; all if there is no press to deliver.
    sent: usize,
    config: [u8; config::LEN],
}

/// The state of a power button.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InputState {
    /// Number of events of the current press that were sent.
    sent: usize,
    select: u8,
    subsel: u8,
}

impl ModelConfig for InputConfig {
    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, mut wiring: Wiring) -> Built {
        let button = wiring.power_button.take();
        let input = Input { button, sent: PRESS.len(), config: [0; config::LEN] };
        Ok(Device::Virtio(Box::new(input)))
    }
}

impl Input {
    /// Sends events as long as the guest has buffers.
    fn send(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some((kind, code, value)) = PRESS.get(self.sent) {
            let Some(chain) = work.pop(EVENTS)? else { break };
            if chain.writable_bytes() < 8 {
                work.refuse(chain);
                continue;
            }
            let event = u64::from(*kind) | u64::from(*code) << 16 | u64::from(*value) << 32;
            let written = chain.write_at(work.memory(), 0, &event.to_le_bytes());
            work.complete(chain, u32::try_from(written).unwrap_or(0));
            self.sent += 1;
        }
        Ok(())
    }

    /// Updates the configuration space to the driver's selection.
    fn update_config(&mut self) {
        let [select, subsel, rest @ ..] = &mut self.config;
        rest.fill(0);
        // A bit per code, up to the highest code.
        let mut keys = [0; KEY_POWER as usize / 8 + 1];
        if let Some(last) = keys.last_mut() {
            *last = 1 << (KEY_POWER % 8);
        }
        let selected: &[u8] = match (*select, *subsel) {
            (config::ID_NAME, 0) => NAME,
            (config::ID_DEVIDS, 0) => &DEVIDS,
            (config::EV_BITS, kind) if u16::from(kind) == EV_KEY => &keys,
            _ => &[],
        };
        let size = u8::try_from(selected.len()).unwrap_or(0);
        if let Some(field) = self.config.get_mut(config::SIZE) {
            *field = size;
        }
        let data = self.config.iter_mut().skip(config::DATA);
        data.zip(selected).for_each(|(to, from)| *to = *from);
    }
}

impl VirtioDevice for Input {
    fn device_type(&self) -> DeviceType {
        // The events have the same format without it.
        DeviceType { version_1_is_optional: true, ..DeviceType::new(MODEL.name, 18, &[64, 64], 0) }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let own = self.config.iter_mut().take(config::SUBSEL + 1);
        own.skip(config::SELECT + offset).zip(data).for_each(|(to, from)| *to = *from);
        self.update_config();
    }

    fn activate(&mut self, _features: u64) {}

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        if queue == STATUS {
            while let Some(chain) = work.pop(STATUS)? {
                work.complete(chain, 0);
            }
        }
        self.send(work)
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let source = |button: &EventFd| Source {
            fd: button.as_raw_fd(),
            token: TOKEN_BUTTON,
            interest: Interest::Read,
        };
        list.extend(self.button.iter().map(source));
    }

    fn ready(&mut self, _token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let was_pressed = self.button.as_ref().is_some_and(|button| button.read().is_ok());
        if was_pressed && self.sent == PRESS.len() {
            self.sent = 0;
        }
        self.send(work)
    }
}

impl VirtioLifecycle for Input {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.config = [0; config::LEN];
        // A press that is not fully delivered is repeated for the next driver.
        if self.sent < PRESS.len() {
            self.sent = 0;
        }
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, _queue: u16) {}

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self { button: _, sent, config } = self;
        // The rest of the configuration space follows from the selection.
        let [select, subsel, ..] = *config;
        SavedState::of(&InputState { sent: *sent, select, subsel })
    }

    fn restore(
        &mut self,
        state: SavedState,
        _features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let InputState { sent, select, subsel } = state.read()?;
        self.sent = sent.min(PRESS.len());
        self.write_config(config::SELECT, &[select, subsel]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::testing::create;
    use crate::virtio::testing::{Buffer, Rig};

    const DOWN: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];
    const UP: [u8; 8] = [1, 0, 116, 0, 0, 0, 0, 0];
    const SYN: [u8; 8] = [0; 8];

    fn rig() -> (Rig, EventFd) {
        let button = EventFd::new(EFD_NONBLOCK).unwrap();
        let own = button.try_clone().unwrap();
        let rig = Rig::build(|mut wiring| {
            wiring.power_button = Some(own);
            create("input", wiring).unwrap()
        });
        (rig, button)
    }

    fn supply(rig: &mut Rig, count: usize) -> Vec<u16> {
        let heads = (0..count).map(|_| rig.add(0, &[Buffer::Write(8)])).collect();
        rig.kick(0);
        heads
    }

    fn events(rig: &mut Rig) -> Vec<Vec<u8>> {
        rig.run();
        let mut events = Vec::new();
        while let Some((head, len)) = rig.take_used(0) {
            assert_eq!(len, 8);
            events.push(rig.written(0, head));
        }
        events
    }

    fn select(rig: &mut Rig, select: u8, subsel: u8) -> Vec<u8> {
        rig.device.write(0x100, &[select]).unwrap();
        rig.device.write(0x101, &[subsel]).unwrap();
        let mut size = [0];
        rig.device.read(0x102, &mut size).unwrap();
        let mut data = vec![0; size[0].into()];
        rig.device.read(0x108, &mut data).unwrap();
        data
    }

    #[test]
    fn the_driver_finds_a_keyboard_with_a_power_key() {
        let (mut rig, _button) = rig();
        assert_eq!(rig.read(8), 18);
        assert_eq!(select(&mut rig, 1, 0), NAME);
        assert_eq!(select(&mut rig, 3, 0), DEVIDS);
        let keys = select(&mut rig, 0x11, 1);
        let set = (0..keys.len() * 8).filter(|bit| keys[bit / 8] >> (bit % 8) & 1 == 1);
        assert_eq!(set.collect::<Vec<_>>(), [116]);
        for (what, sub) in
            [(0, 0), (1, 1), (2, 0), (0x10, 0), (0x11, 0), (0x11, 3), (0x12, 0), (255, 255)]
        {
            assert_eq!(select(&mut rig, what, sub), b"", "{what:#x} {sub}");
        }
        // The driver cannot write the rest of the configuration.
        rig.device.write(0x102, &[9; 8]).unwrap();
        assert_eq!(select(&mut rig, 1, 0), NAME);
    }

    #[test]
    fn a_press_is_the_key_down_and_up() {
        let (mut rig, button) = rig();
        rig.start(0);
        supply(&mut rig, 8);
        for _ in 0..2 {
            button.write(1).unwrap();
            assert_eq!(events(&mut rig), [DOWN, SYN, UP, SYN]);
        }
        assert_eq!(events(&mut rig), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_press_waits_for_the_driver_and_for_its_buffers() {
        let (mut rig, button) = rig();
        button.write(5).unwrap();
        rig.run();
        rig.start(0);
        supply(&mut rig, 3);
        assert_eq!(events(&mut rig), [DOWN, SYN, UP]);
        button.write(1).unwrap();
        rig.run();
        supply(&mut rig, 5);
        assert_eq!(events(&mut rig), [SYN], "a press during a press is merged with it");
        button.write(1).unwrap();
        assert_eq!(events(&mut rig).len(), 4);
    }

    #[test]
    fn a_partly_delivered_press_is_repeated_for_the_next_driver() {
        let (mut rig, button) = rig();
        rig.start(0);
        supply(&mut rig, 2);
        button.write(1).unwrap();
        assert_eq!(events(&mut rig), [DOWN, SYN]);
        rig.start(0);
        supply(&mut rig, 4);
        assert_eq!(events(&mut rig), [DOWN, SYN, UP, SYN]);
    }

    #[test]
    fn buffers_that_are_too_small_and_status_buffers_are_returned() {
        let (mut rig, button) = rig();
        rig.start(0);
        button.write(1).unwrap();
        assert_eq!(rig.ask(0, &[Buffer::Write(7)]).unwrap(), b"");
        assert_eq!(rig.ask(0, &[Buffer::Read(&[0; 8])]).unwrap(), b"");
        assert_eq!(rig.ask(0, &[Buffer::Write(3), Buffer::Write(9)]).unwrap(), DOWN);
        for _ in 0..100 {
            assert_eq!(rig.ask(1, &[Buffer::Read(&[0; 8])]).unwrap(), b"");
        }
    }
}
