//! Ring 2: the guest's console on pipes, terminals, files, sockets; with slow readers, no readers, slow guests.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use harness::{Launch, STOP_LIMIT, Session, checksum, flood, guest, one_host, rvmm};
use rustix::process::Signal;
use rustix::termios::{LocalModes, Termios};

/// A small machine with this guest and a command line for it.
fn machine(name: &str, cmdline: &str) -> Launch {
    rvmm(&["--mem", "64M", "--no-initrd", "--cmdline", cmdline]).kernel(&guest(name))
}

/// The complete output of the guest `flood`.
fn whole_flood(count: usize) -> Vec<u8> {
    let text = flood(count);
    let sum = checksum(&text);
    let mut all = format!("flood: {count} bytes begin\n").into_bytes();
    all.extend(&text);
    all.extend(format!("\nflood: {count} bytes, checksum {sum:#018x}\nPASS flood\n").into_bytes());
    all
}

/// Fails with the position of the first difference, not with megabytes of text.
fn assert_same(got: &[u8], expected: &[u8]) {
    let same = got.iter().zip(expected).take_while(|(a, b)| a == b).count();
    assert!(
        got == expected,
        "{} bytes, expected {}; the first {same} are right, then: {:?}",
        got.len(),
        expected.len(),
        String::from_utf8_lossy(&got[same..got.len().min(same + 200)])
    );
}

/// Reads slowly to the end.
fn read_slowly(mut pipe: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 100_000];
    // Long enough to fill every buffer in between.
    thread::sleep(Duration::from_millis(500));
    loop {
        match pipe.read(&mut buffer).expect("a pipe") {
            0 => return all,
            count => all.extend(&buffer[..count]),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_slow_reader_gets_ten_megabytes_byte_for_byte() {
    if one_host("aia").is_none() {
        return;
    }
    // More than all buffers in between hold; each byte through the UART is two exits.
    for (via, count) in [("uart", 130_000), ("dbcn", 10_000_000)] {
        let arguments = format!("bytes={count} via={via}");
        let mut session = machine("flood", &arguments).no_input().unread().start();
        let output = read_slowly(session.take_output());
        assert_same(&output, &whole_flood(count));
        assert_eq!(session.exit_code(), 0);
    }
}

#[test]
fn a_reader_that_closes_loses_output_and_nothing_else() {
    if one_host("aia").is_none() {
        return;
    }
    for via in ["uart", "dbcn"] {
        let arguments = format!("bytes=100000 via={via}");
        let mut session = machine("flood", &arguments).no_input().unread().start();
        let mut pipe = session.take_output();
        let mut start = vec![0; 5_000];
        pipe.read_exact(&mut start).expect("the beginning");
        assert_same(&start, &whole_flood(100_000)[..5_000]);
        drop(pipe);
        assert_eq!(session.exit_code(), 0);
    }
}

#[test]
fn a_guest_that_reads_slowly_gets_all_input() {
    if one_host("aia").is_none() {
        return;
    }
    let typed = flood(100_000);
    let sum = checksum(&typed);
    let mut session = machine("flood", "read=100000 bytes=1").start();
    session.expect("flood: reading 100000 bytes\n");
    let feeder = session.feed(typed);
    session.expect(&format!("flood: read 100000 bytes, checksum {sum:#018x}\n"));
    feeder.join().expect("all is typed");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn input_before_the_guest_reads_is_kept() {
    if one_host("aia").is_none() {
        return;
    }
    let mut session = machine("flood", "read=20000 bytes=1").start();
    let typed = flood(20_000);
    let sum = checksum(&typed);
    session.feed(typed).join().expect("a pipe takes this much at once");
    session.expect(&format!("flood: read 20000 bytes, checksum {sum:#018x}\n"));
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_null_console_discards_everything() {
    if one_host("aia").is_none() {
        return;
    }
    let mut session = machine("hello", "").args(&["--serial", "null"]).start();
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.output(), b"");
}

#[test]
fn a_file_gets_the_output_and_loses_its_old_contents() {
    if one_host("aia").is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("console");
    fs::write(&file, "old ".repeat(10_000)).expect("a file");
    let mut session = machine("flood", "bytes=20000").path("--serial=file:", &file, "").start();
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.output(), b"");
    assert_same(&fs::read(&file).expect("the file"), &whole_flood(20_000));
}

#[test]
fn a_full_disk_loses_output_and_nothing_else() {
    if one_host("aia").is_none() {
        return;
    }
    let mut session = machine("flood", "bytes=20000").args(&["--serial", "file:/dev/full"]).start();
    assert_eq!(session.exit_code(), 0);
}

/// The path of the pseudo terminal that rvmm announces.
fn announced_pty(session: &Session) -> PathBuf {
    session.expect_error("/dev/pts/");
    let number = session.expect_error("\n");
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    PathBuf::from(format!("/dev/pts/{digits}"))
}

#[test]
fn a_pty_carries_the_console_both_ways() {
    if one_host("aia").is_none() {
        return;
    }
    let mut session = machine("reboot", "").args(&["--serial", "pty"]).start();
    let path = announced_pty(&session);
    // Not as the controlling terminal of the tests: closing it would end them.
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let terminal = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("the pty");
    let mut terminal = fs::File::from(terminal);
    // As a terminal program does: no echo, no line editing.
    let mut settings = rustix::termios::tcgetattr(&terminal).expect("tcgetattr");
    settings.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &settings)
        .expect("tcsetattr");
    terminal.write_all(b"c").expect("the pty");
    assert!(comes(&mut terminal, "reboot: boot\n"));
    power_off(&mut terminal);
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.output(), b"");
}

