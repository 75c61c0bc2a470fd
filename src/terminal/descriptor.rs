//! Non-blocking access to a descriptor without changing its flags: other processes that share standard output with rvmm must not
//! find it non-blocking.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, Stat, fcntl_getfl, fstat, major, minor, open};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::termios::isatty;
use rvmm_devices::Port;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Bytes that a pipe takes without blocking when poll(2) reports it as writable (`PIPE_BUF` on Linux).
const PIPE_BUF: usize = 4096;

/// One direction of a console, on a descriptor of any kind.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    method: Method,
}

/// The method of not blocking on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    /// Its open file description is non-blocking: it was passed so, or opened anew for rvmm alone.
    Nonblocking,
    /// A socket: each call has MSG_DONTWAIT.
    Socket,
    /// A file or a device like `/dev/null`: never blocks, and epoll refuses it.
    Unpollable,
    /// Blocking and shared: poll(2) first, then no more than `chunk` bytes at a time.
    Polled {
        /// Bytes that fit for certain when poll(2) reports the descriptor as writable.
        chunk: usize,
    },
}

/// The direction of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the guest.
    Input,
    /// From the guest.
    Output,
}

impl Descriptor {
    /// Chooses the method for `fd`.
    ///
    /// # Errors
    /// `IsADirectory` for a folder; else the error of the system call.
    pub(super) fn new(fd: OwnedFd, direction: Direction) -> io::Result<Self> {
        let stat = fstat(&fd)?;
        let method = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return Err(io::ErrorKind::IsADirectory.into()),
            FileType::Socket => Method::Socket,
            _ if !is_pollable(fd.as_fd())? => Method::Unpollable,
            kind => {
                // Also if it is non-blocking: processes that share it may change that at any time.
                if let Some(own) = reopen(&fd, &stat, direction) {
                    return Ok(Self { fd: own, method: Method::Nonblocking });
                }
                if fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK) {
                    Method::Nonblocking
                } else {
                    Method::Polled { chunk: if kind == FileType::Fifo { PIPE_BUF } else { 1 } }
                }
            }
        };
        Ok(Self { fd, method })
    }

    /// How the I/O loop waits for it.
    pub(super) fn port(&self) -> Port {
        match self.method {
            Method::Unpollable => Port::Always,
            _ => Port::Poll(self.fd.as_raw_fd()),
        }
    }

    /// Reads the available bytes; see [`rvmm_devices::ConsoleBackend::read`].
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.method {
            Method::Socket => Ok(recv(&self.fd, buffer, RecvFlags::DONTWAIT)?.0),
            Method::Polled { .. } if !self.is_ready(PollFlags::IN) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => Ok(rustix::io::read(&self.fd, buffer)?),
        }
    }

    /// Writes the bytes that fit; see [`rvmm_devices::ConsoleBackend::write`].
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.method {
            Method::Socket => Ok(send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?),
            Method::Polled { chunk } => self.write_polled(bytes, chunk),
            Method::Nonblocking | Method::Unpollable => Ok(rustix::io::write(&self.fd, bytes)?),
        }
    }

    fn write_polled(&self, bytes: &[u8], chunk: usize) -> io::Result<usize> {
        let mut done = 0;
        for piece in bytes.chunks(chunk) {
            if !self.is_ready(PollFlags::OUT) {
                break;
            }
            match rustix::io::write(&self.fd, piece) {
                Ok(written) => done += written,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        if done == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(done) }
    }

    /// True if a call would not block now: there are bytes, room, or an error.
    fn is_ready(&self, direction: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.fd, direction)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }
}

/// Opens a terminal or a pipe a second time, so that `O_NONBLOCK` affects only rvmm. `None` if that is not possible (another
/// user's terminal, no /proc) or would open another file.
fn reopen(fd: &OwnedFd, stat: &Stat, direction: Direction) -> Option<OwnedFd> {
    let is_pipe = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
    // Opening the master of a pseudo terminal would create a new pair.
    let is_master = major(stat.st_rdev) == 5 && minor(stat.st_rdev) == 2;
    if !is_pipe && (is_master || !isatty(fd)) {
        return None;
    }
    let access = match direction {
        Direction::Input => OFlags::RDONLY,
        Direction::Output => OFlags::WRONLY,
    };
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let own = open(path, flags, Mode::empty()).ok()?;
    let same = fstat(&own).is_ok_and(|own| (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino));
    same.then_some(own)
}

