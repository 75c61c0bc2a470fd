//! Every byte that a device changes in guest RAM is noted as written ([`rvmm_devices::virtio::DmaMemory`]), so that a saved guest has it.
//!
//! The checker of every scenario here compares RAM before and after each pass of a device, to the byte, with what the device has noted.
//! In addition to hostile guests, these drivers make requests that succeed: they move as much as possible.

use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use rvmm_devices::testing::{MemoryHost, create};
use rvmm_devices::virtio::blk::testing::MemoryDisk;
use rvmm_devices::virtio::testing::{Buffer, Rig, status};
use rvmm_devices::{CATALOG, Host, Model};
use vm_memory::{Bytes, GuestAddress};

use crate::scenario::RING_RESET;
use crate::scenario::kind::{Kind, Piece};
use crate::scenario::ram::{Watched, not_noted};
use crate::scenario::script::Script;
use crate::scenario::stage::{BUFFERS, Changed, Stage};

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;

/// Runs a driver that makes requests which are nearly always valid, with a backend that is busy, slow, and fails at times.
fn drive(kind: Kind, bytes: &[u8]) -> Changed {
    let mut script = Script::new(bytes);
    let mut stage = Stage::new(kind, script.pick(kind.options()));
    let all = !EVENT_IDX;
    let features = [u64::MAX, all, INDIRECT_DESC | RING_RESET, EVENT_IDX | script.u64(), all];
    stage.start(script.pick(&features), script.pick(&[16, 64, 4, 256]));
    while !script.is_over() {
        let queue = script.below(stage.queues.len());
        for _ in 0..=script.below(6) {
            let request = kind.request(queue, &mut script);
            stage.post(queue, &request, script.flag());
        }
        stage.kick(queue as u32);
        if kind == Kind::Vsock && script.flag() {
            converse(&mut stage, &mut script);
        }
        (0..script.below(3)).for_each(|_| stage.ends.random_event(kind, &mut script));
        stage.run();
        match script.below(16) {
            0 => stage.save_and_restore(),
            1..4 => stage.ends.restore(),
            4 => {
                stage.reset_queue(queue);
                stage.set_up(queue, 16);
            }
            _ => {}
        }
    }
    stage.ends.restore();
    stage.run();
    stage.changed
}

/// Opens a stream to a program of the host, which sends some bytes.
fn converse(stage: &mut Stage, script: &mut Script<'_>) {
    let port = 1000 + u32::from(script.byte());
    let request = [3, 0, 2, 0, port, 1, 0, 1 << 16 | 1, 0, 1 << 18, 0];
    stage.post(1, &[Piece::Read(request.into_iter().flat_map(u32::to_le_bytes).collect())], false);
    stage.kick(1);
    for _ in 0..4 {
        let room = script.pick(&[4096, 45, 1000, 9000]);
        stage.post(0, &[Piece::Write(44), Piece::Write(room)], script.flag());
    }
    stage.kick(0);
    stage.run();
    stage.ends.talk(&vec![b's'; script.pick(&[1, 100, 5000, 20_000])]);
    stage.run();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 1000, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_that_a_device_changes_in_ram_is_noted(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for kind in Kind::ALL {
            drive(kind, &bytes);
        }
    }
}

/// The bytes that these drivers make a device change.
fn changed_by(kind: Kind) -> Changed {
    let mut all = Changed::default();
    let mut state = 1_u64;
    for _ in 0..20 {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(400)
        .collect();
        let Changed { rings, buffers, longest } = drive(kind, &bytes);
        (all.rings, all.buffers) = (all.rings + rings, all.buffers + buffers);
        all.longest = all.longest.max(longest);
    }
    all
}

#[test]
fn every_device_writes_to_the_buffers_that_are_checked() {
    for kind in Kind::ALL {
        let Changed { rings, buffers, longest } = changed_by(kind);
        // A balloon only reads, and a power button sends events of 8 bytes.
        let (total, at_once) = match kind {
            Kind::Balloon => (0, 0),
            Kind::Input => (1000, 8),
            Kind::Rng | Kind::Blk | Kind::Net | Kind::Vsock | Kind::Console => (10_000, 1000),
        };
        let is_busy = rings > 300 && buffers >= total && longest >= at_once;
        assert!(
            is_busy,
            "{kind:?}: {rings} bytes of rings, {buffers} of buffers, {longest} at once"
        );
    }
}

#[test]
fn every_virtio_device_without_another_program_is_checked() {
    let is_own = |model: &&Model| model.summary.starts_with("virtio") && !model.shares_ram;
    let mut models: Vec<&str> = CATALOG.iter().filter(is_own).map(|model| model.name).collect();
    let name = |kind: Kind| kind.options()[0].split(',').next().unwrap();
    let mut kinds = Kind::ALL.map(name);
    models.sort_unstable();
    kinds.sort_unstable();
    assert_eq!(models, kinds);
}

