//! Streams between a guest and its host: the guest's side, which is the test program itself, started there.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::thread;

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::harness::{self, checksum, flood};

/// Ports on either side.
pub(crate) const GUEST_PORT: u32 = 52;
pub(crate) const HOST_PORT: u32 = 1234;
/// Streams in each direction.
pub(crate) const STREAMS: usize = 200;

/// Bytes that go through a stream and back: of some more than either side takes in one go.
pub(crate) fn bytes(stream: usize) -> usize {
    if stream.is_multiple_of(20) { 300_000 } else { 20_000 }
}

/// Sends everything back that comes, until the other side has said all. Gives how much it was.
fn echo(mut stream: impl Read + Write) -> io::Result<usize> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)?;
    Ok(all.len())
}

/// Sends back what comes in [`STREAMS`] streams. Whoever connects gives up after two seconds, and tries again: the stream that
/// was given up comes all the same, with nothing in it.
pub(crate) fn serve<S: Read + Write>(mut next: impl FnMut() -> S) {
    let mut served = 0;
    while served < STREAMS {
        let is_whole = echo(next()).is_ok_and(|count| count > 0);
        served += usize::from(is_whole);
    }
}

/// Connects, however long the other side takes to answer.
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

/// Takes streams from the host, then opens some to it; all that is sent comes back. Only inside a guest.
pub(crate) fn run_inside_the_guest() {
    if std::env::var_os("RVMM_INSIDE_THE_GUEST").is_none() {
        return harness::skip("it is the guest's side of the other test");
    }
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
