//! A hostile guest, driven by bytes: a script selects its actions, and a checker verifies the behaviour of the device.
//!
//! The fuzz targets run it with the inputs of a fuzzer, the tests here with the saved ones (`fuzz/seeds`) and with those of
//! proptest. It uses only public names of the crate, so that `fuzz/` can include this folder by its path.
#![allow(unreachable_pub, reason = "see above")]

pub(crate) mod backends;
pub mod chips;
pub mod kind;
mod oracle;
pub(crate) mod ram;
pub(crate) mod script;
pub(crate) mod stage;

use kind::{Kind, Piece};
use ram::{HIGH, LOW};
use script::Script;
use stage::Stage;

/// Maximum number of actions of one scenario.
const ACTIONS: usize = 300;

/// `VIRTIO_F_RING_RESET`
pub(crate) const RING_RESET: u64 = 1 << 40;

/// Runs a scenario on an input.
pub type Target = fn(&[u8]);

/// The fuzz targets of these scenarios, by name.
pub const TARGETS: [(&str, Target); 12] = [
    ("virtio_rng", |bytes| virtio(Kind::Rng, bytes)),
    ("virtio_blk", |bytes| virtio(Kind::Blk, bytes)),
    ("virtio_net", |bytes| virtio(Kind::Net, bytes)),
    ("virtio_vsock", |bytes| virtio(Kind::Vsock, bytes)),
    ("virtio_input", |bytes| virtio(Kind::Input, bytes)),
    ("virtio_balloon", |bytes| virtio(Kind::Balloon, bytes)),
    ("virtio_console", |bytes| virtio(Kind::Console, bytes)),
    ("virtio_registers", registers),
    ("plic", chips::plic),
    ("uart", chips::uart),
    ("rtc", chips::rtc),
    ("device_options", chips::options),
];

/// Runs a hostile driver of a virtio device; afterwards the device works after a reset.
pub fn virtio(kind: Kind, bytes: &[u8]) {
    drive(kind, bytes, usize::MAX);
}

/// The same, with the device saved and restored after every `every` actions.
pub fn restored(kind: Kind, bytes: &[u8], every: usize) {
    drive(kind, bytes, every);
}

fn drive(kind: Kind, bytes: &[u8], every: usize) {
    let mut script = Script::new(bytes);
    let mut stage = Stage::new(kind, script.pick(kind.options()));
    if !script.once_in(4) {
        start(&mut stage, &mut script);
    }
    for action in 0..ACTIONS {
        if script.is_over() {
            break;
        }
        act(&mut stage, &mut script);
        if action % every == every - 1 {
            stage.save_and_restore();
        }
    }
    stage.run();
    works(&mut stage);
}

/// Accesses only the registers of a virtio device.
pub fn registers(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let kind = script.pick(&Kind::ALL);
    let mut stage = Stage::new(kind, script.pick(kind.options()));
    for _ in 0..ACTIONS {
        match script.below(8) {
            _ if script.is_over() => break,
            0 => {
                stage.run();
            }
            1 => access(&mut stage, &mut script),
            2 => start(&mut stage, &mut script),
            _ => write(&mut stage, &mut script),
        }
    }
    stage.run();
    works(&mut stage);
}

fn start(stage: &mut Stage, script: &mut Script<'_>) {
    let features = match script.below(4) {
        0 => u64::MAX,
        1 => RING_RESET | 1 << 28,
        2 => script.u64() | RING_RESET,
        _ => 1 << 28 | 1 << 29 | RING_RESET | script.u64(),
    };
    stage.start(features, script.pick(&[16, 1, 2, 4, 8, 64, 256, 16]));
    stage.run();
}

