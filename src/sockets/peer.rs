//! The process at the other end of a Unix socket (`SO_PEERCRED` of unix(7)).
//!
//! rustix has this call as well, but its type for a process ID is never 0, which the kernel returns for a process that this one cannot
//! see: of another namespace of process IDs.
#![expect(unsafe_code, reason = "the socket option has no sound safe interface")]

use std::os::fd::{AsFd, AsRawFd};

use rustix::process::Pid;

/// The process that has created the other end, or listened there; `None` if it cannot be seen from here, or the socket is no Unix socket.
pub(crate) fn peer_process(socket: impl AsFd) -> Option<Pid> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: the kernel writes at most `len` bytes to `peer`, any of which are valid integers, and the new length to `len`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    // For other sockets the kernel returns the process 0, too.
    (result == 0).then(|| Pid::from_raw(peer.pid)).flatten()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_process_is_known_at_a_unix_socket_only() {
        let (near, _far) = UnixStream::pair().unwrap();
        let own = Pid::from_raw(i32::try_from(std::process::id()).unwrap());
        assert_eq!(peer_process(&near), own);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(peer_process(&stream), None);
        assert_eq!(peer_process(tempfile::tempfile().unwrap()), None);
    }
}
