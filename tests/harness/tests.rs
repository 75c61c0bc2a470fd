//! Tests of the harness with programs that every machine has.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
use rustix::process::Signal;

use super::harness::{LIMIT, Launch, checksum, is_listening};

fn shell(script: &str) -> Launch {
    Launch::new("/bin/sh").args(&["-c", script])
}

#[test]
fn output_is_found_once_and_in_order() {
    let mut session = shell("echo one two; echo three; exit 7").start();
    assert_eq!(session.expect("two"), "one ");
    assert_eq!(session.expect("three"), "\n");
    assert_eq!(session.exit_code(), 7);
    assert_eq!(session.output(), b"one two\nthree\n");
}

#[test]
fn a_program_that_ends_without_the_text_fails_the_test_at_once() {
    let session = shell("echo something else").start();
    assert_eq!(session.says_within("some", LIMIT).as_deref(), Some(""));
    assert_eq!(session.says_within("the words", LIMIT), None);
    assert!(catch_unwind(AssertUnwindSafe(|| session.expect("the words"))).is_err());
}

#[test]
fn input_and_its_end_arrive() {
    let mut session = shell("read line; echo got $line; cat >/dev/null; echo end").start();
    session.send("a line\n");
    session.expect("got a line\n");
    assert!(session.is_running());
    session.close_input();
    session.expect("end\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn standard_error_is_kept_apart() {
    let mut session = shell("echo complaint >&2; echo output").no_input().start();
    session.expect_error("complaint");
    session.expect("output");
    assert_eq!(session.exit_code(), 0);
    assert_eq!(session.all_errors(), "complaint\n");
}

#[test]
fn a_program_on_a_terminal_detects_it_and_its_changes_are_visible() {
    let mut session =
        shell("test -t 0 && stty -ixany && echo changed; read line; stty ixany; echo $line")
            .on_terminal()
            .start();
    let at_start = format!("{:?}", session.settings_at_start());
    session.expect("changed\r\n");
    assert_ne!(at_start, format!("{:?}", session.settings()));
    session.send("typed\n");
    session.expect("typed\r\ntyped");
    assert_eq!(session.exit_code(), 0);
    assert_eq!(at_start, format!("{:?}", session.settings()));
}

#[test]
fn a_signal_reaches_the_program() {
    let mut session =
        shell("trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 1; done").start();
    session.expect("ready");
    session.signal(Signal::TERM);
    session.expect("caught");
    assert_eq!(session.exit_code(), 3);
}

#[test]
fn the_checksum_is_fnv_1a() {
    assert_eq!(checksum(b""), 0xcbf2_9ce4_8422_2325);
    assert_eq!(checksum(b"foobar"), 0x8594_4171_f739_67e8);
}

#[test]
fn a_socket_is_connected_to_once_it_listens() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    assert!(!is_listening(&path));
    // Bound and visible, but not listening.
    let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddrUnix::new(&path).expect("a short path")).expect("a file for it");
    assert!(path.exists() && !is_listening(&path));
    let mut session = shell("read line").start();
    thread::scope(|scope| {
        let connected = scope.spawn(|| session.connect(&path));
        listen(&socket, 1).expect("it can");
        assert!(is_listening(&path));
        connected.join().expect("a stream");
    });
}