fn act(stage: &mut Stage, script: &mut Script<'_>) {
    let queue = script.below(stage.queues.len());
    match script.below(32) {
        0 => start(stage, script),
        1..10 => {
            let request = stage.kind.request(queue, script);
            let how = script.byte();
            if stage.post(queue, &request, how & 1 == 1) && how & 6 != 6 {
                stage.kick(queue as u32);
                stage.run();
            }
        }
        10..13 => odd_chain(stage, script, queue),
        13..15 => {
            stage.kick(if script.flag() { queue as u32 } else { script.odd32() });
            stage.run();
        }
        15..22 => {
            stage.ends.random_event(stage.kind, script);
            if !script.once_in(4) {
                stage.run();
            }
        }
        22 => poke_ring(stage, script, queue),
        23 => {
            let addr = script.pick(&[LOW.start, HIGH.start]) + script.below(0xffff) as u64;
            let bytes = script.bytes(16);
            stage.poke(addr, &bytes);
        }
        24 => write(stage, script),
        25 => access(stage, script),
        26 => {
            let (offset, data) = (0x100 + script.below(32) as u64, script.bytes(4));
            let width = script.pick(&[1, 2, 4]);
            let _ = stage.device.write(offset, &data[..width]);
        }
        27 => {
            stage.reset_queue(queue);
            if script.flag() {
                stage.set_up(queue, script.pick(&[16, 1, 4, 64]));
            }
        }
        28 => stage.reset(),
        29 => bump(stage, script, queue),
        30 => stage.spurious_call(script.below(24) as u32),
        _ => suppress(stage, script, queue),
    }
}

/// Writes a value that may be valid to a register that exists.
fn write(stage: &mut Stage, script: &mut Script<'_>) {
    const REGISTERS: [u64; 24] = [
        0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
        0xac, 0xc0, 0x70, 0x44, 0x30, 0x38, 0x00, 0x34, 0xfc,
    ];
    let register = script.pick(&REGISTERS);
    let value = match register {
        0x30 | 0x50 => script.below(10) as u32,
        0x70 => script.pick(&[0, 1, 3, 11, 15, 15, 0x8f, 64, 0xff]),
        0x44 | 0xc0 => script.below(3) as u32,
        _ => script.odd32(),
    };
    stage.write(register, value);
}

/// Accesses any offset with any width.
fn access(stage: &mut Stage, script: &mut Script<'_>) {
    let offset = if script.flag() { script.below(0x1010) as u64 } else { script.odd() };
    let width = script.pick(&[1, 2, 4, 8]);
    let mut data = script.bytes(8);
    // The checker has to see writes of words.
    match (script.flag(), width) {
        (true, 4) => stage.write(offset, u32::from_le_bytes(data[..4].try_into().unwrap())),
        (true, _) => drop(stage.device.write(offset, &data[..width])),
        (false, _) => drop(stage.device.read(offset, &mut data[..width])),
    }
}

/// Makes a chain of arbitrary descriptors available.
fn odd_chain(stage: &mut Stage, script: &mut Script<'_>, queue: usize) {
    let Some(active) = stage.queues[queue].active.as_ref() else { return };
    let (table, size) = (active.set_up.at[0], active.set_up.size as u16);
    let head = if script.once_in(16) { script.odd16() } else { script.below(256) as u16 % size };
    let inside = stage.allocate(64);
    let places =
        [inside, inside, table, used_ring_of(stage, queue), LOW.end - 8, HIGH.start, HIGH.end];
    let into = if script.once_in(3) { script.pick(&places) } else { table };
    let mut index = if into == table { head } else { 0 };
    for _ in 0..=script.below(4) {
        let addr = if script.once_in(4) { script.odd() } else { script.pick(&places) };
        let len = if script.once_in(3) { script.odd32() } else { script.below(80) as u32 };
        let flags = script.pick(&[0, 1, 2, 3, 3, 1, 4, 5, 6, 7, 2, 0xffff]);
        let next = if script.once_in(4) { script.odd16() } else { index.wrapping_add(1) % size };
        stage.descriptor(into, index, (addr, len, flags, next));
        index = next % size;
    }
    if into != table {
        let len = script.pick(&[16, 32, 48, 64, 0, 8, 17, 4096, 0xf_fff0, u32::MAX]);
        stage.descriptor(table, head % size, (into, len, script.pick(&[4, 4, 4, 5, 6]), 0));
    }
    stage.offer(queue, head);
    stage.kick(queue as u32);
    stage.run();
}

