//! Both sides over a socket pair, and a side that does something else than it should.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::slice::from_ref;
use std::thread;

use proptest::prelude::*;
use rvmm_devices::testing::skip;

use super::channel::Channel;
use super::message::Kind;
use super::*;
use crate::config::VmConfig;
use crate::error::{EXIT_SNAPSHOT, Error};
use crate::hypervisor::VmState;
use crate::layout::RAM_BASE;
use crate::memory::{PAGE, RamError};
use crate::snapshot::SavedMachine;
use crate::vcpu::Control;
use crate::vcpu::stop::StopReason;

const MEM: u64 = 4 << 20;

fn machine() -> SavedMachine {
    let vm = VmState { time: 7, harts: Vec::new(), irqchip: None };
    let config = VmConfig { mem: MEM, ..VmConfig::default() };
    SavedMachine { saved_at_ns: 0, config, disks: Vec::new(), vm, devices: Vec::new() }
}

/// Guest memory in which each page begins with its number, every fourth one is zero, and those from `changed` on differ.
fn read(changed: u64) -> impl Fn(u64, &mut [u8]) -> std::io::Result<()> {
    move |at, bytes| {
        for (page, bytes) in (at / PAGE..).zip(bytes.chunks_mut(4096)) {
            bytes.fill(0);
            if page % 4 != 0 {
                bytes[..8].copy_from_slice(&page.to_le_bytes());
                bytes[4095] = u8::from(page >= changed);
            } else if page < changed {
                bytes[1] = 1;
            }
        }
        Ok(())
    }
}

/// What a source sends, up to the state, to a target that consents.
fn recorded() -> Vec<u8> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let target = thread::spawn(move || {
        let mut all = Vec::new();
        let mut copy = theirs.try_clone().unwrap();
        let mut channel = Channel::new(theirs.into()).unwrap();
        // Replies to everything, in the right order, before it is asked.
        let this = process::Process::this().unwrap();
        source::send_json(&mut channel, Kind::Welcome, &this).unwrap();
        channel.send(Kind::Received, 0, |_| Ok(())).unwrap();
        channel.send(Kind::Ready, 0, |_| Ok(())).unwrap();
        channel.send(Kind::Running, 0, |_| Ok(())).unwrap();
        copy.read_to_end(&mut all).unwrap();
        all
    });
    let mut source = Source::greet(ours.into(), "web", MEM, false).unwrap();
    source.send_pages(from_ref(&(0..64 * PAGE)), &read(0)).unwrap();
    source.finish_round().unwrap();
    source.send_pages(from_ref(&(0..2 * PAGE)), &read(1)).unwrap();
    source.hand_over(machine(), false, Vec::new(), &read(0)).unwrap();
    assert!(matches!(source.commit(&read(0)), Outcome::Gone));
    drop(source);
    target.join().unwrap()
}

/// What a target makes of these bytes, after which the connection ends.
fn receive(bytes: &[u8]) -> Result<(), Error> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            // It may close the connection at any byte.
            let _ = ours.write_all(bytes);
            let _ = ours.shutdown(std::net::Shutdown::Write);
            let _ = ours.read_to_end(&mut Vec::new());
        });
        let mut incoming = Incoming::of(theirs.into())?;
        let received = incoming.receive()?;
        assert_eq!((received.machine, received.is_paused), (machine(), false));
        let mut number = [0; 8];
        received.ram.read(RAM_BASE + 63 * PAGE, &mut number).unwrap();
        assert_eq!(u64::from_le_bytes(number), 63);
        incoming.take_over()
    })
}

