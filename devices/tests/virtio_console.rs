//! The console device against its driver and its other end: slow readers, much input, sizes, emergency writes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use rvmm_devices::testing::{MemoryConsole, turn, wiring};
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, RAM_SIZE, Rig};
use rvmm_devices::{ConsoleBackend, Host, HostError, Listener, Model, NoHost, Options};

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const F_SIZE: u64 = 1;
const F_EMERG_WRITE: u64 = 4;

/// A host with one console.
struct OneConsole(MemoryConsole);

impl Host for OneConsole {
    fn console(&self, to: &str) -> Result<Box<dyn ConsoleBackend>, HostError> {
        assert_eq!(to, "unix:/run/x");
        Ok(Box::new(self.0.clone()))
    }

    fn listen(&self, path: &Path) -> Result<Box<dyn Listener>, HostError> {
        NoHost.listen(path)
    }

    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        NoHost.connect(path)
    }
}

fn rig_on(console: &MemoryConsole) -> Rig {
    let options = Options::parse("console,to=unix:/run/x").unwrap();
    Rig::build(|mut wiring| {
        wiring.host = Arc::new(OneConsole(console.clone()));
        Model::find("console").unwrap().create(&options, wiring).unwrap()
    })
}

fn started() -> (Rig, MemoryConsole) {
    let console = MemoryConsole::new().unwrap();
    let mut rig = rig_on(&console);
    rig.start(0);
    (rig, console)
}

#[test]
fn a_console_without_another_end_is_refused() {
    for text in ["console", "console,to=nowhere"] {
        let options = Options::parse(text).unwrap();
        assert!(Model::find("console").unwrap().create(&options, wiring()).is_err(), "{text}");
    }
}

#[test]
fn output_goes_through_every_buffer_of_a_chain() {
    let (mut rig, console) = started();
    let text =
        [Buffer::Read(b"hel"), Buffer::Read(b""), Buffer::Read(b"lo, "), Buffer::Read(b"world")];
    assert_eq!(rig.ask(TRANSMIT, &text).unwrap(), b"");
    assert_eq!(console.output(), b"hello, world");
    for odd in [&[Buffer::Read(b"")][..], &[Buffer::Write(8)]] {
        assert_eq!(rig.ask(TRANSMIT, odd).unwrap(), b"");
    }
    let long: Vec<u8> = (0..=250).cycle().take(1 << 20).collect();
    assert_eq!(rig.ask(TRANSMIT, &[Buffer::Read(&long)]).unwrap(), b"");
    assert!(console.output()[12..] == long);
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let (mut rig, console) = started();
    console.set_room(Some(10));
    let text: Vec<u8> = (0..=250).cycle().take(50_000).collect();
    let heads: Vec<u16> =
        text.chunks(5000).map(|part| rig.add(TRANSMIT, &[Buffer::Read(part)])).collect();
    rig.kick(TRANSMIT);
    assert_eq!(rig.take_used(TRANSMIT), None, "the first is not through");
    assert_eq!(turn(rig.device.as_mut(), 0).unwrap(), 0, "the loop sleeps");
    let mut done = 0;
    for _ in 0..100 {
        console.set_room(Some(1000));
        rig.run();
        while let Some((head, _)) = rig.take_used(TRANSMIT) {
            assert_eq!(head, heads[done]);
            done += 1;
            // What has come back is with the other end, but for what its buffer holds.
            assert!(console.output().len() + 4096 >= done * 5000);
        }
    }
    assert!(done == 10 && console.output() == text);
}

#[test]
fn nobody_at_the_other_end_does_not_stop_the_guest() {
    let (mut rig, console) = started();
    console.hang_up();
    for _ in 0..20 {
        assert_eq!(rig.ask(TRANSMIT, &[Buffer::Read(&[b'x'; 10_000])]).unwrap(), b"");
    }
    console.connect();
    rig.run();
    rig.ask(TRANSMIT, &[Buffer::Read(b"back")]).unwrap();
    assert_eq!(console.output(), b"back");
    console.set_room(Some(0));
    rig.add(TRANSMIT, &[Buffer::Read(&[b'y'; 10_000])]);
    rig.kick(TRANSMIT);
    assert_eq!(rig.take_used(TRANSMIT), None);
    console.hang_up();
    rig.run();
    assert!(rig.take_used(TRANSMIT).is_some());
}

#[test]
fn input_waits_outside_until_the_guest_has_room() {
    let (mut rig, console) = started();
    console.type_in(&vec![b'k'; 10_000]);
    rig.run();
    assert_eq!(console.unread(), 10_000);
    let (small, large) = (
        rig.add(RECEIVE, &[Buffer::Write(5)]),
        rig.add(RECEIVE, &[Buffer::Write(4), Buffer::Write(60)]),
    );
    rig.kick(RECEIVE);
    assert_eq!(
        [rig.take_used(RECEIVE), rig.take_used(RECEIVE)],
        [Some((small, 5)), Some((large, 64))]
    );
    assert_eq!(rig.written(RECEIVE, large), vec![b'k'; 64]);
    assert_eq!(console.unread(), 10_000 - 69);
    assert_eq!(turn(rig.device.as_mut(), 0).unwrap(), 0, "the loop sleeps");
    // A buffer is filled with what is there, however little.
    let head = rig.add(RECEIVE, &[Buffer::Write(20_000)]);
    rig.kick(RECEIVE);
    assert_eq!(rig.take_used(RECEIVE), Some((head, 4096)));
}

