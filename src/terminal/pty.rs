//! A pseudo terminal: rvmm has the master, and terminal programs open and close the slave by its path.
//!
//! poll(2) reports a master whose slave is closed as hung up all the time, and no event when the slave is opened again. So
//! the master is only polled while the slave is open, and inotify(7) reports when it is opened. While it is closed, output is
//! dropped and counted, as on a serial line without a peer.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl, inotify};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use rvmm_devices::{ConsoleBackend, Port, Ports};

/// The console of `--serial pty`.
#[derive(Debug)]
pub(super) struct Pty {
    master: OwnedFd,
    /// Readable when the slave has been opened.
    openings: OwnedFd,
    is_open: bool,
}

impl Pty {
    /// Creates a pair whose slave is in raw mode, and returns the path of the slave.
    ///
    /// # Errors
    /// The error of the system call, for example without devpts, or at the limit of inotify instances.
    pub(super) fn open() -> io::Result<(Self, PathBuf)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
        let path = PathBuf::from(OsString::from_vec(ptsname(&master, Vec::new())?.into_bytes()));

        // The default until a program changes it: no echo of what the guest prints, no line editing.
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut mode = tcgetattr(&slave)?;
        mode.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &mode)?;
        // poll(2) reports a hang-up only after the slave has been closed once.
        drop(slave);

        let openings =
            inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&openings, &path, inotify::WatchFlags::OPEN)?;
        Ok((Self { master, openings, is_open: false }, path))
    }

    fn update(&mut self) {
        self.is_open = !is_hung_up(&self.master);
    }
}

impl ConsoleBackend for Pty {
    fn ports(&self) -> Ports {
        let port = if self.is_open { Port::Poll(self.master.as_raw_fd()) } else { Port::Closed };
        Ports { input: port, output: port, event_fd: Some(self.openings.as_raw_fd()) }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match rustix::io::read(&self.master, buffer) {
            // All input before the hang-up has been read by now.
            Err(rustix::io::Errno::IO) | Ok(0) => {
                self.is_open = false;
                Ok(0)
            }
            result => Ok(result?),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match rustix::io::write(&self.master, bytes) {
            Ok(taken) if taken > 0 => Ok(taken),
            // The buffer stays full if the slave was closed meanwhile.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {
                self.update();
                let kind = if self.is_open {
                    io::ErrorKind::WouldBlock
                } else {
                    io::ErrorKind::BrokenPipe
                };
                Err(kind.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(&self.master).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    fn process_event(&mut self) {
        // All events are of the same kind, IN_OPEN. The slave may have been closed since.
        let mut events = [0; 1024];
        while rustix::io::read(&self.openings, &mut events).is_ok_and(|count| count > 0) {}
        self.update();
    }
}

/// True if the other end of `fd` is closed.
pub(super) fn is_hung_up(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::empty())];
    let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    let [fd] = fds;
    ready.is_ok() && fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use super::*;

    fn attach(path: &Path) -> File {
        // If the test is a session leader, the terminal must not become its controlling one, whose hang-up would end the test.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
    }

    fn has_attention(pty: &Pty) -> bool {
        let mut fds = [PollFd::new(&pty.openings, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn a_user_may_disconnect_and_connect_again() {
        let (mut pty, path) = Pty::open().unwrap();
        assert_eq!(pty.ports().output, Port::Closed, "closed at first");
        assert!(!has_attention(&pty));
        for round in [b"first ", b"second"] {
            let mut user = attach(&path);
            assert!(has_attention(&pty));
            pty.process_event();
            assert!(!has_attention(&pty), "the event is consumed");
            assert!(matches!(pty.ports().input, Port::Poll(_)));

            let mut buffer = [0; 64];
            assert_eq!(pty.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert_eq!(pty.write(b"out\n").unwrap(), 4);
            user.read_exact(&mut buffer[..4]).unwrap();
            assert_eq!(&buffer[..4], b"out\n", "no carriage return is added");
            user.write_all(round).unwrap();
            drop(user);
            assert_eq!(pty.read(&mut buffer).unwrap(), 6, "input before the hang-up is read");
            assert_eq!(&buffer[..6], round);
            assert_eq!(pty.read(&mut buffer).unwrap(), 0);
            assert_eq!(pty.ports().input, Port::Closed);
            assert_eq!(pty.ports().output, Port::Closed);
        }
    }

    #[test]
    fn a_user_who_does_not_read_throttles_the_output_and_one_who_disconnects_does_not() {
        let (mut pty, path) = Pty::open().unwrap();
        let user = attach(&path);
        pty.process_event();
        let refusal = |pty: &mut Pty| {
            loop {
                if let Err(error) = pty.write(&[b'x'; 512]) {
                    break error.kind();
                }
            }
        };
        assert_eq!(refusal(&mut pty), io::ErrorKind::WouldBlock);
        assert!(matches!(pty.ports().output, Port::Poll(_)));
        drop(user);
        assert_eq!(refusal(&mut pty), io::ErrorKind::BrokenPipe);
        assert_eq!(pty.ports().output, Port::Closed);
    }

    #[test]
    fn a_user_who_disconnects_at_once_does_not_count_as_connected() {
        let (mut pty, path) = Pty::open().unwrap();
        drop(attach(&path));
        pty.process_event();
        assert_eq!(pty.ports().output, Port::Closed);
    }
}
