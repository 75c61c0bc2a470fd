//! Machines that move to another process while they run.

use std::fs::File;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::harness::{Session, by_length, host, is_listening, one_host};
use crate::{Place, busy_linux, chain, random};

/// Moves the machine to a new process, which is returned with what the verb has printed; it has other ends of the host.
fn try_to_move(place: &Place, name: &str, arguments: &[&str]) -> Result<(Session, String), String> {
    let socket = place.at("move");
    let mut target =
        place.rvmm(&["restore", "--listen"]).path("unix:", &socket, "").args(arguments).start();
    while target.is_running() && !is_listening(&socket) {
        thread::yield_now();
    }
    let to = format!("unix:{}", socket.display());
    match place.verb(&["migrate", name, &to], None) {
        Ok(text) => Ok((target, text)),
        Err(error) => {
            assert_ne!(target.exit_code(), 0, "nobody has come: {error}");
            Err(error)
        }
    }
}

/// As [`try_to_move`]; the old process ends.
fn move_on(place: &Place, session: &mut Session, name: &str, arguments: &[&str]) -> Session {
    let (target, text) = try_to_move(place, name, arguments).expect("it moves");
    assert!(text.starts_with(&format!("Moved {name}: ")), "{text}");
    assert_eq!(session.exit_code(), 0);
    target
}

/// Runs the guest, and moves it at random moments. Returns what it has printed in all, and how often it has moved.
fn moved_at_random(irqchip: &str, cpus: &str) -> (String, usize) {
    let place = Place::new();
    let mut session = chain(&place, irqchip, cpus).start();
    session.expect("started");
    let (mut printed, mut moves) = (String::new(), 0);
    while moves < by_length(50, 6) {
        let socket = place.at("rvmm").join(format!("chain-{}.sock", session.pid()));
        while session.is_running() && !is_listening(&socket) {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(random(300)));
        let moved = try_to_move(&place, "chain", &[]);
        assert_eq!(session.exit_code(), 0);
        printed.push_str(&String::from_utf8(session.output()).expect("text"));
        match moved {
            Ok((target, _)) => {
                moves += 1;
                session = target;
            }
            // It has ended by itself.
            Err(_) if printed.contains("PASS") => return (printed, moves),
            Err(error) => panic!("it cannot move: {error}"),
        }
    }
    assert_eq!(session.exit_code(), 0);
    printed.push_str(&String::from_utf8(session.output()).expect("text"));
    (printed, moves)
}

#[test]
fn a_guest_that_moves_at_random_moments_ends_with_the_same_result() {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        for cpus in ["1", "4"] {
            let mut undisturbed = chain(&Place::new(), irqchip, cpus).start();
            assert_eq!(undisturbed.exit_code(), 0);
            let expected = String::from_utf8(undisturbed.output()).expect("text");
            let (printed, moves) = moved_at_random(irqchip, cpus);
            assert_eq!(printed, expected, "after {moves} moves");
            assert!(moves > 0, "it has never moved");
            println!("{irqchip}, {cpus} harts: moved {moves} times");
        }
    }
}

/// The image over the disk, which grows while the guest writes.
fn overlay(place: &Place) -> PathBuf {
    place.at("disk.qcow2")
}

#[test]
fn linux_that_writes_to_its_disk_moves_with_it_and_to_an_image_as_well() {
    let Some(host) = one_host("aia") else { return };
    let place = Place::new();
    let mut session = busy_linux(&place, host.irqchips[0]);
    session.send("kept=42\n");
    session.ask("echo $kept");
    // From here on it writes an image, whose tables move with it.
    place.save(&mut session, "one", "saved");
    let image = format!("vda={}", overlay(&place).display());
    session = place.restore("saved", &["--disk-overlay", &image]);
    for _ in 0..by_length(10, 3) {
        session = move_on(&place, &mut session, "one", &[]);
        let before = session.ask("wc -l </rounds").to_owned();
        assert_eq!(session.ask("echo $kept; nproc"), "42\n2\n");
        let done = before.lines().next().expect("a number");
        session.ask(&format!(
            "until [ $(wc -l </rounds) -gt $(({done}+1)) ]; do sleep 1; done; echo on"
        ));
    }
    assert_eq!(session.ask("cat /wrong 2>&1 | grep -c x"), "0\n");
    let complaints =
        session.ask("dmesg -r | grep -E '^<[0-4]>' | grep -iE 'stall|lockup|hung|error|bug'");
    assert_eq!(complaints, "");
    assert!(File::open(overlay(&place)).is_ok());
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}
