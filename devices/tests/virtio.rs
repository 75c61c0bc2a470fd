//! The transport and the queues of every virtio device, tested with a device that only echoes.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rvmm_devices::testing::captured_log;
use rvmm_devices::virtio::testing::{
    Buffer, INDIRECT, NEXT, QUEUE_SIZE, RAM, RAM_SIZE, Rig, WRITE, status,
};
use rvmm_devices::virtio::{
    Chain, DeviceType, SavedChain, VirtioDevice, VirtioError, VirtioLifecycle, Work, feature,
};
use rvmm_devices::{Interest, PauseError, RestoreError, SaveError, SavedState, Source};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The calls that the echo device has received.
type Journal = Arc<Mutex<Vec<String>>>;

/// Copies the readable buffers of a request to its writable ones. Queue 1 keeps its requests until queue 0 gets `release`.
struct Echo {
    journal: Journal,
    kept: Vec<Chain>,
    config: [u8; 12],
}

impl Echo {
    fn new() -> (Self, Journal) {
        let journal = Journal::default();
        let config = *b"configured!!";
        (Self { journal: Arc::clone(&journal), kept: Vec::new(), config }, journal)
    }

    fn note(&self, what: impl Into<String>) {
        self.journal.lock().unwrap().push(what.into());
    }

    fn echo(chain: Chain, work: &mut Work<'_>) {
        let mut bytes = vec![0; chain.readable_bytes() as usize];
        let read = chain.read_at(work.memory(), 0, &mut bytes);
        let written = chain.write_at(work.memory(), 0, &bytes[..read]);
        work.complete(chain, written as u32);
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::new("echo", 42, &[256, 8], 0b101)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // The driver can write only the first half.
        for (byte, value) in self.config[..6].iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    fn activate(&mut self, features: u64) {
        self.note(format!("activate {features:#x}"));
    }

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some(chain) = work.pop(queue)? {
            let mut command = [0; 7];
            chain.read_at(work.memory(), 0, &mut command);
            match &command {
                b"release" => {
                    self.kept.drain(..).for_each(|kept| Self::echo(kept, work));
                    Self::echo(chain, work);
                }
                b"reconf!" => {
                    self.config[11] = self.config[11].wrapping_add(1);
                    work.config_changed();
                    Self::echo(chain, work);
                }
                b"give up" => return Err(VirtioError::BackendGone),
                _ if queue == 1 => self.kept.push(chain),
                _ => Self::echo(chain, work),
            }
        }
        Ok(())
    }

    fn list_sources(&self, _list: &mut Vec<Source>) {}

    fn ready(&mut self, _token: u32, _work: &mut Work<'_>) -> Result<(), VirtioError> {
        Ok(())
    }
}

impl VirtioLifecycle for Echo {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        self.note("pause");
        Ok(())
    }

    fn resume(&mut self) {
        self.note("resume");
    }

    fn reset(&mut self) {
        self.note("reset");
        // The chains are kept, to test that an old chain is harmless after a reset.
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, queue: u16) {
        self.note(format!("reset queue {queue}"));
        self.kept.retain(|chain| chain.queue() != queue);
    }

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        SavedState::of(&self.kept.iter().map(Chain::saved).collect::<Vec<_>>())
    }

    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        self.note(format!("restore {features:x?}"));
        for chain in state.read::<Vec<SavedChain>>()? {
            self.kept.extend(work.retake(chain)?);
        }
        Ok(())
    }
}

fn rig() -> Rig {
    Rig::new(Box::new(Echo::new().0))
}

fn started(features: u64) -> Rig {
    let mut rig = rig();
    rig.start(features);
    rig
}

/// Checks that the device completes a request.
fn works(rig: &mut Rig) {
    assert_eq!(rig.ask(0, &[Buffer::Read(b"still?"), Buffer::Write(9)]).unwrap(), b"still?");
}

fn recovers(rig: &mut Rig) {
    rig.start(0);
    works(rig);
}

/// Checks that the device has stopped, has reported that to the driver, and works again after a reset.
fn is_broken_until_reset(rig: &mut Rig) {
    assert_eq!(rig.status() & status::NEEDS_RESET, status::NEEDS_RESET, "no NEEDS_RESET");
    assert_eq!(rig.acknowledge() & 2, 2, "no configuration interrupt");
    rig.kick(0);
    assert!(!rig.irq.is_high(), "a broken device is not silent");
    recovers(rig);
}

