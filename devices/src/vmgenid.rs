//! Virtual machine generation ID (`microsoft,vmgenid`): 16 random bytes that are others after each restore of a snapshot. A guest that finds
//! another id than before knows that it may be one of several copies of a machine, and renews what has to be unique: its random numbers,
//! above all.
//!
//! Source: "Virtual Machine Generation ID" (Microsoft, 2012), the device tree binding `rng/microsoft,vmgenid.yaml` of Linux, and the
//! behaviour of Linux's `drivers/virt/vmgenid.c`, which has the binding since 6.10. The id is kept across resets: a reboot makes no copy.
//!
//! Neither specifies a register that acknowledges the interrupt: the binding's example has an edge. The lines here are levels, so the id is its
//! own acknowledgement: the line is high from the renewal until the guest reads the first byte of the new id, which Linux's interrupt handler does
//! at once. The first, so that a guest that was saved in the middle of reading it, and goes on with the rest of another, is still interrupted.
//!
//! A guest that has not read the id since its reset has nothing to compare a new one with, and is not interrupted. The first kernels
//! with the binding even need that: they request the interrupt before its handler has its data (6.12.117 does not), so one that is pending
//! already would end them with a null pointer, and both interrupt controllers keep it pending when the line falls.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::catalog::{BuildError, Built, Device, Model, Placement, Wiring};
use crate::config::ModelConfig;
use crate::device::{Access, AccessError, FdtDesc, Interest, MmioDevice, RegisterName, Source};
use crate::irq::IrqPin;
use crate::lifecycle::{Lifecycle, PauseError, RestoreError, SaveError, SavedState};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "vmgenid",
    summary: "virtual machine generation ID: tells the guest that it was restored from a snapshot",
    keys: &[],
    placement: Placement::Fixed,
    irqs: 1,
    shares_ram: false,
};

/// The configuration of the generation ID.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmGenIdConfig {}

mod reg {
    use std::ops::Range;

    /// The id; read-only.
    pub(super) const ID: Range<u64> = 0..16;
}

const TOKEN_RENEWED: u32 = 0;

/// The largest access.
const WIDEST: usize = 8;

/// Length of an id.
const ID_BYTES: usize = 16;

type Id = [u8; ID_BYTES];

/// Renews the id, from any thread. A clone is a handle to the same id.
#[derive(Debug, Clone)]
pub struct GenerationControl(Arc<SharedGeneration>);

#[derive(Debug)]
struct SharedGeneration {
    /// Locked for the copy of an id, with or without the device's lock; nothing else is locked meanwhile.
    state: Mutex<GenerationState>,
    /// Readable when the id was renewed.
    renewed: EventFd,
}

/// The guest-visible state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GenerationState {
    id: Id,
    known: Known,
}

/// The id whose first byte the guest has read last since its reset. The line is high if it is an old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Known {
    None,
    Current,
    Old,
}

impl GenerationControl {
    /// Creates a control with a random id.
    ///
    /// # Errors
    /// The host has no descriptors left, or no random numbers.
    pub fn new() -> io::Result<Self> {
        Self::with_id(random_id()?)
    }

