//! The console device with its driver and its backend: slow readers, much input, sizes, emergency writes.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rvmm_devices::testing::{MemoryConsole, create, turn, wiring};
use rvmm_devices::virtio::testing::{Buffer, NEXT, RAM, RAM_SIZE, Rig};
use rvmm_devices::{ConsoleBackend, Endpoint, Host, HostError, Listener, NoHost};

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const F_SIZE: u64 = 1;
const F_EMERG_WRITE: u64 = 4;

/// A host with one console.
struct OneConsole(MemoryConsole);

impl Host for OneConsole {
    fn console(&self, to: &Endpoint) -> Result<Box<dyn ConsoleBackend>, HostError> {
        assert_eq!(*to, Endpoint::Unix("/run/x".into()));
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
    Rig::build(|mut wiring| {
        wiring.host = Arc::new(OneConsole(console.clone()));
        create("console,to=unix:/run/x", wiring).unwrap()
    })
}

fn started() -> (Rig, MemoryConsole) {
    let console = MemoryConsole::new().unwrap();
    let mut rig = rig_on(&console);
    rig.start(0);
    (rig, console)
}

#[test]
fn a_console_without_a_backend_is_refused() {
    for text in ["console", "console,to=nowhere"] {
        assert!(create(text, wiring()).is_err(), "{text}");
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
            // Returned bytes have reached the other end, except for those in its buffer.
            assert!(console.output().len() + 4096 >= done * 5000);
        }
    }
    assert!(done == 10 && console.output() == text);
}