#[test]
fn the_registers_identify_the_device() {
    let mut rig = rig();
    assert_eq!([0, 4, 8].map(|register| rig.read(register)), [0x7472_6976, 2, 42]);
    // "QEMU": drivers for its machine accept no other vendor.
    assert_eq!(rig.read(0xc), 0x554d_4551);
    assert_eq!(rig.offered(), 0b101 | feature::TRANSPORT);
    let sizes = [0, 1, 2, u32::MAX].map(|queue| {
        rig.write(0x30, queue);
        rig.read(0x34)
    });
    assert_eq!(sizes, [256, 8, 0, 0]);
}

#[test]
fn registers_take_aligned_words_and_pairs_of_them() {
    let mut rig = rig();
    for (offset, width) in [(0, 1), (0, 2), (4, 8), (0x18, 8), (1, 4), (0x6e, 4), (0x110 - 0x80, 2)]
    {
        assert!(rig.device.read(offset, &mut vec![0; width]).is_err(), "{offset:#x} {width}");
        assert!(rig.device.write(offset, &vec![0; width]).is_err(), "{offset:#x} {width}");
    }
    // Write-only, read-only, and nonexistent.
    for offset in [0x14, 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0xa4, 0x18, 0xf8] {
        assert!(rig.device.read(offset, &mut [0; 4]).is_err(), "{offset:#x}");
    }
    for offset in [0x00, 0x04, 0x08, 0x0c, 0x10, 0x34, 0x60, 0xb0, 0xfc, 0x18, 0xf8] {
        assert!(!rig.write(offset, 1), "{offset:#x}");
    }
}

#[test]
fn a_driver_of_version_1_is_refused_and_logged_once() {
    for (register, name) in [(0x28, "GuestPageSize"), (0x3c, "QueueAlign"), (0x40, "QueuePFN")] {
        let mut rig = rig();
        let lines = captured_log(|| {
            rig.write(0x70, status::FOUND);
            (0..3).for_each(|_| assert!(!rig.write(register, 4096)));
            assert!(rig.device.read(register, &mut [0; 4]).is_err());
        });
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(line.starts_with(&format!("echo: the guest's driver writes {name}")), "{line}");
        assert!(line.contains("version 1") && line.contains("force-legacy=false"), "{line}");
        rig.start(0);
        works(&mut rig);
    }
}

#[test]
fn features_that_are_refused_are_logged_once() {
    let mut rig = rig();
    let lines = captured_log(|| (0..3).for_each(|_| assert!(!rig.negotiate_only(0b101))));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("does not accept VIRTIO_F_VERSION_1"), "{lines:?}");
    let lines = captured_log(|| (0..3).for_each(|_| assert!(!rig.negotiate(0b10))));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("not offered (0x2)"), "{lines:?}");
    assert_eq!(captured_log(|| recovers(&mut rig)), [""; 0]);
}

#[test]
fn eight_bytes_are_two_registers_as_on_qemus_virt() {
    let mut rig = rig();
    let mut pair = [0; 8];
    rig.device.read(0, &mut pair).unwrap();
    assert_eq!(u64::from_le_bytes(pair), 0x2_7472_6976, "MagicValue and Version");
    // QueueSel with the next register, which is read-only.
    rig.device.write(0x30, &[1, 0, 0, 0, 9, 9, 9, 9]).unwrap();
    assert_eq!(rig.read(0x34), 8);
    // QueueSizeMax is the second of two registers, the first is write-only.
    rig.device.read(0x30, &mut pair).unwrap();
    assert_eq!(pair, [0, 0, 0, 0, 8, 0, 0, 0]);
}

#[test]
fn shared_memory_regions_do_not_exist() {
    let mut rig = rig();
    assert!(rig.write(0xac, 7));
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|register| rig.read(register)), [u32::MAX; 4]);
}