/// Sends `reboot`'s power-off key until the guest has ended: input during a reboot is lost.
fn power_off(stream: &mut (impl Read + Write)) {
    // Fails once it has ended.
    while stream.write_all(b"p").is_ok() && comes(stream, "reboot: what next?\n") {}
}

/// Reads byte by byte until `text`; false if the other end closes before that.
fn comes(stream: &mut impl Read, text: &str) -> bool {
    let mut seen = Vec::new();
    while !seen.ends_with(text.as_bytes()) {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) => seen.push(byte[0]),
            // The errors of a socket and of a terminal whose other end is closed.
            Ok(_) => return false,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return false,
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return false,
            Err(error) => panic!("{error}, before {text:?}: {}", String::from_utf8_lossy(&seen)),
        }
    }
    true
}

#[test]
fn a_socket_carries_the_console_for_one_client_after_the_other() {
    if one_host("aia").is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("console");
    let mut session = machine("reboot", "").path("--serial=unix:", &socket, "").start();
    let mut first = session.connect(&socket);
    first.write_all(b"c").expect("the socket");
    assert!(comes(&mut first, "reboot: boot\n") && comes(&mut first, "reboot: what next?\n"));
    drop(first);
    power_off(&mut session.connect(&socket));
    assert_eq!(session.exit_code(), 0);
    assert!(!socket.exists(), "the socket is still there");
}

fn is_raw(settings: &Termios) -> bool {
    !settings.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
}

/// Starts the guest on a terminal, ends it with `act`, and checks the terminal's settings.
fn on_terminal(launch: Launch, wait_for: &str, code: i32, act: impl FnOnce(&mut Session)) {
    // The settings are compared with those from before the start, which a machine that never starts does not change.
    let mut session = launch.on_terminal().start();
    session.expect(wait_for);
    assert!(is_raw(&session.settings()), "the terminal is not raw while the guest runs");
    act(&mut session);
    assert_eq!(session.exit_code_within(STOP_LIMIT), code);
    assert!(!is_raw(&session.settings()), "the terminal is left raw");
    assert_eq!(
        format!("{:?}", session.settings()),
        format!("{:?}", session.settings_at_start()),
        "the terminal's settings"
    );
}

#[test]
fn ctrl_a_x_ends_a_machine_asleep_and_the_terminal_is_restored() {
    if one_host("aia").is_none() {
        return;
    }
    on_terminal(machine("wfi", "").args(&["--cpus", "4"]), "harts asleep", 0, |session| {
        session.send("\x01x");
    });
}

#[test]
fn the_terminal_is_restored_after_a_signal() {
    if one_host("aia").is_none() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        on_terminal(machine("wfi", ""), "harts asleep", 0, |session| session.signal(signal));
    }
}

#[test]
fn the_terminal_is_restored_after_poweroff_and_after_a_stop() {
    if one_host("aia").is_none() {
        return;
    }
    on_terminal(machine("reboot", ""), "what next?", 0, |session| session.send("p"));
    on_terminal(machine("reboot", ""), "what next?", 3, |session| session.send("f"));
}

#[test]
fn ctrl_a_h_shows_the_keys_and_ctrl_a_ctrl_a_reaches_the_guest() {
    if one_host("aia").is_none() {
        return;
    }
    on_terminal(machine("sbi", "input"), "waiting for 12 bytes", 0, |session| {
        session.send("\x01h");
        session.expect("Ctrl-A x");
        session.send("\x01\x01hello, worl");
        session.expect("sbi: read '\x01hello, worl'");
        session.expect("PASS sbi input");
        session.send("x");
    });
}

#[test]
fn a_machine_without_any_input_runs_to_its_end() {
    if one_host("aia").is_none() {
        return;
    }
    let mut session = machine("hello", "").no_input().start();
    session.expect("PASS hello\n");
    assert_eq!(session.exit_code(), 0);
}