fn used_ring_of(stage: &Stage, queue: usize) -> u64 {
    stage.queues[queue].active.as_ref().map_or(LOW.start, |active| active.set_up.at[2])
}

/// Overwrites a part of the driver's own rings.
fn poke_ring(stage: &mut Stage, script: &mut Script<'_>, queue: usize) {
    let Some(active) = stage.queues[queue].active.as_ref() else { return };
    let part = active.set_up.at[script.below(3)];
    let offset = script.below(active.set_up.size as usize * 8) as u64;
    let value = script.odd();
    let width = script.pick(&[2, 8, 1, 4]);
    stage.poke(part + offset, &value.to_le_bytes()[..width]);
}

/// Advances the available index by an arbitrary step.
fn bump(stage: &mut Stage, script: &mut Script<'_>, queue: usize) {
    let Some(active) = stage.queues[queue].active.as_ref() else { return };
    let (ring, size) = (active.set_up.at[1], active.set_up.size as u16);
    let by = script.pick(&[1, size, size.wrapping_add(1), 0x8000, u16::MAX, 2]);
    let index = stage.queues[queue].available.wrapping_add(by);
    stage.queues[queue].available = index;
    stage.poke(ring + 2, &index.to_le_bytes());
    stage.kick(queue as u32);
    stage.run();
}

/// Changes the driver's notification suppression.
fn suppress(stage: &mut Stage, script: &mut Script<'_>, queue: usize) {
    let Some(active) = stage.queues[queue].active.as_ref() else { return };
    let (ring, size) = (active.set_up.at[1], u64::from(active.set_up.size));
    let value = script.odd16();
    let at = if script.flag() { ring } else { ring + 4 + 2 * size };
    stage.poke(at, &value.to_le_bytes());
}

/// Checks that the device works after a reset, with the backends restored.
pub(crate) fn works(stage: &mut Stage) {
    stage.ends.restore();
    // Without EVENT_IDX, and without the ports of a console, which need a handshake first.
    let many_ports = if stage.kind == Kind::Console { 2 } else { 0 };
    stage.start(!(1 << 29 | many_ports), 16);
    stage.run();
    let queue = match stage.kind {
        Kind::Rng | Kind::Blk | Kind::Balloon => 0,
        Kind::Net | Kind::Vsock | Kind::Input | Kind::Console => 1,
    };
    let request = match stage.kind {
        Kind::Rng => vec![Piece::Write(32)],
        Kind::Blk => {
            vec![Piece::Read(vec![0; 16]), Piece::Write(512), Piece::Write(1)]
        }
        Kind::Balloon => vec![Piece::Read(vec![0x10, 0, 8, 0])],
        Kind::Net => vec![Piece::Read(vec![0; 72])],
        Kind::Input => vec![Piece::Read(vec![0; 8])],
        Kind::Console => vec![Piece::Read(b"alive".to_vec())],
        Kind::Vsock => {
            let words = [3_u32, 0, 2, 0, 77, 78, 0, 5 << 16 | 1, 0, 0, 0];
            vec![Piece::Read(words.into_iter().flat_map(u32::to_le_bytes).collect())]
        }
    };
    if stage.kind == Kind::Vsock {
        assert!(stage.post(0, &[Piece::Write(4096)], false));
        stage.kick(0);
    }
    assert!(stage.post(queue, &request, true));
    stage.kick(queue as u32);
    let back = stage.run();
    assert_eq!(back[queue], 1, "{:?} does not work after a reset: {back:?}", stage.kind);
    match stage.kind {
        Kind::Vsock => assert_eq!(back[0], 1, "no answer"),
        Kind::Console => assert!(stage.ends.console.output().ends_with(b"alive")),
        _ => {}
    }
    stage.reset();
}