#[test]
fn the_configuration_ends_in_zeroes_and_only_the_drivers_part_is_writable() {
    let mut rig = rig();
    let mut bytes = [0xee; 8];
    rig.device.read(0x100 + 8, &mut bytes).unwrap();
    assert_eq!(&bytes, b"ed!!\0\0\0\0");
    rig.device.read(0xff8, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);
    assert!(rig.device.write(0x100 + 4, b"abcd").is_ok());
    rig.device.read(0x100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"confabur");
    for (offset, width) in [(0x10c, 1), (0x108, 8), (0x10b, 2), (0xfff, 1)] {
        assert!(rig.device.write(offset, &vec![0; width]).is_err(), "{offset:#x}");
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut rig = rig();
    assert!(rig.negotiate(0b101 | feature::EVENT_IDX));
    for features in [0b10, 1 << 33, 1 << 63] {
        assert!(!rig.negotiate(features), "{features:#x}");
        assert_eq!(rig.status(), status::FOUND);
    }
}

#[test]
fn a_legacy_driver_is_refused() {
    let mut rig = rig();
    for value in [1, 3] {
        rig.write(0x70, value);
    }
    rig.write(0x24, 0);
    rig.write(0x20, 1);
    rig.write(0x70, status::FEATURES_OK);
    assert_eq!(rig.status(), status::FOUND);
}

#[test]
fn feature_words_past_the_second_are_empty_and_stay_so() {
    let mut rig = rig();
    for word in [2, 3, u32::MAX] {
        rig.write(0x14, word);
        assert_eq!(rig.read(0x10), 0);
        rig.write(0x24, word);
        assert!(!rig.write(0x20, 1));
    }
    assert!(rig.negotiate(0));
    rig.write(0x24, 0);
    assert!(!rig.write(0x20, 0b101), "features are fixed once they are agreed on");
}

#[test]
fn the_status_only_goes_forward_step_by_step() {
    let mut rig = rig();
    for wrong in [4, 8, 4 + 8, 16, 64, 1 << 31] {
        rig.write(0x70, wrong);
        assert_eq!(rig.status(), 0, "{wrong:#x}");
    }
    assert!(rig.write(0x70, 2), "U-Boot leaves ACKNOWLEDGE out");
    assert!(!rig.write(0x70, 2 | 4), "DRIVER_OK without FEATURES_OK");
    assert_eq!(rig.status(), 2);
    rig.write(0x70, 0);
    rig.write(0x70, 1);
    rig.write(0x70, 5);
    assert_eq!(rig.status(), 1, "DRIVER_OK without DRIVER");
    rig.write(0x70, 2);
    assert_eq!(rig.status(), 1, "a bit cleared");
    assert!(rig.negotiate(0));
    rig.write(0x70, status::FOUND);
    assert_eq!(rig.status(), status::FEATURES_OK, "FEATURES_OK cleared");
    rig.write(0x70, status::RUNNING);
    rig.write(0x70, status::RUNNING);
    assert_eq!(rig.status(), status::RUNNING);
    rig.write(0x70, status::RUNNING | status::NEEDS_RESET);
    assert_eq!(rig.status(), status::RUNNING, "NEEDS_RESET is the device's");
}

#[test]
fn a_driver_that_fails_stops_the_device() {
    let mut rig = started(0);
    rig.add(0, &[Buffer::Read(b"x"), Buffer::Write(1)]);
    rig.write(0x70, status::RUNNING | 128);
    rig.kick(0);
    assert_eq!(rig.take_used(0), None);
    recovers(&mut rig);
}

#[test]
fn requests_come_back_with_their_answer_and_an_interrupt() {
    for features in [0, feature::EVENT_IDX, feature::INDIRECT_DESC | feature::EVENT_IDX] {
        let mut rig = started(features);
        for round in 0..100_u8 {
            let text = vec![round; usize::from(round) + 1];
            let (front, back) = text.split_at(text.len() / 2);
            let buffers =
                [Buffer::Read(front), Buffer::Read(back), Buffer::Write(3), Buffer::Write(200)];
            assert_eq!(rig.ask(0, &buffers).unwrap(), text);
        }
    }
    let mut rig = started(0);
    works(&mut rig);
    assert!(rig.irq.is_high());
    assert_eq!(rig.acknowledge(), 1);
    assert!(!rig.irq.is_high());
    assert!(rig.write(0x64, u32::MAX), "acknowledging what is not there");
}

#[test]
fn seventy_thousand_requests_wrap_the_indices() {
    let mut rig = started(feature::EVENT_IDX);
    let buffer = rig.allocate(64);
    let [table, _, used] = rig.rings(0);
    for round in 0..70_000_u32 {
        let slot = (round % 8) as u16;
        rig.set_descriptor(table, slot, (buffer, 8, WRITE, 0));
        // The driver wants an interrupt for each.
        let event = GuestAddress(rig.rings(0)[1] + 4 + 2 * u64::from(QUEUE_SIZE));
        rig.memory.write_obj(round as u16, event).unwrap();
        rig.make_available(0, slot);
        rig.kick(0);
        let index: u16 = rig.memory.read_obj(GuestAddress(used + 2)).unwrap();
        assert_eq!(index, (round + 1) as u16);
        assert_eq!(rig.acknowledge(), 1, "round {round}");
    }
}

#[test]
fn interrupts_are_suppressed_as_the_driver_requests() {
    let mut rig = started(0);
    let [_, driver, _] = rig.rings(0);
    rig.memory.write_obj(1_u16, GuestAddress(driver)).unwrap();
    works(&mut rig);
    assert!(!rig.irq.is_high(), "NO_INTERRUPT");
    let mut rig = started(feature::EVENT_IDX);
    let event = GuestAddress(rig.rings(0)[1] + 4 + 2 * u64::from(QUEUE_SIZE));
    rig.memory.write_obj(1_u16, event).unwrap();
    works(&mut rig);
    assert!(!rig.irq.is_high(), "the driver asked for the second");
    works(&mut rig);
    assert!(rig.irq.is_high());
}

#[test]
fn a_queue_is_frozen_while_the_device_works() {
    let mut rig = started(feature::RING_RESET);
    rig.write(0x30, 0);
    for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        assert!(!rig.write(register, 4), "{register:#x}");
    }
    assert!(!rig.write(0x44, 0), "QueueReady");
    works(&mut rig);
}