#[test]
fn a_disconnected_backend_does_not_block_the_guest() {
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
fn input_stays_in_the_host_until_the_guest_has_buffers() {
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
    // A buffer is returned with the available bytes, even if these are few.
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
fn the_terminal_size_is_offered_if_known_and_updated() {
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
fn an_emergency_write_is_ignored_unless_negotiated() {
    let (mut rig, console) = started();
    rig.write(0x108, u32::from(b'x'));
    rig.run();
    assert_eq!(console.output(), b"");
    rig.start(F_EMERG_WRITE);
    rig.write(0x108, u32::from(b'!'));
    rig.device.write(0x108, b"?").unwrap();
    // The rest of the configuration is read-only.
    rig.write(0x100, u32::MAX);
    rig.device.write(0x109, b"z").unwrap();
    rig.ask(TRANSMIT, &[Buffer::Read(b".")]).unwrap();
    assert_eq!(console.output(), b"!?.");
    assert_eq!(rig.read(0x100), 0);
}

#[test]
fn a_reset_drops_pending_data() {
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
fn output_outside_of_ram_is_refused_and_a_huge_one_does_not_block_the_thread() {
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

/// A host with a console for each requested name.
#[derive(Clone, Default)]
struct Consoles(Arc<Mutex<HashMap<String, MemoryConsole>>>);

impl Consoles {
    fn at(&self, to: &str) -> MemoryConsole {
        let mut all = self.0.lock().unwrap();
        all.entry(to.to_owned()).or_insert_with(|| MemoryConsole::new().unwrap()).clone()
    }
}

impl Host for Consoles {
    fn console(&self, to: &Endpoint) -> Result<Box<dyn ConsoleBackend>, HostError> {
        Ok(Box::new(self.at(to.to_string().trim_start_matches("file:"))))
    }
}

const F_MULTIPORT: u64 = 2;
const CONTROL_IN: u32 = 2;
const CONTROL_OUT: u32 = 3;
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A device with ports whose driver has not sent DEVICE_READY.
fn ports(text: &str, features: u64) -> (Rig, Consoles) {
    let consoles = Consoles::default();
    let text = format!("console,{text}");
    consoles.at("tty").set_size((80, 24));
    let host = consoles.clone();
    let mut rig = Rig::build(|mut wiring| {
        wiring.host = Arc::new(host.clone());
        create(&text, wiring).unwrap()
    });
    rig.start(features);
    (rig, consoles)
}

fn say(rig: &mut Rig, id: u32, event: u16, value: u16) {
    let message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
    assert_eq!(rig.ask(CONTROL_OUT, &[Buffer::Read(&message)]).unwrap(), b"");
}

/// The device's control messages so far: id, event, value, and the data after these.
fn said(rig: &mut Rig) -> Vec<(u32, u16, u16, Vec<u8>)> {
    let mut all = Vec::new();
    loop {
        rig.add(CONTROL_IN, &[Buffer::Write(80)]);
        rig.kick(CONTROL_IN);
        let Some((head, len)) = rig.take_used(CONTROL_IN) else { return all };
        let bytes = rig.written(CONTROL_IN, head);
        let bytes = &bytes[..len as usize];
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        all.push((u32::from(half(0)), half(4), half(6), bytes[8..].to_vec()));
    }
}

/// Sends DEVICE_READY and PORT_READY as Linux does.
fn all_ready(rig: &mut Rig, count: u32) {
    say(rig, u32::MAX, DEVICE_READY, 1);
    (0..count).for_each(|id| say(rig, id, PORT_READY, 1));
    said(rig);
}

#[test]
fn ports_are_announced_and_named_and_the_console_is_the_first() {
    let (mut rig, consoles) =
        ports("to=file:tty,port1=agent=file:a,port4=log.1=file:b", F_SIZE | F_MULTIPORT);
    consoles.at("b").hang_up();
    rig.run();
    assert_eq!(rig.offered() & 7, F_SIZE | F_MULTIPORT | F_EMERG_WRITE);
    assert_eq!((rig.read(0x100), rig.read(0x104)), (80 | 24 << 16, 3));
    assert_eq!(said(&mut rig), [], "the driver is not ready");
    say(&mut rig, u32::MAX, DEVICE_READY, 1);
    let adds: Vec<_> = said(&mut rig);
    assert_eq!(adds, [0, 1, 2].map(|id| (id, PORT_ADD, 1, Vec::new())));
    say(&mut rig, 0, PORT_READY, 1);
    let size = [80, 0, 24, 0].to_vec();
    assert_eq!(
        said(&mut rig),
        [(0, CONSOLE_PORT, 1, vec![]), (0, RESIZE, 1, size), (0, PORT_OPEN, 1, vec![])]
    );
    say(&mut rig, 1, PORT_READY, 1);
    assert_eq!(said(&mut rig), [(1, PORT_NAME, 1, b"agent".to_vec()), (1, PORT_OPEN, 1, vec![])]);
    say(&mut rig, 2, PORT_READY, 1);
    assert_eq!(said(&mut rig), [(2, PORT_NAME, 1, b"log.1".to_vec())], "nobody is there");
    consoles.at("b").connect();
    rig.run();
    assert_eq!(said(&mut rig), [(2, PORT_OPEN, 1, vec![])]);
    consoles.at("b").hang_up();
    rig.run();
    assert_eq!(said(&mut rig), [(2, PORT_OPEN, 0, vec![])]);
}

#[test]
fn each_port_has_its_own_backend_and_input_waits_until_it_is_open() {
    let (mut rig, consoles) = ports("to=file:tty,port1=one=file:a,port2=two=file:b", F_MULTIPORT);
    all_ready(&mut rig, 3);
    for (queue, to) in [(1, "tty"), (5, "a"), (7, "b")] {
        rig.ask(queue, &[Buffer::Read(to.as_bytes())]).unwrap();
        assert_eq!(consoles.at(to).output(), to.as_bytes());
    }
    let slow = consoles.at("a");
    slow.set_room(Some(0));
    rig.add(5, &[Buffer::Read(&[b'x'; 9000])]);
    rig.kick(5);
    assert_eq!(rig.take_used(5), None);
    rig.ask(7, &[Buffer::Read(b"!")]).unwrap();
    assert_eq!(consoles.at("b").output(), b"b!", "a slow reader holds up its own port");
    slow.set_room(None);
    rig.run();
    assert!(rig.take_used(5).is_some());

    let head = rig.add(6, &[Buffer::Write(64)]);
    rig.kick(6);
    consoles.at("b").type_in(b"hello");
    rig.run();
    assert_eq!((rig.take_used(6), consoles.at("b").unread()), (None, 5));
    say(&mut rig, 2, PORT_OPEN, 1);
    rig.run();
    assert_eq!(rig.take_used(6), Some((head, 5)));
    say(&mut rig, 2, PORT_OPEN, 0);
    rig.add(6, &[Buffer::Write(64)]);
    rig.kick(6);
    consoles.at("b").type_in(b"later");
    rig.run();
    assert_eq!((rig.take_used(6), consoles.at("b").unread()), (None, 5));
    assert_eq!(turn(rig.device.as_mut(), 0).unwrap(), 0, "the loop sleeps");
    consoles.at("tty").type_in(b"k");
    assert_eq!(rig.ask(RECEIVE, &[Buffer::Write(8)]).unwrap(), b"k", "the console is always open");
}

#[test]
fn a_driver_without_multiport_has_only_the_console() {
    let (mut rig, consoles) = ports("to=file:tty,port1=one=file:a", F_SIZE);
    rig.ask(TRANSMIT, &[Buffer::Read(b"plain")]).unwrap();
    assert_eq!(consoles.at("tty").output(), b"plain");
    rig.add(CONTROL_OUT, &[Buffer::Read(&[0; 8])]);
    rig.add(CONTROL_IN, &[Buffer::Write(64)]);
    rig.add(5, &[Buffer::Read(b"nobody's")]);
    (2..6).for_each(|queue| rig.kick(queue));
    assert!((2..6).all(|queue| rig.take_used(queue).is_none()));
    assert_eq!(consoles.at("a").output(), b"");
    let (mut rig, consoles) = ports("port1=only=file:a", F_MULTIPORT);
    assert_eq!(rig.read(0x104), 1);
    all_ready(&mut rig, 1);
    rig.ask(TRANSMIT, &[Buffer::Read(b"no console")]).unwrap();
    assert_eq!(consoles.at("a").output(), b"no console");
}

#[test]
fn a_new_terminal_size_is_also_sent_to_drivers_with_ports() {
    let (mut rig, consoles) = ports("to=file:tty,port1=one=file:a", F_SIZE | F_MULTIPORT);
    all_ready(&mut rig, 2);
    consoles.at("tty").set_size((132, 50));
    consoles.at("tty").connect();
    rig.run();
    assert_eq!(said(&mut rig), [(0, RESIZE, 1, [132, 0, 50, 0].to_vec())]);
    assert_eq!(rig.read(0x100), 132 | 50 << 16);
}

#[test]
fn endless_or_invalid_control_messages_cost_nothing() {
    let (mut rig, _consoles) = ports("to=file:tty,port1=one=file:a", F_MULTIPORT);
    say(&mut rig, 0, DEVICE_READY, 1);
    for _ in 0..2000 {
        say(&mut rig, 1, PORT_READY, 1);
    }
    assert_eq!(
        said(&mut rig).iter().map(|said| said.1).collect::<Vec<_>>(),
        [PORT_ADD, PORT_ADD, PORT_NAME, PORT_OPEN]
    );
    for (id, event, value) in [(2, PORT_READY, 1), (u32::MAX, PORT_OPEN, 1), (1, 99, 1), (1, 2, 0)]
    {
        say(&mut rig, id, event, value);
    }
    for odd in [&b""[..], b"short", &[0xff; 9000]] {
        rig.ask(CONTROL_OUT, &[Buffer::Read(odd)]).unwrap();
    }
    assert_eq!(said(&mut rig), []);
    say(&mut rig, 1, PORT_READY, 0);
    say(&mut rig, 1, PORT_READY, 1);
    rig.add(CONTROL_IN, &[Buffer::Write(7)]);
    rig.kick(CONTROL_IN);
    // Buffers left over from `said` are filled first; too short ones are returned empty.
    let taken: Vec<u32> =
        std::iter::from_fn(|| rig.take_used(CONTROL_IN)).map(|used| used.1).collect();
    assert!(taken.contains(&11) && taken.iter().all(|len| matches!(len, 0 | 8 | 11)), "{taken:?}");
    rig.start(F_MULTIPORT);
    assert_eq!(said(&mut rig), [], "a new driver has said nothing");
}

#[test]
fn port_names_are_valid_and_unique() {
    for (text, part) in [
        ("console,port1=agent", "NAME=WHERE"),
        ("console,port1==file:a", "NAME=WHERE"),
        ("console,port1=a/b=file:a", "NAME=WHERE"),
        ("console,port1=a b=file:a", "NAME=WHERE"),
        ("console,port2=x=file:a,port1=x=file:b", "no other port"),
        ("console,port8=x=file:a", "Unknown option"),
    ] {
        let error = create(text, wiring()).err().unwrap();
        let said =
            format!("{error} {:?}", std::error::Error::source(&error).map(ToString::to_string));
        assert!(said.contains(part), "{text}: {said}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_messages_and_bytes_makes_ports_panic_or_spin(
        takes_ports in any::<bool>(),
        steps in prop::collection::vec((0_u8..9, 0_u32..4, 0_u16..9, 0_usize..6000), 1..60)
    ) {
        let (mut rig, consoles) = ports("to=file:tty,port1=one=file:a,port2=two=file:b", if takes_ports { 3 } else { 1 });
        for (what, number, event, len) in steps {
            let end = consoles.at(["tty", "a", "b", "tty"][number as usize]);
            let queue = [0, 4, 6, 2][number as usize];
            match what {
                0 => drop(rig.add(queue, &[Buffer::Write((len % 90) as u32)])),
                1 => drop(rig.add(queue + 1, &[Buffer::Read(&vec![1; len])])),
                2..4 => {
                    let message = [&number.to_le_bytes()[..], &event.to_le_bytes(), &(len as u16 % 3).to_le_bytes()].concat();
                    rig.add(3, &[Buffer::Read(&message)]);
                }
                4 => end.type_in(&vec![2; len]),
                5 => end.set_room(Some(len)),
                6 => end.hang_up(),
                7 => end.connect(),
                _ => end.set_size((event, number as u16)),
            }
            (0..8).for_each(|queue| rig.kick(queue));
            rig.run();
            (0..8).for_each(|queue| while rig.take_used(queue).is_some() {});
        }
        prop_assert!(rig.status() == 15 || rig.status() == 15 | 64);
    }
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