/// True if epoll can watch a descriptor; it refuses files and devices that are always ready (epoll_ctl(2), EPERM).
///
/// # Errors
/// Other errors of epoll.
fn is_pollable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let event = EpollEvent::new(EventSet::IN, 0);
    match Epoll::new()?.ctl(ControlOperation::Add, fd.as_raw_fd(), event) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        result => result.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::pipe::pipe;
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

    use super::*;

    #[test]
    fn epoll_takes_pipes_and_no_files() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(is_pollable(reader.as_fd()).unwrap());
        assert!(!is_pollable(tempfile::tempfile().unwrap().as_fd()).unwrap());
        assert!(!is_pollable(File::open("/dev/null").unwrap().as_fd()).unwrap());
    }

    fn kind<T>(result: io::Result<T>) -> io::ErrorKind {
        result.map(|_| ()).unwrap_err().kind()
    }

    /// Writes until a write fails and returns the number of bytes taken.
    fn fill(output: &Descriptor) -> usize {
        let mut total = 0;
        loop {
            match output.write(&[b'x'; 1000]) {
                Ok(taken) => total += taken,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return total;
                }
            }
        }
    }

    fn is_nonblocking(fd: impl AsFd) -> bool {
        fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK)
    }

    #[test]
    fn a_full_pipe_refuses_and_stays_blocking_for_others() {
        let (reader, writer) = pipe().unwrap();
        let output = Descriptor::new(writer.try_clone().unwrap(), Direction::Output).unwrap();
        assert_eq!(output.method, Method::Nonblocking);
        assert!(fill(&output) >= PIPE_BUF);
        assert!(!is_nonblocking(&writer) && !is_nonblocking(&reader));
        drop(reader);
        assert_eq!(kind(output.write(b"x")), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn an_empty_pipe_has_nothing_yet_and_a_closed_one_has_ended() {
        let (reader, writer) = pipe().unwrap();
        let input = Descriptor::new(reader, Direction::Input).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(kind(input.read(&mut buffer)), io::ErrorKind::WouldBlock);
        File::from(writer).write_all(b"abc").unwrap();
        assert_eq!(input.read(&mut buffer).unwrap(), 3);
        assert_eq!(input.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_descriptor_that_cannot_be_opened_again_is_polled_first() {
        let (reader, writer) = pipe().unwrap();
        let output = Descriptor { fd: writer, method: Method::Polled { chunk: PIPE_BUF } };
        let taken = fill(&output);
        assert!(taken >= PIPE_BUF);
        let input = Descriptor { fd: reader, method: Method::Polled { chunk: PIPE_BUF } };
        let mut buffer = vec![0; 1 << 20];
        let mut read = 0;
        while read < taken {
            read += input.read(&mut buffer).unwrap();
        }
        assert_eq!(kind(input.read(&mut buffer)), io::ErrorKind::WouldBlock);
        drop(input);
        assert_eq!(kind(output.write(b"x")), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_terminal_that_nobody_reads_refuses_and_stays_blocking_for_others() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let mut mode = tcgetattr(&slave).unwrap();
        mode.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &mode).unwrap();
        let output = Descriptor::new(slave.try_clone().unwrap(), Direction::Output).unwrap();
        assert!(fill(&output) > 0);
        assert!(!is_nonblocking(&slave));
        // The master is never opened anew: that would be another terminal.
        let master = Descriptor::new(master, Direction::Output).unwrap();
        assert_eq!(master.method, Method::Polled { chunk: 1 });
        assert!(fill(&master) > 0);
    }

    #[test]
    fn a_socket_whose_peer_does_not_read_refuses() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let shared = near.try_clone().unwrap();
        let stream = Descriptor::new(near.into(), Direction::Output).unwrap();
        assert_eq!(stream.method, Method::Socket);
        assert!(fill(&stream) > 0);
        assert!(!is_nonblocking(&shared));
        let mut buffer = [0; 8];
        assert_eq!(kind(stream.read(&mut buffer)), io::ErrorKind::WouldBlock);
        far.write_all(b"hi").unwrap();
        assert_eq!(stream.read(&mut buffer).unwrap(), 2);
        drop(far);
        assert_eq!(kind(stream.write(b"x")), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn files_and_null_devices_are_always_ready() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before ").unwrap();
        let output = Descriptor::new(file.try_clone().unwrap().into(), Direction::Output).unwrap();
        assert_eq!(output.port(), Port::Always);
        assert_eq!(output.write(b"after").unwrap(), 5);
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before after", "the file offset is shared with the original descriptor");

        let null =
            Descriptor::new(File::open("/dev/null").unwrap().into(), Direction::Input).unwrap();
        assert_eq!(null.port(), Port::Always);
        assert_eq!(null.read(&mut [0; 8]).unwrap(), 0);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let full = Descriptor::new(full.into(), Direction::Output).unwrap();
        assert_eq!(kind(full.write(b"x")), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_folder_is_refused() {
        let folder = File::open("/").unwrap();
        let refused = Descriptor::new(folder.into(), Direction::Input);
        assert_eq!(kind(refused), io::ErrorKind::IsADirectory);
    }
}
