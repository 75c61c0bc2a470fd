//! Non-blocking operations on the Unix socket of a stream.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

/// True if the peer has closed both directions.
pub(super) fn is_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    let [fd] = fds;
    ready.is_ok() && fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Writes as many bytes as the socket accepts now, which may be none.
pub(super) fn write(stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map_err(io::Error::from) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(0)
        }
        result => result,
    }
}
