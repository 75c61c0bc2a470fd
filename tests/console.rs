//! Ring 2: the guest's console from outside: pipes, terminals, files, sockets; slow readers, no readers, slow guests.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use harness::{Launch, STOP_LIMIT, Session, checksum, flood, guest, host, rvmm};
use rustix::process::Signal;
use rustix::termios::{LocalModes, Termios};

/// A small machine with this guest and a command line for it.
fn machine(name: &str, cmdline: &str) -> Launch {
    rvmm(&["--mem", "64M", "--no-initrd", "--cmdline", cmdline]).kernel(&guest(name))
}

/// What the guest `flood` says all in all.
fn whole_flood(count: usize) -> Vec<u8> {
    let text = flood(count);
    let sum = checksum(&text);
    let mut all = format!("flood: {count} bytes begin\n").into_bytes();
    all.extend(&text);
    all.extend(format!("\nflood: {count} bytes, checksum {sum:#018x}\nPASS flood\n").into_bytes());
    all
}

/// Fails with the place of the first difference, not with megabytes of text.
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

/// Reads as a program does that has better things to do, to the end.
fn read_slowly(mut pipe: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 100_000];
    // Long enough for every buffer on the way to fill up.
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
    if host().is_none() {
        return;
    }
    // More than every buffer on the way takes; a byte through the UART is two exits.
    for (via, count) in [("uart", 130_000), ("dbcn", 10_000_000)] {
        let arguments = format!("bytes={count} via={via}");
        let mut session = machine("flood", &arguments).no_input().unread().start();
        let output = read_slowly(session.take_output());
        assert_same(&output, &whole_flood(count));
        assert_eq!(session.exit_code(), 0);
    }
}

#[test]
fn a_reader_that_goes_away_costs_output_and_nothing_else() {
    if host().is_none() {
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
fn a_guest_that_reads_slowly_gets_all_that_was_typed() {
    if host().is_none() {
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
fn input_that_comes_before_the_guest_listens_is_kept() {
    if host().is_none() {
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
fn a_null_console_swallows_everything() {
    if host().is_none() {
        return;
    }
    let mut session = machine("hello", "").args(&["--serial", "null"]).start();
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.output(), b"");
}

#[test]
fn a_file_gets_the_output_and_nothing_of_what_it_held() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("console");
    fs::write(&file, "old ".repeat(10_000)).expect("a file");
    let mut session = machine("flood", "bytes=100000").path("--serial=file:", &file, "").start();
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.output(), b"");
    assert_same(&fs::read(&file).expect("the file"), &whole_flood(100_000));
}

#[test]
fn a_full_disk_costs_output_and_nothing_else() {
    if host().is_none() {
        return;
    }
    let mut session =
        machine("flood", "bytes=100000").args(&["--serial", "file:/dev/full"]).start();
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
    if host().is_none() {
        return;
    }
    let mut session = machine("sbi", "input").args(&["--serial", "pty"]).start();
    let path = announced_pty(&session);
    // Not as the controlling terminal of the tests, which would end with it.
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let terminal = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("the pty");
    let mut terminal = fs::File::from(terminal);
    // A person's terminal program would do that: no echo, no editing.
    let mut settings = rustix::termios::tcgetattr(&terminal).expect("tcgetattr");
    settings.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &settings)
        .expect("tcsetattr");
    read_until(&mut terminal, "sbi: waiting for 12 bytes");
    terminal.write_all(b"hello, world").expect("the pty");
    read_until(&mut terminal, "sbi: read 'hello, world'");
    read_until(&mut terminal, "PASS sbi input");
    terminal.write_all(b"x").expect("the pty");
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.output(), b"");
}

/// Reads byte by byte until `text` has come.
fn read_until(stream: &mut impl Read, text: &str) {
    let mut seen = Vec::new();
    while !seen.ends_with(text.as_bytes()) {
        let mut byte = [0];
        let count = stream.read(&mut byte).expect("a stream");
        assert_eq!(count, 1, "the end, before {text:?}: {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("a listening socket");
    stream.set_read_timeout(Some(harness::LIMIT)).expect("a time-out");
    stream
}

#[test]
fn a_socket_carries_the_console_for_one_client_after_the_other() {
    if host().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("console");
    let mut session = machine("reboot", "").path("--serial=unix:", &socket, "").start();
    while !socket.exists() {
        assert!(session.is_running(), "rvmm ended: {}", session.errors());
        thread::yield_now();
    }
    let mut first = connect(&socket);
    first.write_all(b"c").expect("the socket");
    read_until(&mut first, "reboot: boot\n");
    read_until(&mut first, "reboot: what next?\n");
    drop(first);
    let mut second = connect(&socket);
    second.write_all(b"c").expect("the socket");
    read_until(&mut second, "reboot: what next?\n");
    second.write_all(b"p").expect("the socket");
    assert_eq!(session.exit_code(), 0);
    assert!(!socket.exists(), "the socket is still there");
}

fn is_raw(settings: &Termios) -> bool {
    !settings.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
}

/// Starts the guest on a terminal, lets `act` bring it to its end, and looks at the terminal's settings.
fn on_terminal(launch: Launch, wait_for: &str, code: i32, act: impl FnOnce(&mut Session)) {
    // A machine that never starts leaves the settings alone; they are compared with those from before the start.
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
    if host().is_none() {
        return;
    }
    on_terminal(machine("wfi", "").args(&["--cpus", "4"]), "harts asleep", 0, |session| {
        session.send("\x01x");
    });
}

#[test]
fn the_terminal_is_restored_after_a_signal() {
    if host().is_none() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        on_terminal(machine("wfi", ""), "harts asleep", 0, |session| session.signal(signal));
    }
}

#[test]
fn the_terminal_is_restored_after_poweroff_and_after_a_stop() {
    if host().is_none() {
        return;
    }
    on_terminal(machine("reboot", ""), "what next?", 0, |session| session.send("p"));
    on_terminal(machine("reboot", ""), "what next?", 3, |session| session.send("f"));
}

#[test]
fn ctrl_a_h_shows_the_keys_and_ctrl_a_ctrl_a_reaches_the_guest() {
    if host().is_none() {
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
    if host().is_none() {
        return;
    }
    let mut session = machine("hello", "").no_input().start();
    session.expect("PASS hello\n");
    assert_eq!(session.exit_code(), 0);
}
