//! A Unix socket that rvmm listens on: one user at a time, and when that one leaves, the next.
//!
//! The socket's file is the business of [`Acceptor`], and so is a host that has nothing left to let somebody in with.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use log::info;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rvmm_devices::{ConsoleBackend, Port, Ports};

use super::pty::is_hung_up;
use crate::error::Error;
use crate::host::Acceptor;

/// Users who wait while another is being answered.
const BACKLOG: i32 = 4;

/// What a second user gets to read.
const IN_USE: &[u8] = b"rvmm: somebody else is using this console\r\n";

/// The console of `--serial unix:PATH`.
#[derive(Debug)]
pub(super) struct Socket {
    acceptor: Acceptor,
    user: Option<User>,
    /// The user's place is not free yet: the acceptor is not looked at.
    is_deaf: bool,
}

#[derive(Debug)]
struct User {
    stream: OwnedFd,
    /// No more input; the user may still read.
    input_has_ended: bool,
    /// No more output; what was typed may still be there.
    output_has_ended: bool,
}

impl Socket {
    /// Makes the socket and its file.
    ///
    /// # Errors
    /// As [`Acceptor::open`].
    pub(super) fn listen(path: &Path) -> Result<Self, Error> {
        Ok(Self { acceptor: Acceptor::open(path, BACKLOG)?, user: None, is_deaf: false })
    }