#[test]
fn an_invalid_queue_does_not_start() {
    let outside = RAM + RAM_SIZE;
    let cases: [(u64, u64); 12] = [
        (0x38, 0),
        (0x38, 3),
        (0x38, 512),
        (0x38, 1 << 16),
        (0x38, 0xffff_ffff),
        (0x80, 0x8000_0008),
        (0x80, 0),
        (0x80, outside),
        (0x80, outside - 16),
        (0x90, outside - 4),
        (0xa0, 0x1000_0000),
        (0xa4, 0xffff_ffff),
    ];
    for (register, value) in cases {
        let mut rig = rig();
        assert!(rig.negotiate(0));
        rig.set_up(0);
        rig.write(0x44, 0);
        assert!(rig.write(register, value as u32));
        rig.write(0x44, 1);
        rig.write(0x70, status::RUNNING);
        assert_eq!(rig.status(), status::RUNNING | status::NEEDS_RESET, "{register:#x} {value:#x}");
        is_broken_until_reset(&mut rig);
    }
}

#[test]
fn queues_that_do_not_exist_are_ignored() {
    let mut rig = started(0);
    for queue in [2, 64, 0xffff, u32::MAX] {
        rig.write(0x30, queue);
        assert_eq!(rig.read(0x44), 0);
        for register in [0x38, 0x44, 0x80, 0xc0] {
            assert!(!rig.write(register, 1), "{queue} {register:#x}");
        }
        rig.kick(queue);
    }
    works(&mut rig);
}

#[test]
fn one_queue_is_reset_alone_and_set_up_again() {
    let (echo, journal) = Echo::new();
    let mut rig = Rig::new(Box::new(echo));
    rig.start(feature::RING_RESET);
    rig.add(1, &[Buffer::Read(b"kept"), Buffer::Write(4)]);
    rig.kick(1);
    rig.write(0x30, 1);
    assert!(rig.write(0xc0, 1));
    assert_eq!((rig.read(0xc0), rig.read(0x44)), (0, 0));
    assert!(journal.lock().unwrap().contains(&"reset queue 1".into()));
    works(&mut rig);
    assert!(rig.set_up(1));
    rig.add(1, &[Buffer::Read(b"new"), Buffer::Write(4)]);
    rig.kick(1);
    rig.ask(0, &[Buffer::Read(b"release")]).unwrap();
    assert_eq!(rig.take_used(1), Some((0, 3)));
    assert_eq!(rig.take_used(1), None);
    // Without the feature the register does nothing.
    rig.start(0);
    rig.write(0x30, 1);
    assert!(!rig.write(0xc0, 1));
}