    /// Creates a control whose first id is this one, for tests that compare machines.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn with_id(id: [u8; ID_BYTES]) -> io::Result<Self> {
        let renewed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let state = Mutex::new(GenerationState { id, known: Known::None });
        Ok(Self(Arc::new(SharedGeneration { state, renewed })))
    }

    /// Replaces the id by a random one, and interrupts a guest that has read the old one.
    ///
    /// # Errors
    /// The host has no random numbers; the id is still the old one.
    pub fn renew(&self) -> io::Result<()> {
        let id = random_id()?;
        let mut state = self.state();
        state.id = id;
        if state.known == Known::Current {
            state.known = Known::Old;
        }
        drop(state);
        // An error means that it is readable already.
        let _ = self.0.renewed.write(1);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, GenerationState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A random id.
fn random_id() -> io::Result<Id> {
    let mut id = [0; ID_BYTES];
    // So few bytes are never drawn in part.
    let drawn = getrandom(&mut id[..], GetRandomFlags::empty())?;
    if drawn == id.len() { Ok(id) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// The device.
struct VmGenId {
    generation: GenerationControl,
    irq: IrqPin,
}

impl ModelConfig for VmGenIdConfig {
    fn build(&self, wiring: Wiring) -> Built {
        let generation = wiring.generation.map_or_else(GenerationControl::new, Ok);
        let generation = generation.map_err(|source| BuildError::Host {
            model: MODEL.name,
            what: "random id",
            source,
        })?;
        Ok(Device::Mmio(Box::new(VmGenId { generation, irq: IrqPin::new(wiring.irq) })))
    }
}

impl Lifecycle for VmGenId {
    fn pause(&mut self) -> Result<(), PauseError> {
        Ok(())
    }

    /// An id that was renewed meanwhile interrupts at once: before a hart runs.
    fn resume(&mut self) {
        self.sync_irq();
    }

    fn reset(&mut self) {
        self.generation.state().known = Known::None;
        self.irq.reset();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self { generation, irq: _ } = self;
        SavedState::of(&*generation.state())
    }

    fn restore(&mut self, state: SavedState) -> Result<(), RestoreError> {
        *self.generation.state() = state.read()?;
        self.sync_irq();
        Ok(())
    }
}

impl MmioDevice for VmGenId {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn size(&self) -> u64 {
        0x1000
    }

    fn register_names(&self) -> RegisterName {
        |offset, _| reg::ID.contains(&offset).then_some("ID")
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let part = part(offset, data.len())?;
        let mut state = self.generation.state();
        data.copy_from_slice(state.id.get(part).ok_or(AccessError::Width)?);
        if offset == reg::ID.start {
            state.known = Known::Current;
        }
        drop(state);
        self.sync_irq();
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        part(offset, data.len())?;
        Err(AccessError::ReadOnly)
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "vmgenid",
            compatible: vec!["microsoft,vmgenid"],
            properties: Vec::new(),
            companions: Vec::new(),
        })
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let fd = self.generation.0.renewed.as_raw_fd();
        list.push(Source { fd, token: TOKEN_RENEWED, interest: Interest::Read });
    }

    fn ready(&mut self, _token: u32) {
        // Fails if the event was stale.
        let _ = self.generation.0.renewed.read();
        self.sync_irq();
    }
}

impl VmGenId {
    fn sync_irq(&mut self) {
        let known = self.generation.state().known;
        self.irq.set(known == Known::Old);
    }
}

/// The part of the id that an access reaches.
fn part(offset: u64, width: usize) -> Result<Range<usize>, AccessError> {
    let begin = usize::try_from(offset).ok().filter(|_| reg::ID.contains(&offset));
    let begin = begin.ok_or(AccessError::NoRegister)?;
    let end = begin.saturating_add(width);
    if width == 0 || width > WIDEST || end > ID_BYTES {
        return Err(AccessError::Width);
    }
    Ok(begin..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestIrq, create, turn, wiring};

    const FIRST: Id = *b"abcdefghijklmnop";

    struct Board {
        device: Box<dyn MmioDevice>,
        control: GenerationControl,
        irq: TestIrq,
    }

    fn board() -> Board {
        let (irq, control) = (TestIrq::default(), GenerationControl::with_id(FIRST).unwrap());
        let wiring =
            Wiring { irq: Arc::new(irq.clone()), generation: Some(control.clone()), ..wiring() };
        Board { device: create("vmgenid", wiring).unwrap(), control, irq }
    }

    impl Board {
        /// As Linux does, word by word.
        fn read(&mut self) -> Id {
            let mut id = [0; 16];
            for (word, offset) in id.chunks_exact_mut(4).zip((0..).step_by(4)) {
                self.device.read(offset, word).unwrap();
            }
            id
        }

        /// Renews the id, and has the I/O loop notice it.
        fn renew(&mut self) {
            self.control.renew().unwrap();
            assert_eq!(turn(self.device.as_mut(), 0).unwrap(), 1);
            assert_eq!(turn(self.device.as_mut(), 0).unwrap(), 0);
        }

        fn saved(&self) -> SavedState {
            self.device.save().unwrap()
        }
    }

    #[test]
    fn a_guest_that_knows_the_old_id_is_interrupted_until_it_reads_the_new_one() {
        let mut board = board();
        assert_eq!(board.read(), FIRST);
        assert!(!board.irq.is_high());
        board.renew();
        assert!(board.irq.is_high());
        let second = board.read();
        assert!(second != FIRST && !board.irq.is_high());
        assert_eq!((board.read(), board.irq.changes()), (second, 2));
        board.renew();
        assert!(board.irq.is_high() && board.read() != second);
    }

    #[test]
    fn the_first_byte_of_the_new_id_ends_the_interrupt() {
        let mut board = board();
        for width in 1..=8 {
            board.read();
            board.renew();
            assert!(board.irq.is_high());
            board.device.read(0, &mut [0; 8][..width]).unwrap();
            assert!(!board.irq.is_high(), "{width}");
        }
    }

    #[test]
    fn a_guest_that_has_read_parts_of_two_ids_is_interrupted() {
        let mut board = board();
        board.device.read(0, &mut [0; 8]).unwrap();
        board.renew();
        board.device.read(8, &mut [0; 8]).unwrap();
        assert!(board.irq.is_high());
        board.read();
        assert!(!board.irq.is_high());
    }

    #[test]
    fn a_guest_that_has_read_no_id_is_not_interrupted() {
        let mut board = board();
        board.renew();
        assert!(board.read() != FIRST);
        board.device.reset();
        board.renew();
        board.read();
        assert_eq!(board.irq.changes(), 0);
    }

    #[test]
    fn a_guest_that_reads_a_new_id_before_the_interrupt_gets_none() {
        let mut board = board();
        board.read();
        board.control.renew().unwrap();
        assert!(board.read() != FIRST);
        turn(board.device.as_mut(), 0).unwrap();
        assert_eq!(board.irq.changes(), 0);
    }

    #[test]
    fn every_width_that_lies_inside_reads_its_part_of_the_id() {
        let mut device = board().device;
        for offset in 0..16 {
            for width in 1..=8.min(16 - offset) {
                let mut data = [0; 8];
                device.read(offset as u64, &mut data[..width]).unwrap();
                assert_eq!(data[..width], FIRST[offset..offset + width]);
            }
        }
    }

    #[test]
    fn other_accesses_are_refused_and_acknowledge_nothing() {
        let mut board = board();
        board.read();
        board.renew();
        let (device, mut data) = (board.device.as_mut(), [0; 16]);
        for (offset, width) in [(0, 0), (9, 8), (15, 2), (0, 9), (0, 16)] {
            assert_eq!(device.read(offset, &mut data[..width]), Err(AccessError::Width));
        }
        for offset in [16, 0x18, 0xfff, u64::MAX] {
            assert_eq!(device.read(offset, &mut data[..4]), Err(AccessError::NoRegister));
            assert_eq!(device.write(offset, &data[..4]), Err(AccessError::NoRegister));
        }
        assert_eq!(device.write(0, &data[..8]), Err(AccessError::ReadOnly));
        assert!(board.irq.is_high());
    }

    #[test]
    fn a_reset_keeps_the_id_and_ends_the_interrupt() {
        let mut board = board();
        board.read();
        board.renew();
        board.device.reset();
        assert!(!board.irq.is_high());
        let id = board.read();
        assert!(id != FIRST);
        board.device.reset();
        assert_eq!(board.read(), id);
        // The renewal was noticed before the reset, or it is now: the guest reads the new id anyway.
        board.control.renew().unwrap();
        board.device.reset();
        turn(board.device.as_mut(), 0).unwrap();
        assert!(!board.irq.is_high() && board.read() != id);
    }

    #[test]
    fn a_device_that_is_restored_twice_has_two_new_ids_and_interrupts() {
        let mut saved = board();
        saved.read();
        let ids = [(); 2].map(|()| {
            let mut board = board();
            board.device.restore(saved.saved()).unwrap();
            assert!(!board.irq.is_high());
            board.control.renew().unwrap();
            // Before the first hart runs, without an event.
            board.device.resume();
            assert!(board.irq.is_high());
            board.read()
        });
        assert!(ids[0] != ids[1] && !ids.contains(&FIRST));
    }

    #[test]
    fn an_interrupt_that_the_guest_has_not_taken_is_saved() {
        let mut saved = board();
        saved.read();
        // Its event has not even been dispatched.
        saved.control.renew().unwrap();
        let mut restored = board();
        restored.device.restore(saved.saved()).unwrap();
        assert!(restored.irq.is_high());
        assert_eq!(restored.saved(), saved.saved());
        assert!(restored.read() == saved.read() && !restored.irq.is_high());
    }

    #[test]
    fn devices_of_their_own_have_random_ids() {
        let ids = [(); 2].map(|()| {
            let device = create("vmgenid", Wiring { generation: None, ..wiring() });
            let mut id = [0; 8];
            device.unwrap().read(8, &mut id).unwrap();
            id
        });
        assert!(ids[0] != ids[1] && !ids.contains(&[0; 8]));
    }
}
