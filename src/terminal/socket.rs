//! A Unix socket that rvmm listens on: one client at a time, and the next one after it has disconnected.
//!
//! [`Acceptor`] manages the socket's file, and backs off while the host has no descriptors left.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use log::info;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rvmm_devices::{ConsoleBackend, Port, Ports};

use super::pty::is_hung_up;
use crate::error::Error;
use crate::sockets::Acceptor;

/// Backlog of the socket.
const BACKLOG: i32 = 4;

/// Sent to a second client before it is disconnected.
const IN_USE: &[u8] = b"rvmm: this console is in use by another client\r\n";

/// The console of `--serial unix:PATH`.
#[derive(Debug)]
pub(super) struct Socket {
    acceptor: Acceptor,
    client: Option<TerminalClient>,
    /// The last client's input is not read yet: the acceptor is not polled.
    is_paused: bool,
}

#[derive(Debug)]
struct TerminalClient {
    stream: OwnedFd,
    /// No more input; the client may still read.
    input_has_ended: bool,
    /// No more output; there may still be input.
    output_has_ended: bool,
}

impl Socket {
    /// Creates the socket and its file.
    ///
    /// # Errors
    /// As [`Acceptor::open`].
    pub(super) fn listen(path: &Path) -> Result<Self, Error> {
        Ok(Self { acceptor: Acceptor::open(path, BACKLOG)?, client: None, is_paused: false })
    }

    /// Accepts the next connection, or refuses it if there is a client.
    fn accept(&mut self) {
        let Some(stream) = self.acceptor.accept() else { return };
        if self.client.is_some() {
            let _ = send(&stream, IN_USE, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            return;
        }
        info!("A client connected to the console at {}", self.acceptor);
        self.client =
            Some(TerminalClient { stream, input_has_ended: false, output_has_ended: false });
    }

    fn disconnect(&mut self) {
        info!("The client of the console at {} disconnected", self.acceptor);
        self.client = None;
        self.is_paused = false;
    }
}

impl TerminalClient {
    fn has_unread_input(&self) -> bool {
        !self.input_has_ended && ioctl_fionread(&self.stream).is_ok_and(|bytes| bytes > 0)
    }
}

impl ConsoleBackend for Socket {
    fn ports(&self) -> Ports {
        let port = |end: fn(&TerminalClient) -> bool| match &self.client {
            Some(client) if !end(client) => Port::Poll(client.stream.as_raw_fd()),
            _ => Port::Closed,
        };
        Ports {
            input: port(|client| client.input_has_ended),
            output: port(|client| client.output_has_ended),
            event_fd: (!self.is_paused).then(|| self.acceptor.fd()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(client) = self.client.as_mut() else { return Ok(0) };
        let result = recv(&client.stream, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count);
        match result {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(count) if count > 0 => {}
            // It may be half-closed: `echo poweroff | nc -U PATH` still reads.
            Ok(_) if !is_hung_up(&client.stream) => client.input_has_ended = true,
            _ => {
                self.disconnect();
                return Ok(0);
            }
        }
        Ok(result?)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(client) = self.client.as_mut() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let result = send(&client.stream, bytes, flags).map_err(io::Error::from);
        // The next read sees the hang-up, too, and drops the client.
        client.output_has_ended |= result.as_ref().is_err_and(super::is_hang_up);
        result
    }

    fn process_event(&mut self) {
        match &self.client {
            // The next client waits until the guest has read all input of the last one.
            Some(client) if is_hung_up(&client.stream) && client.has_unread_input() => {
                self.is_paused = true
            }
            // The next call accepts: one call must not close a descriptor and open another one.
            Some(client) if is_hung_up(&client.stream) => self.disconnect(),
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
            socket.process_event();
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
    fn a_second_user_is_refused_with_a_message() {
        let (_folder, path, mut socket) = new_socket();
        let mut first = UnixStream::connect(&path).unwrap();
        socket.process_event();
        let mut second = UnixStream::connect(&path).unwrap();
        socket.process_event();
        let mut reply = Vec::new();
        second.read_to_end(&mut reply).unwrap();
        assert_eq!(reply, IN_USE);
        first.write_all(b"still here").unwrap();
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 10);
    }

    #[test]
    fn a_user_who_only_stops_typing_still_gets_the_output() {
        let (_folder, path, mut socket) = new_socket();
        let mut user = UnixStream::connect(&path).unwrap();
        socket.process_event();
        user.shutdown(Shutdown::Write).unwrap();
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0);
        assert_eq!(socket.ports().input, Port::Closed);
        assert_eq!(socket.write(b"answer").unwrap(), 6);
        let mut buffer = [0; 16];
        assert_eq!(user.read(&mut buffer).unwrap(), 6);

        // No polled descriptor reports that the client has disconnected.
        drop(user);
        let _next = UnixStream::connect(&path).unwrap();
        socket.process_event();
        assert!(is_free(&socket), "the old client is dropped first, and the next call accepts");
        socket.process_event();
        assert!(!is_free(&socket));
    }

    #[test]
    fn a_write_detects_that_the_user_has_disconnected_and_a_read_drops_it() {
        let (_folder, path, mut socket) = new_socket();
        let user = UnixStream::connect(&path).unwrap();
        socket.process_event();
        drop(user);
        assert_eq!(socket.write(b"lost").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(socket.ports().output, Port::Closed);
        assert!(matches!(socket.ports().input, Port::Poll(_)), "closing is left to the I/O thread");
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0);
        assert_eq!(socket.ports().input, Port::Closed);
    }

    #[test]
    fn input_of_the_last_user_is_read_before_the_next_one_is_accepted() {
        let (_folder, path, mut socket) = new_socket();
        let mut first = UnixStream::connect(&path).unwrap();
        socket.process_event();
        first.write_all(b"poweroff").unwrap();
        drop(first);
        let _second = UnixStream::connect(&path).unwrap();
        socket.process_event();
        assert_eq!(socket.ports().event_fd, None, "the acceptor is not polled meanwhile");
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 8);
        assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0);
        assert!(socket.ports().event_fd.is_some());
        socket.process_event();
        assert!(!is_free(&socket));
    }

    #[test]
    fn a_user_who_does_not_read_throttles_the_output() {
        let (_folder, path, mut socket) = new_socket();
        let _user = UnixStream::connect(&path).unwrap();
        socket.process_event();
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
    fn a_file_that_was_replaced_is_not_removed() {
        let (_folder, path, socket) = new_socket();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "not ours").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(&path).unwrap(), "not ours");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_one_in_use_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let listening = UnixListener::bind(&path).unwrap();
        let refusal = Socket::listen(&path).unwrap_err().to_string();
        assert!(refusal.contains("another program listens on it"), "{refusal}");
        drop(listening);
        assert!(path.exists(), "std leaves the file");
        let mut socket = Socket::listen(&path).unwrap();
        let _user = UnixStream::connect(&path).unwrap();
        socket.process_event();
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
            assert!(refusal.contains("is not a socket (remove it"), "{refusal}");
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