#[test]
fn memory_and_state_arrive_as_they_were_sent() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let target = thread::spawn(move || {
        let mut incoming = Incoming::of(theirs.into()).unwrap();
        assert_eq!(incoming.name(), "web");
        let received = incoming.receive().unwrap();
        incoming.take_over().unwrap();
        received
    });
    let mut source = Source::greet(ours.into(), "web", MEM, false).unwrap();
    // Ranges of any length, some of them again with other contents, among them zeroes in the place of others.
    source.send_pages(&[0..PAGE, 2 * PAGE..200 * PAGE, MEM - PAGE..MEM], &read(u64::MAX)).unwrap();
    source.finish_round().unwrap();
    let before = source.sent();
    assert!(before > 190 * PAGE && before < 210 * PAGE, "{before}");
    source.send_pages(from_ref(&(100 * PAGE..150 * PAGE)), &read(100)).unwrap();
    source.finish_round().unwrap();
    assert!(source.sent() - before < 42 * PAGE, "zero pages are not sent");
    source.hand_over(machine(), true, Vec::new(), &read(0)).unwrap();
    assert!(matches!(source.commit(&read(0)), Outcome::Gone));
    let received = target.join().unwrap();
    assert_eq!((received.machine, received.is_paused), (machine(), true));
    let mut expected = vec![0; usize::try_from(MEM).unwrap()];
    for (range, changed) in [
        (0..PAGE, u64::MAX),
        (2 * PAGE..200 * PAGE, u64::MAX),
        (MEM - PAGE..MEM, u64::MAX),
        (100 * PAGE..150 * PAGE, 100),
    ] {
        let [from, to] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
        read(changed)(range.start, &mut expected[from..to]).unwrap();
    }
    let mut memory = vec![0xff; expected.len()];
    received.ram.read(RAM_BASE, &mut memory).unwrap();
    assert!(memory == expected);
}

#[test]
fn a_recorded_source_is_understood_and_a_part_of_it_is_refused() {
    let all = recorded();
    receive(&all).unwrap();
    for len in (0..all.len() - 24).step_by(997).chain(all.len() - 100..all.len() - 24) {
        assert!(receive(&all[..len]).is_err(), "{len} bytes");
    }
    // Without its last message the source has not let the guest go, and this process, which is the source, lives.
    let error = receive(&all[..all.len() - 24]).unwrap_err().to_string();
    assert!(error.contains("has ended"), "{error}");
}

/// A message whose checksum is right.
fn frame(kind: Kind, bytes: &[u8]) -> Vec<u8> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(ours.into()).unwrap();
    channel
        .send(kind, bytes.len(), |payload| {
            payload.copy_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    drop(channel);
    let mut frame = Vec::new();
    theirs.read_to_end(&mut frame).unwrap();
    frame
}

#[test]
fn what_no_source_sends_is_refused_with_the_reason() {
    let hello = {
        let all = recorded();
        let len = usize::try_from(u32::from_le_bytes(all[12..16].try_into().unwrap())).unwrap();
        all[..24 + len.next_multiple_of(8)].to_vec()
    };
    let text = String::from_utf8(hello[24..].to_vec()).unwrap().trim_end_matches('\0').to_owned();
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from));
        frame(Kind::Hello, text.replacen(from, to, 1).as_bytes())
    };
    let after = |more: Vec<u8>| [hello.clone(), more].concat();
    let numbers = |at: u64, len: u64| [at.to_le_bytes(), len.to_le_bytes()].concat();
    let left = |left: &[(u64, u64)]| {
        let state = message::State { machine: machine(), is_paused: false, left: left.to_vec() };
        serde_json::to_vec(&state).unwrap()
    };
    let mut small = machine();
    small.config.mem = MEM / 2;
    let other_size = message::State { machine: small, is_paused: false, left: Vec::new() };
    let other_size = serde_json::to_vec(&other_size).unwrap();
    let mut damaged = frame(Kind::Pages, &[1; 4104]);
    damaged[100] ^= 1;
    let mut long = frame(Kind::Round, &[]);
    long[12] = 1;
    for (bytes, reason) in [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n".to_vec(), "does not speak the protocol"),
        (frame(Kind::Round, &[]), "sends Round instead of Hello"),
        (frame(Kind::Hello, b"{}"), "missing field"),
        (changed("rvmm-migration", "qemu"), "it is no migration of rvmm"),
        (changed("\"version\":1", "\"version\":2"), "its format has version 2"),
        (changed(std::env::consts::ARCH, "s390x"), "it comes from s390x"),
        (changed("\"mem\":4194304", "\"mem\":4194305"), "the size of its memory"),
        (changed("\"mem\":4194304", "\"mem\":0"), "the size of its memory"),
        (changed("\"mem\":4194304", "\"mem\":18446744073709547520"), "the size of its memory"),
        (after(frame(Kind::Hello, b"{}")), "Hello at this point"),
        (after(frame(Kind::Go, &[])), "Go at this point"),
        (after(frame(Kind::Pages, &[0; 7])), "invalid data (pages)"),
        (
            after(frame(Kind::Pages, &[numbers(MEM, 0), vec![1; 4096]].concat())),
            "not inside guest RAM",
        ),
        (after(frame(Kind::Pages, &numbers(u64::MAX, 1))), "not inside guest RAM"),
        (after(frame(Kind::Zeroes, &numbers(MEM, 1))), "invalid data (zero pages)"),
        (after(frame(Kind::Zeroes, &numbers(1, u64::MAX))), "invalid data (zero pages)"),
        (after(frame(Kind::Zeroes, &[0; 9])), "invalid data (zero pages)"),
        (after(frame(Kind::State, b"{\"machine\":1}")), "invalid data (its state"),
        (after(frame(Kind::State, &other_size)), "its memory has another size"),
        (after(frame(Kind::State, &left(&[(0, MEM), (MEM, 4096)]))), "the memory that is left"),
        (after(frame(Kind::State, &left(&[(1, 4096)]))), "the memory that is left"),
        (after(frame(Kind::State, &left(&[(u64::MAX - 4095, 4096)]))), "the memory that is left"),
        (after(frame(Kind::Refused, b"no disk")), "The machine stays where it is: no disk"),
        (after(damaged), "damaged on its way"),
        (after(long), "too long"),
        (after([0; 24].to_vec()), "does not speak the protocol"),
    ] {
        let text = crate::error::chain(&receive(&bytes).unwrap_err());
        assert!(text.contains(reason), "{reason}: {text}");
    }
    let error = receive(&changed("rvmm-migration", "qemu")).unwrap_err();
    assert_eq!(error.exit_code(), EXIT_SNAPSHOT);
}