#[test]
fn an_answer_from_before_a_reset_does_not_reach_the_new_driver() {
    let mut rig = started(0);
    rig.add(1, &[Buffer::Read(b"kept"), Buffer::Write(4)]);
    rig.kick(1);
    rig.start(0);
    rig.ask(0, &[Buffer::Read(b"release")]).unwrap();
    assert_eq!(rig.take_used(1), None);
    assert_eq!(rig.status(), status::RUNNING);
}

#[test]
fn repeated_resets_are_complete_and_leak_nothing() {
    let mut rig = started(0);
    works(&mut rig);
    for _ in 0..10_000 {
        rig.write(0x70, 0);
        assert_eq!((rig.status(), rig.read(0x60)), (0, 0));
    }
    assert!(!rig.irq.is_high());
    rig.kick(0);
    recovers(&mut rig);
}

#[test]
fn a_change_of_the_configuration_is_announced() {
    let mut rig = started(0);
    let before = rig.read(0xfc);
    rig.ask(0, &[Buffer::Read(b"reconf!")]).unwrap();
    assert_eq!(rig.acknowledge(), 3);
    assert_ne!(rig.read(0xfc), before);
}

#[test]
fn a_device_that_fails_needs_a_reset() {
    let mut rig = started(0);
    rig.add(0, &[Buffer::Read(b"give up")]);
    rig.kick(0);
    is_broken_until_reset(&mut rig);
}

/// Makes a chain of raw descriptors available, which start at entry 0 of the queue's table.
fn offer(rig: &mut Rig, descriptors: &[(u64, u32, u16, u16)]) {
    let [table, ..] = rig.rings(0);
    for (index, descriptor) in (0..).zip(descriptors) {
        rig.set_descriptor(table, index, *descriptor);
    }
    rig.make_available(0, 0);
    rig.kick(0);
}

#[test]
fn an_invalid_chain_is_returned_empty() {
    let out = RAM + RAM_SIZE;
    let chains: &[&[(u64, u32, u16, u16)]] = &[
        // A loop of one, of two, and a next outside the table.
        &[(RAM, 1, NEXT, 0)],
        &[(RAM, 1, NEXT, 1), (RAM, 1, NEXT, 0)],
        &[(RAM, 1, NEXT, QUEUE_SIZE)],
        &[(RAM, 1, NEXT, 0xffff)],
        // Outside RAM: all of it, the end, by wrapping, and below.
        &[(out, 1, 0, 0)],
        &[(out - 1, 2, WRITE, 0)],
        &[(u64::MAX - 1, 4, 0, 0)],
        &[(RAM, u32::MAX, WRITE, 0)],
        &[(0, 1, 0, 0)],
        &[(0x1000_0000, 1, WRITE, 0)],
        // Readable after writable.
        &[(RAM + 0x4_0000, 1, WRITE | NEXT, 1), (RAM + 0x4_0000, 1, 0, 0)],
        // An indirect table that was not negotiated.
        &[(RAM + 0x4_0000, 16, INDIRECT, 0)],
    ];
    for chain in chains {
        let mut rig = started(0);
        offer(&mut rig, chain);
        assert_eq!(rig.take_used(0), Some((0, 0)), "{chain:x?}");
        assert_eq!(rig.take_used(0), None);
        works(&mut rig);
    }
}

#[test]
fn a_chain_of_a_queues_size_is_served_and_a_longer_one_is_not() {
    let mut rig = started(0);
    let last = QUEUE_SIZE - 1;
    let chain: Vec<_> = (0..QUEUE_SIZE)
        .map(|index| (RAM + 0x4_0000, 1, if index < last { NEXT } else { 0 }, index + 1))
        .collect();
    offer(&mut rig, &chain);
    assert_eq!(rig.take_used(0), Some((0, 0)));
    let text = [b'a'; 4];
    let buffers: Vec<_> = (0..last).map(|_| Buffer::Read(&text)).collect();
    let buffers = [&buffers[..], &[Buffer::Write(100)]].concat();
    assert_eq!(rig.ask(0, &buffers).unwrap(), vec![b'a'; 60]);
}