#[test]
#[should_panic(expected = "and noted only")]
fn the_checker_finds_a_byte_that_is_not_noted() {
    let mut stage = Stage::new(Kind::Rng, "rng");
    stage.start(0, 16);
    assert!(stage.post(0, &[Piece::Write(64)], false));
    let noted = [BUFFERS..BUFFERS + 8, BUFFERS + 9..BUFFERS + 64];
    stage.forge_and_note(&noted, |stage| {
        stage.ram.memory.write_slice(&[1; 10], GuestAddress(BUFFERS)).unwrap();
    });
}

/// A driver of this device, and what the device notes.
fn watched(options: &str, host: Arc<dyn Host>, features: u64) -> (Rig, Watched) {
    let mut watched = None;
    let mut rig = Rig::build(|mut wiring| {
        let memory = watched.insert(Watched::new(wiring.memory.view().clone()));
        wiring.memory = Arc::new(memory.clone());
        wiring.host = host;
        create(options, wiring).unwrap()
    });
    rig.start(features);
    let watched = watched.unwrap();
    watched.take_noted();
    (rig, watched)
}

/// The buffer of a descriptor.
fn buffer(rig: &Rig, queue: u32, index: u16) -> Range<u64> {
    let at = rig.rings(queue)[0] + 16 * u64::from(index);
    let addr: u64 = rig.memory.read_obj(GuestAddress(at)).unwrap();
    let len: u32 = rig.memory.read_obj(GuestAddress(at + 8)).unwrap();
    addr..addr + u64::from(len)
}

/// A disk that does not answer, with the read of a sector in flight, whose buffer is returned, too.
fn read_in_flight(hold: impl Fn(&MemoryDisk)) -> (Rig, Watched, MemoryDisk, Range<u64>) {
    let disk = MemoryDisk::new(8).unwrap();
    disk.change(|bytes| bytes.fill(0xd5));
    hold(&disk);
    let host = Arc::new(MemoryHost::with_disk(disk.clone()));
    let (mut rig, watched) = watched("blk,path=d,queues=2", host, RING_RESET);
    rig.add(0, &[Buffer::Read(&[0; 16]), Buffer::Write(512), Buffer::Write(1)]);
    rig.kick(0);
    assert_eq!(watched.take_noted(), [], "nothing is done yet");
    let sector = buffer(&rig, 0, 1);
    (rig, watched, disk, sector)
}

/// Resets the device, or its first queue alone.
fn reset(rig: &mut Rig, queue: bool) {
    rig.write(0x30, 0);
    assert!(rig.write(if queue { 0xc0 } else { 0x70 }, u32::from(queue)));
}

#[test]
fn what_a_disk_may_have_read_for_a_driver_that_resets_it_is_noted() {
    for queue in [false, true] {
        let (mut rig, watched, _disk, sector) = read_in_flight(MemoryDisk::hold);
        reset(&mut rig, queue);
        assert_eq!(watched.take_noted(), [sector]);
    }
}

#[test]
fn what_a_disk_reads_after_a_reset_that_does_not_wait_for_it_is_noted_then() {
    for queue in [false, true] {
        let (mut rig, watched, disk, sector) = read_in_flight(MemoryDisk::get_stuck);
        reset(&mut rig, queue);
        rig.run();
        assert_eq!(watched.take_noted(), []);
        disk.release();
        rig.run();
        let mut read = [0; 512];
        rig.memory.read_slice(&mut read, GuestAddress(sector.start)).unwrap();
        assert_eq!(read, [0xd5; 512]);
        assert_eq!(watched.take_noted(), [sector]);
    }
}

#[test]
fn a_frame_whose_further_buffers_are_invalid_is_noted() {
    const MRG_RXBUF: u64 = 1 << 15;
    let host = MemoryHost::default();
    let (mut rig, watched) = watched("net,tap=t", Arc::new(host.clone()), MRG_RXBUF);
    rig.add(0, &[Buffer::Write(100)]);
    rig.make_available(0, 99);
    let first = buffer(&rig, 0, 0);
    let (_, net) = &host.networks()[0];
    net.arrive([0; 12], &[0xa5; 1000]);
    rig.kick(0);
    assert_eq!(rig.status(), status::RUNNING | status::NEEDS_RESET);
    let byte: u8 = rig.memory.read_obj(GuestAddress(first.end - 1)).unwrap();
    assert_eq!(byte, 0xa5);
    assert_eq!(not_noted(&[first], &watched.take_noted()), None);
}

#[test]
fn a_card_whose_frames_the_kernel_moves_notes_its_answers_to_commands() {
    const CTRL_VQ: u64 = 1 << 17;
    let host = Arc::new(MemoryHost::default());
    let (mut rig, watched) = watched("net,tap=t,vhost=on", host, CTRL_VQ);
    let answer = rig.ask(2, &[Buffer::Read(&[9, 9]), Buffer::Write(1)]);
    assert_eq!(answer.unwrap(), [1]);
    let [.., used] = rig.rings(2);
    let changed = [buffer(&rig, 2, 1), used + 2..used + 12];
    assert_eq!(not_noted(&changed, &watched.take_noted()), None);
}