#[test]
fn a_key_reaches_a_guest_that_waits() {
    let (mut rig, console) = started();
    let heads: Vec<u16> = (0..3).map(|_| rig.add(RECEIVE, &[Buffer::Write(4096)])).collect();
    rig.kick(RECEIVE);
    for (head, key) in heads.into_iter().zip([b"a", b"b", b"c"]) {
        console.type_in(key);
        rig.run();
        assert_eq!(rig.take_used(RECEIVE), Some((head, 1)));
        assert_eq!(&rig.written(RECEIVE, head)[..1], key);
    }
    console.type_in(b"d");
    rig.run();
    assert_eq!((rig.take_used(RECEIVE), console.unread()), (None, 1));
    for odd in [&[Buffer::Read(b"no room")][..], &[Buffer::Write(0)]] {
        assert_eq!(rig.ask(RECEIVE, odd).unwrap(), b"");
    }
    assert_eq!(rig.ask(RECEIVE, &[Buffer::Write(64)]).unwrap(), b"d");
}

#[test]
fn the_end_of_the_input_is_not_the_end_of_the_console() {
    let (mut rig, console) = started();
    rig.add(RECEIVE, &[Buffer::Write(64)]);
    rig.kick(RECEIVE);
    console.end_input();
    rig.run();
    assert_eq!(rig.take_used(RECEIVE), None);
    rig.ask(TRANSMIT, &[Buffer::Read(b"still")]).unwrap();
    assert_eq!(console.output(), b"still");
}

#[test]
fn the_size_of_the_terminal_is_offered_where_there_is_one_and_followed() {
    let console = MemoryConsole::new().unwrap();
    assert_eq!(rig_on(&console).offered() & 0xff_ffff, F_EMERG_WRITE);
    console.set_size((80, 24));
    let mut rig = rig_on(&console);
    assert_eq!(rig.offered() & 0xff_ffff, F_SIZE | F_EMERG_WRITE);
    rig.start(F_SIZE);
    assert_eq!(rig.read(0x100), 80 | 24 << 16);
    let generation = rig.read(0xfc);
    console.set_size((132, 50));
    console.type_in(b"!");
    rig.add(RECEIVE, &[Buffer::Write(64)]);
    rig.kick(RECEIVE);
    assert_eq!(rig.read(0x100), 132 | 50 << 16);
    assert_eq!(rig.acknowledge() & 2, 2, "the driver is told");
    assert_ne!(rig.read(0xfc), generation);
}

#[test]
fn an_emergency_write_counts_only_where_it_was_negotiated() {
    let (mut rig, console) = started();
    rig.write(0x108, u32::from(b'x'));
    rig.run();
    assert_eq!(console.output(), b"");
    rig.start(F_EMERG_WRITE);
    rig.write(0x108, u32::from(b'!'));
    rig.device.write(0x108, b"?").unwrap();
    // The rest of the configuration is not the driver's.
    rig.write(0x100, u32::MAX);
    rig.device.write(0x109, b"z").unwrap();
    rig.ask(TRANSMIT, &[Buffer::Read(b".")]).unwrap();
    assert_eq!(console.output(), b"!?.");
    assert_eq!(rig.read(0x100), 0);
}

#[test]
fn a_reset_forgets_what_was_not_through() {
    let (mut rig, console) = started();
    console.set_room(Some(0));
    rig.add(TRANSMIT, &[Buffer::Read(&[b'o'; 30_000])]);
    rig.kick(TRANSMIT);
    rig.start(0);
    console.set_room(None);
    rig.run();
    assert_eq!(rig.take_used(TRANSMIT), None);
    assert_eq!(console.output(), [b'o'; 4096], "what had been taken is delivered");
    rig.ask(TRANSMIT, &[Buffer::Read(b"new")]).unwrap();
    assert!(console.output().ends_with(b"onew"));
    console.type_in(b"k");
    assert_eq!(rig.ask(RECEIVE, &[Buffer::Write(8)]).unwrap(), b"k");
}

#[test]
fn output_outside_of_ram_is_refused_and_a_huge_one_does_not_keep_the_thread() {
    let (mut rig, console) = started();
    let table = rig.rings(TRANSMIT)[0];
    rig.set_descriptor(table, 0, (RAM + RAM_SIZE - 10, 20, 0, 0));
    rig.make_available(TRANSMIT, 0);
    rig.kick(TRANSMIT);
    assert_eq!(rig.take_used(TRANSMIT), Some((0, 0)));
    assert_eq!(console.output(), b"");
    // All of RAM, eight times.
    let len = u32::try_from(RAM_SIZE).unwrap();
    for index in 1..9 {
        let flags = if index < 8 { NEXT } else { 0 };
        rig.set_descriptor(table, index, (RAM, len, flags, index + 1));
    }
    rig.make_available(TRANSMIT, 1);
    rig.write(0x50, TRANSMIT);
    turn(rig.device.as_mut(), 0).unwrap();
    let first = console.output().len();
    assert!((1..=256 << 10).contains(&first), "{first} bytes in one pass");
    rig.run();
    assert_eq!(console.output().len() as u64, 8 * RAM_SIZE);
}

proptest! {
    #[test]
    fn no_sequence_of_requests_makes_the_device_panic_or_spin(
        steps in prop::collection::vec((0_u8..8, 0_u32..3, 0_usize..6000), 1..60)
    ) {
        let (mut rig, console) = started();
        for (what, queue, len) in steps {
            match what {
                0..3 => drop(rig.add(queue.min(1), &[Buffer::Read(&vec![1; len])])),
                3 => drop(rig.add(queue.min(1), &[Buffer::Write(64)])),
                4 => console.type_in(&vec![2; len]),
                5 => console.set_room(Some(len)),
                6 => console.hang_up(),
                _ => console.connect(),
            }
            rig.kick(queue);
            while rig.take_used(queue.min(1)).is_some() {}
        }
        prop_assert!(rig.status() == 15 || rig.status() == 15 | 64);
    }
}