/// A target that sends these messages, and ends the connection.
fn against(messages: &[(Kind, &[u8])]) -> (Result<Source, Error>, thread::JoinHandle<Vec<u8>>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let bytes: Vec<u8> = messages.iter().flat_map(|(kind, bytes)| frame(*kind, bytes)).collect();
    let peer = thread::spawn(move || {
        let _ = theirs.write_all(&bytes);
        let _ = theirs.shutdown(std::net::Shutdown::Write);
        let mut all = Vec::new();
        let _ = theirs.read_to_end(&mut all);
        all
    });
    (Source::greet(ours.into(), "web", MEM, false), peer)
}

#[test]
fn a_target_that_refuses_or_vanishes_is_reported_at_each_message() {
    let this = serde_json::to_vec(&process::Process::this().unwrap()).unwrap();
    let welcome: (Kind, &[u8]) = (Kind::Welcome, &this);
    let refused: (Kind, &[u8]) = (Kind::Refused, b"no room");
    let text = |result: Result<_, Error>| crate::error::chain(&result.map(|_: ()| ()).unwrap_err());
    let (source, _) = against(&[]);
    assert!(text(source.map(drop)).contains("has ended"));
    let (source, _) = against(&[refused]);
    assert_eq!(text(source.map(drop)), "The other side refuses: no room");
    let (source, _) = against(&[(Kind::Welcome, b"?")]);
    assert!(text(source.map(drop)).contains("Cannot understand"));
    let (source, _) = against(&[(Kind::Ready, b"")]);
    assert!(text(source.map(drop)).contains("Ready instead of Welcome"));
    let (source, _) = against(&[welcome]);
    assert!(text(source.unwrap().finish_round()).contains("has ended"));
    let (source, _) = against(&[welcome, refused]);
    assert!(text(source.unwrap().finish_round()).contains("no room"));
    let (source, _) = against(&[welcome, refused]);
    assert!(
        text(source.unwrap().hand_over(machine(), false, Vec::new(), &read(0))).contains("no room")
    );
    // After that it is unknown whether the target, which is this process and lives, has got the guest.
    let (source, _) = against(&[welcome, (Kind::Ready, b"")]);
    let mut source = source.unwrap();
    source.hand_over(machine(), false, Vec::new(), &read(0)).unwrap();
    assert!(
        matches!(source.commit(&read(0)), Outcome::Unknown(reason) if reason.contains("has ended"))
    );
}

#[test]
fn a_target_hears_why_the_guest_stays() {
    let this = serde_json::to_vec(&process::Process::this().unwrap()).unwrap();
    let (source, peer) = against(&[(Kind::Welcome, &this)]);
    source.unwrap().refuse("the user has changed his mind").unwrap();
    let heard = peer.join().unwrap();
    assert!(heard.windows(9).any(|part| part == b"his mind\0" || part.ends_with(b"his mind")));
}