#[test]
fn empty_buffers_are_skipped() {
    let mut rig = started(0);
    let buffers = [
        Buffer::Read(b""),
        Buffer::Read(b"ab"),
        Buffer::Write(0),
        Buffer::Write(1),
        Buffer::Write(0),
        Buffer::Write(5),
    ];
    assert_eq!(rig.ask(0, &buffers).unwrap(), b"ab");
    assert_eq!(rig.ask(0, &[Buffer::Read(b""), Buffer::Write(0)]).unwrap(), b"");
}

/// Offers an indirect table of these descriptors, described by `len` bytes and `flags`.
fn offer_indirect(rig: &mut Rig, table: &[(u64, u32, u16, u16)], len: u32, flags: u16) {
    let at = rig.allocate(0x1000);
    for (index, descriptor) in (0..).zip(table) {
        rig.set_descriptor(at, index, *descriptor);
    }
    offer(rig, &[(at, len, flags, 1), (RAM, 1, 0, 0)]);
}

#[test]
fn indirect_tables_are_used_if_negotiated() {
    let mut rig = started(feature::INDIRECT_DESC);
    rig.memory.write_slice(b"indirect", GuestAddress(RAM + 0x4_0000)).unwrap();
    let table = [(RAM + 0x4_0000, 8, NEXT, 2), (0, 0, 0, 0), (RAM + 0x4_1000, 16, WRITE, 0)];
    offer_indirect(&mut rig, &table, 48, INDIRECT | WRITE);
    assert_eq!(rig.take_used(0), Some((0, 8)));
    let mut answer = [0; 8];
    rig.memory.read_slice(&mut answer, GuestAddress(RAM + 0x4_1000)).unwrap();
    assert_eq!(&answer, b"indirect");
}

#[test]
fn invalid_indirect_tables_are_returned_empty() {
    let one = [(RAM + 0x4_0000, 8, WRITE, 0)];
    let nested = [(RAM + 0x4_0000, 16, INDIRECT, 0)];
    let looped = [(RAM + 0x4_0000, 8, NEXT, 0)];
    for (table, len, flags) in [
        (one, 0, INDIRECT),
        (one, 15, INDIRECT),
        (one, 17, INDIRECT),
        (one, 16 * (u32::from(QUEUE_SIZE) + 1), INDIRECT),
        (one, 65_535 * 16, INDIRECT),
        (one, 16, INDIRECT | NEXT),
        (nested, 16, INDIRECT),
        (looped, 16, INDIRECT),
    ] {
        let mut rig = started(feature::INDIRECT_DESC);
        offer_indirect(&mut rig, &table, len, flags);
        assert_eq!(rig.take_used(0), Some((0, 0)), "{len} {flags}");
        works(&mut rig);
    }
    let mut rig = started(feature::INDIRECT_DESC);
    offer(&mut rig, &[(RAM + RAM_SIZE - 16, 32, INDIRECT, 0)]);
    assert_eq!(rig.take_used(0), Some((0, 0)));
}

#[test]
fn a_head_that_is_still_with_the_device_breaks_the_ring() {
    let mut rig = started(0);
    let head = rig.add(1, &[Buffer::Read(b"kept"), Buffer::Write(4)]);
    rig.make_available(1, head);
    rig.kick(1);
    is_broken_until_reset(&mut rig);
}

