//! Tests of all kinds of consoles.

use std::fs;
use std::sync::Arc;

use rvmm_devices::Port;

use super::*;

fn never() -> StopRequest {
    Arc::new(|| panic!("unexpected stop request"))
}

fn refusal(serial: &Endpoint) -> String {
    open(serial, never()).unwrap_err().to_string()
}

#[test]
fn a_file_gets_the_output_and_is_truncated_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    fs::write(&path, "old and longer").unwrap();
    let mut console = open(&Endpoint::File(path.as_path().into()), never()).unwrap();
    assert_eq!(console.backend.ports().input, Port::Closed);
    assert_eq!(console.backend.write(b"new").unwrap(), 3);
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
}

#[test]
fn a_file_that_cannot_be_written_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let text = refusal(&Endpoint::File(folder.path().into()));
    assert!(text.contains("Cannot open") && text.contains("irectory"), "{text}");
    let text = refusal(&Endpoint::File(folder.path().join("no/such/folder").into()));
    assert!(text.contains("no/such/folder"), "{text}");
}

#[test]
fn a_fifo_without_a_reader_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let text = refusal(&Endpoint::File(path.as_path().into()));
    assert!(text.contains("start the reader first"), "{text}");

    let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).clone();
    let _reader = options.open(&path).unwrap();
    let mut console = open(&Endpoint::File(path.into()), never()).unwrap();
    assert!(matches!(console.backend.ports().output, Port::Poll(_)));
    assert_eq!(console.backend.write(b"read").unwrap(), 4);
}

#[test]
fn a_pseudo_terminal_has_a_path() {
    let console = open(&Endpoint::Pty, never()).unwrap();
    let path = console.pty.as_ref().unwrap();
    assert!(path.starts_with("/dev/pts"), "{console:?}");
    assert!(path.exists());
}

#[test]
fn a_null_console_discards_the_output() {
    let mut console = open(&Endpoint::Null, never()).unwrap();
    assert_eq!(console.backend.write(b"lost").unwrap(), 4);
    assert_eq!(console.backend.ports().input, Port::Closed);
}

#[test]
fn an_embedder_may_bring_descriptors_or_a_writer() {
    let (mut far, near) = io::pipe().unwrap();
    let mut console = Console::from_fds(None, Some(near.into())).unwrap();
    console.backend.write(b"through a pipe").unwrap();
    drop(console);
    let mut text = String::new();
    io::Read::read_to_string(&mut far, &mut text).unwrap();
    assert_eq!(text, "through a pipe");
    assert!(Console::from_writer(Box::new(io::sink())).is_ok());
}