#[test]
fn a_descriptor_that_is_no_stream_socket_is_refused() {
    let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    for descriptor in [datagrams.into(), file.into()] {
        let text = crate::error::chain(&Incoming::of(descriptor).err().unwrap());
        assert!(text.contains("no connected stream socket"), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_source_with_any_bit_changed_is_refused(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        static ALL: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut all = ALL.get_or_init(recorded).clone();
        let at = at.index(all.len());
        all[at] ^= 1 << bit;
        let len = all.len();
        let result = receive(&all);
        prop_assert!(result.is_err(), "bit {bit} of byte {at} of {len}");
    }
}

/// The offsets of pages that are left, and a source that has sent those before.
const LEFT: std::ops::Range<u64> = 100 * PAGE..200 * PAGE;

/// Both sides of a post-copy, up to the moment when the guest is the target's; nothing where the user may not use userfaultfd(2).
fn post_copied() -> Option<(Source, Received)> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let target = thread::spawn(move || {
        let mut incoming = Incoming::of(theirs.into()).unwrap();
        let received = incoming.receive()?;
        // Something that is read while the machine is built.
        let mut number = [0; 8];
        received.ram.read(RAM_BASE + 150 * PAGE, &mut number).unwrap();
        assert_eq!(number[1], 0);
        received.ram.read(RAM_BASE + 151 * PAGE, &mut number).unwrap();
        assert_eq!(u64::from_le_bytes(number), 151);
        incoming.take_over().map(|()| received)
    });
    let mut source = Source::greet(ours.into(), "web", MEM, false).unwrap();
    // What was sent before is replaced.
    source.send_pages(from_ref(&(0..150 * PAGE)), &read(u64::MAX)).unwrap();
    source.finish_round().unwrap();
    let handed = source.hand_over(machine(), false, vec![LEFT], &read(120));
    match handed {
        Ok(()) => assert!(matches!(source.commit(&read(120)), Outcome::Gone)),
        Err(error) => {
            assert!(target.join().unwrap().is_err());
            skip(&error.to_string());
            return None;
        }
    }
    Some((source, target.join().unwrap().unwrap()))
}

#[test]
fn memory_that_is_left_arrives_after_the_guest() {
    let Some((mut source, received)) = post_copied() else { return };
    let feeder = thread::spawn(move || source.send_left(&read(120)).unwrap());
    let mut expected = vec![0; usize::try_from(MEM).unwrap()];
    for (range, changed) in [(0..150 * PAGE, u64::MAX), (LEFT, 120)] {
        let [from, to] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
        read(changed)(range.start, &mut expected[from..to]).unwrap();
    }
    let mut memory = vec![0xff; expected.len()];
    // From the end, so that somebody waits for pages that would come last.
    for (number, page) in memory.chunks_mut(4096).enumerate().rev() {
        received.ram.read(RAM_BASE + number as u64 * PAGE, page).unwrap();
    }
    assert!(memory == expected);
    feeder.join().unwrap();
    // It is as any other memory now.
    received.ram.write(RAM_BASE + 300 * PAGE, &[1]).unwrap();
}

#[test]
fn a_source_that_ends_before_all_memory_has_arrived_ends_the_machine_and_nobody_finds_zeroes() {
    let Some((source, received)) = post_copied() else { return };
    let control = std::sync::Arc::new(Control::new());
    received.arriving.as_ref().unwrap().attach(&control);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| received.ram.read(RAM_BASE + 199 * PAGE, &mut [0; 8]));
        drop(source);
        assert_eq!(waiting.join().unwrap(), Err(RamError::Lost));
    });
    assert!(control.ends_within(std::time::Duration::from_mins(1)));
    let Some(StopReason::HostFailure(why)) = control.reason() else { panic!("another reason") };
    assert!(why.contains("the guest is lost"), "{why}");
}

#[test]
fn a_target_that_ends_meanwhile_is_noticed_by_its_source() {
    let Some((mut source, received)) = post_copied() else { return };
    drop(received);
    let text = crate::error::chain(&source.send_left(&read(120)).unwrap_err());
    assert!(text.contains("has ended"), "{text}");
}