#[test]
fn a_head_outside_the_table_breaks_the_ring() {
    for head in [QUEUE_SIZE, 0xffff] {
        let mut rig = started(0);
        rig.make_available(0, head);
        rig.kick(0);
        is_broken_until_reset(&mut rig);
    }
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_ring() {
    for index in [QUEUE_SIZE + 1, 0x8000, 0xffff] {
        let mut rig = started(0);
        let [_, driver, _] = rig.rings(0);
        rig.memory.write_obj(index, GuestAddress(driver + 2)).unwrap();
        rig.kick(0);
        is_broken_until_reset(&mut rig);
    }
}

#[test]
fn kicks_before_the_start_and_without_requests_do_nothing() {
    let mut rig = rig();
    rig.kick(0);
    assert!(rig.negotiate(0));
    rig.set_up(0);
    rig.add(0, &[Buffer::Read(b"early"), Buffer::Write(5)]);
    rig.kick(0);
    assert_eq!(rig.take_used(0), None);
    rig.write(0x70, status::RUNNING);
    rig.run();
    assert_eq!(rig.take_used(0), Some((0, 5)), "what was there before the start is served");
    for _ in 0..1000 {
        rig.kick(0);
    }
    works(&mut rig);
}

#[test]
fn overlapping_rings_harm_only_the_guest() {
    let mut rig = rig();
    assert!(rig.negotiate(feature::EVENT_IDX));
    rig.set_up(0);
    rig.write(0x44, 0);
    let [table, ..] = rig.rings(0);
    for register in [0x90, 0xa0] {
        rig.write(register, table as u32);
    }
    rig.write(0x44, 1);
    rig.write(0x70, status::RUNNING);
    rig.make_available(0, 0);
    rig.kick(0);
    recovers(&mut rig);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// With any contents of the rings, the device becomes idle, and works after a reset.
    #[test]
    fn rings_of_any_content_are_harmless(
        features in prop::sample::select(vec![0, feature::EVENT_IDX, feature::INDIRECT_DESC, feature::EVENT_IDX | feature::INDIRECT_DESC]),
        descriptors in prop::collection::vec((0_u64..0x90_0000, 0_u32..0x2_0000, 0_u16..8, 0_u16..20), 16),
        heads in prop::collection::vec(0_u16..18, 16),
        index in 0_u16..20,
    ) {
        let mut rig = started(features);
        let [table, driver, _] = rig.rings(0);
        for (at, (addr, len, flags, next)) in (0..).zip(descriptors) {
            rig.set_descriptor(table, at, (RAM + addr, len, flags, next));
        }
        for (at, head) in (0..).zip(heads) {
            rig.memory.write_obj(head, GuestAddress(driver + 4 + 2 * at)).unwrap();
        }
        rig.memory.write_obj(index, GuestAddress(driver + 2)).unwrap();
        rig.kick(0);
        recovers(&mut rig);
    }

    /// After any register writes, the device becomes idle, and works after a reset.
    #[test]
    fn no_sequence_of_register_writes_does_harm(
        writes in prop::collection::vec(
            (prop::sample::select((0..0x110_u64).step_by(4).collect::<Vec<_>>()),
             prop_oneof![0..32_u32, Just(u32::MAX), Just(0x8000_0000), any::<u32>()]),
            0..200,
        ),
    ) {
        let mut rig = rig();
        for (register, value) in writes {
            rig.write(register, value);
            rig.read(register);
        }
        rig.run();
        recovers(&mut rig);
    }
}

/// Processes both its queues whenever its file descriptor is ready.
struct Greedy(EventFd);

impl VirtioDevice for Greedy {
    fn device_type(&self) -> DeviceType {
        DeviceType::new("greedy", 42, &[16, 16], 0)
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn kicked(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some(chain) = work.pop(queue)? {
            work.complete(chain, 0);
        }
        Ok(())
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        list.push(Source { fd: self.0.as_raw_fd(), token: 0, interest: Interest::Read });
    }

    fn ready(&mut self, _token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        drop(self.0.read());
        (0..2).try_for_each(|queue| self.kicked(queue, work))
    }
}

impl VirtioLifecycle for Greedy {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn reset(&mut self) {}

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, _queue: u16) {}

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        Err(SaveError("a test does not save it".into()))
    }

    fn restore(
        &mut self,
        _state: SavedState,
        _features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        Err(RestoreError("a test does not save it".into()))
    }
}

#[test]
fn requests_left_by_a_pass_are_served_without_a_kick() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut rig = Rig::new(Box::new(Greedy(event.try_clone().unwrap())));
    rig.start(0);
    for queue in [0, 1] {
        for _ in 0..16 {
            rig.add(queue, &[Buffer::Write(1)]);
        }
    }
    event.write(1).unwrap();
    rig.run();
    for queue in [0, 1] {
        assert_eq!(std::iter::from_fn(|| rig.take_used(queue)).count(), 16, "queue {queue}");
    }
}
