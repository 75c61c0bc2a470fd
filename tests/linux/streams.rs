//! Streams between a guest and its host: the guest's side, which is the same test of the same binary, started there.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::thread;

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::harness::{Session, checksum, flood};

/// Ports on either side.
pub(crate) const GUEST_PORT: u32 = 52;
pub(crate) const HOST_PORT: u32 = 1234;
/// Streams in each direction.
pub(crate) const STREAMS: usize = 200;

/// Number of bytes sent through a stream and back: for some streams, more than either side reads at once.
pub(crate) fn bytes(stream: usize) -> usize {
    if stream.is_multiple_of(20) { 300_000 } else { 20_000 }
}

/// Echoes all bytes until the other side has shut down; returns their number.
fn echo(mut stream: impl Read + Write) -> io::Result<usize> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)?;
    Ok(all.len())
}

/// Echoes [`STREAMS`] streams. A client times out after two seconds and tries again: the abandoned stream is still accepted,
/// and is empty.
pub(crate) fn serve<S: Read + Write>(mut next: impl FnMut() -> S) {
    let mut served = 0;
    while served < STREAMS {
        let is_whole = echo(next()).is_ok_and(|count| count > 0);
        served += usize::from(is_whole);
    }
}

/// Connects without a time-out.
pub(crate) fn connect(cid: u32, port: u32) -> VsockStream {
    loop {
        match VsockStream::connect_with_cid_port(cid, port) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            result => return result.expect("the other side listens"),
        }
    }
}

/// Sends bytes and expects the same ones back.
pub(crate) fn send_and_take_back(mut stream: VsockStream, sent: &[u8]) {
    let mut reader = stream.try_clone().expect("a copy");
    let back = thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).map(|_| all)
    });
    stream.write_all(sent).expect("the other side reads");
    stream.shutdown(Shutdown::Write).expect("the end");
    let back = back.join().expect("a thread").expect("the other side's answer");
    assert_eq!(checksum(&back), checksum(sent));
}

/// Environment variable of the test inside a guest.
const INSIDE: &str = "RVMM_INSIDE_THE_GUEST";

/// Starts this binary, which is `/inside` in the guest, in the guest's shell: the guest's side of the calling test.
pub(crate) fn start_inside(session: &mut Session) {
    let thread = thread::current();
    let test = thread.name().expect("a test's thread has its name");
    session.send(&format!("chmod +x /inside; {INSIDE}=1 /inside --exact {test} --nocapture\n"));
    session.expect("the guest listens\r\n");
}

/// Waits for the end of the test of [`start_inside`] and checks that exactly that one ran and passed.
pub(crate) fn passed_inside(session: &Session) {
    session.expect("the guest has all of it\r\n");
    session.expect("test result: ok. 1 passed; 0 failed");
    session.expect("# ");
}

/// True inside a guest, in the process of [`start_inside`].
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The guest's side: accepts streams from the host, then opens some to it; all data is echoed.
pub(crate) fn guests_side() {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, GUEST_PORT).expect("bind");
    println!("the guest listens");
    serve(|| {
        let (stream, from) = listener.accept().expect("accept");
        assert_eq!(from.cid(), VMADDR_CID_HOST);
        stream
    });
    for number in 0..STREAMS {
        send_and_take_back(connect(VMADDR_CID_HOST, HOST_PORT), &flood(bytes(number)));
    }
    let refused = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, 4321);
    assert!(refused.is_err(), "nobody listens there");
    println!("the guest has all of it");
}