    /// Lets the next one in, as user or only to hear that the place is taken.
    fn accept(&mut self) {
        let Some(stream) = self.acceptor.admit() else { return };
        if self.user.is_some() {
            let _ = send(&stream, IN_USE, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            return;
        }
        info!("A user connected to the console at {}", self.acceptor.path().display());
        self.user = Some(User { stream, input_has_ended: false, output_has_ended: false });
    }

    fn leave(&mut self) {
        info!("The user of the console at {} left", self.acceptor.path().display());
        self.user = None;
        self.is_deaf = false;
    }
}

impl User {
    fn has_unread_input(&self) -> bool {
        !self.input_has_ended && ioctl_fionread(&self.stream).is_ok_and(|bytes| bytes > 0)
    }
}

impl ConsoleBackend for Socket {
    fn ports(&self) -> Ports {
        let port = |end: fn(&User) -> bool| match &self.user {
            Some(user) if !end(user) => Port::Poll(user.stream.as_raw_fd()),
            _ => Port::Closed,
        };
        Ports {
            input: port(|user| user.input_has_ended),
            output: port(|user| user.output_has_ended),
            attention: (!self.is_deaf).then(|| self.acceptor.fd()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(user) = self.user.as_mut() else { return Ok(0) };
        let result = recv(&user.stream, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count);
        match result {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(count) if count > 0 => {}
            // Only half of it may be closed: `echo poweroff | nc -U PATH` still wants to read.
            Ok(_) if !is_hung_up(&user.stream) => user.input_has_ended = true,
            _ => {
                self.leave();
                return Ok(0);
            }
        }
        Ok(result?)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(user) = self.user.as_mut() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let result = send(&user.stream, bytes, flags).map_err(io::Error::from);
        // Whoever reads sees the end too, and closes.
        user.output_has_ended |= result.as_ref().is_err_and(super::is_hang_up);
        result
    }

    fn attend(&mut self) {
        match &self.user {
            // The next one waits until the guest has read all that the last one typed.
            Some(user) if is_hung_up(&user.stream) && user.has_unread_input() => {
                self.is_deaf = true
            }
            // The next call lets somebody in: none may close one and open one.
            Some(user) if is_hung_up(&user.stream) => self.leave(),
            _ => self.accept(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;

    use super::*;

    fn new_socket() -> (tempfile::TempDir, PathBuf, Socket) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let socket = Socket::listen(&path).unwrap();
        (folder, path, socket)
    }

    fn is_free(socket: &Socket) -> bool {
        socket.ports().output == Port::Closed
    }

    #[test]
    fn one_user_after_the_other_is_served() {
        let (_folder, path, mut socket) = new_socket();
        assert!(is_free(&socket));
        for _ in 0..2 {
            let mut user = UnixStream::connect(&path).unwrap();
            socket.attend();
            assert_eq!(socket.write(b"out").unwrap(), 3);
            let mut buffer = [0; 16];
            assert_eq!(user.read(&mut buffer).unwrap(), 3);
            assert_eq!(socket.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            user.write_all(b"typed").unwrap();
            drop(user);
            assert_eq!(socket.read(&mut buffer).unwrap(), 5);
            assert_eq!(socket.read(&mut buffer).unwrap(), 0);
            assert!(is_free(&socket));
        }
    }

    #[test]
    fn a_second_user_is_told_and_sent_away() {
        let (_folder, path, mut socket) = new_socket();
        let mut first = UnixStream::connect(&path).unwrap();
        socket.attend();
        let mut second = UnixStream::connect(&path).unwrap();
        socket.attend();
        let mut told = Vec::new();
        second.read_to_end(&mut told).unwrap();
        assert_eq!(told, IN_USE);
        first.write_all(b"still here").unwrap();
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 10);
    }

    #[test]
    fn a_user_who_only_stops_typing_still_gets_the_output() {
        let (_folder, path, mut socket) = new_socket();
        let mut user = UnixStream::connect(&path).unwrap();
        socket.attend();
        user.shutdown(Shutdown::Write).unwrap();
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0);
        assert_eq!(socket.ports().input, Port::Closed);
        assert_eq!(socket.write(b"answer").unwrap(), 6);
        let mut buffer = [0; 16];
        assert_eq!(user.read(&mut buffer).unwrap(), 6);

        // Gone without another word; nothing is watched that could tell.
        drop(user);
        let _next = UnixStream::connect(&path).unwrap();
        socket.attend();
        assert!(is_free(&socket), "the place is cleared first, and the next call fills it");
        socket.attend();
        assert!(!is_free(&socket));
    }

    #[test]
    fn a_user_who_left_is_noticed_by_a_write_and_forgotten_by_a_read() {
        let (_folder, path, mut socket) = new_socket();
        let user = UnixStream::connect(&path).unwrap();
        socket.attend();
        drop(user);
        assert_eq!(socket.write(b"lost").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(socket.ports().output, Port::Closed);
        assert!(matches!(socket.ports().input, Port::Poll(_)), "closing is left to the I/O thread");
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0);
        assert_eq!(socket.ports().input, Port::Closed);
    }

    #[test]
    fn what_the_last_user_typed_is_read_before_the_next_one_is_let_in() {
        let (_folder, path, mut socket) = new_socket();
        let mut first = UnixStream::connect(&path).unwrap();
        socket.attend();
        first.write_all(b"poweroff").unwrap();
        drop(first);
        let _second = UnixStream::connect(&path).unwrap();
        socket.attend();
        assert_eq!(socket.ports().attention, None, "nobody asks again and again meanwhile");
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 8);
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0);
        assert!(socket.ports().attention.is_some());
        socket.attend();
        assert!(!is_free(&socket));
    }

    #[test]
    fn a_user_who_does_not_read_holds_back() {
        let (_folder, path, mut socket) = new_socket();
        let _user = UnixStream::connect(&path).unwrap();
        socket.attend();
        let refusal = loop {
            if let Err(error) = socket.write(&[b'x'; 4096]) {
                break error.kind();
            }
        };
        assert_eq!(refusal, io::ErrorKind::WouldBlock);
        assert!(!is_free(&socket));
    }

    #[test]
    fn the_file_is_the_owners_alone_and_removed_at_the_end() {
        let (_folder, path, socket) = new_socket();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_somebody_elses_by_now_is_left_alone() {
        let (_folder, path, socket) = new_socket();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "not ours").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(&path).unwrap(), "not ours");
    }

    #[test]
    fn a_dead_socket_is_taken_over_and_a_living_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let living = UnixListener::bind(&path).unwrap();
        let refusal = Socket::listen(&path).unwrap_err().to_string();
        assert!(refusal.contains("another program listens there"), "{refusal}");
        drop(living);
        assert!(path.exists(), "std leaves the file");
        let mut socket = Socket::listen(&path).unwrap();
        let _user = UnixStream::connect(&path).unwrap();
        socket.attend();
        assert!(!is_free(&socket));
    }

    #[test]
    fn what_is_no_socket_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("nowhere"), &link).unwrap();
        for path in [&file, &link] {
            let refusal = Socket::listen(path).unwrap_err().to_string();
            assert!(refusal.contains("remove what is there"), "{refusal}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn a_path_where_no_file_can_be_made_is_a_mistake_of_the_user() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [folder.path().join("nowhere/console"), file.join("console"), file] {
            let refusal = Socket::listen(&path).unwrap_err();
            assert_eq!(refusal.exit_code(), crate::error::EXIT_USAGE, "{refusal}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_with_its_length() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(103)));
        let refusal = Socket::listen(&path).unwrap_err().to_string();
        assert!(refusal.contains("108 bytes") && refusal.contains("107"), "{refusal}");
    }
}
